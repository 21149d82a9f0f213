"""The expansion compiler: find convolutions by dataflow, choose a block for each, plan, and put the blocks in place.

A plan touches nothing: every block is built on the meta device first, and must fold back into just the convolution that
it replaces, by the laws of :mod:`passes.algebra.conv_form`. What does not is left alone with the reason.
"""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry
from passes.blocks.kit.layers import is_block
from passes.blocks.kit.registry import Block
from passes.collapse import check_model
from passes.edits.apply import apply
from passes.edits.edit import Block as BlockEdit
from passes.edits.edit import Edit, Remove, remember
from passes.graph.copies import deep_copy
from passes.refusal import Reason, Refusal, ReparamError
from passes.table import section
from passes.training.build import Cost, build, check_preserved, signature, site_of, try_on_meta
from passes.training.discovery import Found, find_convs
from passes.training.filters import Blocks, Where, block_chooser, selector
from passes.training.positions import positions_of

__all__ = ["Cost", "Plan", "PlanRow", "make_plan"]

log = logging.getLogger("reparam")

_UNASKED = (Reason.NOT_SELECTED, Reason.KERNEL_OF_ONE)
"""Refusals of convolutions that the caller did not ask for."""


@dataclass(frozen=True)
class PlanRow:
    """One convolution in a plan: the block that it gets and what that costs, or the refusal that says why not."""

    layer: str
    geometry: Geometry
    block: Block | None
    refusal: Refusal | None
    cost: Cost | None
    found: Found = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """What :func:`reparam.expand` would do; ``print(plan)`` is a table, :meth:`apply` does it.

    Args:
        rows: one per convolution, in order of registration.
        per_sample: whether multiply-adds are those of one sample, else of one output position.
    """

    rows: tuple[PlanRow, ...]
    per_sample: bool
    _model: nn.Module = field(repr=False)
    _preserve: bool = True
    _online: dict[str, bool] = field(default_factory=dict, repr=False)
    _inplace: bool = False

    @property
    def expanded(self) -> tuple[PlanRow, ...]:
        """Rows that get a block."""
        return tuple(row for row in self.rows if row.refusal is None)

    @property
    def refused(self) -> tuple[PlanRow, ...]:
        """Rows of convolutions that were asked for and are left alone."""
        return tuple(row for row in self.rows if row.refusal is not None and row.refusal.reason not in _UNASKED)

    def reasons(self) -> Counter[str]:
        """How many convolutions are left alone for each reason, unselected ones included."""
        return Counter(row.refusal.message for row in self.rows if row.refusal is not None)

    def apply(self) -> nn.Module:
        """The expanded model: a copy, or the model itself if the plan was made with ``inplace=True``.

        Raises :class:`ReparamError` if a block does not keep the function although it should; the model is then as it
        was.
        """
        self._check_unchanged()
        model = self._model if self._inplace else deep_copy(self._model)
        scaled = (
            [] if self._preserve or not self._inplace else _norm_weights((row.found for row in self.expanded), model)
        )
        try:
            edits, blocks = self._built(model)
            apply(model, edits, blocks)
            remember(model, edits)
        # Whatever went wrong, a model edited in place must come back as it was; the error itself goes on.
        except BaseException:
            with torch.no_grad():
                for weight, before in scaled:
                    weight.copy_(before)
            raise
        level = logging.INFO if self.expanded else logging.WARNING
        log.log(level, "expand: %d of %d convolutions get a block", len(self.expanded), len(self.rows))
        return model

    def _built(self, model: nn.Module) -> tuple[list[Edit], dict[str, nn.Module]]:
        """The edits, and the blocks that they put in place; one of each signature is seen to keep the function."""
        edits: list[Edit] = []
        blocks: dict[str, nn.Module] = {}
        checked: set[Any] = set()
        for row in self.expanded:
            block, path, norm = row.block, row.layer, row.found.norm
            assert block is not None
            online = self._online[path]
            site = site_of(model, row.found, self._preserve, online)
            blocks[path] = build(path, site, block, online)
            kind = signature(site, block, online)
            if self._preserve and kind not in checked:
                checked.add(kind)
                check_preserved(path, site, blocks[path])
            options = tuple(block.options.items())
            behind = ("", ()) if norm is None else (norm.path, norm.rest)
            edits.append(BlockEdit(path, block.name, options, online, self._preserve, *behind))
            if site.norm_taken and norm is not None:
                edits.append(Remove(norm.path, norm.rest))
        return edits, blocks

    def _check_unchanged(self) -> None:
        modules = dict(self._model.named_modules())
        for row in self.expanded:
            norm = row.found.norm
            if modules.get(row.layer) is not row.found.conv or (norm is not None and norm.path not in modules):
                raise ReparamError(f"{row.layer} is no longer the layer that was planned for: plan again")

    def __str__(self) -> str:
        lines = [f"{len(self.expanded)} of {len(self.rows)} convolutions get a block"]
        costs = [row.cost for row in self.expanded if row.cost is not None]
        if costs:
            cells = [_aligned([c.parameters for c in costs]), _aligned([c.multiply_adds for c in costs])]
            names = [(row.layer, str(row.geometry), str(row.block)) for row in self.expanded]
            names.append(("total", "", ""))
            work = "multiply-adds" if self.per_sample else "multiply-adds a position"
            body = [(*name, *row) for name, *row in zip(names, *cells, strict=True)]
            lines += ["parameters and multiply-adds are those before -> in training -> after collapse"]
            lines += section("", ("layer", "geometry", "block", "parameters", work), body)
        lines += _grouped("left alone", self.refused, layers=True)
        lines += _grouped("not considered", self._unasked, layers=False)
        return "\n".join(lines)

    @property
    def _unasked(self) -> tuple[PlanRow, ...]:
        return tuple(row for row in self.rows if row.refusal is not None and row.refusal.reason in _UNASKED)


