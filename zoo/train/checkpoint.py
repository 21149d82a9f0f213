"""The folder of a run: what it was, what each epoch gave, and the state that the next epoch goes on from.

    run.json                configuration, network, data, versions, machine, date
    log.csv                 one row for each epoch
    last.safetensors        the training state after the last epoch: tensors ``model.*``, ``optimizer.*``, ``ema.*``;
                            as metadata the note of :mod:`reparam.files`, the configuration, the rows of the log and
                            the optimizer's settings
    previous.safetensors    the state after the epoch before, for when the last one is damaged
    best.safetensors        the weights of the best evaluation, as :mod:`reparam.files` writes them
    best.ema.safetensors    the averaged weights of their own best evaluation, if the run averages
    result.json             the result, once the run is finished

Every file is written beside its place and renamed, so it is whole or it is the old one. The log is written from the
rows in the state: an epoch that is repeated after a crash is in it once.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam import ReparamError
from reparam.files import load_state, misfit
from reparam.recipe import Recipe
from reparam.saving import FileError, replace_file, safetensors_torch
from zoo.train.config import Config
from zoo.train.result import Epoch

__all__ = [
    "CheckpointError",
    "Folder",
    "State",
    "pack_optimizer",
    "unpack_optimizer",
]

log = logging.getLogger("reparam.train")

UNIMPORTANT = ("root",)
"""Fields of a configuration that may differ between a run and its continuation: they do not change the result."""
SHOWN = 3
"""Differing fields that a message names."""


class CheckpointError(ReparamError):
    """A checkpoint that a run cannot go on from; the message names it, the reason and the way out."""


@dataclass(frozen=True)
class State:
    """What the next epoch goes on from.

    Args:
        tensors: ``model.*``, ``optimizer.*`` and, where weights are averaged, ``ema.*``; on the CPU.
        epochs: the log so far.
        settings: of the optimizer and the loss scaler, as JSON can hold them.
    """

    tensors: dict[str, Tensor]
    epochs: tuple[Epoch, ...]
    settings: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors ``name.*``, without that prefix."""
        return {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }


class Folder:
    """The files of a run; the folder is made when the first one is written.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.last = self.path / "last.safetensors"
        self.previous = self.path / "previous.safetensors"
        self.best = self.path / "best.safetensors"
        self.best_ema = self.path / "best.ema.safetensors"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write ``name`` (``run.json``, ``result.json``)."""
        self._write_text(self.path / name, json.dumps(content, indent=1) + "\n")

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
            "epochs": json.dumps([dataclasses.astuple(epoch) for epoch in state.epochs]),
            "settings": json.dumps(state.settings),
        }
        if expanded is not None:
            note["expanded"] = expanded.to_text()
        # safetensors refuses tensors that share memory, as tied weights do; loading both copies into them is the same.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.tensors.items()}
        write = safetensors_torch(self.last).save_file
        # Under a name of its own first: at no moment is there less than one whole state.
        upcoming = self.path / "next.safetensors"
        replace_file(upcoming, partial(write, tensors, metadata=note))
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(upcoming, self.last)
        self.write_log(state.epochs)

    def write_log(self, epochs: Sequence[Epoch]) -> None:
        """Write ``log.csv``; what was not evaluated is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Epoch))
        writer.writerows(dataclasses.astuple(epoch) for epoch in epochs)
        self._write_text(self.path / "log.csv", text.getvalue())

    def read_state(self, config: Config, model: nn.Module) -> State | None:
        """The newest state of this run, or None if there is none.

        A state that is damaged, or of another run, is passed over with a warning that says why.

        Args:
            config: of the run that is to go on.
            model: of that run; its names and shapes are compared.

        Raises:
            CheckpointError: there are states, and none can be used.
        """
        refused: list[str] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = _read_state(path, config, model)
            except (CheckpointError, FileError) as error:
                refused.append(str(error))
                continue
            for reason in refused:
                log.warning("%s. Going on from %s, after epoch %d", reason, path.name, len(state.epochs))
            return state
        if refused:
            also = f", and {self.previous.name} cannot be used either" if len(refused) > 1 else ""
            raise CheckpointError(f"{refused[0]}{also}. Train into another folder with --out, or remove {self.path}")
        return None

    def sweep(self) -> None:
        """Remove what a killed run left half written."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _write_text(self, path: Path, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read_state(path: Path, config: Config, model: nn.Module) -> State:
    """The state in a file. Raises :class:`FileError` or :class:`CheckpointError` with its name and what is wrong."""
    content = load_state(path)
    if not content.metadata.keys() >= {"config", "epochs", "settings"}:
        raise CheckpointError(f"{path} is not a checkpoint of `reparam train`")
    differences = _differences(json.loads(content.metadata["config"]), json.loads(config.to_json()))
    if differences:
        raise CheckpointError(f"{path} is of another run: {'; '.join(differences)}")
    try:
        rows = json.loads(content.metadata["epochs"])
        state = State(content.tensors, tuple(Epoch(*row) for row in rows), json.loads(content.metadata["settings"]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} was written by another version ({type(error).__name__}: {error})") from error
    problem = misfit(model, state.part("model"))
    if problem:
        raise CheckpointError(f"{path} is of another network than {config.model} is now: {problem}")
    return state


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The fields of two configurations that differ, in words."""
    names = [name for name in dict.fromkeys((*here, *there)) if name not in UNIMPORTANT]
    found = [name for name in names if there.get(name) != here.get(name)]
    words = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in found[:SHOWN]]
    return words + [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else words


# ------------------------------------------------------------------------------------------------- optimizer


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors ``INDEX.NAME`` on the CPU, and all else as JSON can hold it."""
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, values in content["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu()
            else:
                others[f"{index}.{name}"] = value
    return tensors, {"groups": content["param_groups"], "others": others}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Give an optimizer of the same parameters what :func:`pack_optimizer` took."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **settings["others"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})
