"""How close is this code to the authors'? One line per golden file and quantity.

    python benchmarks/golden_table.py [FOLDER] [--json FILE]

FOLDER holds golden files (by default all folders tests/data/golden*; others of the same kinds,
with other seeds and shapes, work as well). Exit code 1 when an error is above its tolerance, 2
without files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import common
import torch

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS.parent))

# They lie with the tests that use them.
from tests.support.golden.checks import check_folder  # noqa: E402
from tests.support.golden.methods import kinds_of  # noqa: E402


def main() -> None:
    """Recompute, print, and say whether everything holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--json", type=Path, help="also write the table here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folders = [chosen.folder] if chosen.folder else sorted((TESTS / "data").glob("golden*"))
    found = [
        (file.name, check)
        for folder in folders
        for kinds in kinds_of(folder)
        for file, check in check_folder(folder, kinds)
    ]
    if not found:
        print(f"no golden files in {chosen.folder or TESTS / 'data'}", file=sys.stderr)
        sys.exit(2)
    common.table(
        ["file", "quantity", "largest error", "tolerance", ""],
        [
            [name, c.quantity, f"{c.error:.1e}", f"{c.tolerance:.1e}", "" if c.holds else "FAILS"]
            for name, c in found
        ],
    )
    failed = [(name, check) for name, check in found if not check.holds]
    files = len({name for name, _ in found})
    print(f"{files} files, {len(found)} quantities, {len(failed)} above their tolerance")
    if chosen.json:
        lines = [{"file": name, **vars(check), "holds": check.holds} for name, check in found]
        chosen.json.write_text(json.dumps(lines, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
