"""Whether the tensors of a file are those of a network, under its names or behind a prefix that a trainer put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from reparam.disk import FileError
from reparam.untrusted import odd_kind

__all__ = ["Fitted", "fitted", "misfit", "other_classes", "without_prefix"]

WORDS = ("module", "_orig_mod", "model", "net", "network")
"""What trainers call the network that they train."""


@dataclass(frozen=True)
class Fitted:
    """The tensors that a network asks for, by its own names, and what was done to find them, in sentences."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The first differences between a model's state dict and ``tensors`` in words, or an empty string."""
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    extra = [name for name in tensors if name not in state]
    lacks = f"{len(missing)} tensors are missing from the file, the first is {missing[0]!r}" if missing else ""
    more = f"{len(extra)} tensors of the file have no place in the network, the first is {extra[0]!r}" if extra else ""
    if lacks or more:
        return "; ".join(filter(None, (lacks, more)))
    for name, value in state.items():
        if value.shape != tensors[name].shape:
            return f"{name!r} is {tuple(tensors[name].shape)} in the file and {tuple(value.shape)} in the network"
        if odd := odd_kind(name, tensors[name], value):
            return odd
    return ""


def fitted(model: nn.Module, tensors: dict[str, Tensor]) -> Fitted | None:
    """The tensors as they are if they fit, else all that stand behind the one prefix behind which they fit.

    None where they fit in no way. What stands outside of the prefix is left out: a loss with weights of its own, or an
    average, where the prefix is one that trainers give to what they train.

    Raises:
        FileError: they fit behind several prefixes, as a teacher and a student would.
    """
    if not misfit(model, tensors):
        return Fitted(tensors)
    first = next(iter(model.state_dict()), "")
    prefixes = [name[: -len(first)] for name in tensors if first and name.endswith(f".{first}")]
    inside = {prefix: _behind(prefix, tensors) for prefix in prefixes}
    found = {prefix: those for prefix, those in inside.items() if not misfit(model, those)}
    if not found:
        return None
    usual = [prefix for prefix in found if set(prefix.split(".")) <= {*WORDS, ""}]
    if len(usual) == 1:
        found = {usual[0]: found[usual[0]]}
    if len(found) > 1:
        every = " and behind ".join(map(repr, found))
        raise FileError(f"the network's tensors stand behind {every}; choose with --key {next(iter(found))}")
    ((prefix, those),) = found.items()
    outside = [name for name in tensors if not name.startswith(prefix)]
    rest = f", and left out {len(outside)} tensors of other names, such as {outside[0]!r}" if outside else ""
    return Fitted(those, (f"dropped the prefix {prefix!r}{rest}",))


def other_classes(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, int, int] | None:
    """The layer whose number of outputs is all that keeps the tensors from fitting, that of the file and its own."""
    state = model.state_dict()
    if state.keys() != tensors.keys():
        return None
    apart = [name for name, value in state.items() if value.shape != tensors[name].shape]
    layers = {name.rpartition(".")[0] for name in apart}
    sizes = {(*tensors[name].shape[:1], *state[name].shape[:1]) for name in apart}
    if len(layers) != 1 or len(sizes) != 1 or any(state[n].shape[1:] != tensors[n].shape[1:] for n in apart):
        return None
    ((held, own),) = sizes
    return layers.pop(), held, own


def _behind(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def without_prefix(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a first word that all share and the network does not know, to say what else is wrong."""
    words = {name.partition(".")[0] for name in tensors}
    known = {name.partition(".")[0] for name in model.state_dict()}
    return _behind(f"{words.pop()}.", tensors) if len(words) == 1 and not words & known else tensors
