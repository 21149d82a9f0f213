"""A plan whose training step is measured, and stays within a budget; the rule is in :mod:`passes.training.budget`.

Every candidate is planned as it is without a budget, and what was chosen is planned, tried and measured as what it is:
one block and form per layer.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.expand import Plan, PlanRow, make_plan
from passes.graph.generators import kept_generators
from passes.graph.inputs import Example, as_example, copied, tensors_in
from passes.refusal import Reason, Refusal, ReparamError
from passes.training.budget import Limits, Option, Pair, Round, settle
from passes.training.build import build, signature, site_of
from passes.training.filters import Blocks, Forms, alternatives, named_blocks
from passes.training.forms import Form
from passes.training.step import Measure, Step, measure

__all__ = ["make_budgeted_plan"]

log = logging.getLogger("reparam")

NOTE = "The order of layers is by cost and capacity, not by proven accuracy."


def make_budgeted_plan(
    model: nn.Module,
    block: Blocks,
    *,
    limits: Limits,
    form: Forms = None,
    example_inputs: Any = None,
    measured_by: Measure = measure,
    **how: Any,
) -> Plan:
    """The plan that keeps a training step on ``example_inputs`` within ``limits``; ``how`` as for :func:`make_plan`.

    ``form=None``: as ``branches``, then ``sampled``, or as the block is meant. The model is not changed.
    """
    if example_inputs is None:
        raise ReparamError("a budget is measured: pass example_inputs=, a batch like those of training")
    if not torch.is_grad_enabled():
        raise ReparamError("a budget measures training steps, and gradients are switched off here")
    if foreign := sorted({p.device.type for p in model.parameters()} - {"cpu", "cuda"}):
        raise ReparamError(f"a budget is measured on the CPU or a CUDA device, and the model is on {foreign[0]}")
    blocks = alternatives(block)
    forms: list[Forms] = [form]
    if form is None and any(not each.info.online for some in blocks for each in named_blocks(some)):
        forms.append(Form("sampled"))
    how["example_inputs"] = example_inputs
    plans = [(rank, make_plan(model, each, form=f, **how)) for each in blocks for rank, f in enumerate(forms)]
    base, possible = (
        _all_rows([plan for _, plan in plans]),
        [(rank, row) for rank, plan in plans for row in plan.expanded],
    )
    if min(limits.room) == 0:
        none = dict.fromkeys(row.layer for _, row in possible)
        return _decided(base, none, "the budget has no room", f"no block: {limits} is what the plain step takes")
    with kept_generators(p.device for p in model.parameters()):
        meter = _Meter(base, as_example(example_inputs, base._model), limits, measured_by)
        options = []
        for rank, row in possible:
            if meter.calls.get(row.layer) and (form is not None or rank == 0 or not _meant_online(row)):
                options.append(_option(rank, row, meter.price(row)))

        def tried(chosen: Sequence[Option]) -> tuple[set[str], Callable[[], Pair], Plan]:
            blocks = {escape(option.layer): option.block for option in chosen}
            forms = {escape(option.layer): option.form for option in chosen}
            plan = make_plan(model, blocks, form=forms, **{**how, "where": list(blocks)})
            return {row.layer for row in plan.expanded}, lambda: meter.factors(plan), plan

        best, rounds = settle(options, limits, tried)
    decided: dict[str, PlanRow | None] = dict.fromkeys(option.layer for option in options)
    for each in rounds:
        decided |= {row.layer: row for row in each.result.taken_back}
    takes = [] if limits.time is None else [f"{_short(meter.plain.seconds * 1e3)} ms"]
    takes += [] if limits.memory is None else [f"{_short(meter.plain.bytes / 2**20)} MiB"]
    lines = [f"budget: {limits}; the plain step takes {' and '.join(takes)} on {meter.where}"]
    lines += [_said(each, limits) for each in rounds]
    if best is None:
        lines.append(_nothing_fits(options, limits))
        log.warning("budget: %s", lines[-1])
        return _decided(base, decided, "no block fits the budget", *lines)
    if best is not rounds[-1]:
        lines.append(f"kept: {_said(best, limits)}")
    for row in best.result.expanded:
        price = next(option.price for option in best.chosen if option.layer == row.layer)
        decided[row.layer] = replace(row, price=(price[0] * best.scale[0], price[1] * best.scale[1]))
    log.info("budget: %s", lines[-1])
    return _decided(replace(base, compared=best.result.compared), decided, "the budget went to other layers", *lines)


def _all_rows(plans: Sequence[Plan]) -> Plan:
    """The first plan with the rows of the others, too: some blocks take linear layers, which others never see."""
    found = {row.layer: row for plan in reversed(plans) for row in plan.rows}
    longest = max(plans, key=lambda plan: len(plan.rows))
    return replace(plans[0], rows=tuple(found[row.layer] for row in longest.rows))


def _decided(base: Plan, decided: Mapping[str, PlanRow | None], why: str, *lines: str) -> Plan:
    """The plan with the rows that were decided on; None for a layer that is left alone."""
    rows = []
    for row in base.rows:
        mine = decided.get(row.layer, row)
        if mine is None or (mine is row and row.refusal is None):
            said = why if row.layer in decided else "it does not run in a training step, so no block has a price"
            mine = replace(row, block=None, cost=None, refusal=Refusal(Reason.OVER_BUDGET, said).at(row.layer))
        rows.append(mine)
    return replace(base, rows=tuple(rows), budget=(*lines, NOTE))


def _meant_online(row: PlanRow) -> bool:
    return row.block is not None and row.block.info.online


def _option(rank: int, row: PlanRow, price: Pair) -> Option:
    assert row.block is not None
    assert row.cost is not None
    g = row.geometry
    kernel = g.out_channels * g.in_channels // g.groups * math.prod(g.kernel)
    return Option(row.layer, row.block, row.form, kernel, row.cost.parameters[1], rank, price)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _said(each: Round, limits: Limits) -> str:
    parts = [
        f"{name} predicted {predicted:.3f}, measured {measured:.3f}"
        for name, limit, predicted, measured in zip(
            ("time", "memory"), (limits.time, limits.memory), each.predicted, each.measured, strict=True
        )
        if limit is not None
    ]
    over = "" if each.holds(limits) else ": over the budget"
    return f"{len(each.chosen)} block{'s' * (len(each.chosen) != 1)}: {'; '.join(parts)} times the plain step{over}"


def _nothing_fits(options: Sequence[Option], limits: Limits) -> str:
    if not options:
        return "no layer that runs in a training step can have a block"
    limited = [i for i, room in enumerate(limits.room) if room < math.inf]
    least = min(options, key=lambda o: max(o.price[i] / limits.room[i] for i in limited))
    adds = " and ".join(f"{least.price[i]:.3f} of the plain step's {('time', 'memory')[i]}" for i in limited)
    return f"no block fits {limits}: the cheapest, {least.block} as {least.form} at {least.layer}, adds {adds}"


class _Meter:
    """Measures single layers, each kind once, and whole networks, in training on ``example``.

    Attributes:
        calls: by layer, the inputs that one step calls it with.
        plain: what a step of the network takes.
        where: on what.
    """

    def __init__(self, plan: Plan, example: Example | None, limits: Limits, measured_by: Measure) -> None:
        assert example is not None
        self.preserve, self.example, self.measure = plan._preserve, example, measured_by
        self.memory = limits.memory is not None
        self.model = replace(plan, rows=()).expanded_copy()
        self.step = self._whole(self.model)
        self.calls = self._calls()
        self.plain = measured_by([self.step])[0]
        cuda = self.step.device.type == "cuda"
        self.where = torch.cuda.get_device_name(self.step.device) if cuda else "one CPU thread"
        self._known: dict[Any, Pair] = {}

    def _whole(self, model: nn.Module) -> Step:
        def call() -> Any:
            args, kwargs = copied((self.example.args, dict(self.example.kwargs)))  # which a forward may write into
            return model(*args, **kwargs)

        return Step(model, call, whole=True, memory=self.memory)

    def _calls(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}

        def note(path: str, args: Any, kwargs: Any) -> None:
            x = next(tensors_in((args, kwargs)))
            found.setdefault(path, []).append(torch.empty_like(x, device="meta", requires_grad=x.requires_grad))

        hooks = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
            )
            for path, module in self.model.named_modules()
            if isinstance(module, (_ConvNd, nn.Linear))
        ]
        try:
            self.step()
        except ReparamError:
            raise
        # The model is user code: whatever it raises means that it does not train on these inputs.
        except Exception as error:
            raise ReparamError(f"a training step on example_inputs fails: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def price(self, row: PlanRow) -> Pair:
        """What the block of a row adds to a step."""
        assert row.block is not None
        seconds = size = 0.0
        for x in self.calls[row.layer]:
            site = site_of(self.model, row.found, self.preserve, row.form)
            trained = tuple(p.requires_grad for m in (site.conv, site.norm) if m is not None for p in m.parameters())
            key = (signature(site, row.block, row.form), x.shape, x.stride(), x.dtype, x.requires_grad, trained)
            if key not in self._known:
                plain, block = self.measure(self._pair(row, x))
                self._known[key] = block.seconds - plain.seconds, block.bytes - plain.bytes
            seconds, size = seconds + self._known[key][0], size + self._known[key][1]
        return seconds / self.plain.seconds, size / max(self.plain.bytes, 1)

    def _pair(self, row: PlanRow, like: Tensor) -> list[Step]:
        """A layer with its norm, and the block in their place."""
        assert row.block is not None
        mine, theirs = (copy.deepcopy(site_of(self.model, row.found, self.preserve, row.form)) for _ in range(2))
        block = build(row.layer, theirs, row.block, row.form)
        plain = nn.Sequential(mine.layer or mine.conv)
        if theirs.norm_taken and mine.norm is not None:
            plain.append(mine.norm)
        x = torch.empty_like(like, device=self.step.device).normal_().requires_grad_(like.requires_grad)
        return [Step(plain, lambda: plain(x), memory=self.memory), Step(block, lambda: block(x), memory=self.memory)]

    def factors(self, plan: Plan) -> Pair:
        """What a step of the planned network takes, in steps of the plain one that take turns with it."""
        try:
            plain, expanded = self.measure([self.step, self._whole(plan.expanded_copy())])
        except torch.OutOfMemoryError as error:
            raise ReparamError(
                f"a step with {len(plan.expanded)} blocks does not fit into memory: pass memory="
            ) from error
        return expanded.seconds / plain.seconds, expanded.bytes / plain.bytes if self.memory else 1.0
