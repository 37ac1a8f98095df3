"""QM9 as the package qm9pack ships it: molecules read from its CSV files, and features computed from their geometry.

QM9 has 133 885 molecules of up to nine atoms of C, N, O and F (and up to 29 with H), of which qm9pack has the 130 831
whose geometry is consistent; geometries and properties are those of B3LYP/6-31G(2df,p) (Ramakrishnan et al., Quantum
chemistry structures and properties of 134 kilo molecules, Scientific Data 1, 2014). Only `qm9_part*.csv` are read, with
Python's csv module; qm9pack itself is never imported (it needs setuptools' old pkg_resources).

**Targets**, the eleven of multi-task work on QM9 (Navon et al., ICML 2022): dipole moment mu, polarizability alpha,
HOMO and LUMO energies, electronic spatial extent R2, zero-point energy, four atomization energies (U0 = U at 0 K, and
U, H and G at 298 K, each less those of the free atoms), and the heat capacity. Energies are in meV.

**Features**, functions of element numbers and positions alone, whatever the order of the atoms and the orientation:

    counts       5    how many H, C, N, O, F
    spectrum    29    eigenvalues of the Coulomb matrix (Rupp et al., Physical Review Letters 108, 2012), atomic units:
                      Z_i^2.4 / 2 on the diagonal, Z_i Z_j / r_ij off it; largest magnitude first, then zeros
    distances  360    for each of the 15 pairs of elements, how many pairs of atoms lie at 24 distances between 0.9 and
                      8 Å: Gaussians in log r, as wide as the distances are apart, which tells bond orders apart

None has angles or charges: mu, a vector's length, can be learned only roughly from them.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["TARGETS", "Molecules", "Target", "default_folder", "features", "load", "read"]

ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
NUMBERS = list(ELEMENTS.values())
PAIRS = list(itertools.combinations_with_replacement(NUMBERS, 2))
ATOMS = 29  # in the largest molecule
BOHR = 0.529177210903  # Å
MEV = 27211.386245988  # a hartree
DISTANCES = np.geomspace(0.9, 8.0, 24)
VERSION = 1  # of the features; a new one leaves old caches unused


class Target(NamedTuple):
    """A column of the CSV files as a target: `unit` is what `factor` makes of it after its atoms' values are taken off.

    Attributes:
        name: what tables call it.
        unit: of the target.
        column: of the CSV files.
        factor: from the column's unit to `unit`.
        atoms: the column's values for free H, C, N, O and F atoms.
    """

    name: str
    unit: str
    column: str
    factor: float = 1.0
    atoms: tuple[float, ...] = (0.0,) * len(ELEMENTS)


# Free atoms: B3LYP/6-31G(2df,p) energies in hartree, as published with QM9.
TARGETS = (
    Target("mu", "D", "Dipole_debye"),
    Target("alpha", "a₀³", "Polarizability_bohr3"),
    Target("HOMO", "meV", "HOMO_au", MEV),
    Target("LUMO", "meV", "LUMO_au", MEV),
    Target("R2", "a₀²", "R2_bohr2"),
    Target("ZPVE", "meV", "ZPVE_au", MEV),
    Target("U0", "meV", "InternalEnergy_0K_au", MEV, (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730)),
    Target("U", "meV", "InternalEnergy_298K_au", MEV, (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314)),
    Target("H", "meV", "Enthalphy_298K_au", MEV, (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370)),
    Target("G", "meV", "GibbsFreeEnergy_298K_au", MEV, (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544)),
    Target("Cv", "cal/mol/K", "Heatcapacity_Cv_cal_mol_K"),
)
COLUMNS = ("N_atoms", "Elements", "XYZ_Ang", *(target.column for target in TARGETS))


class Molecules(NamedTuple):
    """N molecules.

    Attributes:
        numbers: element numbers, uint8 [N, 29], 0 after the last atom.
        positions: in Å, float64 [N, 29, 3].
        targets: float64 [N, 11].
    """

    numbers: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


def default_folder() -> Path:
    """The data folder of the installed qm9pack.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("qm9pack")  # finds a package without running it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package qm9pack, which has the data, is not installed: pip install qm9pack")
    return Path(spec.submodule_search_locations[0]) / "data"


def read(folder: Path, molecules: int | None = None, seed: int = 0) -> Molecules:
    """Molecules from `qm9_part*.csv`, in an order drawn at random.

    Args:
        folder: where the files are.
        molecules: how many; None for all.
        seed: of the order, and so of which they are.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a file without a column, with a cell that is not what it should be or with a number that is not
            finite, or fewer molecules than asked for.
    """
    rows = [row for path in _parts(folder) for row in _rows(path)]
    wanted = len(rows) if molecules is None else molecules
    if not 0 < wanted <= len(rows):
        raise ValueError(f"molecules: expected 1 to {len(rows)} (what {folder} has), got {wanted}")
    order = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    result = Molecules(
        np.zeros((wanted, ATOMS), np.uint8), np.zeros((wanted, ATOMS, 3)), np.zeros((wanted, len(TARGETS)))
    )
    for n, index in enumerate(order):
        path, line, cells = rows[index]
        try:
            numbers, positions, targets = _molecule(cells)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        result.numbers[n, : len(numbers)] = numbers
        result.positions[n, : len(numbers)] = positions
        result.targets[n] = targets
    return result


