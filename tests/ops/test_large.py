"""More than 2^31 of everything that is counted: offsets do not wrap.

Gradients are zero but for a few islands, so that a small matrix of the islands has the same Gram and the same result
there. On a CPU, memory that was never written costs no pages: what counts is the result.
"""

import pytest
import torch
from helpers import BF16, F64, randn

import fastmtl

HALF = 2**31  # beyond what 32 bits hold with a sign; twice that is beyond what they hold without one
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]
METHODS = {
    "AlignedMTL": fastmtl.AlignedMTL(),
    "UPGrad": fastmtl.UPGrad(),
    "GradDrop": fastmtl.GradDrop(leak=torch.ones(2)),  # keeps everything: the sum, by the elementwise kernel
}

pytestmark = pytest.mark.slow
devices = pytest.mark.parametrize("device", DEVICES)
every = pytest.mark.parametrize("name", METHODS)


def islands(P):
    """Starts of ranges of 40: the ends, and the place where an index would wrap."""
    return [0, HALF - 20, P - 40]


def placed(G, P, device):
    """[T, P], zero but for the islands, which hold the columns of G in order; and the function that reads them back."""
    wide = torch.zeros(G.shape[0], P, dtype=G.dtype, device=device)
    at = islands(P)
    for start, part in zip(at, G.split(40, dim=-1), strict=True):
        wide[:, start : start + 40] = part.to(device)

    def read(x):
        return torch.cat([x[..., s : s + 40] for s in at], -1).cpu()

    return wide, read


@every
@devices
def test_parameters(name, device):
    """One row of more than 2^31 parameters: 8.6 GB of gradients and 4.3 GB of result."""
    G, method = randn(2, 120, dtype=BF16), METHODS[name]
    wide, read = placed(G, HALF + 60, device)
    out = torch.full((HALF + 60,), torch.nan, dtype=BF16, device=device)
    method(wide, out)
    assert torch.equal(read(out), method(G))
    assert sum(part.count_nonzero().item() for part in out.split(2**28)) == method(G).count_nonzero()
    del out
    rows = method(list(wide))[0]
    assert torch.equal(read(rows), method(G))


@every
@devices
def test_rows_far_apart(name, device):
    """Rows that start more than 2^31 and 2^32 elements after the first."""
    G, method = randn(3, 1000, dtype=BF16), METHODS[name]
    if name == "GradDrop":
        method = fastmtl.GradDrop(leak=torch.ones(3))
    wide = torch.zeros(2 * (HALF + 1000) + 1000, dtype=BF16, device=device)
    far = wide.as_strided((3, 1000), (HALF + 1000, 1))
    far.copy_(G)
    assert torch.equal(method(far).cpu(), method(G))
    assert torch.equal(method(list(far))[0].cpu(), method(G))


@every
@devices
def test_columns_far_apart(name, device):
    """Columns at a stride: the last starts more than 2^31 elements after the first."""
    G, method = randn(2, 1025, dtype=BF16), METHODS[name]
    wide = torch.zeros((HALF // 1024 + 1) * 1024 + 2, dtype=BF16, device=device)
    far = wide.as_strided((2, 1025), (1, HALF // 1024 + 1))
    far.copy_(G)
    assert torch.equal(method(far).cpu(), method(G))


@devices
def test_batches(device):
    """A batch of more than 2^31 elements in all."""
    B, T, P = 2**21 + 3, 2, 520
    G = torch.zeros(B, T, P, dtype=BF16, device=device)
    some = [0, B // 2, 2**31 // (T * P), 2**31 // (T * P) + 1, B - 1]
    G[some] = randn(len(some), T, P, dtype=BF16).to(device)
    method = fastmtl.AlignedMTL()
    out = method(G)
    assert torch.equal(out[some].cpu(), method(G[some].cpu()))
    assert sum(part.any(-1).sum().item() for part in out.split(2**16)) == len(some)
    M = torch.empty(B, T, T, dtype=F64, device=device)
    torch.bmm(G[some].double(), G[some].mT.double(), out=M[: len(some)])
    torch.testing.assert_close(fastmtl.ops.gram(G)[some], M[: len(some)], rtol=1e-6, atol=1e-9)
