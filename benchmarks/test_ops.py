"""Every op of fastmtl.ops, called directly: beside plain PyTorch, TorchJD and a collection loop where they have one.

Whole aggregations of more shapes have files of their own (test_flat, test_batched, test_ragged), and so have the task
weights of the methods (test_weighting). In place of plain PyTorch the solvers have `fastmtl.ops.reference`: nobody
writes those by hand. TorchJD's weights are compared with ours up to their scale, and as closely as its solvers go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import loops
import peers
import pure
import pytest
import torch
import workloads
from torch import Tensor

from fastmtl import ops
from fastmtl.info import tolerances
from fastmtl.ops import reference
from fastmtl.scaling.baseline import Pure, task_weights

pytest.importorskip("pytest_benchmark")

# The parameters of an MLP, 0.85 million.
SHAPES = [torch.Size(shape) for shape in ((512, 128), (512,), *(((512, 512), (512,)) * 3))]
SIZES = [shape.numel() for shape in SHAPES]
EXACT, LOOSE = 1e-6, 1e-4  # relative errors: of float64 sums, and of float32's on well-conditioned gradients


class Contest(NamedTuple):
    """What stands in one group.

    Attributes:
        calls: by name.
        error: how wrong a result is.
        tolerance: how wrong ours may be.
        loose: how wrong the others may be.
    """

    calls: Mapping[str, Callable[[], Any]]
    error: Callable[[Any], float]
    tolerance: float
    loose: float = LOOSE


def theirs(who: str, name: str, *options: Any) -> Callable[..., Any]:
    """TorchJD's aggregator or weighting of this name, where `who` asks for it."""
    if who != "torchjd":
        return torch.empty_like  # never called
    return getattr(peers.torchjd(), name)(*options)


def distance(expected: Tensor) -> Callable[[Any], float]:
    """Relative error in the 2-norm of a tensor, or of a list that is flattened."""
    return lambda result: workloads.error(result, expected)


def after(call: Callable[[], object], out: Any) -> Callable[[], Any]:
    """An op that writes into `out`, as a function that returns it."""

    def run() -> Any:
        call()
        return out

    return run


def policy(T: int) -> tuple[None, str, float, float, str]:
    """AlignedMTL's options as the ops take them."""
    return None, "min", *tolerances(T, torch.float32), "normalized"


def gram(who: str, T: int, P: int) -> Contest:
    G = workloads.matrix(T, P)
    calls = {"fastmtl": lambda: ops.gram(G), "pure": lambda: G @ G.T}
    return Contest(calls, distance(G.double() @ G.double().mT), EXACT)


def balance(who: str, T: int) -> Contest:
    M, w = workloads.grams(T)[0], torch.full((T,), 1 / T, dtype=torch.float64)
    weigh = theirs(who, "AlignedMTLWeighting")
    calls = {
        "fastmtl": lambda: ops.balance(M, *policy(T))[0],
        "pure": lambda: task_weights(M, w),
        "torchjd": lambda: weigh(M),
    }
    return Contest(calls, distance(reference.balance(M, *policy(T))[0]), EXACT, EXACT)


def align_gram(who: str, T: int) -> Contest:
    contest = balance(who, T)
    M = workloads.grams(T)[0]
    calls = {**contest.calls, "fastmtl": lambda: ops.align_gram(M, *policy(T))[0]}
    return Contest(calls, contest.error, EXACT, EXACT)


def combine(who: str, T: int, P: int) -> Contest:
    G, alpha, out = workloads.matrix(T, P), torch.rand(T, dtype=torch.float64), torch.empty(P)
    single = alpha.float()
    calls = {
        "fastmtl": after(lambda: ops.combine(G, alpha, out), out),
        "pure": lambda: torch.mv(G.T, single, out=out),
    }
    return Contest(calls, distance(alpha @ G.double()), EXACT)


def align(who: str, T: int, P: int) -> Contest:
    G, out, base, aggregate = workloads.matrix(T, P), torch.empty(P), Pure((T, P)), theirs(who, "AlignedMTL")
    calls = {
        "fastmtl": after(lambda: ops.align(G, *policy(T), out), out),
        "pure": lambda: base(G),
        "torchjd": lambda: aggregate(G),
    }
    return Contest(calls, distance(workloads.exact(G)), workloads.tolerance(T))


