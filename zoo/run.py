"""Many models, each in a process of its own with a limit of time and of memory; what one does costs one row.

Processes are forked from a server that has the model libraries loaded, so that a model does not pay for their import. A
process that dies, hangs or takes too much memory is an outcome like any other. The journal (:mod:`zoo.journal`) has a
line for each model as soon as it ends, so a run that is killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from reparam import ReparamError, sources
from reparam.recipe import parse_block
from reparam.sources import _near
from zoo import memory
from zoo.convert import Job, Settings, convert, finished, one_line, remove_files, versions
from zoo.journal import Folder, Journal, JournalError
from zoo.outcome import Failed, Outcome, OutOfMemory, TimedOut, from_json
from zoo.render import _processor
from zoo.weights import find_checkpoints

__all__ = ["Limits", "Run", "Running", "convert_zoo", "select"]

log = logging.getLogger("reparam.zoo")

PRELOAD = ["zoo.run", "zoo.warm"]
"""What the server imports once for all processes."""
POLL = 0.05
"""Seconds between two looks at memory and time."""
GRACE = 10.0
"""Seconds that a process may take to end after it has given its outcome."""
TAIL = 4000
"""Characters kept of what a process wrote before it died."""
GIB = 1 << 30


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
class Running:
    """A model that is being converted: its process, where it stands, and what it holds."""

    job: Job
    process: Any
    pipe: Connection
    log: Path | None
    began: float = field(default_factory=time.monotonic)
    started: str = field(default_factory=lambda: _now())
    stage: str = "start"
    base: int | None = None
    peak: int = 0
    outcome: Outcome | None = None
    closed: bool = False

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.began


@dataclass
class Run:
    """A run as it goes on, for whoever displays it.

    Args:
        total: models of this run, those done by an earlier one included.
        running: models at work now, the oldest first.
        done: outcomes so far, those of an earlier run included.
        fresh: how many of ``done`` this run has made.
    """

    total: int
    limits: Limits
    running: list[Running] = field(default_factory=list)
    done: list[Outcome] = field(default_factory=list)
    fresh: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds left if the rest takes as long as what is done, None before anything is."""
        if not self.fresh:
            return None
        return (time.monotonic() - self.began) / self.fresh * (self.total - len(self.done))


def convert_zoo(
    names: Iterable[str],
    *,
    source: str = "timm",
    out: str | os.PathLike[str] | None = None,
    block: str | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    save: bool = True,
    max_parameters: int | None = None,
    jobs: int = 1,
    timeout: float = Limits.timeout,
    memory: float | None = None,
    resume: bool = False,
    retry: bool = False,
    on_tick: Callable[[Run], None] | None = None,
) -> Iterator[Outcome]:
    """Convert many models; yields the outcome of each as it ends (see :mod:`zoo.outcome`).

    In a script, call it under ``if __name__ == "__main__":``, as everything that starts processes.

    Args:
        names: names, shell patterns, or specs such as ``torchvision:resnet18`` for other sources than ``source``.
        source: of names that do not say theirs.
        out: the run folder; without one nothing is written and nothing can be resumed.
        block: expand first, and check the way back: a name, or ``name:option=value,...``.
        pretrained: load the source's trained weights.
        weights: folder of checkpoints; only models that it has one for are converted.
        save: keep the networks, not only their descriptions.
        max_parameters: refuse larger networks before they are built.
        jobs: processes at a time.
        timeout: seconds for one model.
        memory: GiB for one model, beyond what the libraries take.
        resume: go on with the run in ``out``; what it has done is not done again.
        retry: with ``resume``, do again what was not converted for an error, for its time or for its memory.
        on_tick: called often with the state of the run, for a display.

    Raises:
        UnknownNameError: a name or pattern that matches nothing, or an unknown source.
        ReparamError: bad options; ``out`` is in use, or holds another run. Errors of models are outcomes.
    """
    limits = Limits(jobs, timeout, memory)
    if block is not None:
        parse_block(block)
    if pretrained and weights is not None:
        raise ReparamError("trained weights come from the source or from a folder: drop one of pretrained and weights")
    folder = None if out is None else Path(out)
    settings = Settings(block, pretrained, None if weights is None else os.fspath(weights), save, max_parameters)
    wanted = select(names, source, weights)
    todo = [Job(where, name, settings, folder, checkpoint) for where, name, checkpoint in wanted]
    if resume and folder is None:
        raise ReparamError("there is nothing to resume without a run folder")
    tick = on_tick or (lambda run: None)
    if folder is None:
        return _drive(Run(len(todo), limits), todo, lambda outcome: None, tick)
    return _kept(folder, todo, limits, resume, retry, tick)


