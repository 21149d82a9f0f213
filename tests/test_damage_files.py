"""The script that damages files: it goes through every class, and says so where a reader raises."""

from __future__ import annotations

import json
from pathlib import Path

import damage_files
import pytest

from reparam import files


def test_no_class_of_damage_ends_in_a_raw_exception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert damage_files.main(["--each", "1", "--seed", "3", "--out", str(tmp_path / "damage.md")]) == 0
    text = (tmp_path / "damage.md").read_text(encoding="utf-8")
    assert "0 raw exceptions" in text
    assert text in capsys.readouterr().out


def test_a_reader_that_raises_is_counted_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(path: Path) -> None:
        json.loads(path.read_bytes())

    monkeypatch.setattr(files, "load_state", careless)
    monkeypatch.setattr(damage_files, "journals", lambda folder: iter(()))
    monkeypatch.setattr(damage_files, "states", lambda folder: iter(()))
    assert damage_files.main(["--each", "1"]) == 1
    assert ".safetensors, all, empty: JSONDecodeError" in capsys.readouterr().out


def test_the_page_is_that_of_a_whole_run() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "damage.md").read_text(encoding="utf-8")
    count = int(text.split(" files: ")[0].rsplit("\n", 1)[1].replace(",", ""))
    assert count >= 1000
    assert ", 0 raw exceptions." in text
