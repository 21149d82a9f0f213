"""A full or read-only disk: one line that names file and fix, exit status 1, no partial file, the old one kept."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from safetensors import SafetensorError
from torch import nn
from typer.testing import CliRunner

import reparam
from reparam import cli, files
from reparam.disk import FileError, replace_file, scratch_folder
from zoo.convert import convert
from zoo.job import Job, Settings
from zoo.journal import Journal
from zoo.outcome import Failed, NothingToDo
from zoo.render import write_text
from zoo.train import data
from zoo.train.config import Config
from zoo.train.plots import learning_curves
from zoo.train.trainer import train

pytest_plugins = ("toy_package", "troublesome_package")

FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


def snapshot(folder: Path) -> dict[Path, bytes]:
    """The files by content; a lock has the number of the last process that held it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def run(*arguments: object) -> str:
    """Run the command line, which has to fail in one line."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.output.rstrip().endswith(line)
    return line


# ------------------------------------------------------------------------------------------------ any writer


def _save(suffix: str) -> Callable[[Path], Any]:
    return lambda folder: files.save_model(nn.Linear(50, 50), folder / f"net{suffix}")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": _save(".safetensors"),
    "torch": _save(".pt"),
    "text": lambda folder: write_text(folder / "report.html", "text"),
    "figure": lambda folder: learning_curves({"plain": ([1, 2], np.ones((1, 2)))}, folder / "curves"),
}


def _refuse(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


MOMENTS = [(Path, "touch"), (Path, "chmod"), (os, "fsync"), (os, "replace")]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment[1])
@pytest.mark.parametrize("number", [FULL, READ_ONLY, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_whenever_the_disk_refuses_the_old_file_is_there_and_no_other(
    number: int, moment: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        before = snapshot(folder)
        with monkeypatch.context() as patch:
            patch.setattr(*moment, _refuse(number))
            with pytest.raises(FileError) as caught:
                write(folder)
        assert snapshot(folder) == before
        message = str(caught.value)
        assert any(message.startswith(f"{path} cannot be written: {os.strerror(number)}; ") for path in before)
        assert "\n" not in message


def test_a_disk_that_refuses_to_remove_as_well_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("touch", "unlink"):
        monkeypatch.setattr(Path, name, _refuse(READ_ONLY))
    with pytest.raises(FileError, match=r"Read-only file system; write to a disk that is not read-only"):
        write_text(tmp_path / "a.txt", "text")


def test_what_libraries_make_of_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FileError, match=r"net\.safetensors cannot be written: No space left on device; make room"):
        WRITERS["safetensors"](tmp_path)
    assert snapshot(tmp_path) == {}


def test_errors_of_other_kinds_stay_what_they_are(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "a", wrong)
    assert snapshot(tmp_path) == {}


# ------------------------------------------------------------------------------------------------ commands


TOY = ("--model", "zoo:mnist_toy", "--data", "synthetic", "--epochs", 2, "--batch", 8)
CONFIG = Config(model="zoo:mnist_toy", data="synthetic", epochs=2, batch=8)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SYNTHETIC", {"train": 24, "test": 10})


def fill(folder: Path) -> None:
    """What earlier commands have left: networks, a run of training that was stopped, one of conversion, its report."""
    for suffix in (".safetensors", ".pt"):
        files.save_model(nn.Linear(2, 2), folder / f"net{suffix}")
    train(CONFIG, folder / "run", stop_after=1)
    with Journal(folder / "zoo") as journal:
        journal.append("run", {"settings": vars(Settings()), "specs": ["trouble:linear"]})
        journal.append("outcome", NothingToDo(name="linear", source="trouble", reason="nothing").to_json())
    write_text(folder / "zoo" / "report.html", "old")


def commands(folder: Path, toy: str) -> dict[str, tuple[object, ...]]:
    """Every command that writes; the last word of its line is the path that the message has to name."""
    return {
        "collapse": ("collapse", toy, "-o", folder / "net.safetensors"),
        "collapse to .pt": ("collapse", toy, "-o", folder / "net.pt"),
        "expand": ("expand", toy, "-b", "acb", "-o", folder / "net.safetensors"),
        "train, going on": ("train", *TOY, "--out", folder / "run"),
        "train": ("train", *TOY, "--out", folder / "fresh"),
        "convert": ("convert", folder / "run", "-o", folder / "net.pt"),
        "zoo convert": ("zoo", "convert", "trouble:block", "--out", folder / "new"),
        "zoo convert, going on": ("zoo", "convert", "trouble:block", "--resume", "--out", folder / "zoo"),
        "report": ("zoo", "report", folder / "zoo"),
        "summary": ("zoo", "summary", folder / "zoo", "--out", folder / "zoo.md"),
    }


def check_commands(folder: Path, toy: str, reason: str, without: tuple[str, ...] = ()) -> None:
    before = snapshot(folder)
    for name, arguments in commands(folder, toy).items():
        if name in without:
            continue
        line = run(*arguments)
        assert str(arguments[-1]) in line, name
        assert reason in line, name
        after = snapshot(folder)
        assert {path: after.get(path) for path in before} == before, name
        assert not [path for path in after.keys() - before.keys() if after[path]], name


@pytest.mark.parametrize("number", [FULL, READ_ONLY])
def test_each_command_that_meets_it_ends_in_one_line(
    number: int, toy: str, trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    fill(folder)
    monkeypatch.setattr(os, "fsync", _refuse(number))
    check_commands(folder, toy, os.strerror(number))


def test_a_read_only_folder_is_told_before_the_work(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(reparam, "collapse_with_report", None)
    assert "net.pt cannot be written: " in run("collapse", toy, "-o", tmp_path / "net.pt")


# ------------------------------------------------------------------------------------------------ a real disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes; only who may mount has one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount(folder, "size=4m"):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, options: str) -> int:
    try:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], stderr=-3).returncode
    except OSError:
        return 1


def test_a_full_disk(disk: Path, toy: str, trouble: Path) -> None:
    fill(disk)
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)) == 4096:
            pass
    # The last page of the journal still has room for lines.
    check_commands(disk, toy, "No space left on device; make room there", without=("zoo convert, going on",))
    before = snapshot(disk)
    outcome = convert(Job("trouble", "block", folder=disk / "zoo"))
    assert isinstance(outcome, Failed)
    assert "No space left on device; make room there" in outcome.error
    assert not outcome.traceback
    assert snapshot(disk) == before


def test_a_read_only_disk(disk: Path, toy: str, trouble: Path) -> None:
    fill(disk)
    assert mount(disk, "remount,ro") == 0
    check_commands(disk, toy, "Read-only file system; write to a disk that is not read-only")


def test_what_a_killed_process_left_beside_a_file_goes(tmp_path: Path) -> None:
    """What a living one is writing stays, and so does anything that only looks alike."""
    target = tmp_path / "net.safetensors"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f".{target.name}.{gone.pid}.{name}.tmp" for name in ("0a1b", "folder")]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    (left[1] / target.name).write_bytes(b"half")
    others = [
        tmp_path / f".{target.name}.{os.getpid()}.0a1b.tmp",
        tmp_path / f".other.safetensors.{gone.pid}.0a1b.tmp",
        tmp_path / f".{target.name}.words.0a1b.tmp",
    ]
    for path in others:
        path.write_bytes(b"half")
    replace_file(target, lambda path: path.write_bytes(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])
    with scratch_folder(target) as folder:
        assert folder.is_dir()
    assert not folder.exists()
