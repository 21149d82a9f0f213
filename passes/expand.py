"""The expansion compiler: find convolutions by dataflow, choose a block for each, plan, and put the blocks in place.

A plan touches nothing: every block is built on the meta device first, and must fold back into just the convolution
that it replaces, by the laws of :mod:`passes.algebra.conv_form`. What does not is left alone with the reason. Then all
blocks are tried on a copy that is run against the original (:mod:`passes.training.trial`).
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry, Layer
from passes.blocks.kit.layers import BranchSum, SilenceError, is_block
from passes.blocks.kit.registry import Block
from passes.collapse import check_model
from passes.edits.apply import apply
from passes.edits.carried import other_network, remember
from passes.edits.edit import Block as BlockEdit
from passes.edits.edit import Edit, Remove
from passes.exported import is_program
from passes.fold.methods import classes_of, parts_used
from passes.graph.capture import join
from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators
from passes.graph.inputs import as_example
from passes.graph.patches import patched
from passes.graph.weights import weight_maker
from passes.proof.compare import EquivalenceError
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.table import section
from passes.training.build import Cost, answers_for, build, check_preserved, signature, site_of, try_on_meta
from passes.training.discovery import Found, find_convs, layers_in
from passes.training.filters import Blocks, Forms, Where, block_chooser, form_chooser, named_blocks, selector
from passes.training.forms import Form
from passes.training.inside import takes_any_weight
from passes.training.positions import positions_of
from passes.training.retrace import Reading
from passes.training.trial import try_blocks

__all__ = ["Cost", "Plan", "PlanRow", "make_plan"]

ALONE = "layer"
"""How a layer is called that is the whole model; expanding it gives its block."""

log = logging.getLogger("reparam")

_NOTED_METHOD = "{}.{} uses the convolution @ without its norm, which goes into the block: it will get both"
_NOTED_MAKER = (
    "{} computes the weight of @, and computes no sum of branches: collapse gives a plain convolution, and like= needs "
    "an architecture without it"
)

_UNASKED = (Reason.NOT_SELECTED, Reason.KERNEL_OF_ONE, Reason.NOT_MEANT)
"""Refusals of convolutions that the caller did not ask for."""

_TAKEN_BACK = (Reason.NOT_RUN, Reason.DIFFERS)
"""Refusals of convolutions whose block was tried and did not hold."""


@dataclass(frozen=True)
class PlanRow:
    """One convolution in a plan: the block that it gets and what that costs, or the refusal that says why not.

    ``norm_stays`` says why a norm that reads it stays outside of the block; ``price`` what the block adds to the time
    and, if asked for, the memory of a training step, in plain steps.
    """

    layer: str
    geometry: Geometry
    block: Block | None
    refusal: Refusal | None
    cost: Cost | None
    found: Found = field(repr=False)
    form: Form = field(default_factory=Form)
    price: tuple[float, float] | None = None

    @property
    def norm_stays(self) -> Refusal | None:
        return self.found.norm_stays


@dataclass(frozen=True)
class Plan:
    """What :func:`reparam.expand` would do; ``print(plan)`` is a table, :meth:`apply` does it.

    Args:
        rows: one per convolution, in order of registration.
        per_sample: whether multiply-adds are those of one sample, else of one output position.
        compared: what the trial compared and on what, or why it could not; empty without a trial.
        budget: lines on what a step may take, is predicted to take, and takes; empty without a budget.
    """

    rows: tuple[PlanRow, ...]
    per_sample: bool
    _model: nn.Module = field(repr=False)
    _preserve: bool = True
    _inplace: bool = False
    _verify: bool | str = True
    compared: tuple[str, ...] = ()
    _alone: bool = False
    budget: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing of the blocks.

        Methods that forward does not call and that use a convolution without the norm that goes into its block; layers
        that compute their weight and could not compute that of their folded block.
        """
        found: dict[str, list[str]] = {}
        for row in self.expanded:
            if (maker := weight_maker(row.found.conv)) is not None and not takes_any_weight(row.found.conv):
                found.setdefault(_NOTED_MAKER.format(maker), []).append(row.layer)
            if row.found.norm is None:
                continue
            paths = [PurePosixPath(path.replace(".", "/")) for path in (row.layer, row.found.norm.path)]
            around = next(path for path in paths[0].parents if path in paths[1].parents)
            owner = self._model.get_submodule(".".join(around.parts))
            conv, norm = (path.parts[len(around.parts)] for path in paths)
            for method, some in parts_used(owner, frozenset((conv, norm))):
                if conv in some:
                    found.setdefault(_NOTED_METHOD.format(type(owner).__name__, method), []).append(row.layer)
        return tuple(
            note.replace("@", f"{layers[0]} and {len(layers) - 1} more" if len(layers) > 1 else layers[0])
            for note, layers in found.items()
        )

    @property
    def expanded(self) -> tuple[PlanRow, ...]:
        """Rows that get a block."""
        return tuple(row for row in self.rows if row.refusal is None)

    @property
    def refused(self) -> tuple[PlanRow, ...]:
        """Rows of convolutions that were asked for and are left alone."""
        return tuple(row for row in self.rows if row.refusal is not None and row.refusal.reason not in _UNASKED)

    @property
    def taken_back(self) -> tuple[PlanRow, ...]:
        """Rows whose block was tried, and is not put in because it did not hold."""
        return tuple(row for row in self.rows if row.refusal is not None and row.refusal.reason in _TAKEN_BACK)

    def reasons(self) -> Counter[str]:
        """How many convolutions are left alone for each reason, unselected ones included."""
        return Counter(row.refusal.message for row in self.rows if row.refusal is not None)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of :func:`reparam.expand` that choose just these blocks and forms, on any network of these layers."""
        return {
            "block": {escape(row.layer): row.block for row in self.expanded},
            "form": {escape(row.layer): row.form for row in self.expanded},
            "where": [escape(row.layer) for row in self.expanded],
            "init": "preserve" if self._preserve else "paper",
        }

    def expanded_copy(self) -> nn.Module:
        """The expanded model in training, unchecked: to be measured."""
        model = deep_copy(self._model)
        _put(model, self.expanded, self._preserve, check=False)
        return model if self._model.training else model.train()

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
            edits, _ = _put(model, self.expanded, self._preserve, check=bool(self._verify))
            remember(model, edits)
        # Whatever went wrong, a model edited in place must come back as it was; the error itself goes on.
        except BaseException:
            with torch.no_grad():
                for weight, before in scaled:
                    weight.copy_(before)
            raise
        for row in self.taken_back:
            log.warning("expand: the block of %s is taken back: %s", row.layer, row.refusal and row.refusal.message)
        if warning := other_network(model):
            log.warning("expand: %s", warning)
        for note in self.notes:
            log.info("expand: %s", note)
        level = logging.INFO if self.expanded else logging.WARNING
        why = "" if self.expanded else f": {'; '.join(self.reasons()) or 'there are none'}"
        log.log(level, "expand: %d of %d %s get a block%s", len(self.expanded), len(self.rows), self.noun, why)
        return model.get_submodule(ALONE) if self._alone else model

    @property
    def noun(self) -> str:
        """What the rows are."""
        return "layers" if any(isinstance(row.found.conv, nn.Linear) for row in self.rows) else "convolutions"

    def _check_unchanged(self) -> None:
        modules = dict(self._model.named_modules())
        for row in self.expanded:
            norm = row.found.norm
            if modules.get(row.layer) is not row.found.conv or (norm is not None and norm.path not in modules):
                raise ReparamError(f"{row.layer} is no longer the layer that was planned for: plan again")

    @property
    def prices(self) -> dict[str, list[str]]:
        """What each expanded row adds to a step's time and memory, and their sums; what was measured alone."""
        priced = [row.price for row in self.expanded if row.price is not None]
        columns = {name: [price[i] for price in priced] for i, name in enumerate(("time", "memory"))}
        return {n: [f"{p:+.3f}" for p in [*each, math.fsum(each)]] for n, each in columns.items() if any(each)}

    def __str__(self) -> str:
        lines = [f"{len(self.expanded)} of {len(self.rows)} {self.noun} get a block"]
        costs = [row.cost for row in self.expanded if row.cost is not None]
        if costs:
            cells = [_aligned([c.parameters for c in costs]), _aligned([c.multiply_adds for c in costs])]
            names = [(row.layer, str(row.geometry), f"{row.block}{_in_form(row)}") for row in self.expanded]
            names.append(("total", "", ""))
            work = "multiply-adds" if self.per_sample else "multiply-adds a position"
            body = [(*name, *row) for name, *row in zip(names, *cells, strict=True)]
            lines += ["parameters and multiply-adds are those before -> in training -> after collapse"]
            added = self.prices
            body = [(*row, *prices) for row, *prices in zip(body, *added.values(), strict=True)]
            lines += section("", ("layer", "geometry", "block", "parameters", work, *added), body)
        back = self.taken_back
        said = [(row, row.refusal) for row in self.refused if row not in back]
        stays = [(row, row.norm_stays) for row in self.expanded if row.norm_stays is not None]
        lines[1:1] = _grouped("taken back", [(row, row.refusal) for row in back], layers=True)
        lines += _grouped("left alone", said, layers=True)
        lines += _grouped("without their norm", stays, layers=True)
        unasked = [(row, row.refusal) for row in self.rows if row.refusal and row.refusal.reason in _UNASKED]
        meant = [pair for pair in unasked if pair[1].reason is Reason.NOT_MEANT]
        lines += _grouped("not considered", [pair for pair in unasked if pair not in meant], layers=False)
        lines += _grouped("not considered", meant, layers=True)
        if notes := [f"note: {note}" for note in self.notes]:
            lines += ["", *(line for note in notes for line in textwrap.wrap(note, 110, subsequent_indent="  "))]
        if self.compared:
            lines += ["", *(line for text in self.compared for line in textwrap.wrap(f"tried: {text}", 110))]
        if self.budget:
            lines += ["", *(line for text in self.budget for line in textwrap.wrap(text, 110, subsequent_indent="  "))]
        return "\n".join(lines)


