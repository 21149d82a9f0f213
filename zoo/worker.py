"""Models in processes of their own, each with a limit of time and of memory; what one does costs one row.

Processes are forked from a server that has the model libraries loaded, so that a model does not pay for their import. A
process that dies, hangs or takes too much memory is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from reparam import ReparamError
from reparam.disk import make_folder
from reparam.exhausted import says_exhausted
from zoo import memory
from zoo.convert import convert
from zoo.job import FILES, Job, Tell, one_line, remove_files, versions
from zoo.journal import Folder
from zoo.outcome import Failed, Outcome, OutOfMemory, TimedOut, from_json
from zoo.plan import plan
from zoo.render import processor

__all__ = ["Engine", "Limits", "Running", "Underway", "convert_here", "here", "last_words", "now"]

PRELOAD = ["zoo.orphan", "zoo.worker", "zoo.warm"]
"""What the server imports once for all processes; first of all, what looks after it meanwhile."""
POLL = 0.05
"""Seconds between two looks at memory and time."""
GRACE = 10.0
"""Seconds that a process may take to end after it has given its outcome."""
TAIL = 4000
"""Characters kept of what a process wrote before it died."""
GIB = 1 << 30
CHILDREN = threading.Lock()
"""Held while processes are started, looked at and ended: each start makes multiprocessing look at all of them, and two
threads, such as a cluster's worker has, would take an exit status from each other."""


def now() -> str:
    """This moment as the journal writes it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Limits:
    """What processes may take.

    Args:
        jobs: processes at a time.
        timeout: seconds for one model.
        memory: GiB for one model, beyond what the libraries take; None leaves it to the system.
    """

    jobs: int = 1
    timeout: float = 900.0
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1 or not self.timeout > 0 or (self.memory is not None and not self.memory > 0):
            raise ReparamError(f"jobs, timeout and memory must be positive, got {self}")


@dataclass
class Underway:
    """A model that is being converted: where it stands and, once ``base`` is known, what it holds beyond that."""

    job: Job
    stage: str = field(default="start", kw_only=True)
    base: int | None = field(default=None, kw_only=True)
    peak: int = field(default=0, kw_only=True)
    began: float = field(default_factory=time.monotonic, kw_only=True)

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.began


@dataclass
class Running(Underway):
    """The same with its process on this machine."""

    process: Any
    pipe: Connection
    log: Path | None
    started: str = field(default_factory=now)
    outcome: Outcome | None = None
    closed: bool = False


@dataclass(frozen=True)
class Engine:
    """Where the models of a run are converted.

    Args:
        machine: in words, for the journal.
        jobs: models at a time.
        convert: yields the outcome of each model as it ends and, often, None between them. It keeps the list up to
            date with what is being converted. Whatever ends it ends that too.
    """

    machine: str
    jobs: int
    convert: Callable[[Sequence[Job], Limits, list[Underway]], Iterator[Outcome | None]]


def here(jobs: int) -> Engine:
    """Processes of this machine."""
    return Engine(f"{processor()}, {os.cpu_count()} cores", jobs, convert_here)


def convert_here(todo: Sequence[Job], limits: Limits, running: list[Running]) -> Iterator[Outcome | None]:
    """Keep ``limits.jobs`` processes at work until all is done; see :class:`Engine`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting = list(reversed(todo))
    try:
        while waiting or running:
            while waiting and len(running) < limits.jobs:
                with CHILDREN:
                    running.append(_start(context, waiting.pop()))
            yield None
            wait([each.pipe for each in running if not each.closed] or [running[0].process.sentinel], timeout=POLL)
            for each in list(running):
                with CHILDREN:
                    outcome = _look(each, limits)
                    if outcome is not None:
                        _finish(each, outcome)
                if outcome is not None:
                    running.remove(each)
                    yield outcome
    finally:
        with CHILDREN:
            for each in running:
                _kill(each)
                _clear(each)


def _start(context: Any, job: Job) -> Running:
    ours, theirs = context.Pipe(duplex=False)
    log = _log_of(job)
    if log is not None:
        make_folder(log.parent)
    process = context.Process(target=_child, args=(job, theirs, log, dict(os.environ)), daemon=False, name=job.spec)
    process.start()
    theirs.close()
    return Running(job, process, ours, log)


def _log_of(job: Job) -> Path | None:
    """The file that takes what the model's process writes to the terminal."""
    if job.folder is None:
        return None
    folder = Folder(job.folder)
    return folder.running / folder.of(job.source, job.name, ".log").name


def _look(each: Running, limits: Limits) -> Outcome | None:
    """The outcome of a process if it has ended or has to."""
    _receive(each)
    if each.outcome is not None:
        return each.outcome
    held = memory.resident(each.process.pid)
    if each.base is not None:
        each.peak = max(each.peak, held - each.base)
    if each.closed or not each.process.is_alive():
        _receive(each)  # what it said last
        each.process.join(GRACE)
        return each.outcome or _died(each)
    if each.seconds > limits.timeout:
        return TimedOut(**_common(each), stage=each.stage, limit=limits.timeout)
    if limits.memory is not None and each.peak > limits.memory * GIB:
        message = f"more than {limits.memory:g} GiB"
        return OutOfMemory(**_common(each), stage=each.stage, limit=limits.memory, message=message)
    return None


