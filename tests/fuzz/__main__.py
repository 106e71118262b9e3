"""Throws broken inputs at the real readers: make fuzz MINUTES=5 [SET="--seed 7 --targets tar image"].

An input has to give a result or an error of ours, within a time, a memory and a number of open files. One
that does not is saved as `TARGET-DIGEST.bin`, with what it did beside it; moved to `tests/fuzz/cases/`, it is
tried by every `make test`.
"""

import argparse
import sys
from pathlib import Path

from tests.fuzz.drive import drive
from tests.fuzz.targets import TARGETS

parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
parser.add_argument("--minutes", type=float, default=5.0)
parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs")
parser.add_argument("--targets", nargs="*", default=sorted(TARGETS), choices=sorted(TARGETS))
parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where findings are saved")
given = parser.parse_args()
found = drive(given.targets, given.seed, given.minutes * 60, given.out)
by_target = ", ".join(f"{name} {number:,}" for name, number in sorted(found.tried.items()))
print(f"{sum(found.tried.values()):,} inputs: {by_target}")
for finding in found.findings:
    print(f"{finding.path}: {finding.text}")
sys.exit(1 if found.findings else 0)