def _put(
    model: nn.Module, rows: Iterable[PlanRow], preserve: bool, *, check: bool, real: bool = True
) -> tuple[list[Edit], dict[str, _BatchNorm]]:
    """Build the blocks of ``rows`` and put them in place; gives the edits, and norms that moved by their former paths.

    With ``check``, one block of each signature is seen to keep the function. Without ``real`` they are blocks to be
    tried: they record no kernel, and where a block cannot start as what it replaces, its main branch is there alone.
    """
    edits: list[Edit] = []
    blocks: dict[str, nn.Module] = {}
    moved: dict[str, _BatchNorm] = {}
    checked: set[Any] = set()
    running = classes_of(model.modules())
    for row in rows:
        block, path, norm = row.block, row.layer, row.found.norm
        assert block is not None
        site = site_of(model, row.found, preserve, row.form)
        try:
            blocks[path] = build(path, site, block, row.form, recorded=real)
        except (RefusalError, SilenceError):
            if real:
                raise
            blocks[path] = BranchSum(str(block), {"main": site.main()}, site.conv, site.layer, site.inside)
        kind = signature(site, block, row.form)
        if check and preserve and kind not in checked:
            checked.add(kind)
            check_preserved(path, site, blocks[path])
        options = tuple(block.options.items())
        behind = ("", ()) if norm is None else (norm.path, norm.rest)
        edits.append(BlockEdit(path, block.name, options, str(row.form), preserve, *behind, norms=row.found.norms))
        if site.norm_taken and site.norm is not None and norm is not None:
            answering = answers_for(model, norm.path, blocks[path], running)
            edits.append(Remove(norm.path, norm.rest, answering=answering, into="" if answering else path))
            moved[norm.path] = site.norm
    apply(model, edits, blocks)
    return edits, moved


