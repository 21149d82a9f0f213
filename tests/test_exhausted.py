"""Memory that runs out is told as that: by the commands in one line, by a run of many models in the model's row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors
import torch

from reparam import ReparamError, files
from reparam.exhausted import WORDS, causes, was_exhausted
from zoo import job as jobs
from zoo import worker
from zoo.job import Job, Work, attempt
from zoo.journal import read
from zoo.outcome import Failed, Outcome, OutOfMemory

pytest_plugins = ("troublesome_package",)

TORCH = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def wrapped(error: Exception) -> Exception:
    try:
        raise ReparamError("it cannot be copied") from error
    except ReparamError as outer:
        return outer


EXHAUSTED: tuple[Exception, ...] = (
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f8")),
    RuntimeError(f"{TORCH} 34359738368 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    OSError(12, "Cannot allocate memory"),
)


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
def test_what_libraries_raise_is_recognised_also_behind_errors_of_ours(error: Exception) -> None:
    assert was_exhausted(error)
    assert was_exhausted(wrapped(error))
    assert not was_exhausted(wrapped(ValueError("out of cheese")))


def test_an_error_that_is_its_own_cause_is_looked_at_once() -> None:
    error, other = ValueError("out of cheese"), ValueError("out of wine")
    error.__cause__, other.__cause__ = other, error
    assert list(islice(causes(error), 9)) == [error, other]
    error.__cause__ = error
    assert not was_exhausted(error)


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("ours", [False, True])
def test_a_row_says_out_of_memory_in_any_stage(error: Exception, ours: bool) -> None:
    class Exhausted(Work):
        def run(self) -> Outcome:
            self.stage = "collapse"  # where errors of ours are refusals
            raise wrapped(error) if ours else error

    outcome = attempt(Exhausted(Job("trouble", "block"), jobs.silent))
    assert isinstance(outcome, OutOfMemory)
    assert outcome.sentence() == "collapse: the system gave no more memory"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".h5"])
def test_a_file_for_which_there_is_no_memory_is_named(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **options: Any) -> Any:
        raise RuntimeError(f"{TORCH} 8 bytes")

    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"")
    for module, name in ((torch, "load"), (safetensors, "safe_open"), (h5py, "File")):
        monkeypatch.setattr(module, name, exhausted)
    with pytest.raises(files.FileError, match=f"net{suffix} needs more memory than there is"):
        files.load_state(path)


# ------------------------------------------------------------------------------------------------ a process that died


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        (-signal.SIGKILL, "", OutOfMemory),  # as a cgroup's limit ends it
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", OutOfMemory),
        (1, "Traceback\nMemoryError\n", OutOfMemory),
        (-signal.SIGABRT, "Fatal Python error: Aborted", Failed),
        (3, "", Failed),
    ],
)
def test_how_a_process_ended_says_whether_memory_ran_out(
    code: int, words: str, kind: type[Outcome], tmp_path: Path
) -> None:
    job = Job("trouble", "block", folder=tmp_path)
    log = worker._log_of(job)
    assert log is not None
    log.parent.mkdir()
    log.write_text(words)
    process: Any = SimpleNamespace(exitcode=code)
    outcome = worker._died(worker.Running(job, process, None, log))  # type: ignore[arg-type]
    assert type(outcome) is kind
    assert "\n" not in outcome.sentence()


# ------------------------------------------------------------------------------------------------ a real limit

SWEEP = """
import ctypes, gc, json, resource, sys
from pathlib import Path
from typer.testing import CliRunner
from reparam import cli
from zoo.convert import convert
from zoo.job import Job

def held():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def limited(megabytes, work):
    resource.setrlimit(resource.RLIMIT_AS, (held() + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

spec, out = "timm:resnet18,num_classes=10", Path(sys.argv[1])
def collapse():
    return CliRunner().invoke(cli.app, ["collapse", spec, "-o", str(out), "--folds-only"])
collapse()
whole = out.read_bytes()
for megabytes in (2, 30, 70, 110, 20000):
    result = limited(megabytes, collapse)
    told = [line for line in result.output.splitlines() if not line.startswith("note")][-1]
    kept = out.read_bytes() == whole and len(list(out.parent.iterdir())) == 1
    outcome = limited(megabytes, lambda: convert(Job("timm", "resnet18")))
    print(json.dumps([result.exit_code, told, kept, outcome.kind, outcome.sentence()]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs to know what a process holds")
def test_under_a_real_limit_it_is_one_line_and_a_row(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, tmp_path / "net.safetensors"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for status, told, kept, kind, sentence in lines:
        assert kept or status == 0
        assert told == f"error: {WORDS}" if status else "wrote" in told
        assert kind in ("out_of_memory", "converted"), sentence
    # How much is too little differs from machine to machine, but for the ends.
    assert [(status, kind) for status, _, _, kind, _ in (lines[0], lines[-1])] == [
        (1, "out_of_memory"),
        (0, "converted"),
    ]


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A control group of 2 GB, in either version of the kernel's interface; skips where none can be made."""
    for parent, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(parent, f"reparam-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / limit).exists():  # an ordinary folder, or one for other resources
                continue
            (group / limit).write_text("2000000000")
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


def assert_greedy_row(command: str, trouble: Path, folder: Path) -> None:
    """Two models are converted, of which the first takes all memory."""
    words = "-m reparam zoo convert trouble:greedy trouble:linear --out run"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exec $0 {words}", sys.executable],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{trouble}:{Path.cwd()}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert {name: outcome.kind for name, outcome in read(folder / "run").outcomes.items()} == {
        "trouble:greedy": "out_of_memory",
        "trouble:linear": "nothing_to_do",
    }
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_under_ulimit_goes_on_with_the_next_model(trouble: Path, tmp_path: Path) -> None:
    assert_greedy_row("ulimit -v 8000000", trouble, tmp_path)


@pytest.mark.slow
def test_so_does_one_in_a_control_group(limited_group: Path, trouble: Path, tmp_path: Path) -> None:
    """Here the kernel kills the process that took too much."""
    assert_greedy_row(f"echo $$ > {limited_group}/cgroup.procs", trouble, tmp_path)
