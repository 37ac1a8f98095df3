# %% [markdown]
# # In a Lightning trainer
#
# There are two ways. `fan_out` works as is: `training_step` returns the total, and the trainer does the rest. For exact
# steps there is a callback, `MultiTask`: `training_step` returns the losses.

# %%
import logging
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastmtl
from fastmtl.integrations.lightning import MultiTask

STEPS = 60
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Batches of inputs [32, 8] and targets [3, 32, 1]."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(index))
        return x, torch.stack([torch.sin(2 * x[:, :1]), x[:, 1:2] * x[:, 2:3], 10 * x[:, 3:4].abs()])


class Module(pl.LightningModule):
    """An encoder and three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, for everything."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    """One epoch, with accumulation and clipping as they come with the trainer."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    return trainer


# %% [markdown]
# ## The upper bound: one ordinary backward


# %%
class UpperBound(Module):
    """`fan_out` between encoder and heads."""

    method = fastmtl.AlignedMTL()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The sum of the losses, whose backward aligns."""
        x, targets = batch
        hs = fastmtl.fan_out(self.encoder(x), tasks=3, method=self.method)
        losses = [mse_loss(head(h), y) for head, h, y in zip(self.heads, hs, targets)]
        total = hs.total(losses)
        self.log("total", total.detach())
        return total


trainer = fit(UpperBound())
print(f"{trainer.global_step} steps of the optimizer, total {float(trainer.callback_metrics['total']):.3f}")

# %% [markdown]
# ## Exact: a callback
#
# Named losses keep their names in the log: `mtl/alpha/…`, `mtl/norm/…`, `mtl/condition_number`, `mtl/conflicts`.
# Gradients of micro-batches are summed before they are aggregated.


# %%
class Exact(Module):
    """Returns its losses."""

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> dict[str, dict[str, Tensor]]:
        """The losses, by name."""
        x, targets = batch
        h = self.encoder(x)
        names = ("sine", "product", "kink")
        return {"losses": {name: mse_loss(head(h), y) for name, head, y in zip(names, self.heads, targets)}}


multi_task = MultiTask(fastmtl.AlignedMTL(), shared="encoder")
trainer = fit(Exact(), multi_task)
for name, value in sorted(trainer.callback_metrics.items()):
    print(f"{name:<22} {float(value):.3g}")
