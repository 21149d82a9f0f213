"""The README is true: its Python runs, and its table of blocks is complete."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reparam
from passes.blocks.kit import registry
from reparam import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BLOCKS", reparam.blocks())  # the example's block is gone after
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 2
    names: dict[str, Any] = {"__name__": "readme"}
    for code in examples:
        exec(compile(code, "README.md", "exec"), names)
    assert "lowrank" in reparam.blocks()


def test_five_commands_on_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "torchvision", "accelerate"):
        pytest.importorskip(package)
    source = Path(__file__).parent.parent / "docs" / "net.py"
    assert len(source.read_text().splitlines()) <= 30
    (tmp_path / "docs").mkdir()
    shutil.copy(source, tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = [
        line.partition(" # ")[0] for line in README.splitlines() if re.match("reparam .*(docs/net.py|runs/net)", line)
    ]
    commands = [shlex.split(line)[1:] for line in lines]
    assert [next(w for w in words if w[0] != "-") for words in commands] == [
        "plan", "expand", "train", "collapse", "verify",
    ]  # fmt: skip
    for words in commands:
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
    assert "equal" in done.output


def test_a_new_block_takes_at_most_twenty_lines() -> None:
    code = re.search(r"(@reparam.block.*?)\n\n\n", README, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 20


def test_every_block_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert rows == {name for name, info in reparam.blocks().items() if info.declare.__module__.startswith("passes.")}


def test_it_stays_short() -> None:
    assert len(README.splitlines()) < 200
