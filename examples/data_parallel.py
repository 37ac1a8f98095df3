"""Several processes, each with its part of the batch: DistributedDataParallel, or FSDP2's shards.

The gradients that are aggregated are those of the whole batch, so that all three ways below print the same losses.

    python examples/data_parallel.py --processes 2 --way ddp       # or fsdp2; or: torchrun --nproc-per-node 2 ...
    python examples/data_parallel.py --processes 1                 # one process on the whole batch
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastmtl

TASKS, BATCH = 3, 64


class Model(nn.Module):
    """An encoder and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 8] -> T outputs [N, 1]."""
        h = self.encoder(x)
        return [head(h) for head in self.heads]


def losses_of(outputs: list[Tensor], x: Tensor) -> list[Tensor]:
    """Means over what the process has of the batch; the last task's is by far the largest."""
    targets = x[:, :1].sin(), x[:, 1:2] * x[:, 2:3], 30 * x.sum(1, keepdim=True)
    return [nn.functional.mse_loss(out, y) for out, y in zip(outputs, targets, strict=True)]


def train(way: str, steps: int) -> list[float]:
    """The last step's losses, the mean over all processes; `way` is "ddp", "fsdp2", or "alone"."""
    model, method = Model(), fastmtl.AlignedMTL(scale="median")
    shared: list[Tensor] = list(model.encoder.parameters())
    group: bool | None = None  # None of one process, or of shards, which FSDP2 averages in the passes
    rank, world = (0, 1) if way == "alone" else (dist.get_rank(), dist.get_world_size())
    trained: nn.Module = model
    if way == "ddp":
        trained, group = DistributedDataParallel(model), True
    elif way == "fsdp2":
        for part in (model.encoder, *model.heads, model):
            fully_shard(part)
        shared = list(model.encoder.parameters())  # taken before the forward, as for the optimizer
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(BATCH, 8, generator=generator).chunk(world)[rank]
        losses = losses_of(trained(x), x)
        optimizer.zero_grad()
        method.backward(losses, shared=shared, process_group=group)
        optimizer.step()
    last = torch.stack(losses).detach() / world
    if world > 1:
        dist.all_reduce(last)
    return [float(loss) for loss in last]


def run(rank: int, world: int, way: str, steps: int, rendezvous: str) -> None:
    """One process of `world`; the first one prints."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    losses = train(way if world > 1 else "alone", steps)
    if rank == 0:
        print(f"{way if world > 1 else 'one process'}: losses " + " ".join(f"{loss:.4f}" for loss in losses))
    if world > 1:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Starts the processes, or is one that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--way", choices=("ddp", "fsdp2"), default="ddp", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args(arguments)
    rest = options.way, options.steps
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *rest, "env://")
    elif options.processes == 1:
        run(0, 1, *rest, "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            given = options.processes, *rest, f"file://{folder}/rendezvous"
            torch.multiprocessing.spawn(run, given, nprocs=options.processes)


if __name__ == "__main__":
    main()
