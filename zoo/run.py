"""Many models: which, with what, in which order, and a folder that remembers what became of each.

Each is converted in a process of its own (:mod:`zoo.worker`), on this machine or on those of a cluster
(:mod:`zoo.cluster`). The journal (:mod:`zoo.journal`) has a line for each model as soon as it ends, written by this one
process, so a run that is killed goes on where it was.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

from passes.fold.rules import rules_of
from reparam import ReparamError, sources
from reparam.networks import UsageError
from reparam.own_code import Code, is_place
from reparam.recipe import parse_block
from zoo.job import FILES, Job, Settings, finished, versions
from zoo.journal import Journal, JournalError
from zoo.onnx_file import check_packages
from zoo.outcome import Outcome
from zoo.weights import find_checkpoints
from zoo.worker import Engine, Limits, Running, Underway, here, now

__all__ = ["Limits", "Run", "Running", "convert_zoo", "select"]

log = logging.getLogger("reparam.zoo")

SUFFIX = ".onnx"


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
    running: list[Underway] = field(default_factory=list)
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
    onnx: bool = False,
    max_parameters: int | None = None,
    outputs: bool = True,
    latency: bool = True,
    plan: bool = False,
    norms: str = "keep",
    cost: str = "numbers",
    jobs: int = 1,
    timeout: float = Limits.timeout,
    memory: float | None = None,
    resume: bool = False,
    retry: bool = False,
    cluster: str | None = None,
    on_tick: Callable[[Run], None] | None = None,
) -> Iterator[Outcome]:
    """Convert many models; yields the outcome of each as it ends (see :mod:`zoo.outcome`).

    In a script, call it under ``if __name__ == "__main__":``, as everything that starts processes.

    Args:
        names: names, shell patterns, or specs such as ``torchvision:resnet18`` for other sources than ``source``; and
            ONNX files, or shell patterns of such, which are collapsed into files.
        source: of names that do not say theirs.
        out: the run folder; without one nothing is written and nothing can be resumed.
        block: expand first, and check the way back: a name, or ``name:option=value,...``.
        pretrained: load the source's trained weights.
        weights: folder of checkpoints; only models that it has one for are converted.
        save: keep the networks, not only their descriptions.
        onnx: keep them as ONNX files, too, each run by onnxruntime and compared.
        max_parameters: refuse larger networks before they are built.
        outputs: compare whole outputs and the way back, not only each fold: that takes two thirds of the time.
        latency: time the networks, which says little on a machine that is busy otherwise.
        plan: only plan, without numbers; outcomes are then :class:`zoo.outcome.Planned`.
        norms: as for :func:`reparam.collapse`; an ONNX file keeps its norms.
        cost: as for :func:`reparam.collapse`.
        jobs: processes at a time; a cluster runs as many as its workers have threads.
        timeout: seconds for one model.
        memory: GiB for one model, beyond what the libraries take.
        resume: go on with the run in ``out``; what it has done is not done again.
        retry: with ``resume``, do again what was not converted for an error, for its time or for its memory.
        cluster: address of a Dask scheduler (``tcp://host:8786``) whose workers convert; they see ``out`` and
            ``weights`` under the same paths as this machine.
        on_tick: called often with the state of the run, for a display.

    Raises:
        UnknownNameError: a name or pattern that matches nothing, or an unknown source.
        UsageError: ``onnx`` without the packages or the options that it needs; the cluster cannot be reached, has no
            workers, or they have other versions or other files.
        ReparamError: bad options; ``out`` is in use, or holds another run. Errors of models are outcomes.
    """
    limits = Limits(jobs, timeout, memory)
    rules_of(norms, cost)
    if block is not None:
        parse_block(block)
    if pretrained and weights is not None:
        raise ReparamError("trained weights come from the source or from a folder: drop one of pretrained and weights")
    if resume and out is None:
        raise ReparamError("there is nothing to resume without a run folder")
    if cluster is not None and jobs != 1:
        raise UsageError(
            "jobs (--jobs) are processes of this machine; a cluster runs as many as its workers have threads"
        )
    names = list(names)
    files = [name for name in names if name.endswith(SUFFIX)]
    if files:
        if block is not None or pretrained or weights is not None or onnx or plan or norms != "keep":
            raise UsageError(
                "an ONNX file has no layers that a block could replace, has its weights, keeps its norms (one operator "
                "each) and is planned with its numbers: drop --block, --pretrained, --weights, --norms and --onnx, and "
                "convert it"
            )
        check_packages()
    if onnx:
        if plan or out is None or not save or not outputs:
            raise UsageError(
                "an ONNX file (--onnx) is a network that is kept and compared: it needs a run folder, and no plan, "
                "--no-save or --no-outputs"
            )
        check_packages()
    folder = None if out is None else Path(out)
    shelf = None if weights is None else os.fspath(weights)
    settings = Settings(block, pretrained, shelf, save, onnx, max_parameters, outputs, latency, plan, norms, cost)
    wanted = _files(files)
    if len(files) < len(names) or not names:
        wanted += select([name for name in names if name not in files], source, weights)
    todo = [Job(where, name, settings, folder, checkpoint) for where, name, checkpoint in wanted]
    engine = nullcontext(here(jobs)) if cluster is None else _connect(cluster, todo)
    return _run(engine, folder, todo, limits, resume, retry, on_tick or (lambda run: None))


def _files(names: Iterable[str]) -> list[tuple[str, str, str | None]]:
    """Source, name and path of each ONNX file that ``names`` stand for, each once, in the order given."""
    found: dict[str, Path] = {}
    for text in names:
        matches = [text] if Path(text).is_file() else sorted(glob(text))
        if not matches:
            raise sources.UnknownNameError(f"no file is named {text!r}")
        for path in map(Path, matches):
            other = found.setdefault(path.stem, path.resolve())
            if other != path.resolve():
                raise UsageError(f"{other} and {path} have the same name: convert them in runs of their own")
    return [(FILES, name, str(path)) for name, path in found.items()]


def select(
    names: Iterable[str], source: str, weights: str | os.PathLike[str] | None = None
) -> list[tuple[str, str, str | None]]:
    """Source, name and checkpoint of each model that ``names`` stand for, each once, in the order given.

    Raises:
        UnknownNameError: something matches nothing.
    """
    found: dict[tuple[str, str], None] = {}
    for text in names:
        own = is_place(text.rpartition(":")[0])  # a pattern of one's own code is no spec, and matches nothing
        where, name = sources.split(text) if own or sources.is_spec(text) else (source, text)
        pattern = any(c in name for c in "*?[") and "," not in name
        if sources.runs_code(where):
            Code(where).find(name.partition(",")[0])
            sources.name_code(text)
            found[where, name] = None
            continue
        matches = sources.names(where, name) if pattern else [name]
        if not pattern and ":" not in name and name.partition(",")[0] not in (known := sources.names(where)):
            raise sources.UnknownNameError(f"unknown network {name!r} in source {where!r}{sources.near(name, known)}")
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


# ------------------------------------------------------------------------------------------------- driving


def _connect(address: str, jobs: Sequence[Job]) -> AbstractContextManager[Engine]:
    try:
        from zoo.cluster import connect
    except ModuleNotFoundError as error:
        raise ReparamError(
            f"a cluster needs {error.name}, which is not installed: pip install 'reparam[cluster]'"
        ) from error
    return connect(address, jobs)


def _run(
    opened: AbstractContextManager[Engine],
    folder: Path | None,
    jobs: Sequence[Job],
    limits: Limits,
    resume: bool,
    retry: bool,
    tick: Callable[[Run], None],
) -> Iterator[Outcome]:
    with opened as engine:
        run = Run(len(jobs), replace(limits, jobs=engine.jobs))
        if folder is None:
            yield from _drive(engine, run, jobs, lambda outcome: None, tick)
        else:
            yield from _kept(engine, run, folder, jobs, resume, retry, tick)


def _drive(
    engine: Engine, run: Run, todo: Sequence[Job], record: Callable[[Outcome], None], tick: Callable[[Run], None]
) -> Iterator[Outcome]:
    """Keep the engine at work until all is done; whatever ends this generator ends what the engine is doing."""
    with closing(engine.convert(todo, run.limits, run.running)) as steps:
        for outcome in steps:
            if outcome is not None:
                record(outcome)
                run.done.append(outcome)
                run.fresh += 1
            tick(run)
            if outcome is not None:
                yield outcome


# ------------------------------------------------------------------------------------------------- with a folder


def _kept(
    engine: Engine,
    run: Run,
    folder: Path,
    jobs: Sequence[Job],
    resume: bool,
    retry: bool,
    tick: Callable[[Run], None],
) -> Iterator[Outcome]:
    """A run with a journal."""
    with Journal(folder) as journal:
        done = _done(journal, jobs, resume, retry)
        todo = [job for job in jobs if job.spec not in done]
        journal.append("run", _header(engine, jobs, run.limits, len(done)))
        run.done.extend(done.values())
        for job in list(todo):
            # Its files are whole, only its line is missing: the run was killed between the two.
            outcome = finished(job) if resume else None
            if outcome is not None:
                journal.append("outcome", outcome.to_json())
                run.done.append(outcome)
                todo.remove(job)
                yield outcome
        started = time.monotonic()
        yield from _drive(engine, run, todo, lambda outcome: journal.append("outcome", outcome.to_json()), tick)
        journal.append("end", {"finished": now(), "seconds": round(time.monotonic() - started, 1)})


def _done(journal: Journal, jobs: Sequence[Job], resume: bool, retry: bool) -> dict[str, Outcome]:
    """Outcomes that need not be made again.

    Raises:
        JournalError: the folder holds a run that was not to be resumed, or one with other settings.
    """
    content = journal.content
    if content.runs and not resume:
        raise JournalError(f"{journal.folder.path} holds a run: go on with it (--resume), or use another folder")
    for run in content.runs:
        if jobs and not jobs[0].settings.are(run.get("settings")):
            raise JournalError(
                f"{journal.folder.path} holds a run with other settings ({_words(run.get('settings'))}); use those, or "
                "another folder"
            )
    asked = {job.spec for job in jobs}
    return {spec: o for spec, o in content.outcomes.items() if spec in asked and (o.ok or not retry)}


def _words(settings: Any) -> str:
    pairs = settings.items() if isinstance(settings, dict) else ()
    return ", ".join(f"{key} {value}" for key, value in pairs) or "none"


def _header(engine: Engine, jobs: Sequence[Job], limits: Limits, done: int) -> dict[str, Any]:
    return {
        "started": now(),
        "specs": [job.spec for job in jobs],
        "settings": vars(jobs[0].settings),
        "limits": vars(limits),
        "command": sys.argv[1:],
        "versions": versions(),
        "machine": engine.machine,
        "done_before": done,
    }