def make_plan(
    model: nn.Module,
    block: Blocks,
    *,
    where: Where = None,
    init: str = "preserve",
    online: bool | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    inplace: bool = False,
) -> Plan:
    """Decide for every convolution of ``model``; see :func:`reparam.plan`. The model is not changed."""
    _check(model, init, online, inplace)
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        return _decided(model, block, where, init == "preserve", online, example_inputs, inplace)


def _decided(
    model: nn.Module,
    block: Blocks,
    where: Where,
    preserve: bool,
    online: bool | None,
    example_inputs: tuple[Any, ...] | None,
    inplace: bool,
) -> Plan:
    convs = find_convs(model)
    paths = [found.path for found in convs]
    selected, chosen = selector(where, paths), block_chooser(block, paths)
    positions = None if example_inputs is None else positions_of(model, convs, example_inputs)
    decided: dict[Any, Cost | Refusal] = {}
    rows, onlines = [], {}
    for found in convs:
        mine = chosen(found.path)
        outcome: Cost | Refusal | None = selected(found.path, found.conv)
        if outcome is None and mine is None:
            outcome = Refusal(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)
        asked = not isinstance(outcome, Refusal) or outcome.reason is not Reason.NOT_SELECTED
        if asked and _inside_block(model, found.path):
            outcome = Refusal(Reason.BLOCK, "it is part of a block already; collapse the model first")
        outcome = outcome or found.refusal
        if outcome is None:
            assert mine is not None
            as_one = mine.info.online if online is None else online
            onlines[found.path] = as_one
            key = signature(site_of(model, found, preserve, as_one), mine, as_one)
            if key not in decided:
                decided[key] = try_on_meta(model, found, mine, preserve, as_one)
            outcome = decided[key]
        cost = outcome if isinstance(outcome, Cost) else None
        refusal = outcome.at(found.path) if isinstance(outcome, Refusal) else None
        if cost is not None and positions is not None:
            cost = _times(cost, positions.get(found.path, 0))
        rows.append(PlanRow(found.path, Geometry.of(found.conv), mine if cost else None, refusal, cost, found))
    return Plan(tuple(rows), positions is not None, model, preserve, onlines, inplace)


def _check(model: Any, init: Any, online: Any, inplace: bool) -> None:
    if init not in ("preserve", "paper"):
        raise ReparamError(f"init is 'preserve' or 'paper', got {init!r}")
    if online not in (None, True, False):
        raise ReparamError(f"online is True, False or None (as the block says), got {online!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError("a scripted model cannot be expanded: expand first, then torch.jit.script the result")
    if hasattr(model, "_orig_mod"):
        raise ReparamError("a compiled model cannot be expanded: expand first, then torch.compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ReparamError(f"expand the model inside first, then wrap it in {type(model).__name__}")
    check_model(model, numbers=False)
    if isinstance(model, _ConvNd):
        raise ReparamError("the model is itself one layer: put it into torch.nn.Sequential, so that it can be replaced")
    if inplace and (name := next((n for n, p in model.named_parameters() if p.is_inference()), None)) is not None:
        raise ReparamError(
            f"{name} was made under torch.inference_mode() and can never be trained: leave out inplace=True, which "
            "gives a copy that can"
        )


def _norm_weights(found: Iterable[Found], model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights of the norms that a published initialisation scales, each with a copy of its numbers."""
    norms = [model.get_submodule(each.norm.path) for each in found if each.norm is not None]
    weights = [norm.weight for norm in norms if isinstance(norm.weight, Tensor)]
    return [(weight, weight.detach().clone()) for weight in weights]


def _inside_block(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    return any(is_block(model.get_submodule(".".join(parts[:i]))) for i in range(len(parts)))


def _times(cost: Cost, positions: float) -> Cost:
    before, training, after = (m * positions for m in cost.multiply_adds)
    return Cost(cost.parameters, (before, training, after))


# ------------------------------------------------------------------ printing


def _aligned(triples: Sequence[Sequence[float]]) -> list[str]:
    """``before -> training -> after`` for each row and for their sum, the three in columns of their own."""
    total = [sum(values) for values in zip(*triples, strict=True)]
    cells = [[_count(value) for value in triple] for triple in [*triples, total]]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [" -> ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _grouped(title: str, rows: Sequence[PlanRow], *, layers: bool) -> list[str]:
    """Convolutions under the reason that they share."""
    lines = []
    reasons: dict[str, list[PlanRow]] = {}
    for row in rows:
        assert row.refusal is not None
        reasons.setdefault(row.refusal.message, []).append(row)
    for reason, members in reasons.items():
        lines += ["", *textwrap.wrap(f"{len(members)} {title}: {reason}", 110, subsequent_indent="  ")]
        if layers:
            widest = max(len(row.layer) for row in members)
            lines += [f"  {row.layer:{widest}}  {row.geometry}" for row in members]
    return lines


def _count(number: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{max(2 - len(str(int(scaled))) + 1, 0)}f}{unit}"
    return f"{number:.0f}"