def features(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The features that the module describes.

    Args:
        numbers: [N, A], 0 where there is no atom.
        positions: in Å, [N, A, 3].

    Returns:
        float32 [N, 394].
    """
    chunks = range(0, len(numbers), 500)
    return np.concatenate([_features(numbers[n : n + 500], positions[n : n + 500]) for n in chunks]).astype(np.float32)


def load(folder: Path, cache: Path, molecules: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, 394] and targets float64 [N, 11] of `read`'s molecules, computed once and kept."""
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in _parts(folder)]
    key = hashlib.sha256(json.dumps([VERSION, files, molecules, seed]).encode()).hexdigest()[:12]
    path = cache / f"qm9-{key}.npz"
    if not path.exists():
        found = read(folder, molecules, seed)
        cache.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new.npz")  # savez would append its suffix to any other
        np.savez(new, features=features(found.numbers, found.positions), targets=found.targets)
        new.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["features"], arrays["targets"]


def _parts(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("qm9_part*.csv"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: expected qm9_part1.csv, qm9_part2.csv, … of the package qm9pack, found none"
        )
    return paths


def _rows(path: Path) -> Iterator[tuple[Path, int, list[str]]]:
    """The cells of `COLUMNS` of every row, with file and line."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        head = next(reader, [])
        missing = [column for column in COLUMNS if column not in head]
        if missing:
            raise ValueError(f"{path}: expected columns {', '.join(COLUMNS)}, {', '.join(missing)} not among {head}")
        places = [head.index(column) for column in COLUMNS]
        for row in reader:
            if len(row) != len(head):
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(head)} cells, got {len(row)}")
            yield path, reader.line_num, [row[place] for place in places]


def _molecule(cells: Sequence[str]) -> tuple[list[int], np.ndarray, list[float]]:
    """Element numbers, positions and targets from the cells of `COLUMNS`."""
    count, symbols, xyz, *properties = cells
    # Not JSON: ['C','H'].
    names = [name.strip().strip("'\"") for name in symbols.strip().strip("[]").split(",")]
    if len(names) > ATOMS or str(len(names)) != count.strip() or not ELEMENTS.keys() >= set(names):
        raise ValueError(f"Elements: expected {count} (N_atoms, up to {ATOMS}) of {', '.join(ELEMENTS)}, got {symbols}")
    try:
        positions = np.array(json.loads(re.sub(r"\.(?=[],])", ".0", xyz)), dtype=np.float64)  # JSON but for "0."
    except (TypeError, ValueError):
        positions = np.empty(0)
    if positions.shape != (len(names), 3) or not np.isfinite(positions).all():
        raise ValueError(f"XYZ_Ang: expected {count} (N_atoms) positions of three finite numbers, got {xyz[:200]}")
    targets = []
    for target, cell in zip(TARGETS, properties, strict=True):
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{target.column}: expected a finite number, got {cell!r}")
        atoms = math.fsum(names.count(name) * atom for name, atom in zip(ELEMENTS, target.atoms, strict=True))
        targets.append((value - atoms) * target.factor)
    return [ELEMENTS[name] for name in names], positions, targets


def _features(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    Z = numbers.astype(np.float64)
    counts = np.stack([(numbers == z).sum(1) for z in NUMBERS], 1)
    r = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    there = (Z[:, :, None] * Z[:, None] > 0) & ~np.eye(Z.shape[1], dtype=bool)
    r = np.where(there, r, np.inf)
    coulomb = Z[:, :, None] * Z[:, None] / r * BOHR
    coulomb[:, range(Z.shape[1]), range(Z.shape[1])] = 0.5 * Z**2.4
    spectrum = np.linalg.eigvalsh(coulomb)
    spectrum = np.take_along_axis(spectrum, np.argsort(-np.abs(spectrum), 1, kind="stable"), 1)

    i, j = np.triu_indices(Z.shape[1], 1)
    near = there[:, i, j]
    log_r = np.log(np.where(near, r[:, i, j], 1.0)).astype(np.float32)
    spacing = math.log(DISTANCES[1] / DISTANCES[0])
    bumps = np.exp(-0.5 * ((log_r[..., None] - np.log(DISTANCES).astype(np.float32)) / np.float32(spacing)) ** 2)
    low, high = np.minimum(numbers[:, i], numbers[:, j]), np.maximum(numbers[:, i], numbers[:, j])
    kinds = np.stack([near & (low == a) & (high == b) for a, b in PAIRS], 1).astype(np.float32)
    distances = kinds @ bumps  # [N, pairs of elements, pairs of atoms] @ [N, pairs of atoms, distances]
    return np.concatenate([counts, spectrum, distances.reshape(len(Z), -1)], 1)
