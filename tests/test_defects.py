"""Defects to plant (``plant_defects.py``): each still has its place, and one of every kind of check is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from defects import DEFECTS, Defect, place_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_every_defect_has_one_place_and_changes_it(defect: Defect) -> None:
    path = place_of(defect, ROOT)
    assert defect.new != defect.old
    compile(path.read_text().replace(defect.old, defect.new), path, "exec")


def test_names_are_unique() -> None:
    assert max(Counter(str(defect) for defect in DEFECTS).values()) == 1


FEW = "eps forgotten|hooks are not seen"
MORE = "extent one|read outside dies|operations are not seen|were not traced"


@pytest.mark.parametrize(
    ("names", "networks", "count"),
    [
        (FEW, "conv_norm,hooked", 2),
        pytest.param(MORE, "conv_norm,middle_returned,in_place_between,options_of_one", 4, marks=pytest.mark.slow),
    ],
    ids=["two", "more"],
)
def test_planted_defects_are_noticed(names: str, networks: str, count: int) -> None:
    """A few of different parts, each on a network that shows it."""
    command = [sys.executable, "tests/plant_defects.py", "--no-tests", "--networks", networks, "--only", names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} defects" in done.stdout