def _receive(each: Running) -> None:
    """Take what the process has said."""
    try:
        while not each.closed and each.pipe.poll():
            word, value = each.pipe.recv()
            if word == "base":
                each.base = value
            elif word == "stage":
                each.stage = value
            elif word == "outcome":
                each.outcome = from_json(value)
    except (EOFError, OSError):
        each.closed = True


def _died(each: Running) -> Outcome:
    """What a process's end without an outcome means."""
    code, words = each.process.exitcode, last_words(each.job)
    if code == -signal.SIGKILL:
        message = "killed by the system, which does so when memory runs out"
        return OutOfMemory(**_common(each), stage=each.stage, message=message)
    text = f"exit status {code}"
    if code is not None and code < 0:
        text = f"killed by {signal.Signals(-code).name}"
    if says_exhausted(words):
        return OutOfMemory(**_common(each), stage=each.stage, message=f"its process ended for want of memory: {text}")
    return Failed(**_common(each), stage=each.stage, error=f"its process ended: {text}", traceback=words)


def _common(each: Running) -> dict[str, Any]:
    return {
        "name": each.job.name,
        "source": each.job.source,
        "started": each.started,
        "seconds": {"all": round(each.seconds, 4)},
        "peak": each.peak,
        "versions": versions(),
    }


def _finish(each: Running, outcome: Outcome) -> None:
    """End the process, and leave no file of a model that was not converted."""
    if each.outcome is not None:
        each.process.join(GRACE)
    _kill(each)
    _clear(each)
    if outcome.kind != "converted":
        remove_files(each.job)


def _kill(each: Running) -> None:
    """End the process and all that it has started, which may outlive it."""
    if each.base is not None:  # it has a session of its own by then
        _end_group(each.process.pid)
    if each.process.is_alive():
        each.process.kill()
    each.process.join()


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _clear(each: Running) -> None:
    each.pipe.close()
    each.process.close()
    if each.log is not None:
        with contextlib.suppress(OSError):  # a disk that has become read-only; the next run removes it
            each.log.unlink(missing_ok=True)


def last_words(job: Job) -> str:
    """The end of what the model's process wrote to the terminal; the file that has it is removed."""
    log = _log_of(job)
    if log is None:
        return ""
    with contextlib.suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        log.unlink()
        return text
    return ""


# ------------------------------------------------------------------------------------------------- in the process


def _child(job: Job, pipe: Connection, log: Path | None, environment: dict[str, str]) -> None:
    """What runs in a model's process. The server's environment is that of the first run that this program made."""
    import faulthandler

    import torch

    os.environ.update(environment)
    _send_output_to(log)
    faulthandler.enable()
    os.setsid()  # what the model starts is ended with it
    _guard(pipe)
    with contextlib.suppress(OSError):
        # When the system runs out of memory, this process is to go, not the run.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(1)
    gc.freeze()  # what the libraries hold need not be looked through each time that garbage is collected
    pipe.send(("base", memory.resident()))
    try:
        outcome = _kind_of_work(job)(job, lambda stage: pipe.send(("stage", stage)))
    # Of an exit or an interrupt inside a model nothing may be known but this.
    except BaseException as error:
        traceback.print_exc()
        raise SystemExit(one_line(error)) from error
    pipe.send(("outcome", outcome.to_json()))


def _kind_of_work(job: Job) -> Callable[[Job, Tell], Outcome]:
    if job.source == FILES:
        from zoo.convert_file import convert_file  # needs packages that others do not

        return convert_file
    return plan if job.settings.plan else convert


def _guard(pipe: Connection) -> None:
    """Start a process that ends this one and all it has started when the run is gone, or when this one is.

    A thread could not: a network may hang in C code, which lets no thread run, and what it has started knows no parent.
    """
    run, leader = multiprocessing.parent_process(), os.getpid()
    held, holding = os.pipe()
    if run is None:
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(held)  # the other end closes with this process
        return
    try:
        os.setsid()
        if os.fork() == 0:  # nobody's child: code that waits for its children does not wait for it
            os.close(holding)
            pipe.close()
            wait([run.sentinel, held])
            _end_group(leader)
    finally:
        os._exit(0)


def _send_output_to(log: Path | None) -> None:
    """Libraries write to the terminal as they like; here that goes into a file, which is read if the process dies."""
    sys.stdout.flush()
    sys.stderr.flush()
    how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        target = os.open(os.devnull if log is None else log, how, 0o644)
    except OSError:  # the disk is full: what they write is lost, the model need not be
        target = os.open(os.devnull, how, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
