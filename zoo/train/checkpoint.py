"""The folder of a run: what it was, what each epoch gave, and the state that the next epoch goes on from.

    run.json                configuration, network, data, versions, machine, date
    log.csv                 one row for each epoch
    last.safetensors        the training state after the last epoch: tensors ``model.*``, ``optimizer.*``, ``ema.*``;
                            as metadata the note of :mod:`reparam.files`, the configuration, the rows of the log, the
                            optimizer's settings, and a digest of all of it
    previous.safetensors    the state after the epoch before, for when the last one is damaged
    next.safetensors        the last state before it has its name; there only after a run that was killed right then
    best.safetensors        the weights of the best evaluation, as :mod:`reparam.files` writes them
    best.ema.safetensors    the averaged weights of their own best evaluation, if the run averages
    result.json             the result, once the run is finished

Every file is written beside its place and renamed, so it is whole or it is the old one. The log is written from the
rows in the state: an epoch that is repeated after a crash is in it once.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reparam import ReparamError
from reparam.disk import FileError, check_writable, make_folder, move_file, replace_file, told
from reparam.files import load_state
from reparam.recipe import Recipe
from reparam.saving import safetensors_torch
from zoo.render import write_text
from zoo.train.config import Config
from zoo.train.result import Epoch
from zoo.train.state import DIGEST, Parts, State, StateError, check_digest, digest, parsed

__all__ = ["CheckpointError", "Folder", "held"]

log = logging.getLogger("reparam.train")

UNIMPORTANT = ("root",)
"""Fields of a configuration that may differ between a run and its continuation: they do not change the result."""
SHOWN = 3
"""Differing fields that a message names."""


class CheckpointError(ReparamError):
    """A checkpoint that a run cannot go on from; the message names it, the reason and the way out."""


class Folder:
    """The files of a run; the folder is made when the first one is written.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.last = self.path / "last.safetensors"
        self.previous = self.path / "previous.safetensors"
        self.upcoming = self.path / "next.safetensors"
        self.best = self.path / "best.safetensors"
        self.best_ema = self.path / "best.ema.safetensors"
        self.weights = (self.last, self.previous, self.best, self.best_ema)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write ``name`` (``run.json``, ``result.json``)."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def write_state(self, state: State, config: Config, source: str, expanded: Recipe | None) -> None:
        """Write the log and the state; the state that was the last becomes the previous one.

        Args:
            state: to write.
            config: of the run.
            source: the spec of the stock network.
            expanded: how the run's network was expanded from that.
        """
        note = {
            "source": source,
            "collapsed": "no",
            "config": config.to_json(),
            **state.note(),
        }
        if expanded is not None:
            note["expanded"] = expanded.to_text()
        # safetensors refuses tensors that share memory, as tied weights do; loading both copies into them is the same.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.tensors.items()}
        note[DIGEST] = digest(tensors, note)
        write = safetensors_torch(self.last).save_file
        # Under a name of its own first: at no moment is there less than one whole state.
        replace_file(self.upcoming, partial(write, tensors, metadata=note))
        if self.last.exists():
            move_file(self.last, self.previous)
        move_file(self.upcoming, self.last)
        self.write_log(state.epochs)

    def write_log(self, epochs: Sequence[Epoch]) -> None:
        """Write ``log.csv``; what was not evaluated is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Epoch))
        writer.writerows(dataclasses.astuple(epoch) for epoch in epochs)
        write_text(self.path / "log.csv", text.getvalue())

    def read_state(self, config: Config, parts: Parts) -> State | None:
        """The newest state of this run, or None if there is none.

        A state that is damaged, or of another run, is passed over with a warning that says why.

        Args:
            config: of the run that is to go on.
            parts: of that run, which have to be able to go on from it.

        Raises:
            CheckpointError: there are states, and none can be used.
        """
        refused: list[tuple[Path, str]] = []
        for path in (self.upcoming, self.last, self.previous):
            if path.is_dir():
                raise CheckpointError(f"{path} is a folder where a run has a file; remove it, and the run goes on")
            if not path.exists():
                continue
            try:
                state = _read_state(path, config, parts)
            except (CheckpointError, FileError) as error:
                refused.append((path, str(error)))
                continue
            for _, reason in refused:
                log.warning("%s. Going on from %s, after epoch %d", reason, path.name, len(state.epochs))
            return state
        if refused:
            (_, reason), *others = refused
            also = "".join(f", and {path.name} cannot be used either" for path, _ in others)
            raise CheckpointError(f"{reason}{also}. Train into another folder with --out, or remove {self.path}")
        return None

    def sweep(self) -> None:
        """Ask whether this run can write here at all, and remove what a killed one left half written."""
        with told(self.path):
            if self.path.exists():
                check_writable(self.last)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path | None) -> Iterator[None]:
    """Let no other run have the folder meanwhile; of several processes of one run, the first one holds it.

    What is made for that is removed again if nothing was written. Raises :class:`CheckpointError` if it is in use.
    """
    if path is None or int(os.environ.get("RANK", "0")):
        yield
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            try:
                # The system gives this lock free when the process ends, however it ends.
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"{path} is in use by another run; wait for it, or train into another folder with --out"
                ) from error
        yield
    finally:
        os.close(folder)
        with contextlib.suppress(OSError):
            for folder_made in made:
                folder_made.rmdir()


def _read_state(path: Path, config: Config, parts: Parts) -> State:
    """The state in a file. Raises :class:`FileError` or :class:`CheckpointError` with its name and what is wrong."""
    content = load_state(path)
    note = content.metadata
    if not note.keys() & {"config", "epochs", "settings"}:
        raise CheckpointError(f"{path} is not a checkpoint of `reparam train`")
    try:
        check_digest(content.tensors, note)
        differences = _differences(parsed(note, "config", dict[str, Any]), json.loads(config.to_json()))
        if differences:
            raise CheckpointError(f"{path} is of another run: {'; '.join(differences)}")
        state = State.read(content.tensors, note)
        parts.check(state)
    except StateError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return state


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The fields of two configurations that differ, in words."""
    names = [name for name in dict.fromkeys((*here, *there)) if name not in UNIMPORTANT]
    found = [name for name in names if there.get(name) != here.get(name)]
    words = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in found[:SHOWN]]
    return words + [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else words
