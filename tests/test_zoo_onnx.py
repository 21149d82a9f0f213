"""Collapsed networks as ONNX files: what the file computes, what it cannot hold, and what is said then."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from reparam import files, sources
from reparam.cli import app
from reparam.networks import UsageError
from zoo import onnx_file
from zoo.convert import convert
from zoo.inputs import View
from zoo.job import Job, Settings, remove_files
from zoo.journal import Folder, read
from zoo.onnx_file import ExportError, write_onnx
from zoo.outcome import Converted, Mismatch, from_json
from zoo.run import convert_zoo

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytest_plugins = ("troublesome_package",)

TOLERANCE = 64 * torch.finfo(torch.float32).eps


class Moody(nn.Module):
    """What it does depends on the numbers that come in, which no exporter can write down."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.sum().item() > 0 else y - 1


class OneByOne(nn.Module):
    """Takes one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)).reshape(1, 4)


class Picky(nn.Module):
    """Takes images of one size that is not the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 6 * 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


def job(name: str, folder: Path | None) -> Job:
    return Job("trouble", name, Settings(onnx=True, latency=False), folder)


def outputs(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, fed)]


def left(folder: Path) -> list[str]:
    """Names of the files that a run folder holds."""
    return sorted(path.name for path in Folder(folder).models.rglob("*") if path.is_file())


def test_the_file_computes_what_the_collapsed_network_does_for_any_batch(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Converted), outcome
    assert outcome.onnx_file == "models/trouble/block.onnx"
    assert outcome.file is not None
    assert outcome.notes == ()
    assert "onnx" in outcome.seconds
    assert outcome.details is not None
    assert from_json(json.loads((tmp_path / outcome.details).read_text())["outcome"]) == outcome
    network = files.load_model(tmp_path / outcome.file)
    x = torch.randn(3, 3, 224, 224)
    (got,) = outputs(tmp_path / outcome.onnx_file, x)
    with torch.no_grad():
        torch.testing.assert_close(got, network(x))
    assert left(tmp_path) == ["block.json", "block.onnx", "block.safetensors"]


def test_without_the_option_there_is_no_file(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(Job("trouble", "block", Settings(latency=False), tmp_path))
    assert isinstance(outcome, Converted)
    assert outcome.onnx_file is None
    assert left(tmp_path) == ["block.json", "block.safetensors"]


def test_a_file_with_a_wrong_weight_is_a_mismatch_and_not_kept(
    trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.onnx.export

    def wrong(model: Any, *args: Any, **options: Any) -> Any:
        damaged = copy.deepcopy(model)
        with torch.no_grad():
            damaged.head.weight[0, 0] += 1e-3
        return right(damaged, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Mismatch), outcome
    assert outcome.error > outcome.allowed > 0
    assert "ONNX" in outcome.message
    assert left(tmp_path) == []


def test_a_network_that_cannot_be_exported_is_converted_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "create", lambda spec, **_: Moody())
    outcome = convert(job("moody", tmp_path))
    assert isinstance(outcome, Converted), outcome
    assert outcome.onnx_file is None
    (note,) = outcome.notes
    assert note.startswith("no ONNX file: the ONNX exporter fails: GuardOnDataDependentSymNode")
    assert left(tmp_path) == ["moody.json", "moody.safetensors"]


def test_what_onnxruntime_cannot_run_is_a_note(trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Converted), outcome
    assert outcome.notes == ("no ONNX file: onnxruntime fails: ValueError: no such kernel",)
    assert left(tmp_path) == ["block.json", "block.safetensors"]


def test_without_outputs_to_compare_there_is_no_file(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("detector", tmp_path))
    assert isinstance(outcome, Converted), outcome
    assert outcome.onnx_file is None
    assert "could not be compared" in outcome.notes[0]


def test_a_network_for_one_sample_gives_a_file_for_one_sample(tmp_path: Path) -> None:
    model, path = OneByOne().eval(), tmp_path / "one.onnx"
    note = write_onnx(model, View((3, 8, 8)), TOLERANCE, path)
    assert note.startswith("the ONNX file takes one sample at a time")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(outputs(path, x)[0], model(x))


def test_a_network_that_rejects_the_usual_size_is_exported_at_the_size_of_its_proof(tmp_path: Path) -> None:
    path = tmp_path / "picky.onnx"
    assert write_onnx(Picky().eval(), View((3, 8, 8)), TOLERANCE, path) == ""
    assert outputs(path, torch.randn(2, 3, 8, 8))[0].shape == (2, 2)


def test_a_network_beyond_what_one_file_holds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    with pytest.raises(ExportError, match="cannot hold"):
        write_onnx(Picky().eval(), View((3, 8, 8)), TOLERANCE, tmp_path / "picky.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(files.FileError, match="cannot be written"):
        write_onnx(Picky().eval(), View((3, 8, 8)), TOLERANCE, tmp_path / "nowhere" / "picky.onnx")


def test_files_of_a_model_that_was_not_converted_are_removed(tmp_path: Path) -> None:
    path = job("block", tmp_path).path(".onnx")
    assert path is not None
    path.parent.mkdir(parents=True)
    path.touch()
    remove_files(job("block", tmp_path))
    assert left(tmp_path) == []


# ------------------------------------------------------------------------------------------------ the verbs


def test_without_the_packages_it_is_a_usage_error_before_any_work(
    trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = onnx_file.find_spec
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"need onnxruntime, .* pip install 'reparam\[onnx\]'"):
        convert_zoo(["block"], source="trouble", out=out, onnx=True)
    result = CliRunner().invoke(app, ["zoo", "convert", "trouble:block", "--out", str(out), "--onnx"])
    assert result.exit_code == 2, result.output
    assert "onnxruntime" in result.output
    assert not out.exists()


@pytest.mark.parametrize("options", [{"out": None}, {"save": False}, {"outputs": False}, {"plan": True}])
def test_options_that_leave_nothing_to_write_are_a_usage_error(
    trouble: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="--onnx"):
        convert_zoo(["block"], source="trouble", onnx=True, **{"out": tmp_path / "run", **options})


@pytest.mark.slow
def test_the_command_line_writes_and_links_the_file(trouble: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["zoo", "convert", "trouble:block", "--out", str(out), "--onnx"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert read(out).runs[0]["settings"]["onnx"] is True
    assert (out / "models" / "trouble" / "block.onnx").is_file()
    assert "models/trouble/block.onnx" in (out / "report.html").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["zoo", "show", str(out), "block"])
    assert "file: models/trouble/block.onnx" in shown.output
