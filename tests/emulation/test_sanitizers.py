"""The emulated kernels under sanitizers: accesses outside of arrays, undefined behaviour and races."""

import build
import harness
import pytest
import weights_matrix

WEIGHTS = harness.KERNELS.with_name("weights.cpp")
ONLY_F32 = ("FASTMTL_EMULATE_ONLY_F32",)

pytestmark = pytest.mark.slow  # `make emulate`: each takes a compilation


@pytest.mark.parametrize(
    ("mode", "order", "defines"),
    [
        ("thread", "reversed", ONLY_F32),  # races do not depend on the type
        ("address", "sequential", ()),
    ],
    ids=["thread", "address"],
)
def test_kernels(mode, order, defines):
    """Over a smaller matrix of cases."""
    matrix = str(harness.KERNELS.with_name("matrix.py"))
    result = build.run(mode, [matrix, str(harness.built(mode, defines)), order], timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("cases hold\n")


@pytest.mark.parametrize(
    ("mode", "order"),
    [("address", "sequential"), ("thread", "reversed")],
    ids=["address", "thread"],
)
def test_weights(mode, order):
    """And the same bits as without a sanitizer."""
    harness.require_tools()
    script = str(WEIGHTS.with_name("weights_matrix.py"))
    result = build.run(mode, [script, str(build.build(mode, WEIGHTS)), order])
    assert result.returncode == 0, result.stdout + result.stderr
    plain = build.load(build.build("plain", WEIGHTS))
    assert result.stdout == f"{weights_matrix.digest(plain, 'shuffled')}\n"