def make_plan(
    model: nn.Module,
    block: Blocks,
    *,
    where: Where = None,
    init: str = "preserve",
    form: Forms = None,
    example_inputs: Any = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
) -> Plan:
    """Decide for every convolution of ``model``; see :func:`reparam.plan`. The model is not changed."""
    linear = any(each.info.linear for each in named_blocks(block))
    _check(model, init, verify, inplace, linear=linear)
    if alone := isinstance(model, (_ConvNd, nn.Linear) if linear else _ConvNd):
        model = nn.Sequential(OrderedDict({ALONE: model})).train(model.training)
    with kept_generators(p.device for p in model.parameters()):
        positions = None
        read: list[Reading] = []
        asked = _asked(model, layers_in(model, linear=linear), block, where)
        wanted = {path for path, mine in asked.items() if isinstance(mine, Block)}
        convs = find_convs(model, linear=linear, read=read, wanted=wanted)
        if verify is not True:
            convs = [_unseen(found) for found in convs]
        if example_inputs is not None:
            example_inputs = as_example(example_inputs, model)
            positions = positions_of(model, convs, example_inputs)
        decide = _Decision(model, init == "preserve", positions)
        with patched():  # for the traces of all blocks at once
            rows = decide.rows(convs, asked, form)
        plan = Plan(rows, positions is not None, model, init == "preserve", inplace, verify, _alone=alone)
        return _tried(plan, decide, example_inputs, read, strict) if verify is True else plan