def select(
    names: Iterable[str], source: str, weights: str | os.PathLike[str] | None = None
) -> list[tuple[str, str, str | None]]:
    """Source, name and checkpoint of each model that ``names`` stand for, each once, in the order given.

    Raises:
        UnknownNameError: something matches nothing.
    """
    found: dict[tuple[str, str], None] = {}
    for text in names:
        where, _, name = text.partition(":") if sources.is_spec(text) else (source, "", text)
        pattern = any(c in name for c in "*?[") and "," not in name
        matches = sources.names(where, name) if pattern else [name]
        if not pattern and ":" not in name and name.partition(",")[0] not in (known := sources.names(where)):
            raise sources.UnknownNameError(f"unknown network {name!r} in source {where!r}{_near(name, known)}")
        if not matches:
            raise sources.UnknownNameError(f"no network of {where!r} is named {name!r}")
        found |= dict.fromkeys((where, match) for match in matches)
    if not found:
        raise sources.UnknownNameError("no network is named")
    if weights is None:
        return [(where, name, None) for where, name in found]
    known = {name for where, _ in found for name in sources.names(where)} | {name for _, name in found}
    shelf = find_checkpoints(weights, sorted(known))
    for stranger in shelf.strangers:
        log.warning("%s is named for no network of %s", stranger, ", ".join(sorted({where for where, _ in found})))
    chosen = [(where, name, str(shelf.files[name])) for where, name in found if name in shelf.files]
    if not chosen:
        raise sources.UnknownNameError(f"{os.fspath(weights)} has no checkpoint named for any of these networks")
    return chosen


# ------------------------------------------------------------------------------------------------- with a folder


def _kept(
    folder: Path, jobs: Sequence[Job], limits: Limits, resume: bool, retry: bool, tick: Callable[[Run], None]
) -> Iterator[Outcome]:
    """A run with a journal."""
    with Journal(folder) as journal:
        done = _done(journal, jobs, resume, retry)
        todo = [job for job in jobs if job.spec not in done]
        journal.append("run", _header(jobs, limits, len(done)))
        run = Run(len(jobs), limits, done=list(done.values()))
        for job in list(todo):
            # Its files are whole, only its line is missing: the run was killed between the two.
            outcome = finished(job) if resume else None
            if outcome is not None:
                journal.append("outcome", outcome.to_json())
                run.done.append(outcome)
                todo.remove(job)
                yield outcome
        started = time.monotonic()
        yield from _drive(run, todo, lambda outcome: journal.append("outcome", outcome.to_json()), tick)
        journal.append("end", {"finished": _now(), "seconds": round(time.monotonic() - started, 1)})


def _done(journal: Journal, jobs: Sequence[Job], resume: bool, retry: bool) -> dict[str, Outcome]:
    """Outcomes that need not be made again.

    Raises:
        JournalError: the folder holds a run that was not to be resumed, or one with other settings.
    """
    content = journal.content
    if content.runs and not resume:
        raise JournalError(f"{journal.folder.path} holds a run: go on with it (--resume), or use another folder")
    for run in content.runs:
        if jobs and run.get("settings") != vars(jobs[0].settings):
            raise JournalError(
                f"{journal.folder.path} holds a run with other settings ({_words(run.get('settings'))}); use those, or "
                "another folder"
            )
    asked = {job.spec for job in jobs}
    return {spec: o for spec, o in content.outcomes.items() if spec in asked and (o.ok or not retry)}