def eigh(who: str, B: int, T: int) -> Contest:
    M = workloads.symmetric(B, T)
    calls = {"fastmtl": lambda: ops.eigh(M), "pure": lambda: torch.linalg.eigh(M)}
    return Contest(calls, lambda result: workloads.eigen_error(M, *result), 10, 10)


def sign_drop(who: str, T: int, P: int) -> Contest:
    G, out, seed = workloads.conflicting(T, P), torch.empty(P), torch.tensor(0)
    aggregate = theirs(who, "GradDrop")
    calls = {
        "fastmtl": after(lambda: ops.sign_drop(G, seed, None, out), out),
        "pure": lambda: loops.graddrop(G),
        "torchjd": lambda: aggregate(G),
    }
    return Contest(calls, lambda result: workloads.sign_error(G, result), EXACT)


class Ragged:
    """T rows of one tensor per parameter; what plain PyTorch and a loop make of them."""

    def __init__(self, T: int) -> None:
        self.rows = workloads.ragged(T, SHAPES)
        self.grads = [g for row in self.rows for g in row]
        self.base = pure.Ragged(T, SHAPES)
        self.matrix = self.base.flatten(self.rows).clone()
        self.out = [torch.empty(shape) for shape in SHAPES]

    def loop(self, aggregate: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        """Collect, aggregate, write back."""
        return lambda: loops.slices(aggregate(loops.collected(self.rows, SIZES)), SHAPES)

    def concatenated(self, aggregate: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        """The same with everything preallocated, and views in the place of copies."""

        def run() -> list[Tensor]:
            pieces = aggregate(self.base.flatten(self.rows)).split(SIZES)
            return [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]

        return run


def gram_rows(who: str, T: int) -> Contest:
    case = Ragged(T)

    def collected() -> Tensor:
        G = loops.collected(case.rows, SIZES)
        return G @ G.T

    def concatenated() -> Tensor:
        G = case.base.flatten(case.rows)
        return G @ G.T

    calls = {"fastmtl": lambda: ops.gram_rows(case.grads, T), "pure": concatenated, "loop": collected}
    return Contest(calls, distance(case.matrix.double() @ case.matrix.double().mT), EXACT)


def combine_rows(who: str, T: int) -> Contest:
    case, alpha = Ragged(T), torch.rand(T, dtype=torch.float64)
    single, factors = alpha.float(), alpha.tolist()

    def foreach() -> list[Tensor]:
        total = torch._foreach_mul(case.rows[0], factors[0])
        for row, factor in zip(case.rows[1:], factors[1:], strict=True):
            torch._foreach_add_(total, row, alpha=factor)
        return list(total)

    calls = {
        "fastmtl": after(lambda: ops.combine_rows(case.grads, alpha, case.out), case.out),
        "pure": foreach,
        "loop": case.loop(lambda G: single @ G),
    }
    return Contest(calls, distance(alpha @ case.matrix.double()), EXACT)


def align_rows(who: str, T: int) -> Contest:
    case, aggregate = Ragged(T), theirs(who, "AlignedMTL")
    calls = {
        "fastmtl": after(lambda: ops.align_rows(case.grads, T, *policy(T), case.out), case.out),
        "pure": lambda: case.base(case.rows),
        "torchjd": case.concatenated(aggregate),
        "loop": case.loop(loops.aligned),
    }
    return Contest(calls, distance(workloads.exact(case.matrix)), workloads.tolerance(T))


def sign_drop_rows(who: str, T: int) -> Contest:
    case, seed, aggregate = Ragged(T), torch.tensor(0), theirs(who, "GradDrop")
    calls = {
        "fastmtl": after(lambda: ops.sign_drop_rows(case.grads, T, seed, None, case.out), case.out),
        "pure": case.concatenated(loops.graddrop),
        "torchjd": case.concatenated(aggregate),
        "loop": case.loop(loops.graddrop),
    }
    return Contest(calls, lambda result: workloads.sign_error(case.matrix, workloads.flatten(result)), EXACT)


def weights(op: str, peer: str, options: Callable[[int], tuple[Any, ...]], loose: float) -> Callable[..., Contest]:
    """An op from a Gram matrix to task weights, beside its reference and TorchJD's method."""

    def contest(who: str, T: int) -> Contest:
        M, known = workloads.grams(T)[0], peers.PEERS[peer]
        weigh = known.theirs(peers.torchjd(), T) if who == "torchjd" else torch.empty_like
        given = torch.linalg.cholesky(M) if known.factor else M

        def run(function: Callable[..., Any]) -> Callable[[], Tensor]:
            arguments = options(T)  # its own: GradVac's targets are a state

            def call() -> Tensor:
                result = function(M, *arguments)
                return result if isinstance(result, Tensor) else result[0]

            return call

        def of_length_one(alpha: Tensor) -> Tensor:
            return alpha / (alpha @ M @ alpha).sqrt()

        expected = of_length_one(run(getattr(reference, op))())
        calls = {
            "fastmtl": run(getattr(ops, op)),
            "reference": run(getattr(reference, op)),
            "torchjd": lambda: weigh(given),
        }
        return Contest(calls, lambda alpha: peers.difference(M, of_length_one(alpha), expected), EXACT, loose)

    return contest


TWO, THREE, SOLVER = ("fastmtl", "pure"), ("fastmtl", "pure", "torchjd"), ("fastmtl", "reference", "torchjd")
LOOP, ALL = ("fastmtl", "pure", "loop"), ("fastmtl", "pure", "torchjd", "loop")
TASKS: list[tuple[int, ...]] = [(10,), (40,)]

# op -> its problems, their sizes, and who takes part. TorchJD's MGDA stops early, and its PCGrad and GradVac draw
# orders of their own: of them no more can be asked than the same direction.
OPS: dict[str, tuple[Callable[..., Contest], list[tuple[int, ...]], tuple[str, ...]]] = {
    "gram": (gram, [(10, 1_000_000), (128, 100_000), (1024, 10_000)], TWO),
    "combine": (combine, [(10, 1_000_000), (128, 100_000), (1024, 10_000)], TWO),
    "align": (align, [(10, 1_000_000), (1024, 10_000)], THREE),
    "gram_rows": (gram_rows, [(10,)], LOOP),
    "combine_rows": (combine_rows, [(10,)], LOOP),
    "align_rows": (align_rows, [(10,)], ALL),
    "sign_drop": (sign_drop, [(10, 1_000_000)], THREE),
    "sign_drop_rows": (sign_drop_rows, [(10,)], ALL),
    "eigh": (eigh, [(512, 8), (1, 512)], TWO),
    "balance": (balance, [(10,), (40,), (128,)], THREE),
    "align_gram": (align_gram, [(10,), (40,), (128,)], THREE),
    "mgda": (weights("mgda", "MGDA", lambda T: (), 0.3), TASKS, SOLVER),
    "dual_cone": (weights("dual_cone", "UPGrad", lambda T: (None, True), 1e-2), TASKS, SOLVER),
    "cagrad": (weights("cagrad", "CAGrad", lambda T: (0.5,), 1e-3), TASKS, SOLVER),
    "nash": (weights("nash", "NashMTL", lambda T: (1.0,), 1e-3), TASKS, SOLVER),
    "unit_solve": (weights("unit_solve", "IMTL", lambda T: (None, T * 1e-7), 1e-6), TASKS, SOLVER),
    "constant": (weights("constant", "Uniform", lambda T: (None,), EXACT), TASKS, SOLVER),
    "pcgrad": (weights("pcgrad", "PCGrad", lambda T: (torch.tensor(0), True), 0.5), TASKS, SOLVER),
    "gradvac": (
        weights("gradvac", "GradVac", lambda T: (torch.tensor(0), 0.5, torch.zeros(T, T, dtype=torch.float64)), 0.5),
        TASKS,
        SOLVER,
    ),
}
ROWS = [(op, size, who) for op, (_, sizes, names) in OPS.items() for size in sizes for who in names]


@pytest.mark.benchmark(max_time=0.2, min_rounds=3)
@pytest.mark.parametrize(
    ("op", "size", "who"), ROWS, ids=[f"{op}-{'x'.join(map(str, size))}-{who}" for op, size, who in ROWS]
)
def test_op(benchmark: Any, op: str, size: tuple[int, ...], who: str) -> None:
    """One op, or what stands beside it; compared with its float64 answer first."""
    try:
        contest = OPS[op][0](who, *size)
    except ImportError as error:
        pytest.skip(f"{error}: {peers.INSTALL}")
    run = contest.calls[who]
    assert contest.error(run()) <= (contest.tolerance if who == "fastmtl" else contest.loose)
    benchmark.group = f"{op} {'x'.join(map(str, size)) if len(size) > 1 else f'T={size[0]}'}"
    benchmark(run)
