"""The models of a run on the workers of a Dask cluster, one task each.

Dask decides which worker takes which model, gives the models of a worker that died to others, and restarts it. A worker
converts a model as this machine would (:mod:`zoo.worker`): in a process of its own with the limits of the run, so that
a crash or a hang costs a row and not the worker. Only the process that drives the run writes the journal; the workers
write the models' files, into the same folder.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from distributed import Client, Future, KilledWorker, Reschedule, Status, Worker, as_completed, get_worker

from reparam import ReparamError
from reparam.disk import reason_of
from reparam.networks import UsageError
from zoo.job import Job, one_line, remove_files, versions
from zoo.journal import JournalError
from zoo.outcome import Failed, Outcome
from zoo.render import processor
from zoo.worker import Engine, Limits, Underway, convert_here, last_words, now

__all__ = ["connect"]

log = logging.getLogger("reparam.zoo")

PATIENCE = 10.0
"""Seconds to wait for the scheduler, and then for its first worker."""
POLL = 0.05
"""Seconds between two looks at what has ended."""
RETRIES = 2
"""How often a model is given to a worker again after an error of the worker itself; Dask counts deaths on its own."""


@contextmanager
def connect(address: str, jobs: Sequence[Job]) -> Iterator[Engine]:
    """The cluster at ``address``, once it is sure that it can convert ``jobs``.

    Raises:
        UsageError: there is none, it has no workers, their versions differ from those here, or they do not see the run
            folder or the checkpoints.
    """
    with _quiet(), closing(_client(address)) as client:
        threads = client.nthreads()
        _check_workers(client)
        _check_files(client, jobs)
        machine = f"{len(threads)} workers of a cluster, {sum(threads.values())} threads; driven on {processor()}"
        yield Engine(machine, sum(threads.values()), partial(_convert, client))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own log, which has tracebacks of what is an error message here: a lost connection."""
    theirs = logging.getLogger("distributed.client")
    level = theirs.level
    theirs.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _client(address: str) -> Client:
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    # An address may be wrong in many ways: no such host, no such protocol, nobody there, somebody else there.
    except Exception as error:
        raise UsageError(f"no Dask scheduler can be reached at {address}: {one_line(error, named=False)}") from error
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError as error:
        client.close()
        raise UsageError(f"the cluster at {address} has no workers; start some: dask worker {address}") from error
    return client


def _check_workers(client: Client) -> None:
    ours = _packages()
    for worker, theirs in client.run(_packages, on_error="return").items():
        if isinstance(theirs, Exception):
            raise UsageError(f"worker {worker} cannot load reparam: {one_line(theirs)}") from theirs
        differ = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if differ:
            here, there = (
                ", ".join(f"{name} {found.get(name, '(none)')}" for name in differ) for found in (ours, theirs)
            )
            raise UsageError(f"worker {worker} has {there}, this machine {here}; install the same versions")


def _packages() -> dict[str, str]:
    """Versions on which results depend; Python's own is Dask's business."""
    return {name: version for name, version in versions().items() if name != "python"}


def _check_files(client: Client, jobs: Sequence[Job]) -> None:
    """That every worker sees a file written just now into the run folder, and the checkpoints."""
    checkpoints = [os.path.abspath(job.checkpoint) for job in jobs if job.checkpoint is not None]
    if checkpoints:
        _check_seen(client, checkpoints, os.path.dirname(checkpoints[0]), "--weights")
    folder = jobs[0].folder
    if folder is not None:
        path = os.path.abspath(folder)
        try:
            os.makedirs(path, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path, prefix=".shared-", suffix=".tmp") as token:
                _check_seen(client, [token.name], path, "--out")
        except OSError as error:
            raise JournalError(f"{folder} cannot be written: {reason_of(error)}") from error


def _check_seen(client: Client, paths: Sequence[str], folder: str, option: str) -> None:
    blind = [worker for worker, seen in client.run(_sees, paths).items() if not seen]
    if blind:
        raise UsageError(
            f"{folder} is not on a file system that the workers share: {', '.join(blind)} cannot read what is in it "
            f"here; name a folder that all of them see ({option})"
        )


def _sees(paths: Sequence[str]) -> bool:
    return all(os.access(path, os.R_OK) for path in paths)


# ------------------------------------------------------------------------------------------------- driving


def _convert(client: Client, todo: Sequence[Job], limits: Limits, running: list[Underway]) -> Iterator[Outcome | None]:
    """One task for each model; see :class:`zoo.worker.Engine`."""
    suspects: list[Job] = []
    yield from _together(client, todo, limits, running, suspects)
    # What waits on a worker is blamed for its death like what ran there. Alone, a model answers for itself.
    for job in suspects:
        yield from _together(client, [job], limits, running, None)


