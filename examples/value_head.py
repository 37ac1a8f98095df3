"""A causal language model with a value head: no module stands between the two, so `attach` has no place there.

As in actor-critic fine-tuning of language models, logits and values are made from the last hidden state in the model's
own `forward`, and the language model's head is tied to its embedding. Its `forward` fans that state out: one line.

    python examples/value_head.py --help
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmtl

LENGTH, WIDTH, NEWLINE = 32, 48, 10
NAMES = ("text", "value")


class Output(NamedTuple):
    """What the model returns: logits [N, L, 256], values [N, L], and the fan-out between them and the transformer."""

    logits: Tensor
    values: Tensor
    hs: fastmtl.FanOut


class Model(nn.Module):
    """A small transformer over bytes; the weight of its embedding is that of its head, too."""

    def __init__(self, method: fastmtl.Method) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.method = method
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, ids: Tensor) -> Output:
        """[N, L] -> see `Output`."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        h = self.layers(self.embedding(ids) + self.position, mask, is_causal=True)
        hs = fastmtl.fan_out(h, NAMES, self.method)
        return Output(F.linear(hs["text"], self.embedding.weight), self.value(hs["value"])[..., 0], hs)


def losses_of(output: Output, ids: Tensor) -> dict[str, Tensor]:
    """The next byte, and the return: newlines to come, each discounted by 0.9 a byte."""
    returns = torch.zeros(ids.shape)
    for i in reversed(range(ids.shape[1] - 1)):
        returns[:, i] = (ids[:, i + 1] == NEWLINE) + 0.9 * returns[:, i + 1]
    text = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return {"text": text, "value": 10 * F.mse_loss(output.values, returns)}


def train(steps: int) -> list[dict[str, float]]:
    """The losses of each step."""
    model = Model(fastmtl.AlignedMTL(scale="rmse"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    pieces = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, LENGTH, LENGTH // 2)
    history = []
    for _ in range(steps):
        ids = pieces[torch.randint(len(pieces), (16,))]
        output = model(ids)
        losses = losses_of(output, ids)
        optimizer.zero_grad()
        output.hs.total(losses).backward()
        optimizer.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    return history


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Trains, and prints the losses of the first and the last step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    options = parser.parse_args(arguments)
    history = train(options.steps)
    for losses in (history[0], history[-1]):
        print("  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return history


if __name__ == "__main__":
    main()
