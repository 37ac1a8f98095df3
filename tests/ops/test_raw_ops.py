"""What holds for every op, whatever it computes: errors, version counters, copies on write, modes of the processor."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BF16, EPS32, F16, F32, F64, needs_extension, randn
from test_ops import OP_CASES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.ops.registry import CONTRACTS

CASES = [(name, (*args, *kwargs.values())) for name, args, kwargs in OP_CASES]
CASE_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("name", "args"), CASES, ids=CASE_IDS)
POLICY = (None, "min", 1e-3, EPS32, "normalized")


def arguments_of(name):
    return getattr(ops, name)._schema.arguments


def written_by(name):
    """Which arguments an op writes to."""
    return [i for i, a in enumerate(arguments_of(name)) if a.alias_info is not None and a.alias_info.is_write]


def copied(args):
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), args)


def tensors(args):
    return [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]


def same_bits(x, y):
    return torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


# ------------------------------------------------------------------------------------------------ wrong arguments


def kernel(name, args):
    return getattr(ops, name)(*args)


def fallback(name, args):
    """What runs where no kernel is built."""
    CONTRACTS[name](*args)
    return getattr(reference, name)(*args)


def traced(name, args):
    with FakeTensorMode() as mode:
        return getattr(ops, name)(*pytree.tree_map_only(Tensor, mode.from_tensor, args))


def wrong_gradients(g):
    yield "integers", g.to(torch.int32)
    yield "complex", g.to(torch.complex64)
    yield "float8", g.to(torch.float8_e5m2)


def wrong_vectors(x):
    yield "float32", x.float()
    yield "integers", x.long()
    yield "longer", torch.cat([x, x], -1)
    yield "empty", x[..., :0]
    yield "another dimension", x[None]
    yield "strided", torch.stack([x, x], -1)[..., 0]
    yield "meta", x.to("meta")


def wrong_results(x):
    yield "another dtype", x.to(F32 if x.dtype is F64 else F64)
    yield "longer", torch.cat([x, x], -1)
    yield "another dimension", x[None]
    yield "meta", x.to("meta")
    yield "repeated", x.flatten()[:1].expand(x.shape)


def wrong_values(argument, x, given):
    """What can be wrong with this argument, and the value that is."""
    others = len(tensors(list(given.values()))) > 1  # without any, a tensor on the meta device is a valid call
    if argument == "G":
        yield from wrong_gradients(x)
        yield "no task", x[..., :0, :]
        yield "one dimension", x.flatten()
        yield "four dimensions", x[None, None]
        if others:
            yield "meta", x.to("meta")
    elif argument == "M":
        yield "integers", x.long()
        yield "bfloat16", x.to(BF16)
        yield "one dimension", x.flatten()
        yield "not square", x[..., :-1]
        if others:
            yield "meta", x.to("meta")
    elif argument == "grads":
        last = len(x) - 1  # not the only one of its column
        odd = dict(wrong_gradients(x[last]))
        odd |= {"another dtype": x[last].to(F64), "another shape": x[last][None], "meta": x[last].to("meta")}
        for what, g in odd.items():
            yield what, [g if i == last else h for i, h in enumerate(x)]
        yield "all integers", [None if g is None else g.long() for g in x]
        yield "one too many", [*x, x[last]]
        if given.get("out") is not None:
            yield "none", []
        if given.get("out") is not None and "alpha" not in given:  # for the others that is zero
            yield "only None", [None] * len(x)
    elif argument == "tasks":
        yield from (("zero", 0), ("negative", -2), ("another", 3))
    elif argument in ("alpha", "weights", "leak", "targets"):
        yield from wrong_vectors(torch.ones(3, dtype=F64) if x is None else x)
    elif argument == "seed":
        yield from (("float", x.double()), ("int32", x.int()), ("two", torch.stack([x, x])), ("meta", x.to("meta")))
    elif argument == "out" and isinstance(x, Tensor):
        yield from wrong_results(x)
        yield "within G", given["G"][..., 0, :]
    elif argument == "out" and x is not None:
        yield from ((what, [y, *x[1:]]) for what, y in wrong_results(x[0]))
        yield from (("one too few", x[1:]), ("within grads", [given["grads"][0], *x[1:]]))
    elif argument in ("scale", "rank_rule"):
        yield "unknown", "max"
    elif argument in ("rtol", "zero", "c", "power", "beta"):
        yield from (("negative", -1.0), ("NaN", math.nan), ("infinite", math.inf))


@pytest.mark.parametrize("impl", [kernel, fallback, traced])
@every_case
def test_wrong_arguments(name, args, impl):
    """An error that begins with the argument, says what was expected and what came; and nothing is written."""
    names = [a.name for a in arguments_of(name)]
    impl(name, copied(args))
    for i, argument in enumerate(names):
        given = dict(zip(names, copied(args), strict=True))
        for x in tensors([given[names[k]] for k in written_by(name)]):
            x.fill_(7.0)
        for what, value in wrong_values(argument, given[argument], given):
            if impl is traced and what in ("repeated", "within G", "within grads"):
                continue  # there is no memory
            wrong = [value if k == i else x for k, x in enumerate(given.values())]
            versions = [x._version for x in tensors(wrong)]
            # A wrong number of the one is a wrong number of the others, and so with devices.
            numbers = {"grads", "tasks", "alpha", "out"}
            blamed = set(names) if what == "meta" else numbers if argument in numbers else {argument}
            match = rf"^({'|'.join({*blamed, 'rows'} if 'grads' in blamed else blamed)})(\[\d+\])*: .*expected .*got "
            with pytest.raises(RuntimeError, match=match) as raised:
                impl(name, wrong)
            assert ".h:" not in str(raised.value), "where it stands in the sources tells nobody anything"
            assert [x._version for x in tensors(wrong)] == versions, (argument, what)
            for k in written_by(name):
                assert all((x == 7.0).all() for x in tensors(wrong[k] if k != i else list(given.values())[k]))


@pytest.mark.parametrize("impl", [kernel, fallback])
def test_results_within_other_arguments_are_an_error(impl):
    memory = torch.zeros(20, dtype=F64)
    with pytest.raises(RuntimeError, match=r"^out: expected memory"):
        impl("combine", (randn(3, 20, dtype=F64), memory[:3], memory))
    with pytest.raises(RuntimeError, match=r"^out.*: expected memory"):
        impl("combine_rows", ([randn(20, dtype=F64)] * 3, memory[:3], [memory]))
    M = torch.eye(3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"^targets: expected memory"):
        impl("gradvac", (M, torch.tensor(1), 0.5, M))
    assert not memory.any()
    assert torch.equal(M, torch.eye(3, dtype=F64))


def replaced(xs, i, x):
    return [x if k == i else y for k, y in enumerate(xs)]


def wrong_lists():
    """Two rows of a [3, 2] and a [7], results for them, and what is said of them."""
    grads, out = [randn(3, 2), randn(7), None, randn(7, seed=1)], [torch.zeros(3, 2), torch.zeros(7)]
    want, kinds = "float32 tensor of shape [7] on cpu", "float32, float64, bfloat16 or float16"
    yield "a dtype", replaced(grads, 3, grads[3].double()), out, f"rows[1][1]: expected the other tasks' {want}, got f"
    yield "a shape", replaced(grads, 3, randn(1, 7)), out, f"rows[1][1]: expected the other tasks' {want}, got float32"
    yield "integers", replaced(grads, 0, torch.ones(3, 2).int()), out, f"rows[0][0]: expected {kinds}, got int32 tensor"
    yield "booleans", [None, grads[1] > 0, None, grads[3] > 0], out, f"rows[0][1]: expected {kinds}, got bool tensor"
    yield "integers to write", [None, grads[1]] * 2, [out[0].int(), out[1]], f"out[0]: expected {kinds}, got int32"
    yield "a dtype to write", grads, replaced(out, 1, out[1].half()), f"out[1]: expected a {want}, got float16 tensor"
    yield "a shape to write", grads, replaced(out, 1, torch.zeros(8)), f"out[1]: expected a {want}, got float32 tensor"
    repeated = "out[1]: expected a tensor without repeated elements, got strides [0]"
    yield "an element twice", grads, replaced(out, 1, torch.zeros(1).expand(7)), repeated
    within = (
        "out[0]: expected memory that does not overlap the gradients, got float32 tensor of shape [3, 2] on cpu within"
    )
    yield "a gradient", grads, [grads[3][:6].view(3, 2), out[1]], within
    memory = torch.zeros(12)
    apart = "out[1]: expected memory that does not overlap other results, got that of out[0]"
    yield "another result", grads, [memory[:6].view(3, 2), memory[5:]], apart
    yield "too few results", grads, out[:1], "out: expected 2 tensors, got 1"


@pytest.mark.parametrize(
    ("grads", "out", "text"), [case[1:] for case in wrong_lists()], ids=[c[0] for c in wrong_lists()]
)
@pytest.mark.parametrize("name", ["gram_rows", "align_rows", "sign_drop_rows"])
def test_lists_that_do_not_fit_are_named_in_the_same_words(name, grads, out, text):
    """By the kernel, by what stands before the reference, and by a method, whose error is a TypeError or ValueError."""
    rest = {"gram_rows": (), "align_rows": POLICY, "sign_drop_rows": (torch.tensor(3), None)}[name]
    said, before = [], [x.clone() for x in out]
    for impl in (kernel, fallback):
        with pytest.raises(RuntimeError) as raised:
            impl(name, (grads, 2, *rest, out))
        said.append(str(raised.value))
    method = {"gram_rows": fastmtl.MGDA, "align_rows": fastmtl.AlignedMTL, "sign_drop_rows": fastmtl.GradDrop}[name]()
    if text.startswith("out: "):  # there is no op to ask
        text = "out: expected"
    else:
        assert said[0] == said[1]
    assert all(s.startswith(text) for s in said), said
    if text.startswith("out[0]: expected float32"):
        return  # a method leaves alone what has no gradient
    with pytest.raises(TypeError if "bfloat16 or" in text else ValueError) as raised:
        method([grads[:2], grads[2:]], out)
    assert str(raised.value).startswith(text)
    assert all(map(torch.equal, out, before))


def test_a_result_that_does_not_fit_changes_no_state():
    """What a method remembers is that of the last step that succeeded."""
    method = fastmtl.GradVac()
    rows = [[randn(4, seed=t), randn(3, seed=t)] for t in range(2)]
    method(rows)
    before = {name: x.clone() for name, x in method.state_dict().items()}
    with pytest.raises(ValueError, match=r"^out\[1\]: expected a float32 tensor of shape \[3\] on cpu, got"):
        method(rows, out=[torch.zeros(4), torch.zeros(4)])
    assert before
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())


@pytest.mark.parametrize("impl", [kernel, fallback])
def test_sparse_gradients_are_an_error(impl):
    G = randn(3, 20)
    with pytest.raises(RuntimeError, match=r"^G: expected .* got float32 sparse_coo tensor of shape"):
        impl("gram", (G.to_sparse(),))
    with pytest.raises(RuntimeError, match=r"^out: expected .* got float32 sparse_coo tensor of shape"):
        impl("combine", (G, torch.ones(3, dtype=F64), torch.zeros(20).to_sparse()))


# ------------------------------------------------------------------------------------------------ what autograd sees


@pytest.mark.parametrize("impl", [kernel, fallback])
@pytest.mark.parametrize(("name", "args"), [c for c in CASES if written_by(c[0])], ids=[
    i for i, c in zip(CASE_IDS, CASES, strict=True) if written_by(c[0])
])  # fmt: skip
def test_what_is_written_is_no_longer_what_was_saved(name, args, impl):
    """Otherwise a tensor that autograd saved could be overwritten, and a gradient be wrong without a word."""
    args = copied(args)
    written = tensors([args[i] for i in written_by(name)])
    read = [x for x in tensors(args) if all(x is not y for y in written)]
    x = torch.ones((), requires_grad=True)
    saved = [x * y for y in written]
    versions = [y._version for y in read]
    impl(name, args)
    assert [y._version for y in read] == versions
    for y in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_is_written_in_a_compiled_graph_is_no_longer_what_was_saved():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def write(G, alpha, out):
        ops.combine(G, alpha, out)
        return out.sum()

    G, alpha, out = randn(3, 20), torch.ones(3, dtype=F64), torch.zeros(20)
    x = torch.ones((), requires_grad=True)
    y = (x * out).sum()
    total = write(G, alpha, out)
    assert torch.allclose(total, G.sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_leaf_that_requires_grad_is_not_overwritten():
    G, alpha = randn(3, 20), torch.ones(3, dtype=F64)
    out = torch.zeros(20, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"leaf.* that requires grad"):
        ops.combine(G, alpha, out)
    assert not out.any()
    with torch.no_grad():
        ops.combine(G, alpha, out)
    assert out.any()


# ------------------------------------------------------------------------------------------------ copies on write


@needs_extension
@every_case
def test_copies_on_write_are_made_for_what_is_written_alone(name, args):
    args = copied(args)
    kept = tensors(args)
    written = {id(x) for x in tensors([args[i] for i in written_by(name)])}
    if name == "gram_rows":  # whether what will be written lies apart can be said once it has memory of its own
        written |= {id(x) for x in args[2] or ()}
    lazy = {id(x): x._lazy_clone() for x in kept}
    expected, before = copied(args), [x.clone() for x in kept]
    wanted = kernel(name, expected)
    got = kernel(name, pytree.tree_map_only(Tensor, lambda x: lazy[id(x)], args))
    for x in kept:
        assert torch._C._is_cow_tensor(lazy[id(x)]) == (id(x) not in written), name
    for x, y in zip(kept, before, strict=True):
        assert torch.equal(x, y) or x.isnan().any(), "the original was written"
    for x, y in zip(tensors(got), tensors(wanted), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(kept, tensors(expected), strict=True):
        assert torch.equal(lazy[id(x)], y)


@needs_extension
@pytest.mark.parametrize("method", [fastmtl.AlignedMTL(), fastmtl.UPGrad(), fastmtl.GradDrop()], ids=repr)
def test_methods_make_no_copies_of_what_they_read(method):
    G, out = randn(3, 200), torch.zeros(200)
    lazy, result = G._lazy_clone(), out._lazy_clone()
    method(lazy, out=result)
    rows = [g.clone()._lazy_clone() for g in G]
    method(rows)
    assert all(torch._C._is_cow_tensor(x) for x in (lazy, *rows))
    assert not out.any()
    shared = torch.zeros(3, 200)  # gradients that are a copy on write of the result's memory do not overlap it
    method(shared._lazy_clone(), out=shared[0])


# ------------------------------------------------------------------------------------------------ subnormal numbers


@contextlib.contextmanager
def flushing(on=True):
    if not torch.set_flush_denormal(on):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def flushes():
    return not bool(torch.tensor(1e-310, dtype=F64) * 1.0)


def subnormal_cases():
    """Calls on numbers that are subnormal, or become so, in every dtype; large enough for all threads."""
    alpha, leak, seed = torch.tensor([0.5, 1.0, -1.0], dtype=F64), torch.full((3,), 0.5, dtype=F64), torch.tensor(3)
    for dtype, size in ((F32, 1e-40), (BF16, 1e-39), (F16, 1e-6), (F64, 1e-310)):
        G = (randn(3, 300_000, dtype=F64) * size).to(dtype)
        assert ((G.abs() < torch.finfo(dtype).tiny) & (G != 0)).double().mean() > 0.5
        rows = [x for g in G for x in g.split([100_000, 200_000])]
        flat, lists = torch.empty(300_000, dtype=dtype), [torch.empty(n, dtype=dtype) for n in (100_000, 200_000)]
        large = (randn(3, 300_000, dtype=F64)).to(dtype)
        tiny = alpha * size  # makes them subnormal
        roots = G if dtype is not F64 else randn(3, 300_000, dtype=F64) * 1e-161  # whose products are subnormal
        yield f"gram {dtype}", lambda G=roots: ops.gram(G)
        yield f"gram_rows {dtype}", lambda rows=list(roots): ops.gram_rows(rows, 3)
        for kind, X, a in (("of", G, alpha), ("to", large, tiny)):
            parts = [x for g in X for x in g.split([100_000, 200_000])]
            yield f"combine {kind} {dtype}", lambda X=X, a=a, out=flat: (ops.combine(X, a, out), out.clone())
            yield (
                f"combine_rows {kind} {dtype}",
                lambda p=parts, a=a, o=lists: (ops.combine_rows(p, a, o), [x.clone() for x in o]),
            )
        yield f"align {dtype}", lambda G=G, out=flat: (ops.align(G, *POLICY, out), out.clone())
        yield f"align_rows {dtype}", lambda r=rows, o=lists: (ops.align_rows(r, 3, *POLICY, o), [x.clone() for x in o])
        yield f"sign_drop {dtype}", lambda G=G, out=flat: (ops.sign_drop(G, seed, leak, out), out.clone())
        yield (
            f"sign_drop_rows {dtype}",
            lambda r=rows, o=lists: (ops.sign_drop_rows(r, 3, seed, leak, o), [x.clone() for x in o]),
        )
    A = randn(20_000, 3, 4, dtype=F64)
    for dtype, size in ((F32, 1e-40), (F64, 1e-310)):
        M = (A @ A.mT * size).to(dtype)
        targets = torch.zeros(M.shape, dtype=F64)
        solvers = {
            "balance": lambda M=M: ops.balance(M, *POLICY),
            "align_gram": lambda M=M: ops.align_gram(M, *POLICY),
            "eigh": lambda M=M: ops.eigh(M),
            "mgda": lambda M=M: ops.mgda(M),
            "dual_cone": lambda M=M: ops.dual_cone(M, None, True),
            "cagrad": lambda M=M: ops.cagrad(M, 0.5),
            "nash": lambda M=M: ops.nash(M, 1.0),
            "unit_solve": lambda M=M: ops.unit_solve(M, None, 0.0),
            "constant": lambda M=M: ops.constant(M, None),
            "pcgrad": lambda M=M: ops.pcgrad(M, seed, True),
            "gradvac": lambda M=M, targets=targets: (ops.gradvac(M, seed, 0.5, targets.zero_()), targets.clone()),
        }
        yield from ((f"{name} {dtype}", call) for name, call in solvers.items())


SUBNORMAL = dict(subnormal_cases())


@needs_extension
@pytest.mark.parametrize("name", SUBNORMAL)
def test_subnormal_numbers_are_numbers_in_every_mode_and_thread(name):
    """The mode belongs to a thread, so that with two of them a part of the numbers would be zeros."""
    call = SUBNORMAL[name]
    torch.set_num_threads(2)
    expected = tensors(call())
    assert any(x.any() for x in expected)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with flushing():
            got = call()
            assert flushes(), "the caller's mode was changed"
        assert not flushes()
        for x, y in zip(tensors(got), expected, strict=True):
            assert same_bits(x, y), threads


@needs_extension
def test_the_mode_comes_back_after_an_error():
    with flushing():
        with pytest.raises(RuntimeError, match="alpha"):
            ops.combine(randn(3, 20), torch.ones(3), torch.empty(20))
        assert flushes()


@needs_extension
def test_threads_that_began_in_the_other_mode():
    """They inherit the mode of the thread that starts them: here all flush but the one that calls."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(2)
