"""Fits the cost model of `engine="auto"` to measured times: `python tools/fit_engine_costs.py GRID.json [...]`.

The files are what `python benchmarks/engines.py grid --json PATH` writes. Prints the coefficients for
`fastmtl/gramian/cost.py`, what share of the cases they get right, and what share fits to four fifths of the cases get
right of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from fastmtl.gramian.cost import SECONDS

WITHIN = 1.1
Case = dict[str, Any]


def main(paths: Sequence[str]) -> None:
    """Prints coefficients and shares."""
    cases = [case for path in paths for case in json.loads(Path(path).read_text(encoding="utf-8"))["cases"]]
    found = fit(cases)
    print("SECONDS = (" + ", ".join(f"{x:.2g}" for x in found) + ")")
    for case in cases:
        full, own = predicted(case, found)
        taken, note = case["seconds"], "" if is_right(case, found) else "  WRONG"
        print(
            f"{case['case']:44} gramian/full {taken['gramian'] / taken['full']:.2f}, backwards {own / full:.2f}{note}"
        )
    print(f"right in {share(cases, found):.0%} of {len(cases)} cases")
    print(f"with the coefficients of cost.py as they are: {share(cases, np.array(SECONDS)):.0%}")
    folds = [cases[k::5] for k in range(5)]
    kept = [share(fold, fit([case for other in folds if other is not fold for case in other])) for fold in folds]
    print(f"on cases left out of the fit, a fifth at a time: {np.mean(kept):.0%}")


def fit(cases: Sequence[Case]) -> np.ndarray:
    """Coefficients [9], seconds: small relative errors of both times, and above all of their ratio."""
    full = np.array([case["plan"]["features"][0] for case in cases], float)
    own = np.array([case["plan"]["features"][1] for case in cases], float)
    times = np.array([[backward(case, "full"), backward(case, "gramian")] for case in cases])

    def errors(x: np.ndarray) -> np.ndarray:
        a, b = np.log(full @ np.exp(x)), np.log(own @ np.exp(x))
        return np.concatenate(
            [a - np.log(times[:, 0]), b - np.log(times[:, 1]), 2 * (a - b - np.log(times[:, 0] / times[:, 1]))]
        )

    start = np.log([4e-6, 3e-6, 1e-9, 6e-12, 1e-11, 1e-11, 1e-9, 1e-4, 5e-4])
    tries = [start + np.random.default_rng(seed).normal(0, 1, len(start)) for seed in range(20)]
    runs = [least_squares(errors, x, loss="soft_l1", f_scale=0.1, bounds=(-40, -3)) for x in tries]
    return np.exp(min(runs, key=lambda run: run.cost).x)


def backward(case: Case, engine: str) -> float:
    """Seconds of a step without its forward."""
    return max(case["seconds"][engine] - case["seconds"]["forward"], 1e-6)


def predicted(case: Case, coefficients: np.ndarray) -> np.ndarray:
    """Seconds of both engines."""
    return np.array(case["plan"]["features"], float) @ coefficients


def is_right(case: Case, coefficients: np.ndarray) -> bool:
    """Whether the engine that is expected to be faster is, or nearly."""
    full, own = predicted(case, coefficients)
    taken = case["seconds"]
    return taken["full" if full < own else "gramian"] <= WITHIN * min(taken["full"], taken["gramian"])


def share(cases: Sequence[Case], coefficients: np.ndarray) -> float:
    """Of cases that are right."""
    return float(np.mean([is_right(case, coefficients) for case in cases]))


if __name__ == "__main__":
    main(sys.argv[1:])
