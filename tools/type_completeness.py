"""Says how much of the public interface has known types (`pyright --verifytypes`), and exits 1 below a bound.

python tools/type_completeness.py [--least 95]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def verify() -> dict:
    """Pyright's report on the package of this checkout."""
    # It asks the first Python on the PATH where torch is, and does not see through the hook of an editable install.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pyright", "--verifytypes", "fastmtl", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["typeCompleteness"]
    except (json.JSONDecodeError, KeyError):
        raise SystemExit(f"pyright: {done.stdout}{done.stderr}") from None


def main() -> int:
    """Prints the symbols whose types are not known, and the score; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--least", type=float, default=95.0, help="percent of the symbols (default: %(default)s)")
    least = parser.parse_args().least
    found = verify()
    score = 100 * found["completenessScore"]
    for symbol in found["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            print(symbol["name"])
    print(f"types of {score:.1f} % of the public symbols are known, expected at least {least:g} %")
    return int(score < least)


if __name__ == "__main__":
    raise SystemExit(main())
