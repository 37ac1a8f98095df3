"""Aligned-MTL on real data: two overlaid handwritten digits, three tasks, one of which drowns the others.

Every image shows two of scikit-learn's 8x8 digits, the right one shifted by four pixels and laid over the left one. One
trunk serves three heads: which digit is left, which is right (cross entropies), and what the two looked like apart
(squared error, summed over the pixels, so that its gradient is one to two orders of magnitude larger). The same network
is trained three times from the same seeds, on the same batches, with the same optimizer and learning rate: on the plain
sum of the losses, with `fastmtl.AlignedMTL`, and with the same method as one would write it in plain PyTorch.

    python examples/digits.py --help        # or `make demo`
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmtl import AlignedMTL, eigh, ops

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: pip install 'fastmtl-torch[demo]'") from error

SIDE, SHIFT, CLASSES, WIDTH = 8, 4, 10, 256
# Of 1e-3, 3e-3, 1e-2, 2e-2 and 4e-2 the learning rate at which the plain sum reconstructs best; Aligned-MTL classifies
# better, and reconstructs worse, at each of them.
BATCH, LEARNING_RATE = 128, 1e-2
# Plain PyTorch's float32 Gram loses about κ² eps32 of the gradient, and κ starts out near 100.
AGREE = 1e-2
WARMUP = 3
METHOD = AlignedMTL()

Rows = list[tuple[Tensor, ...]]


class Batch(NamedTuple):
    """Overlaid images [N, 96], the left and the right digit [N], and both images apart [N, 128]."""

    image: Tensor
    left: Tensor
    right: Tensor
    apart: Tensor


class Digits:
    """Pairs of digits drawn at random; no digit that the test pairs are made of is ever trained on."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        digits = load_digits()
        self._images = torch.tensor(digits.images, dtype=torch.float32)
        self._labels = torch.tensor(digits.target)
        self._train, self._test = torch.randperm(len(self._images), generator=self._generator).split((1297, 500))
        train = self._images[self._train]
        self._mean, self._std = train.mean(), train.std()

    def train(self) -> Batch:
        """A fresh training batch."""
        return self._pairs(self._train, BATCH)

    def test(self) -> Batch:
        """Test pairs."""
        return self._pairs(self._test, 4000)

    def _pairs(self, pool: Tensor, n: int) -> Batch:
        left, right = pool[torch.randint(len(pool), (2, n), generator=self._generator)]
        apart = self._images[torch.stack((left, right), 1)]
        image = F.pad(apart[:, 0], (0, SHIFT)).maximum(F.pad(apart[:, 1], (SHIFT, 0)))
        image, apart = (((x - self._mean) / self._std).flatten(1) for x in (image, apart))
        return Batch(image, self._labels[left], self._labels[right], apart)


class Net(nn.Module):
    """A two-layer trunk that all three tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        pixels = SIDE * (SIDE + SHIFT)
        self.trunk = nn.Sequential(nn.Linear(pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in (CLASSES, CLASSES, 2 * SIDE * SIDE))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits of the left and of the right digit, and both images apart."""
        features = self.trunk(image)
        return [head(features) for head in self.heads]

    def losses(self, batch: Batch) -> list[Tensor]:
        """Cross entropies of the left and of the right digit, and the squared error summed over pixels."""
        left, right, apart = self(batch.image)
        error = (apart - batch.apart).square().sum(1).mean()
        return [F.cross_entropy(left, batch.left), F.cross_entropy(right, batch.right), error]


def uniform_step(net: Net, losses: list[Tensor]) -> None:
    """What a training loop without multi-task optimization does."""
    torch.stack(losses).sum().backward()


def fastmtl_step(net: Net, losses: list[Tensor]) -> Tensor:
    """The same with fastmtl; returns the kept eigenvalues of the Gram, descending."""
    info = METHOD.backward(losses, shared=net.trunk.parameters())
    assert info.eigenvalues is not None  # which Aligned-MTL has
    return info.eigenvalues[: info.rank]


