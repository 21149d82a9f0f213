"""A folder of ONNX files, converted with the same outcomes and the same report as networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

import onnx
from test_onnx import make, model

import reparam.onnx
from passes.proof.compare import Verdict
from reparam.cli import app
from reparam.networks import UsageError
from reparam.sources import UnknownNameError
from zoo import convert_file
from zoo.job import FILES, Job, Settings
from zoo.journal import read
from zoo.outcome import Converted, Failed, Mismatch, NothingToDo, Refused
from zoo.run import convert_zoo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files: one that folds, one in which nothing does, one that is none."""
    files = tmp_path / "files"
    files.mkdir()
    onnx.save(make("two branches"), files / "branches.onnx")
    onnx.save(model("y = Relu (x)", {}), files / "nothing.onnx")
    (files / "torn.onnx").write_bytes(make("two branches").SerializeToString()[:200])
    return files


def test_a_folder_of_files(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["zoo", "convert", str(folder / "*.onnx"), "--out", str(out)])
    assert result.exit_code == 1, result.output
    outcomes = read(out).outcomes
    converted, nothing, torn = (outcomes[f"onnx:{name}"] for name in ("branches", "nothing", "torn"))
    assert isinstance(converted, Converted)
    assert isinstance(nothing, NothingToDo)
    assert isinstance(torn, Failed)
    assert "torn.onnx" in torn.error
    assert "\n" not in torn.error
    assert converted.folds == 1
    assert converted.proof.outputs == "whole"
    assert converted.latency is not None
    assert (converted.before.convs, converted.after.convs) == (2, 1)
    assert converted.file == "models/onnx/branches.onnx"
    assert reparam.onnx.verify(folder / "branches.onnx", out / converted.file).verdict is Verdict.EQUAL
    assert json.loads((out / "models/onnx/branches.json").read_text())["weights"]["file"].endswith("branches.onnx")
    assert (out / "report.html").is_file()
    shown = CliRunner().invoke(app, ["zoo", "show", str(out), "branches"])
    assert "whole outputs" in shown.output
    assert "nan" not in shown.output
    again = CliRunner().invoke(app, ["zoo", "convert", str(folder / "*.onnx"), "--out", str(out), "--resume"])
    assert "3/3" not in again.output


def test_files_beside_networks(folder: Path, tmp_path: Path) -> None:
    names = [str(folder / "branches.onnx"), "zoo:cifar_quick"]
    outcomes = list(convert_zoo(names, out=tmp_path / "run", save=False, latency=False))
    assert [outcome.spec for outcome in outcomes] == ["onnx:branches", "zoo:cifar_quick"]
    assert not (tmp_path / "run/models/onnx/branches.onnx").exists()


def test_what_files_cannot_have(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "branches.onnx")
    for options in ({"block": "acb"}, {"pretrained": True}, {"onnx": True}, {"plan": True}, {"weights": folder}):
        with pytest.raises(UsageError, match="ONNX file"):
            list(convert_zoo([path], out=tmp_path / "run", **options))  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="absent"):
        list(convert_zoo([str(folder / "absent*.onnx")]))
    (folder / "other").mkdir()
    onnx.save(make("two branches"), folder / "other/branches.onnx")
    with pytest.raises(UsageError, match="same name"):
        list(convert_zoo([path, str(folder / "other/branches.onnx")]))


def test_a_file_that_is_too_large_or_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(**options: object) -> Job:
        return Job(FILES, "branches", Settings(**options), None, str(folder / "branches.onnx"))  # type: ignore[arg-type]

    assert isinstance(convert_file.convert_file(job(max_parameters=10)), Refused)
    outcome = convert_file.convert_file(job(outputs=False))
    assert isinstance(outcome, Converted)
    assert outcome.proof.outputs == "none"

    def wrong(*_: object, **__: object) -> None:
        raise reparam.EquivalenceError("y differs", error=0.5)

    monkeypatch.setattr(convert_file.reparam.onnx, "collapse_with_report", wrong)
    assert isinstance(convert_file.convert_file(job()), Mismatch)