def _together(
    client: Client, todo: Sequence[Job], limits: Limits, running: list[Underway], suspects: list[Job] | None
) -> Iterator[Outcome | None]:
    """Outcomes as they come; models whose workers died too often become ``suspects``, or failures if it is None."""
    topic = f"reparam-zoo-{secrets.token_hex(8)}"
    events: deque[tuple[str, str]] = deque()
    client.subscribe_topic(topic, lambda event: events.append(tuple(event[1])))
    waiting: dict[Future, Job] = {}
    looked = time.monotonic()
    try:
        for job in todo:
            task = client.submit(_convert_there, _absolute(job), limits, topic, pure=False, retries=RETRIES)
            waiting[task] = job
        ended = as_completed(waiting, loop=client.loop, with_results=True, raise_errors=False)
        while waiting:
            yield None
            batch = ended.next_batch(block=False)
            _follow(events, waiting.values(), running)
            for future, result in batch:
                job = waiting.pop(future)
                stage = next((each.stage for each in running if each.job is job), "start")
                running[:] = [each for each in running if each.job is not job]
                if future.status == "finished":
                    yield result
                elif future.status != "error":
                    raise _lost(client)
                elif suspects is not None and isinstance(result[1], KilledWorker):
                    suspects.append(job)
                else:
                    yield _failed(job, stage, result[1])
            if not batch:
                time.sleep(POLL)
            if time.monotonic() - looked > PATIENCE:
                looked = time.monotonic()
                _warn_if_empty(client)
    finally:
        with suppress(Exception):  # what ends this may be that there is no scheduler left to be told
            client.cancel(list(waiting))


def _absolute(job: Job) -> Job:
    """The same on a worker, which is in another folder."""
    checkpoint = None if job.checkpoint is None else os.path.abspath(job.checkpoint)
    return replace(job, folder=None if job.folder is None else job.folder.absolute(), checkpoint=checkpoint)


def _follow(events: deque[tuple[str, str]], jobs: Collection[Job], running: list[Underway]) -> None:
    """Bring the list of running models up to date with what workers have told."""
    while events:
        spec, stage = events.popleft()
        each = next((each for each in running if each.job.spec == spec), None)
        if each is None or stage == "start":  # again, if its worker died
            running[:] = [other for other in running if other is not each]
            running.extend(Underway(job, stage=stage) for job in jobs if job.spec == spec)
        else:
            each.stage = stage


def _failed(job: Job, stage: str, error: BaseException) -> Failed:
    """The outcome of a model that its workers could not bring to an end, which leaves no file."""
    remove_files(job)
    text = one_line(error)
    if isinstance(error, KilledWorker):
        times = error.allowed_failures + 1
        text = f"its worker died, {times} times of {times}; the last one was {error.last_worker.address}"
    return Failed(
        name=job.name,
        source=job.source,
        started=now(),
        versions=versions(),
        stage=stage,
        error=text,
        traceback=last_words(job),
    )


def _lost(client: Client) -> ReparamError:
    return ReparamError(
        f"the Dask scheduler at {client.scheduler.address} is gone; what had ended before is kept: start it again, and "
        "go on with --resume"
    )


def _warn_if_empty(client: Client) -> None:
    with suppress(OSError):  # a scheduler that is gone is found out by what was submitted to it
        if not client.nthreads():
            log.warning("the cluster has no workers any more; the run goes on when it has")


# ------------------------------------------------------------------------------------------------- on a worker


def _convert_there(job: Job, limits: Limits, topic: str) -> Outcome:
    """Convert one model on this worker, and tell its stages under ``topic``.

    Raises:
        Reschedule: nobody waits for this model any more, or the worker is being closed.
    """
    worker = get_worker()
    # The nanny makes a worker a daemon, which may not have children in case they outlive it; ours end with it.
    multiprocessing.current_process().daemon = False
    running: list[Any] = []
    stage = ""
    with closing(convert_here([job], replace(limits, jobs=1), running)) as steps:
        for outcome in steps:
            if outcome is not None:
                return outcome
            if not _wanted(worker):
                break
            if running[0].stage != stage:
                stage = running[0].stage
                worker.log_event(topic, (job.spec, stage))
    raise Reschedule


def _wanted(worker: Worker) -> bool:
    """Whether somebody waits for the task of this thread."""
    task = worker.state.tasks.get(worker.get_current_task())
    return task is not None and task.state == "executing" and worker.status not in (Status.closing, Status.closed)