def pure_step(net: Net, losses: list[Tensor]) -> Tensor:
    """Aligned-MTL as one would write it without fastmtl: collect the task gradients, align them, write back."""
    shared = list(net.trunk.parameters())
    rows: Rows = []
    for loss, head in zip(losses, net.heads, strict=True):
        private = list(head.parameters())
        gradients = torch.autograd.grad(loss, shared + private, retain_graph=loss is not losses[-1])
        rows.append(gradients[: len(shared)])
        for p, g in zip(private, gradients[len(shared) :], strict=True):
            p.grad = g
    aligned, lam = pure_align(rows)
    for p, g in zip(shared, aligned, strict=True):
        p.grad = g
    return lam


def pure_align(rows: Rows) -> tuple[list[Tensor], Tensor]:
    """The aligned gradient per parameter and the kept eigenvalues, descending, in plain PyTorch."""
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    lam, V = torch.linalg.eigh(G @ G.T)
    kept = lam > lam[-1] * len(G) * torch.finfo(G.dtype).eps
    lam, V = lam[kept], V[:, kept]
    alpha = lam[0].sqrt() * (V @ (lam.rsqrt() * V.mean(0)))
    pieces = torch.mv(G.T, alpha).split([g.numel() for g in rows[0]])
    return [piece.view_as(g) for piece, g in zip(pieces, rows[0], strict=True)], lam.flip(0)


Step = Callable[[Net, list[Tensor]], Tensor | None]
STEPS: dict[str, Step] = {"uniform": uniform_step, "fastmtl": fastmtl_step, "pure": pure_step}
TITLES = {"uniform": "uniform sum", "fastmtl": "Aligned-MTL,\nfastmtl", "pure": "Aligned-MTL,\npure PyTorch"}
COLOURS = {"uniform": "#d1495b", "fastmtl": "#00798c"}


class Run(NamedTuple):
    """One training run.

    Attributes:
        losses: the three training losses at every step.
        kappa: condition number of the trunk's gradient matrix, by the step at which it was looked at.
        left: accuracy on the left digit of held-out pairs, percent.
        right: accuracy on the right digit, percent.
        error: mean squared error of the reconstruction per pixel; a pixel's variance is 1.
    """

    losses: list[list[float]]
    kappa: dict[int, float]
    left: float
    right: float
    error: float

    @property
    def mean_kappa(self) -> float:
        """The geometric mean: κ spans orders of magnitude."""
        return statistics.geometric_mean(self.kappa.values())


def train(name: str, seed: int, steps: int, advance: Callable[[], object] = lambda: None) -> Run:
    """Trains one network with `STEPS[name]`; networks and batches depend on `seed` alone."""
    digits = Digits(seed)
    test = digits.test()
    net = _network(seed)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    history: list[list[float]] = []
    kappa: dict[int, float] = {}
    for step in range(steps):
        losses = net.losses(digits.train())
        history.append([loss.item() for loss in losses])
        # The plain sum never sees the task gradients: they are computed beside it now and then, to be looked at only.
        looked = _spectrum(task_gradients(net, losses)) if name == "uniform" and step % 10 == 0 else None
        optimizer.zero_grad()
        lam = STEPS[name](net, losses)
        lam = looked if lam is None else lam
        if lam is not None:
            kappa[step] = (lam[0] / lam[-1]).sqrt().item()
        optimizer.step()
        schedule.step()
        advance()
    with torch.no_grad():
        left, right, apart = net(test.image)
        return Run(
            losses=history,
            kappa=kappa,
            left=_accuracy(left, test.left),
            right=_accuracy(right, test.right),
            error=F.mse_loss(apart, test.apart).item(),
        )


def task_gradients(net: Net, losses: list[Tensor]) -> Rows:
    """One row of trunk gradients per loss; the graph is kept."""
    return [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in losses]


def first_gradients(seed: int) -> dict[str, list[Tensor]]:
    """What each way of computing it says the first aligned gradient of the trunk is; `exact` is a float64 SVD."""
    net, batch = _network(seed), Digits(seed).train()
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in task_gradients(net, net.losses(batch))]).double()
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    found = {"exact": [sigma[-1] * (U.mean(0) @ Vh)]}
    for name in ("fastmtl", "pure"):
        net.zero_grad()
        STEPS[name](net, net.losses(batch))
        found[name] = [p.grad.clone() for p in net.trunk.parameters() if p.grad is not None]
    return found