if not torch.set_flush_denormal(True):
    print("cannot")
    sys.exit()
x = torch.full((1_000_000,), 1e-40)
(x * 1.0).sum()  # starts the others
torch.set_flush_denormal(False)
assert (x * 1.0 == 0).any(), "no thread flushes"
torch.set_num_threads(1)
from test_raw_ops import SUBNORMAL, same_bits, tensors
for name, call in SUBNORMAL.items():
    torch.set_num_threads(2)
    two = tensors(call())
    torch.set_num_threads(1)
    for x, y in zip(two, tensors(call()), strict=True):
        assert same_bits(x, y), name
print("same")
"""
    assert run(script) in ("same", "cannot")


def run(script):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    # Large blocks go back to the system as soon as they are freed.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-c", script, str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------ memory


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_large_scratch_is_given_back():
    """A step with many tasks does not make the process larger for good, in any of its threads."""
    script = """
import torch
from fastmtl import ops

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

def call(T):
    A = torch.randn(2, T, T + 8, dtype=torch.float64)
    M, G = A @ A.mT, torch.randn(T, 3000)
    for solve in (ops.mgda, lambda M: ops.cagrad(M, 0.5), lambda M: ops.nash(M, 1.0)):
        solve(M)
    ops.dual_cone(M, None, False)
    ops.pcgrad(M, torch.tensor(1), True)
    ops.align_rows(list(G), T, None, "min", 1e-6, 1e-7, "normalized", [torch.empty(3000)])

torch.set_num_threads(2)
call(40)
before = resident()
call(1000)
print(resident() - before)
"""
    grown = int(run(script))
    assert grown < 8 * 2**20, f"{grown / 2**20:.0f} MB"
