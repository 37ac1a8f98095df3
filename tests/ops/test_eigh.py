"""`fastmtl.eigh` by LAPACK's own test ratios, and its relative accuracy on graded matrices."""

import pytest
import torch
from helpers import F32, F64, dtype_id, randn, residuals
from parity import SPECTRA, graded, symmetric

import fastmtl

RATIO = 10.0
SIZES = [*range(1, 20), 23, 24, 31, 32, 33, 40, 49, 64, 65, 100, 130]
CASES = [(T, F64) for T in SIZES] + [(T, F32) for T in (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100)]


def check(M, name=""):
    lam, V = fastmtl.eigh(M)
    assert lam.shape == M.shape[:-1]
    assert V.shape == M.shape
    assert lam.dtype is V.dtype is M.dtype
    assert (lam[..., 1:] >= lam[..., :-1]).all(), f"{name}: not ascending"
    first, second = residuals(M, lam, V)
    assert first < RATIO, f"{name}: |MV - VL| / (|M| T eps) = {first:.3g}"
    assert second < RATIO, f"{name}: |VtV - I| / (T eps) = {second:.3g}"
    return lam, V


@pytest.mark.parametrize(("T", "dtype"), CASES, ids=dtype_id)
def test_lapack_ratios(T, dtype):
    names = list(SPECTRA)
    batch = torch.stack([SPECTRA[name](T) for name in names]).to(dtype)
    lam, _ = check(batch, "batch")
    for name, M, one in zip(names, batch, lam, strict=True):
        largest = M.abs().sum(0).max().item()
        expected = torch.linalg.eigvalsh(M.to(F64))
        assert (one - expected).abs().max().item() <= RATIO * T * torch.finfo(dtype).eps * largest, name


@pytest.mark.parametrize("name", SPECTRA)
def test_lapack_ratios_one_matrix(name):
    for T in (2, 3, 8, 11, 16):
        for dtype in (F64, F32):
            check(SPECTRA[name](T).to(dtype), f"{name}, T = {T}")


@pytest.mark.parametrize("dtype", [F64, F32], ids=dtype_id)
@pytest.mark.parametrize(
    ("batch", "T"), [(1, 3), (3, 5), (8, 8), (9, 8), (9, 1), (17, 4), (4096, 3), (1000, 2), (5, 33), (0, 4)]
)
def test_batches(batch, T, dtype):
    A = randn(batch, T, T, dtype=F64, seed=batch)
    M = (A + A.mT).to(dtype)
    lam, V = fastmtl.eigh(M)
    assert lam.shape == (batch, T)
    assert V.shape == M.shape
    if batch:
        check(M)


def test_leading_dimensions():
    A = randn(2, 3, 5, 5, dtype=F64)
    lam, V = check(A + A.mT)
    assert lam.shape == (2, 3, 5)
    assert V.shape == (2, 3, 5, 5)


@pytest.mark.parametrize("T", [3, 8, 20])
def test_strided_input(T):
    base = torch.zeros(4, T + 2, 2 * T, dtype=F64)
    M = base[1:, 1 : T + 1, ::2]
    M.copy_(torch.stack([symmetric(T, seed) for seed in range(3)]))
    assert not M.is_contiguous()
    strided, dense = fastmtl.eigh(M), fastmtl.eigh(M.contiguous())
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])
    check(M.mT)


def test_lapack_would_not_pass_the_graded_test():
    """Guards that of parity.py: where an absolute error of eps λ_max is allowed, the smallest eigenvalues are noise."""
    A = graded(8, 9, seed=8)
    errors = []
    for M in (A, A.flip(0, 1)):
        ours = fastmtl.eigh(M)[0]
        errors.append(((torch.linalg.eigvalsh(M) - ours) / ours).abs().max().item())
    assert max(errors) > 1e-3


def test_two_by_two_in_closed_form():
    a, b, c = 3.0, 1e-9, 1e-16
    M = torch.tensor([[a, b], [b, c]], dtype=F64)
    lam, V = fastmtl.eigh(M)
    # det / λ_max to full relative accuracy; det = ac - b² has no cancellation here beyond a factor 1.5.
    assert lam[0].item() == pytest.approx((a * c - b * b) / a, rel=1e-14)
    assert lam[1].item() == pytest.approx(a, rel=1e-15)
    assert abs(V[0, 0].item() / V[1, 0].item()) == pytest.approx(b / a, rel=1e-9)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**-260, 2.0**260, 2.0**500])
def test_scales(scale):
    M = torch.stack([symmetric(6), symmetric(6, 1) * scale, torch.eye(6, dtype=F64)])
    lam, V = fastmtl.eigh(M)
    expected = fastmtl.eigh(symmetric(6, 1))
    assert torch.equal(lam[1] / scale, expected[0])
    assert torch.equal(V[1], expected[1])


def test_the_input_is_left_alone():
    M = symmetric(9)
    before = M.clone()
    fastmtl.eigh(M)
    assert torch.equal(M, before)