def _words(settings: Any) -> str:
    pairs = settings.items() if isinstance(settings, dict) else ()
    return ", ".join(f"{key} {value}" for key, value in pairs) or "none"


def _header(jobs: Sequence[Job], limits: Limits, done: int) -> dict[str, Any]:
    return {
        "started": _now(),
        "specs": [job.spec for job in jobs],
        "settings": vars(jobs[0].settings),
        "limits": vars(limits),
        "command": sys.argv[1:],
        "versions": versions(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "done_before": done,
    }


# ------------------------------------------------------------------------------------------------- processes


def _drive(
    run: Run, todo: Sequence[Job], record: Callable[[Outcome], None], tick: Callable[[Run], None]
) -> Iterator[Outcome]:
    """Keep ``jobs`` processes at work until all is done; whatever ends this generator ends them too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting = list(reversed(todo))
    try:
        while waiting or run.running:
            while waiting and len(run.running) < run.limits.jobs:
                run.running.append(_start(context, waiting.pop()))
            tick(run)
            wait([each.pipe for each in run.running if not each.closed] or [_ended(run)], timeout=POLL)
            for each in list(run.running):
                outcome = _look(each, run.limits)
                if outcome is None:
                    continue
                _finish(each, outcome)
                record(outcome)
                run.running.remove(each)
                run.done.append(outcome)
                run.fresh += 1
                tick(run)
                yield outcome
    finally:
        for each in run.running:
            _kill(each)
            _clear(each)


def _ended(run: Run) -> Any:
    return run.running[0].process.sentinel


def _start(context: Any, job: Job) -> Running:
    ours, theirs = context.Pipe(duplex=False)
    log = None
    if job.folder is not None:
        folder = Folder(job.folder).running
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / Folder(job.folder).of(job.source, job.name, ".log").name
    process = context.Process(target=_child, args=(job, theirs, log, dict(os.environ)), daemon=False, name=job.spec)
    process.start()
    theirs.close()
    return Running(job, process, ours, log)


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
    code = each.process.exitcode
    if code == -signal.SIGKILL:
        message = "killed by the system, which does so when memory runs out"
        return OutOfMemory(**_common(each), stage=each.stage, message=message)
    text = f"exit status {code}"
    if code is not None and code < 0:
        text = f"killed by {signal.Signals(-code).name}"
    return Failed(**_common(each), stage=each.stage, error=f"its process ended: {text}", traceback=_tail(each.log))


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
    """End the process and all that it has started."""
    if each.process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(each.process.pid) == each.process.pid:
                os.killpg(each.process.pid, signal.SIGKILL)
        each.process.kill()
    each.process.join()


def _clear(each: Running) -> None:
    each.pipe.close()
    each.process.close()
    if each.log is not None:
        each.log.unlink(missing_ok=True)


def _tail(log: Path | None) -> str:
    try:
        return "" if log is None else log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    except OSError:
        return ""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------- in the process


def _child(job: Job, pipe: Connection, log: Path | None, environment: dict[str, str]) -> None:
    """What runs in a model's process. The server's environment is that of the first run that this program made."""
    import faulthandler

    import torch

    os.environ.update(environment)
    _send_output_to(log)
    faulthandler.enable()
    os.setsid()  # what the model starts is ended with it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(OSError):
        # When the system runs out of memory, this process is to go, not the run.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(1)
    gc.freeze()  # what the libraries hold need not be looked through each time that garbage is collected
    pipe.send(("base", memory.resident()))
    try:
        outcome = convert(job, lambda stage: pipe.send(("stage", stage)))
    # Of an exit or an interrupt inside a model nothing may be known but this.
    except BaseException as error:
        traceback.print_exc()
        raise SystemExit(one_line(error)) from error
    pipe.send(("outcome", outcome.to_json()))


def _die_with_parent() -> None:
    """A run that is killed leaves nobody behind who would write into its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _send_output_to(log: Path | None) -> None:
    """Libraries write to the terminal as they like; here that goes into a file, which is read if the process dies."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
