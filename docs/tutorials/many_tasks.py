# %% [markdown]
# # Hundreds of tasks
#
# How do cost, memory and accuracy grow with the number of tasks? `python -m fastmtl scaling` answers that for the
# aggregation alone, on the machine it runs on; a few more lines answer it for a whole training step. Both run here,
# on small grids.

# %%
import csv
import time

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import mse_loss

import fastmtl
from fastmtl.__main__ import main

STEPS = 70
torch.set_num_threads(1)

# %% [markdown]
# ## The aggregation
#
# The same as on the command line:
#
#     python -m fastmtl scaling --out scaling --tasks 4:64:4 --params 1e4 --kappa 1e4 --threads 1
#
# It checks every result against a float64 reference, times it beside plain PyTorch, and leaves `scaling.json`,
# `scaling.csv` and figures in the folder. `--quick` takes a small grid of everything, and the defaults a large one.
# Theory says that time grows with T² for the Gram matrix, T³ for the weights, and T for the combination.

# %%
options = "--tasks 4:64:4 --params 1e4 --kappa 1e4 --threads 1 --rounds 5 --seconds 0.2"
main(["scaling", "--out", "scaling", *options.split()])

# %% [markdown]
# The figures are drawn from the table, which is yours to draw otherwise:

# %%
with open("scaling/scaling.csv", newline="") as file:
    rows = list(csv.DictReader(file))
print(f"{'T':>5} {'fastmtl':>9} {'plain':>9} {'Gram':>9} {'weights':>9} {'combine':>9}  ms; relative error of both")
for row in rows:
    times = [1e3 * float(row[f"seconds_{what}"]) for what in ("fastmtl", "pure", "gram", "weights", "combine")]
    print(
        f"{row['tasks']:>5}",
        *(f"{x:>9.3f}" for x in times),
        f" {float(row['error_fastmtl']):.0e} {float(row['error_pure'] or 'nan'):.0e}",
    )

# %% [markdown]
# ## A training step
#
# One encoder and T small heads, under three regimes: the plain sum, the upper bound with `fan_out` (one ordinary
# backward, plus T² work on the representation), and exact steps with `shared=`, which take gradients of the encoder.


# %%
def step_times(T: int) -> dict[str, float]:
    """Median milliseconds of a step: an encoder of 100 000 parameters, batches of 64."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(T))
    x, targets = torch.randn(64, 64), torch.randn(T, 64, 1)
    method = fastmtl.AlignedMTL()

    def plain() -> None:
        h = encoder(x)
        torch.stack([mse_loss(head(h), y) for head, y in zip(heads, targets)]).sum().backward()

    def bound() -> None:
        hs = fastmtl.fan_out(encoder(x), tasks=T, method=method)
        hs.total([mse_loss(head(h), y) for head, h, y in zip(heads, hs, targets)]).backward()

    def exact() -> None:
        h = encoder(x)
        method.backward([mse_loss(head(h), y) for head, y in zip(heads, targets)], shared=encoder)

    found: dict[str, list[float]] = {"plain sum": [], "fan_out": [], "shared=": []}
    for _ in range(STEPS // 10):  # interleaved, so that all see the same machine
        for name, step in zip(found, (plain, bound, exact)):
            encoder.zero_grad()
            heads.zero_grad()
            start = time.perf_counter()
            step()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


counts = (4, 16, 64, 128)
steps = {T: step_times(T) for T in counts}
print(f"{'T':>5}", *(f"{name:>11}" for name in steps[4]), " ms")
for T in counts:
    print(f"{T:>5}", *(f"{took:>11.1f}" for took in steps[T].values()))

# %%
figure = Figure(figsize=(11, 3.4), layout="constrained")
parts, whole = figure.subplots(1, 2)
tasks = [int(row["tasks"]) for row in rows]
for what, label in (("fastmtl", "whole"), ("pure", "plain PyTorch"), ("gram", "Gram"), ("weights", "weights")):
    parts.plot(tasks, [1e3 * float(row[f"seconds_{what}"]) for row in rows], "o-", label=label)
parts.set(title="aggregation of 10 000 parameters", xlabel="tasks", ylabel="ms", xscale="log", yscale="log")
parts.legend()
for name in steps[4]:
    whole.plot(counts, [steps[T][name] for T in counts], "o-", label=name)
whole.set(title="training step", xlabel="tasks", ylabel="ms", xscale="log", yscale="log")
whole.legend()
figure.savefig("many_tasks.svg")

# %% [markdown]
# `fan_out` adds little to the plain sum, while exact steps cost a backward pass of the encoder for each task.
# [Performance](../performance.md#large-t) has aggregations of up to 1024 tasks on a quiet machine.
