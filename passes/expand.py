"""The expansion compiler: find convolutions by dataflow, choose a block for each, plan, and put the blocks in place.

A plan touches nothing: every block is built on the meta device first, and must fold back into just the convolution that
it replaces, by the laws of :mod:`passes.conv_form`. What does not is left alone with the reason.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.blocks.parts import BranchSum, silence
from passes.blocks.registry import Block
from passes.blocks.site import Site
from passes.collapse import check_model
from passes.copies import deep_copy
from passes.emit import target_of
from passes.equivalent import Reading
from passes.geometry import Geometry
from passes.modes import kept_modes
from passes.online import OnlineSum, scales_for_norms
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.select import Blocks, Where, block_chooser, selector
from passes.sites import Found, find_convs, plain_norm, remainder
from passes.surgery import Surgeon
from passes.table import section

__all__ = ["Cost", "Plan", "PlanRow", "make_plan"]

log = logging.getLogger("reparam")


@dataclass(frozen=True)
class Cost:
    """What a layer holds and does: before, while training, and after collapse.

    ``multiply_adds`` are per sample if the plan was given example inputs, else per output position.
    """

    parameters: tuple[int, int, int]
    multiply_adds: tuple[float, float, float]


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
        quiet = (Reason.NOT_SELECTED, Reason.KERNEL_OF_ONE)
        return tuple(row for row in self.rows if row.refusal is not None and row.refusal.reason not in quiet)

    def reasons(self) -> Counter[str]:
        """How many convolutions are left alone for each reason, unselected ones included."""
        return Counter(row.refusal.message for row in self.rows if row.refusal is not None)

    def apply(self) -> nn.Module:
        """The expanded model: a copy, or the model itself if the plan was made with ``inplace=True``.

        Raises :class:`ReparamError` if a block does not keep the function although it should; the model is then as it
        was.
        """
        model = self._model if self._inplace else deep_copy(self._model)
        surgeon = Surgeon(model)
        checked: set[Any] = set()
        try:
            for row in self.expanded:
                assert row.block is not None
                site = _site(model, row.found, self._preserve, self._online[row.layer])
                module = _build(site, row.block, self._online[row.layer])
                signature = _signature(site, row.block, self._online[row.layer])
                if self._preserve and signature not in checked:
                    checked.add(signature)
                    _check_preserved(row.layer, site, module)
                surgeon.replace(row.layer, module)
                if site.norm_taken and row.found.norm is not None:
                    norm = model.get_submodule(row.found.norm.path)
                    surgeon.replace(row.found.norm.path, remainder(norm, row.found.norm.rest))
        # Whatever went wrong, a model edited in place must come back as it was; the error itself goes on.
        except BaseException:
            surgeon.undo()
            raise
        log.info("expand: %d of %d convolutions", len(self.expanded), len(self.rows))
        return model

    def __str__(self) -> str:
        body = []
        for row in self.rows:
            if row.cost is not None:
                parameters = " -> ".join(f"{p:,}" for p in row.cost.parameters)
                work = " -> ".join(_count(m) for m in row.cost.multiply_adds)
                body.append((row.layer, str(row.geometry), str(row.block), parameters, work))
        for row in self.refused:
            assert row.refusal is not None
            body.append((row.layer, str(row.geometry), f"left: {row.refusal.message}", "", ""))
        unit = "multiply-adds a sample" if self.per_sample else "multiply-adds a position"
        header = ("layer", "geometry", "block", "parameters: before, training, after", unit)
        lines = [f"{len(self.expanded)} of {len(self.rows)} convolutions get a block, {len(self.refused)} are left"]
        lines += section("", header, body)
        costs = [row.cost for row in self.rows if row.cost is not None]
        if costs:
            total = [sum(c.parameters[i] for c in costs) for i in range(3)]
            work_sum = [sum(c.multiply_adds[i] for c in costs) for i in range(3)]
            lines += ["", f"parameters of these layers: {' -> '.join(f'{t:,}' for t in total)}"]
            if self.per_sample:
                lines.append(f"multiply-adds of these layers: {' -> '.join(_count(m) for m in work_sum)}")
        quiet = Counter(row.refusal.message for row in self.rows if row.refusal is not None and row not in self.refused)
        return "\n".join(lines + [f"{count} not considered: {reason}" for reason, count in quiet.items()])


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
    _check(model, init)
    convs = find_convs(model)
    paths = [found.path for found in convs]
    selected, chosen = selector(where, paths), block_chooser(block, paths)
    positions = None if example_inputs is None else _positions(model, convs, example_inputs)
    decided: dict[Any, Cost | Refusal] = {}
    rows, onlines = [], {}
    for found in convs:
        mine = chosen(found.path)
        outcome: Cost | Refusal | None = selected(found.path, found.conv) or found.refusal
        if outcome is None and mine is None:
            outcome = Refusal(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)
        if outcome is None and _inside_block(model, found.path):
            outcome = Refusal(Reason.BLOCK, "it is part of a block already; collapse the model first")
        if outcome is None:
            assert mine is not None
            as_one = mine.info.online if online is None else online
            onlines[found.path] = as_one
            key = _signature(_site(model, found, init == "preserve", as_one), mine, as_one)
            if key not in decided:
                decided[key] = _try_on_meta(model, found, mine, init == "preserve", as_one)
            outcome = decided[key]
        cost = outcome if isinstance(outcome, Cost) else None
        refusal = outcome.at(found.path) if isinstance(outcome, Refusal) else None
        if cost is not None and positions is not None:
            cost = _times(cost, positions.get(found.path, 0))
        rows.append(PlanRow(found.path, Geometry.of(found.conv), mine if cost else None, refusal, cost, found))
    return Plan(tuple(rows), positions is not None, model, init == "preserve", onlines, inplace)


def _check(model: Any, init: str) -> None:
    if init not in ("preserve", "paper"):
        raise ReparamError(f"init is 'preserve' or 'paper', got {init!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError("a scripted model cannot be expanded: expand first, then torch.jit.script the result")
    if hasattr(model, "_orig_mod"):
        raise ReparamError("a compiled model cannot be expanded: expand first, then torch.compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ReparamError(f"expand the model inside first, then wrap it in {type(model).__name__}")
    check_model(model)
    if isinstance(model, _ConvNd):
        raise ReparamError("the model is itself one layer: put it into torch.nn.Sequential, so that it can be replaced")


def _inside_block(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), BranchSum) for i in range(len(parts)))


# ------------------------------------------------------------------ one block


def _site(model: nn.Module, found: Found, preserve: bool, online: bool) -> Site:
    conv = model.get_submodule(found.path)
    assert isinstance(conv, _ConvNd)
    norm = None
    if found.norm is not None:
        held = model.get_submodule(found.norm.path)
        assert isinstance(held, _BatchNorm)
        norm = plain_norm(held, len(conv.kernel_size))
    return Site(conv, norm, preserve=preserve, online=online)


def _build(site: Site, block: Block, online: bool) -> BranchSum:
    """The block for one convolution, in its dtype, on its device, as trainable as it is."""
    conv, norm = site.conv, site.norm
    own = {id(p) for m in (conv, norm) if m is not None for p in m.parameters()}
    branches = block.branches(site)
    others = list(branches.values())[1:]
    if site.preserve:
        for branch in others:
            silence(branch)
    kind: type[BranchSum] = BranchSum
    if online:
        kind = OnlineSum
        branches = {name: scales_for_norms(branch, site.n) for name, branch in branches.items()}
    layout = target_of([conv.weight])
    for branch in branches.values():
        for module in branch.modules():
            if module is not norm:
                module.training = conv.training if norm is None else norm.training
        for parameter in branch.parameters():
            if id(parameter) in own:
                continue
            if not conv.weight.requires_grad:
                parameter.requires_grad_(False)
            if layout.channels_last and parameter.dim() == conv.weight.dim() and parameter.dim() in (4, 5):
                last = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=last)
    module = kind(str(block), branches, conv)
    module.training = conv.training
    return module


def _try_on_meta(model: nn.Module, found: Found, block: Block, preserve: bool, online: bool) -> Cost | Refusal:
    """Build the block without numbers and fold it: what it costs, or why it cannot be used here."""
    real = _site(model, found, preserve, online)
    norm_on_meta = None if real.norm is None else _on_meta(real.norm)
    site = Site(_on_meta(real.conv), norm_on_meta, preserve=preserve, online=online)
    try:
        built = _build(site, block, online=False)
        reading = Reading(built)
        form = reading.form(None)
    except RefusalError as error:
        return Refusal(error.refusal.reason, error.refusal.message)
    if not site.geometry.matches(form):
        return Refusal(Reason.BLOCK, f"{block} folds into another geometry than {site.geometry}")
    if form.bias is not None and not site.shift:
        return Refusal(Reason.BLOCK, f"{block} would leave a bias, and no layer here can take it")
    conv = site.conv.weight.numel()
    bias = site.out_channels if site.shift else 0
    norm = 0 if site.norm is None else sum(p.numel() for p in site.norm.parameters())
    before = conv + (0 if site.conv.bias is None else site.out_channels) + norm
    training = sum(p.numel() for p in built.parameters()) + (0 if site.norm_taken else norm)
    positions = (float(conv), float(conv) if online else reading.multiply_adds(), float(conv))
    return Cost((before, training, conv + bias), positions)


def _on_meta(module: Any) -> Any:
    """The same layer without numbers."""
    bare = copy.copy(module)
    for table in ("_parameters", "_buffers"):
        tensors = {}
        for name, tensor in module.__dict__[table].items():
            empty = None if tensor is None else torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(empty, tensor.requires_grad) if is_parameter and empty is not None else empty
        bare.__dict__[table] = tensors
    return bare


def _signature(site: Site, block: Block, online: bool) -> Any:
    norm = site.norm
    kind = None if norm is None else (type(norm), norm.affine, norm.eps, norm.momentum)
    return block, site.geometry, kind, site.conv.bias is None, site.shift, online, site.conv.weight.dtype


def _check_preserved(layer: str, site: Site, module: BranchSum) -> None:
    """Run the block and the layers that it replaces on a small random input."""
    g, weight = site.geometry, site.conv.weight
    reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel, strict=True)]
    sizes = [max(r, 2 * max(g.lead[i], g.trail[i])) + g.stride[i] for i, r in enumerate(reach)]
    x = torch.randn((2, g.in_channels, *sizes), generator=torch.Generator().manual_seed(0)).to(weight)
    with kept_modes(site.conv, module), torch.no_grad():
        wanted = site.conv(x)
        if site.norm_taken and site.norm is not None:
            wanted = site.norm(wanted)
        got = module(x)
    allowed = torch.finfo(weight.dtype).eps ** 0.5 * max(float(wanted.abs().max()), 1.0)
    gap = float((got - wanted).abs().max())
    if not gap <= allowed:
        raise ReparamError(
            f"{layer}: {module.block} does not start as the function that it replaces (off by {gap:.3g}); let every "
            "added branch end in a convolution, a batch norm or a module with silence(), or pass init='paper'"
        )


# ------------------------------------------------------------------ counting


def _positions(model: nn.Module, convs: list[Found], inputs: tuple[Any, ...]) -> dict[str, int]:
    """Output positions of every convolution for one sample of ``inputs``."""
    found: dict[str, int] = {}
    hooks = []
    for each in convs:

        def note(module: nn.Module, args: Any, output: Tensor, path: str = each.path) -> None:
            found[path] = found.get(path, 0) + output[0, 0].numel()

        hooks.append(each.conv.register_forward_hook(note))
    try:
        with kept_modes(model), torch.no_grad():
            model(*inputs)
    # The model is user code: whatever it raises means that it does not take these inputs.
    except Exception as error:
        raise ReparamError(f"the model rejects example_inputs: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _times(cost: Cost, positions: int) -> Cost:
    before, training, after = (m * positions for m in cost.multiply_adds)
    return Cost(cost.parameters, (before, training, after))


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"