def _asked(model: nn.Module, layers: Mapping[str, Layer], block: Blocks, where: Where) -> dict[str, Block | Refusal]:
    """The block that is asked for in each layer's place, or why none is; whatever the code around it does."""
    paths = [*layers]
    selected, chosen = selector(where, paths), block_chooser(block, paths)
    asked: dict[str, Block | Refusal] = {}
    for path, layer in layers.items():
        mine = chosen(path)
        refusal: Refusal | None = Refusal(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)
        if mine is not None and isinstance(layer, nn.Linear) and not mine.info.linear:
            refusal = Refusal(Reason.NOT_SELECTED, f"{mine.name} is for convolutions, and this is a linear layer")
        elif mine is not None:
            refusal = selected(path, layer, mine)
        if (refusal is None or refusal.reason is not Reason.NOT_SELECTED) and _inside_block(model, path):
            refusal = Refusal(Reason.BLOCK, "it is part of a block already; collapse the model first")
        asked[path] = refusal or mine  # type: ignore[assignment]  # without a refusal there is a block
    return asked


def _unseen(found: Found) -> Found:
    """A convolution of which no graph says how it is used is left alone where nothing is run."""
    if found.refusal is not None or found.unread is None:
        return found
    said = f"{found.unread.message}; only a run shows how it is used: verify=True"
    return replace(found, refusal=replace(found.unread, message=said))


def _tried(plan: Plan, decide: _Decision, example: Any, read: Sequence[Reading], strict: bool) -> Plan:
    """The plan without the blocks that do not hold when the network runs."""

    def put(model: nn.Module, rows: Sequence[PlanRow]) -> dict[str, dict[str, str]]:
        _, norms = _put(model, rows, preserve=True, check=False, real=False)
        paths = {id(module): path for path, module in model.named_modules()}
        moved: dict[str, dict[str, str]] = {}
        for row in rows:
            if (norm := row.found.norm) is not None and norm.path in norms:
                stay = {path: path for name in norm.rest for path in [join(norm.path, name)]}
                moved[row.layer] = {norm.path: paths[id(norms[norm.path])], **stay}
            if weight_maker(row.found.conv) is not None:  # with what every forward of it may change
                inside = (path for path, m in model.get_submodule(row.layer).named_modules() if weight_maker(m))
                moved.setdefault(row.layer, {})[row.layer] = join(row.layer, next(inside))
        return moved

    rows = {row.layer: row for row in plan.rows}
    blocks = [row.block for row in plan.expanded]
    outcome = try_blocks(
        plan._model,
        plan.expanded,
        put,
        decide.without_norm,
        example,
        lambda row: row.found.always,
        lambda row: row.found.unread,
        decide.again,
        exact_in_training=all(block is None or block.info.exact_in_training for block in blocks),
        read=read,
    )
    if strict and (outcome.taken_back or outcome.changed):
        refusal = next(iter([*outcome.taken_back.values(), *outcome.changed.values()]))
        raise EquivalenceError(str(refusal), layer=refusal.layer)
    for layer, refusal in {**outcome.unseen, **outcome.taken_back}.items():
        rows[layer] = replace(rows[layer], block=None, refusal=refusal, cost=None)
    rows |= {row.layer: row for row in outcome.kept}
    for layer, refusal in outcome.changed.items():
        rows[layer] = replace(rows[layer], found=replace(rows[layer].found, norm_stays=refusal))
    return replace(plan, rows=tuple(rows.values()), compared=outcome.compared)


