"""Structures of other people fold unseen: each of the page that ``tests/structures.py`` writes, and the page itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import structures
import torch
from blocks import ECB, lively
from structures import STRUCTURES, Structure, measure
from torch import nn

import reparam

DOCS = Path(__file__).parents[1] / "docs" / "structures.md"


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda each: each.name)
def test_each_becomes_one_layer(structure: Structure) -> None:
    found = measure(structure)
    assert found.becomes in ("Conv2d", "Linear"), found.left
    assert found.error < 1e-13
    assert found.numbers[1] <= found.numbers[0]


def test_a_structure_that_does_not_fold_is_seen() -> None:
    """A 3x3 behind a zero-padded 3x3 is none of one layer."""
    row = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    found = measure(Structure("two in a row", "nobody", lambda: row))
    assert found.becomes == "Conv2d + Conv2d"
    assert found.layers == (2, 2)


def test_the_page_has_every_structure() -> None:
    """Written by its command; errors differ in their last digit from machine to machine, what is folded does not."""
    rows = [line.split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if " → " in line]
    assert [row[0].removeprefix("| ") for row in rows] == [each.name for each in STRUCTURES]
    assert {row[4] for row in rows} == {"Conv2d", "Linear"}
    assert "python tests/structures.py --out docs/structures.md" in DOCS.read_text(encoding="utf-8")
    assert structures.__doc__ is not None


def test_a_row_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "STRUCTURES", [each for each in STRUCTURES if each.name.startswith("RepLK")])
    (row,) = [line for line in structures.page().splitlines() if " → " in line]
    assert re.fullmatch(
        r"\| RepLK: 13x13 \+ 5x5 \| RepLKNet, CVPR 2022 \| 4 → 1 \| 1,616 → 1,360 \| Conv2d \| \de-1\d \|", row
    )


@pytest.mark.parametrize("seed", range(5))
def test_edge_filters_are_read_whatever_their_biases(seed: int) -> None:
    """What a border of biases leaves behind a filter that sums to zero is rounding, and no part of its kernel."""
    torch.manual_seed(seed)
    folded = reparam.collapse(nn.Sequential(lively(ECB(4 * (seed + 1)))))
    assert type(folded[0]) is nn.Conv2d  # type: ignore[index]
