"""Without inputs: the code of a network runs on proxies, as it is and with blocks, and must do the same around them.

A block stands where its convolution stood, as one call under the same path. So the graphs are the same but for what the
code has found out of the modules themselves: how many there are, what they are called, the sum of all parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.edits.holders import apart
from passes.graph.capture import Unit, first_difference, trace_units
from passes.graph.errors import first_line
from passes.graph.modes import kept_modes
from passes.proof.check import Checked
from passes.proof.compare import Difference, Verdict
from passes.refusal import Refusal

__all__ = ["Reading", "traced_alike"]


Reading = tuple[list[Unit], list[Refusal]]
"""What :func:`trace_units` gives."""


def traced_alike(
    model: nn.Module,
    trial: nn.Module,
    blocks: Sequence[str],
    moved: Sequence[str],
    *,
    training: bool,
    read: Reading | None = None,
) -> Checked:
    """Whether the code of ``trial`` does the same as that of ``model`` around the layers that were replaced.

    Args:
        model: the original.
        trial: the model with blocks.
        blocks: paths of the blocks.
        moved: paths of other modules in whose places something else stands.
        training: in which mode.
        read: what is known of the original in that mode, in which the layers may have been entered.
    """
    compared = f"code of the whole network{' in training' if training else ''}, on no input"
    replaced = [*blocks, *moved]
    try:
        found: Difference | None = None
        if read is not None:
            before, after = _around(replaced, read), _around(replaced, _traced(trial, blocks, training))
            found = next(_differences(before, after, frozenset(replaced)), None)
        if read is None or found is not None:  # or it is entered in another way, and does the same as one call
            before, after = (_around(replaced, _traced(each, replaced, training)) for each in (apart(model), trial))
            found = next(_differences(before, after), None)
    # Code that looks for a layer may raise anything where it finds a block.
    except Exception as error:
        told = Difference(f"raises {type(error).__name__} while it is read: {first_line(error)}")
        return Checked(Verdict.DIFFERENT, compared, (told,))
    if found is None:
        aside = f"; {', '.join(path or 'the network' for path in before[1])} cannot be read" if before[1] else ""
        return Checked(Verdict.EQUAL, f"{compared}: the same operations{aside}")
    return Checked(Verdict.DIFFERENT, compared, (found,))


Around = tuple[dict[str, Unit], dict[str, Refusal]]
"""Graphs by path, and why parts cannot be read."""


def _traced(model: nn.Module, whole: Sequence[str], training: bool) -> Reading:
    """What the code does, each module at the paths ``whole`` being one call."""
    leaves = []
    for path in whole:
        with contextlib.suppress(AttributeError):  # the path has a place in one of the two only
            leaves.append(model.get_submodule(path))
    with kept_modes(model, training=training):
        return trace_units(model, numbers=not training, leaves=leaves)


def _around(replaced: Sequence[str], read: Reading) -> Around:
    """What is read of the code that lies in none of the modules that were replaced."""
    inside = tuple(f"{path}." for path in replaced)
    return (
        {unit.path: unit for unit in read[0] if not unit.path.startswith(inside)},
        {refusal.layer: refusal for refusal in read[1] if not refusal.layer.startswith(inside)},
    )


def _differences(before: Around, after: Around, whole: frozenset[str] = frozenset()) -> Iterator[Difference]:
    for path in before[1].keys() | after[1].keys():
        if before[1].get(path) != after[1].get(path):
            yield Difference(f"is read in another way: {after[1].get(path, 'nothing is in the way')}", path)
    for path, unit in before[0].items():
        other = after[0].get(path)
        if other is None:
            yield Difference("can no longer be read", path)
            continue
        inner = {at.removeprefix(f"{path}.") for at in whole} if path else whole
        if (node := first_difference(unit.graph, other.graph, inner)) is not None:
            yield Difference(f"does something else at {unit.name(node)}", path)
        changed = (n for n, value in unit.constants.items() if not _same(value, other.constants.get(n)))
        if (name := next(changed, None)) is not None:
            yield Difference(f"computes another constant ({name})", path)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, nn.Module):  # the layer in one place, which a function is handed
        return isinstance(other, nn.Module)
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return value is other or bool(value == other)
    if value.is_meta or other.is_meta:
        return value.shape == other.shape
    return value.dtype == other.dtype and torch.equal(value, other)
