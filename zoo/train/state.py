"""What the next epoch of a run goes on from: as tensors and text, and whether a run can go on from it.

A state carries a digest of all that it holds, so that a file with one flipped bit is no state. Who writes a digest can
write anything, so what it covers is still read by type, and a copy of the optimizer has to make a step with it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.edits.typed import fits, hints
from reparam import ReparamError
from reparam.files import fill, misfit
from zoo.train.result import Epoch

__all__ = ["DIGEST", "Parts", "State", "StateError", "check_digest", "digest", "parsed"]

DIGEST = "digest"
"""The key of the note that has it."""


class StateError(ReparamError):
    """A state that is damaged, or that this run cannot go on from; the message says why, not which file it is."""


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

    def note(self) -> dict[str, str]:
        """All but the tensors, as text."""
        rows = [dataclasses.astuple(epoch) for epoch in self.epochs]
        return {"epochs": json.dumps(rows), "settings": json.dumps(self.settings)}

    @staticmethod
    def read(tensors: dict[str, Tensor], note: Mapping[str, str]) -> State:
        """The state of these tensors and :meth:`note`. Raises :class:`StateError`."""
        rows = parsed(note, "epochs", list[list[Any]])
        epochs = tuple(_epoch(number, row) for number, row in enumerate(rows, 1))
        return State(tensors, epochs, parsed(note, "settings", dict[str, Any]))


def _epoch(number: int, row: Sequence[Any]) -> Epoch:
    kinds = hints(Epoch)
    if len(row) != len(kinds) or not all(map(fits, row, kinds.values())) or row[0] != number:
        raise StateError(f"it is damaged: row {number} of its log cannot be {row!s:.40}")
    return Epoch(*row)


def parsed(note: Mapping[str, str], key: str, kind: Any) -> Any:
    """What the note has as JSON under ``key``, of that type. Raises :class:`StateError`."""
    try:
        value = json.loads(note[key])
    except KeyError as error:
        raise StateError(f"it is damaged: it has no {key}") from error
    except (ValueError, RecursionError) as error:
        raise StateError(f"it is damaged: its {key} cannot be read ({error!s:.60})") from error
    if not fits(value, kind):
        raise StateError(f"it is damaged: its {key} cannot be {value!s:.40}")
    return value


def digest(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    """A digest of tensors and note, its own entry aside."""
    total = hashlib.blake2b(digest_size=16)
    for key, text in sorted(note.items()):
        if key != DIGEST:
            total.update(f"{key}={len(text)}:{text}\n".encode(errors="surrogatepass"))
    for name, value in sorted(tensors.items()):
        total.update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode(errors="surrogatepass"))
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_digest(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Raise :class:`StateError` for a state that is not what was written."""
    if DIGEST not in note:
        raise StateError("it is damaged, or was written by another version: it has no digest of its content")
    if note[DIGEST] != digest(tensors, note):
        raise StateError("it is damaged: its content is not that of its digest")


# ------------------------------------------------------------------------------------------------- a run's parts


@dataclass(frozen=True)
class Parts:
    """What of a run changes from step to step.

    Args:
        model: the network itself.
        averaged: the network of the averaged weights, if the run averages.
        optimizer: of the model's parameters.
        scaler: of the loss, in half precision.
    """

    model: nn.Module
    averaged: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: Any = None

    def pack(self, epochs: Sequence[Epoch]) -> State:
        """The state after these epochs."""
        optimizer, settings = _pack_optimizer(self.optimizer)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer}
        if self.averaged is not None:
            parts["ema"] = self.averaged.state_dict()
        tensors = {f"{part}.{name}": value.cpu() for part, state in parts.items() for name, value in state.items()}
        kept = {"optimizer": settings, "scaler": None if self.scaler is None else self.scaler.state_dict()}
        return State(tensors, tuple(epochs), kept)

    def check(self, state: State) -> None:
        """Raise :class:`StateError` unless :meth:`take` can take the state and steps can follow; nothing is changed."""
        for name, part in (("model", self.model), ("ema", self.averaged)):
            problem = "" if part is None else misfit(part, state.part(name))
            if problem:
                raise StateError(f"it is of another network than the run has now: {problem}")
        scaler = None if self.scaler is None else self.scaler.state_dict()
        kinds = {"optimizer": dict[str, Any], "scaler": dict[str, float] | None}
        if not all(name in state.settings and fits(state.settings[name], kind) for name, kind in kinds.items()):
            raise StateError("it is damaged: its settings are not those of an optimizer and a scaler")
        if (state.settings["scaler"] or {}).keys() != (scaler or {}).keys():
            raise StateError("it is damaged: its settings of the loss scaler are others than the run has")
        _check_optimizer(self.optimizer, state)

    def take(self, state: State) -> None:
        """Go on from a state that :meth:`check` has let pass."""
        fill(self.model, state.part("model"))
        if self.averaged is not None:
            fill(self.averaged, state.part("ema"))
        _unpack_optimizer(self.optimizer, state)
        if self.scaler is not None:
            self.scaler.load_state_dict(state.settings["scaler"])


def _check_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Which tensors an optimizer keeps, and of which shapes, only it knows: a copy makes a step without a gradient."""
    trial = copy.deepcopy(optimizer)
    try:
        _unpack_optimizer(trial, state)
        for group in trial.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        trial.step()
    # An optimizer that is given nonsense fails in any way.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StateError(f"it is damaged: its optimizer cannot make a step ({reason:.100})") from error


def _pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _unpack_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give an optimizer of the same parameters what :func:`_pack_optimizer` took."""
    settings = state.settings["optimizer"]
    # An optimizer takes tensors as they are, and steps write into them; the state stays what it is.
    tensors = {name: value.clone() for name, value in state.part("optimizer").items()}
    content: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **settings["others"]}.items():
        index, _, name = key.partition(".")
        content.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": content, "param_groups": settings["groups"]})
