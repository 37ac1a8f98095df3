# %% [markdown]
# # Several processes: DDP and FSDP2
#
# Two processes on this machine, with gloo. On GPUs it is the same code with `nccl`, started by `torchrun`.
#
# Which gradient do you want? Without options, `fan_out` aligns on each process, and the results are averaged: a
# different, noisier direction than a single process would take on the whole batch. With `process_group=True` all
# processes use the task weights of the whole batch.

# %%
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import fastmtl

WORLD = 2
torch.set_num_threads(1)


class Model(nn.Module):
    """An encoder and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(2))

    def forward(
        self, x: Tensor, method: fastmtl.GramMethod | None = None
    ) -> tuple[list[Tensor], fastmtl.FanOut | None]:
        """Outputs; with a method from aliases of the representation, aligned over all processes."""
        h = self.encoder(x)
        if method is None:
            return [head(h) for head in self.heads], None
        hs = fastmtl.fan_out(h, tasks=2, method=method, process_group=True if dist.is_initialized() else None)
        return [head(alias) for head, alias in zip(self.heads, hs)], hs


def data() -> tuple[Tensor, Tensor]:
    """The whole batch: inputs [16, 8], targets [2, 16, 1]."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.stack([torch.sin(x[:, :1]), 20 * x[:, 1:2]])


def part(rank: int) -> tuple[Tensor, Tensor]:
    """The half of the batch that is this process's."""
    x, targets = data()
    return x[rank::WORLD], targets[:, rank::WORLD]


def losses_of(outputs: list[Tensor], targets: Tensor) -> list[Tensor]:
    """Means over the examples that are here."""
    return [mse_loss(output, y) for output, y in zip(outputs, targets)]


def gradient(model: Model) -> Tensor:
    """The encoder's, flat; put together where it is sharded."""
    grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])


# %% [markdown]
# What runs in each process is a function of its rank. The steps are those of any loop.


# %%
def upper_bound(rank: int) -> Tensor:
    """DDP, one ordinary backward, the weights of the whole batch."""
    model = DistributedDataParallel(Model())
    x, targets = part(rank)
    outputs, hs = model(x, fastmtl.AlignedMTL())
    assert hs is not None
    hs.total(losses_of(outputs, targets)).backward()
    return gradient(model.module)


def exact(rank: int) -> Tensor:
    """DDP, exact: the T gradients are averaged over the processes, in pieces, and aligned."""
    model = DistributedDataParallel(Model())
    x, targets = part(rank)
    outputs, _ = model(x)
    shared = model.module.encoder.parameters()
    fastmtl.AlignedMTL().backward(losses_of(outputs, targets), shared=shared, process_group=True)
    return gradient(model.module)


def sharded(rank: int) -> Tensor:
    """FSDP2: parameters that `fully_shard` has sharded are recognised."""
    model = Model()
    for module in (model.encoder, *model.heads, model):
        fully_shard(module)
    shared = list(model.encoder.parameters())  # before the forward, as for the optimizer
    x, targets = part(rank)
    outputs, _ = model(x)
    fastmtl.AlignedMTL().backward(losses_of(outputs, targets), shared=shared)
    return gradient(model)


# %% [markdown]
# The rest starts the processes and collects their results:

# %%
WAYS: tuple[Callable[[int], Tensor], ...] = (upper_bound, exact, sharded)


def process(rank: int, folder: str) -> None:
    """One process: every way once."""
    os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {way.__name__: way(rank) for way in WAYS}
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    children = [mp.get_context("fork").Process(target=process, args=(rank, folder)) for rank in range(WORLD)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert not any(child.exitcode for child in children)
    found = torch.load(Path(folder, "found.pt"))

# %% [markdown]
# ## The same as one process
#
# For comparison, one process on the whole batch. Both exact ways agree with it up to rounding, and so does the upper
# bound with that of one process.

# %%
x, targets = data()
model = Model()
outputs, hs = model(x, fastmtl.AlignedMTL())
assert hs is not None
hs.total(losses_of(outputs, targets)).backward()
bound = gradient(model)
model.zero_grad()
outputs, _ = model(x)
fastmtl.AlignedMTL().backward(losses_of(outputs, targets), shared=model.encoder)
whole = gradient(model)
for name, expected in (("upper_bound", bound), ("exact", whole), ("sharded", whole)):
    error = float((found[name] - expected).norm() / expected.norm())
    print(f"{name:<12} differs from one process by {error:.0e}")
    assert error < 1e-4
