"""A loss for each example: digits of which 10 % are labelled wrongly, and what the task weights say of those.

The same network is trained from the same seed, on the same batches, with the same optimizer: on the mean gradient,
and on the gradients of single examples aggregated by UPGrad, DualProj and Aligned-MTL (`scale="rmse"`). Every step
takes the Gram matrix of the batch's gradients, from one backward pass and one that checks that examples do not mix.
Printed are, of wrong labels relative to right ones, the median weight α and the median of α times the gradient's norm.

    python examples/noisy_labels.py --help
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmtl

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"the example needs {error.name}: pip install 'fastmtl-torch[demo]'") from error

CLASSES, WIDTH, SIDE = 10, 128, 8
LEARNING_RATE = 1e-3
METHODS = {
    "mean gradient": lambda: fastmtl.Uniform(),
    "UPGrad": lambda: fastmtl.UPGrad(),
    "DualProj": lambda: fastmtl.DualProj(),
    "AlignedMTL rmse": lambda: fastmtl.AlignedMTL(scale="rmse"),
}


class Digits(NamedTuple):
    """Images [N, 64] with labels [N], some of which are wrong."""

    x: Tensor
    y: Tensor
    wrong: Tensor


class Run(NamedTuple):
    """What training has led to.

    Attributes:
        accuracy: on the test images, whose labels are right.
        memorised: the share of wrong labels that the network gives its training images.
        ratio: the median task weight α of wrong labels over that of right ones, in the last epoch.
        pull: the same of α times the gradient's norm: how much of the step is theirs.
        seconds: of training.
    """

    accuracy: float
    memorised: float
    ratio: float
    pull: float
    seconds: float


def load(share: float, seed: int) -> tuple[Digits, Digits]:
    """Training images with this share of labels replaced by others, and test images."""
    generator = torch.Generator().manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    n = len(x) * 3 // 4
    wrong = torch.rand(n, generator=generator) < share
    other = (y[:n] + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
    noisy = torch.where(wrong, other, y[:n])
    return Digits(x[:n], noisy, wrong), Digits(x[n:], y[n:], torch.zeros(len(x) - n, dtype=torch.bool))


def network() -> nn.Module:
    """A small convolutional network without batch statistics."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, SIDE, SIDE)), nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * SIDE * SIDE // 4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)),
    )


def train(method: fastmtl.Method, train_set: Digits, test_set: Digits, epochs: int, batch: int, seed: int) -> Run:
    """One network, trained on what the method makes of the gradients of single examples."""
    torch.manual_seed(seed)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    start, seen = time.perf_counter(), []
    for epoch in range(epochs):
        for rows in torch.randperm(len(train_set.x)).split(batch):
            losses = F.cross_entropy(net(train_set.x[rows]), train_set.y[rows], reduction="none")
            optimizer.zero_grad()
            info = method.backward(losses, batch_dim=0)
            optimizer.step()
            if epoch == epochs - 1:
                norms = fastmtl.diagnostics.norms(info)
                share = torch.stack([info.alpha * len(rows), info.alpha * len(rows) * norms])
                seen.append((share, train_set.wrong[rows]))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        accuracy = (net(test_set.x).argmax(1) == test_set.y).double().mean().item()
        memorised = (net(train_set.x).argmax(1) == train_set.y)[train_set.wrong].double().mean().item()
    shares, wrong = torch.cat([share for share, _ in seen], 1), torch.cat([wrong for _, wrong in seen])
    ratio, pull = (shares[:, wrong].median(1).values / shares[:, ~wrong].median(1).values).tolist()
    return Run(accuracy, memorised, ratio, pull, seconds)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    """Trains with every method and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.1, help="of labels that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    given = parser.parse_args(arguments)
    sets = load(given.share, given.seed)
    print(f"{'':18}{'accuracy':>10}{'memorised':>12}{'α':>10}{'α · norm':>10}{'seconds':>10}")
    runs = {}
    for name in given.methods:
        runs[name] = run = train(METHODS[name](), *sets, given.epochs, given.batch, given.seed)
        print(
            f"{name:18}{run.accuracy:10.3f}{run.memorised:12.2f}{run.ratio:10.2g}{run.pull:10.2g}{run.seconds:10.1f}",
            flush=True,
        )
    return runs


if __name__ == "__main__":
    main()