def shortening(seed: int) -> float:
    """How many times as long as Aligned-MTL's first gradient of the trunk that of the plain sum is."""
    net = _network(seed)
    rows = task_gradients(net, net.losses(Digits(seed).train()))
    summed = [torch.stack(column).sum(0) for column in zip(*rows, strict=True)]
    lengths = (
        torch.cat([g.flatten() for g in gradients if g is not None]).norm() for gradients in (summed, METHOD(rows))
    )
    longer, shorter = lengths
    return float(longer / shorter)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over all entries."""
    x, y = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (a, b))
    return ((x - y).norm() / y.norm()).item()


def timings(rounds: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of ("step", name), a training step up to `.grad`, and ("align", name), the aggregation alone.

    All of them run in turn on the same network and batch, so that whatever else the machine does hits all alike.
    """
    net, batch = _network(0), Digits(0).train()
    rows = task_gradients(net, net.losses(batch))

    def whole(step: Step) -> None:
        net.zero_grad()
        step(net, net.losses(batch))

    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("step", name): partial(whole, step) for name, step in STEPS.items()
    }
    calls["align", "fastmtl"] = partial(METHOD, rows)
    calls["align", "pure"] = partial(pure_align, rows)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(WARMUP + rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(t[WARMUP:]) for key, t in times.items()}


def run(
    seeds: int = 3,
    steps: int = 500,
    out: Path = Path("demo.png"),
    quick: bool = False,
    results: Path | None = None,
) -> int:
    """Trains, prints the table, saves the figure and, where `results` is a path, the numbers as JSON.

    Returns:
        The exit status: 1 if fastmtl and plain PyTorch disagree about the first gradient.

    Raises:
        ValueError: fewer than one seed or two steps.
    """
    if seeds < 1 or steps < 2:
        raise ValueError(f"expected seeds >= 1 and steps >= 2, got seeds={seeds}, steps={steps}")
    if quick:
        seeds, steps = 1, min(steps, 60)
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after a minute of training
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    runs: dict[str, list[Run]] = {name: [] for name in STEPS}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=seeds * steps * len(STEPS))
        for seed in range(seeds):
            for name in STEPS:
                progress.update(bar, description=f"seed {seed}, {name}")
                runs[name].append(train(name, seed, steps, lambda: progress.advance(bar)))
        progress.update(bar, description="timing")
        ms = timings(10 if quick else 60)
    first = [first_gradients(seed) for seed in range(seeds)]
    apart = max(difference(found["pure"], found["fastmtl"]) for found in first)
    errors = [max(difference(found[name], found["exact"]) for found in first) for name in ("fastmtl", "pure")]

    runs_of = f"{seeds} seed{'s' * (seeds > 1)}, {steps} steps"
    table = Table(title=f"Two overlaid digits: {runs_of}, mean ± standard deviation")
    for title in ("", *TITLES.values()):
        table.add_column(title, justify="right" if title else "left")
    for label, field, fmt in (
        ("left digit, accuracy %", "left", ".1f"),
        ("right digit, accuracy %", "right", ".1f"),
        ("reconstruction error", "error", ".3f"),
        ("κ of the task gradients", "mean_kappa", ".0f"),
    ):
        table.add_row(label, *(_spread([getattr(r, field) for r in runs[name]], fmt) for name in STEPS))
    table.add_row("κ of what is summed", f"{statistics.fmean(r.mean_kappa for r in runs['uniform']):.0f}", "1", "1")
    table.add_row("error of the gradient", "-", *(f"{error:.0e}" for error in errors))
    table.add_row("aggregation, ms", "-", *(f"{ms['align', name]:.2f}" for name in ("fastmtl", "pure")))
    table.add_row("training step, ms", *(f"{ms['step', name]:.2f}" for name in STEPS))
    console.print(table)
    plot(runs, out)
    if results is not None:
        save(runs, results, steps)
    if ops.EXTENSIONS["_C"] is None:
        speed = "No kernels are in use, so fastmtl ran on its slow reference ops: see python -m fastmtl info."
    else:
        speed = f"fastmtl aggregates {ms['align', 'pure'] / ms['align', 'fastmtl']:.1f} x as fast as plain PyTorch."
    notes = (
        "Accuracy and squared error (a pixel's variance is 1) are on held-out digits. κ is the condition number, its",
        "geometric mean over the steps; the gradient's error is the first step's, against a float64 SVD.",
        f"The first gradients of fastmtl and of plain PyTorch are {apart:.0e} apart.",
        speed,
        f"Curves: {out}",
    )
    console.print("\n".join(notes), highlight=False, soft_wrap=True)
    if apart > AGREE:
        console.print(f"fastmtl and plain PyTorch disagree about the first gradient: {apart:.0e} > {AGREE:.0e}")
        return 1
    return 0