class _Decision:
    """Decides convolution by convolution; layers that are alike are tried once."""

    def __init__(self, model: nn.Module, preserve: bool, positions: dict[str, float] | None) -> None:
        self.model, self.preserve, self.positions = model, preserve, positions
        self._decided: dict[Any, Cost | Refusal] = {}

    def rows(self, convs: list[Found], asked: Mapping[str, Block | Refusal], form: Forms) -> tuple[PlanRow, ...]:
        form_of = form_chooser(form, [*asked])
        rows = []
        for found in convs:
            mine = asked[found.path]
            refusal = mine if isinstance(mine, Refusal) else found.refusal
            if refusal is not None or isinstance(mine, Refusal):
                told = refusal and refusal.at(found.path)
                rows.append(PlanRow(found.path, Geometry.of(found.conv), None, told, None, found))
            else:
                rows.append(self.row(found, mine, form_of(found.path, mine)))
        return tuple(rows)

    def row(self, found: Found, block: Block, form: Form) -> PlanRow:
        """The block in the place of one convolution, or why it does not fit."""
        key = signature(site_of(self.model, found, self.preserve, form), block, form)
        if key not in self._decided:
            self._decided[key] = try_on_meta(self.model, found, block, self.preserve, form)
        outcome, geometry = self._decided[key], Geometry.of(found.conv)
        if isinstance(outcome, Refusal):
            return PlanRow(found.path, geometry, None, outcome.at(found.path), None, found, form)
        cost = outcome if self.positions is None else _times(outcome, self.positions.get(found.path, 0))
        return PlanRow(found.path, geometry, block, None, cost, found, form)

    def again(self, row: PlanRow) -> PlanRow:
        """The same block for a convolution that is called more than once."""
        other = row.block and self.row(replace(row.found, again=True), row.block, row.form)
        return other if other and other.refusal is None else row

    def without_norm(self, row: PlanRow) -> PlanRow | None:
        """The same block with the norm left where it is; None if that is how it is, or if the block needs the norm."""
        if row.found.norm is None or row.block is None:
            return None
        alone = self.row(replace(row.found, norm=None), row.block, row.form)
        return alone if alone.refusal is None else None


def _check(model: Any, init: Any, verify: Any, inplace: bool, *, linear: bool) -> None:
    if init not in ("preserve", "paper"):
        raise ReparamError(f"init is 'preserve' or 'paper', got {init!r}")
    if verify not in (True, False, "folds"):
        raise ReparamError(f"verify is True, 'folds' or False, got {verify!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError("a scripted model cannot be expanded: expand first, then torch.jit.script the result")
    if hasattr(model, "_orig_mod"):
        raise ReparamError("a compiled model cannot be expanded: expand first, then torch.compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ReparamError(f"expand the model inside first, then wrap it in {type(model).__name__}")
    if is_program(model):
        raise ReparamError(
            "an exported program has no layers that a block could replace: expand the module, then export"
        )
    check_model(model, numbers=False)
    if inplace and isinstance(model, (_ConvNd, nn.Linear) if linear else _ConvNd):
        raise ReparamError("the model is itself one layer, which cannot be replaced in place: take what expand returns")
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


def _in_form(row: PlanRow) -> str:
    return "" if row.form.name == "branches" else f", {row.form}"


def _aligned(triples: Sequence[Sequence[float]]) -> list[str]:
    """``before -> training -> after`` for each row and for their sum, the three in columns of their own."""
    total = [sum(values) for values in zip(*triples, strict=True)]
    cells = [[_count(value) for value in triple] for triple in [*triples, total]]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [" -> ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _grouped(title: str, rows: Iterable[tuple[PlanRow, Refusal | None]], *, layers: bool) -> list[str]:
    """Convolutions under the reason that they share."""
    lines = []
    reasons: dict[str, list[PlanRow]] = {}
    for row, refusal in rows:
        assert refusal is not None
        reasons.setdefault(refusal.message, []).append(row)
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
