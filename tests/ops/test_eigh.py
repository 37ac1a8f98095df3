"""`fastmtl.eigh` by LAPACK's own test ratios, and its relative accuracy on graded matrices."""

import pytest
import torch
from helpers import EPS64, F32, F64, dtype_id, generator, randn, relative, residuals

import fastmtl

RATIO = 10.0
SIZES = [*range(1, 20), 23, 24, 31, 32, 33, 40, 49, 64, 65, 100, 130]
CASES = [(T, F64) for T in SIZES] + [(T, F32) for T in (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100)]


def with_spectrum(spectrum, seed=0):
    """Q diag(spectrum) Qᵀ with a random orthogonal Q, exactly symmetric."""
    T = spectrum.shape[0]
    Q, _ = torch.linalg.qr(torch.randn(T, T, dtype=F64, generator=generator(seed)))
    A = (Q * spectrum) @ Q.T
    return (A + A.T) / 2


def symmetric(T, seed=0):
    A = randn(T, T, dtype=F64, seed=seed)
    return A + A.T


def make_spectra():
    """name -> T -> matrix [T, T] in float64."""

    def line(T):
        return torch.linspace(0, 1, T, dtype=F64)

    def clustered(T):
        clusters = torch.tensor([1.0, 1.0 + 1e-12, 2.0, -3.0], dtype=F64)
        return with_spectrum(clusters.repeat(T // 4 + 1)[:T] + 1e-14 * line(T))

    def spiked(T):
        v = randn(T, dtype=F64, seed=T)
        return torch.eye(T, dtype=F64) + 1e6 * torch.outer(v, v)

    def graded(T):
        C = with_spectrum(1 + line(T))
        d = torch.logspace(0, -8, T, dtype=F64)
        return C * d * d[:, None]

    def tridiagonal(T):
        one = torch.ones(max(T - 1, 0), dtype=F64)
        return 2 * torch.eye(T, dtype=F64) - torch.diag(one, 1) - torch.diag(one, -1)

    def rank_one(T):
        v = randn(T, dtype=F64, seed=T)
        return torch.outer(v, v)

    return {
        "random": symmetric,
        "psd": lambda T: with_spectrum(line(T) + 0.1),
        "indefinite": lambda T: with_spectrum(line(T) - 0.5),
        "negative definite": lambda T: -with_spectrum(line(T) + 0.1),
        "clustered": clustered,
        "repeated": lambda T: with_spectrum(torch.where(line(T) < 0.5, 1.0, 2.0)),
        "one": lambda T: torch.eye(T, dtype=F64),
        "zero": lambda T: torch.zeros(T, T, dtype=F64),
        "diagonal": lambda T: torch.diag(randn(T, dtype=F64, seed=T)),
        "all ones": lambda T: torch.ones(T, T, dtype=F64),
        "rank one": rank_one,
        "spiked": spiked,
        "geometric": lambda T: with_spectrum(torch.logspace(0, -12, T, dtype=F64)),
        "graded up": lambda T: graded(T).flip(0, 1),
        "graded down": graded,
        "tridiagonal": tridiagonal,
        "antidiagonal": lambda T: torch.eye(T, dtype=F64).flip(0).clone(),
        "tiny": lambda T: symmetric(T) * 2.0**-100,
        "huge": lambda T: symmetric(T) * 2.0**100,
    }


SPECTRA = make_spectra()


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


@pytest.mark.parametrize("T", [3, 8, 20, 40, 80])
def test_a_matrix_alone_and_in_a_batch_is_the_same(T):
    A = randn(9, T, T, dtype=F64)
    M = A @ A.mT
    lam, _V = fastmtl.eigh(M)
    alone = [fastmtl.eigh(m) for m in M]
    assert relative(torch.stack([a[0] for a in alone]), lam) <= T * EPS64
    for b, (_, v) in enumerate(alone):
        assert residuals(M[b], lam[b], v)[0] < RATIO


@pytest.mark.parametrize("T", [2, 3, 8, 17, 32, 40, 70])
def test_only_the_lower_triangle_is_read(T):
    M = torch.stack([symmetric(T, seed) for seed in range(3)])
    noise = torch.full((T, T), torch.nan, dtype=F64).triu(1)
    lam, V = fastmtl.eigh(M)
    other, W = fastmtl.eigh(M.tril() + torch.where(noise.isnan(), noise, 0.0))
    assert torch.equal(lam, other)
    assert torch.equal(V, W)


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


@pytest.mark.parametrize("T", [2, 3, 5, 8, 13, 32])
@pytest.mark.parametrize("flip", [False, True], ids=["large first", "small first"])
def test_small_eigenvalues_of_graded_matrices(T, flip):
    """A = D C D with a benign C: a relative stopping rule keeps every eigenvalue accurate, LAPACK does not."""
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    gen = generator(T)
    C = with_spectrum(torch.linspace(0.5, 1.5, T, dtype=F64), seed=T)
    d = torch.logspace(0, -9, T, dtype=F64)
    d = d.flip(0) if flip else d
    A = C * d * d[:, None]
    A = A.tril() + A.tril(-1).T
    with mpmath.workdps(60):
        exact = mpmath.eigsy(mpmath.matrix(A.tolist()), eigvals_only=True)
        expected = torch.tensor(sorted(float(x) for x in exact), dtype=F64)
    others = torch.randn(2, T, T, dtype=F64, generator=gen)
    lam = fastmtl.eigh(torch.stack([others[0] + others[0].T, A, others[1] @ others[1].T]))[0][1]
    assert ((lam - expected) / expected).abs().max().item() <= 50 * T * EPS64


def test_lapack_would_not_pass_the_graded_test():
    """Guards the test above: where an absolute error of eps λ_max is allowed, the smallest eigenvalues are noise."""
    C = with_spectrum(torch.linspace(0.5, 1.5, 8, dtype=F64), seed=8)
    d = torch.logspace(0, -9, 8, dtype=F64)
    A = C * d * d[:, None]
    errors = []
    for M in (A, A.flip(0, 1)):
        M = M.tril() + M.tril(-1).T
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40, 70])
def test_a_non_finite_matrix_gives_nan_and_spares_the_others(T, bad):
    M = torch.stack([symmetric(T, seed) for seed in range(9)])
    lam, V = fastmtl.eigh(M)
    for b, (i, j) in ((4, (0, 0)), (8, (T - 1, 0))):
        broken = M.clone()
        broken[b, i, j] = broken[b, j, i] = bad
        got, vectors = fastmtl.eigh(broken)
        assert got[b].isnan().all()
        assert vectors[b].isnan().all()
        rest = [k for k in range(9) if k != b]
        assert torch.equal(got[rest], lam[rest])
        assert torch.equal(vectors[rest], V[rest])


def test_the_input_is_left_alone():
    M = symmetric(9)
    before = M.clone()
    fastmtl.eigh(M)
    assert torch.equal(M, before)
