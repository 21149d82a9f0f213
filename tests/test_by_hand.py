"""The scripts that are run by hand for long: each of them for a moment, and with a defect that it has to find."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import busy_threads
import kill_moments
import pytest
import torch
from torch import nn

import reparam


def test_threads_for_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    assert busy_threads.main(["--minutes", "0.03"]) == 0
    assert ", 0 failures" in capsys.readouterr().out


def test_threads_that_are_disturbed_are_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disturbed(shared: Any, i: int) -> None:
        raise RuntimeError("a forward that was traced by another thread")

    monkeypatch.setattr(busy_threads, "VERBS", (disturbed,))
    assert busy_threads.main(["--minutes", "0.05"]) == 1
    assert "traced by another thread" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [busy_threads.plan, busy_threads.expand, busy_threads.explain, busy_threads.collapse])
def test_a_network_that_another_thread_runs_stays_as_it_is(verb: Any) -> None:
    """Its code is read in both modes; whoever runs it meanwhile sees neither, and its statistics stay."""
    shared = busy_threads.Shared()
    model, x, wanted = shared.plain[2], shared.inputs[2], shared.outputs[2]
    modes, seen, done = set[bool](), list[bool](), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                modes.add(model.training)
                seen.append(torch.equal(model(x), wanted))

    server = threading.Thread(target=serve)
    server.start()
    for _ in range(5):
        verb(shared, 2)
    done.set()
    server.join()
    assert seen
    assert all(seen)
    assert modes == {False}


@pytest.mark.parametrize("inplace", [False, True])
def test_random_numbers_that_another_thread_draws_are_not_the_network_s(inplace: bool) -> None:
    shared, done = busy_threads.Shared(), threading.Event()

    def draw() -> None:
        while not done.is_set():
            torch.rand(3)

    other = threading.Thread(target=draw)
    other.start()
    try:
        result = [reparam.collapse_with_report(copy.deepcopy(m), inplace=inplace)[1] for m in shared.plain]
    finally:
        done.set()
        other.join()
    assert [len(report.folds) for report in result] == shared.folds
    assert not any(report.taken_back for report in result)


BUSY, BOTH = threading.Lock(), threading.Event()


class Meets(nn.Module):
    """Says whether two threads were in its forward at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not BUSY.acquire(blocking=False):
            BOTH.set()
            return self.norm(self.conv(x))
        time.sleep(0.05)
        y = self.norm(self.conv(x))
        BUSY.release()
        return y


def test_verbs_of_several_threads_run_networks_one_after_the_other() -> None:
    """The generators that each seeds, and puts back, are the process's."""
    done = []
    models = [Meets().eval() for _ in range(3)]
    threads = [threading.Thread(target=lambda m=m: done.append(reparam.explain(m))) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
    assert not BOTH.is_set()


def test_a_server_that_still_loads_ends_with_its_parent(tmp_path: Path) -> None:
    """Its parent is gone before the libraries are there."""
    loading = "import zoo.orphan, pathlib, os, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {loading!r}]); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    victim = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    assert kill_moments.left_over(tmp_path.resolve()) == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "convert"])
def test_some_moments_of_a_command(verb: str, tmp_path: Path) -> None:
    assert kill_moments.main(["--each", "3", "--only", verb, "--out", str(tmp_path / "kills.md")]) == 0
    assert f"| `{verb}` |" in (tmp_path / "kills.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_half_written_file_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that has its name before it is whole."""
    verb = kill_moments.verbs(tmp_path)[0]

    def start(command: str, folder: Path) -> int:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "best.safetensors").write_bytes(b"half")
        return right(command, folder)

    right = kill_moments.start
    monkeypatch.setattr(kill_moments, "finish", lambda *_: 1.0)
    monkeypatch.setattr(kill_moments, "start", start)
    found = kill_moments.kill(
        kill_moments.Verb(verb.name, verb.command, verb.again, verb.there, lambda folder: None),
        random.Random(0).random(),
        None,
        tmp_path,
    )
    assert len(found.damaged) == 1