def save(runs: dict[str, list[Run]], path: Path, steps: int) -> None:
    """What the documentation cites (tools/docs_numbers.py): one number a seed."""
    fields = ("left", "right", "error", "mean_kappa")
    methods = {name: {field: [getattr(run, field) for run in of] for field in fields} for name, of in runs.items()}
    shorter = [shortening(seed) for seed in range(len(runs["uniform"]))]
    about = {"steps": steps, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps({"about": about, "methods": methods, "shorter": shorter}, indent=1) + "\n")


def plot(runs: dict[str, list[Run]], out: Path) -> None:
    """Loss curves and condition number over the steps: the mean over the seeds, and their range."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        losses, kappas = ([getattr(run, field) for run in runs[name]] for field in ("losses", "kappa"))
        loss = torch.tensor(losses).mT  # [seed, task, step]
        kappa = torch.tensor([list(seen.values()) for seen in kappas])
        steps, looked = torch.arange(loss.shape[-1]), torch.tensor(list(kappas[0]))
        for axis, x, y in (
            (axes[0], steps, loss[:, :2].mean(1)),
            (axes[1], steps, loss[:, 2]),
            (axes[2], looked, kappa),
        ):
            # One batch is noisy: a running (geometric, for the axis is logarithmic) mean over a fiftieth of the run.
            window = max(1, y.shape[-1] // 50)
            y = F.avg_pool1d(y.log(), window, stride=1).exp()
            x = x[window // 2 :][: y.shape[-1]]
            axis.plot(x, y.mean(0), color=colour, label=TITLES[name].replace("\n", " "))
            axis.fill_between(x, y.amin(0), y.amax(0), color=colour, alpha=0.2, linewidth=0)
    axes[2].axhline(1.0, color=COLOURS["fastmtl"], linestyle="--", label="after the alignment")
    axes[2].set_ylim(bottom=0.7)
    titles = ("Cross entropy, mean of both digits", "Reconstruction, squared error", "Condition number κ")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="training step", yscale="log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(out, dpi=150)


def _network(seed: int) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float(100.0 * (logits.argmax(1) == labels).double().mean())


def _spectrum(rows: Rows) -> Tensor:
    gram = ops.gram_rows([g for row in rows for g in row], len(rows))
    return eigh(gram)[0].flip(0)


def _spread(values: list[float], fmt: str) -> str:
    mean = format(statistics.fmean(values), fmt)
    return f"{mean} ± {format(statistics.stdev(values), fmt)}" if len(values) > 1 else mean


def _at_least(minimum: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {text}")
        return int(text)

    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains on overlaid digits, with and without Aligned-MTL.")
    parser.add_argument("--seeds", type=_at_least(1), default=3, help="training runs per method (default: %(default)s)")
    parser.add_argument("--steps", type=_at_least(2), default=500, help="training steps per run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where to save the figure (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to save the numbers of every seed")
    parser.add_argument("--quick", action="store_true", help="one seed, at most 60 steps: only to see that it runs")
    options = parser.parse_args(arguments)
    return run(seeds=options.seeds, steps=options.steps, out=options.out, quick=options.quick, results=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
