"""The contraction compiler: trace, find regions, fold, prove, operate.

Nothing of the caller's model changes until every fold of a unit is computed and proven; a failure after that takes
every edit back.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from passes.algebra.lowering import all_finite, emit, target_of
from passes.edits.edit import Undo, apply
from passes.fold.aliasing import Memory
from passes.fold.edits import edits_of
from passes.fold.placement import Layout, place
from passes.fold.regions import Region, fold_of, origin
from passes.fold.selection import plan_unit
from passes.graph.capture import Unit, retrace, trace_units
from passes.graph.copies import deep_copy, independent, shadow
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example
from passes.graph.modes import evaluate, has_own_modes, kept_modes
from passes.proof.prove import prove
from passes.proof.run import outputs
from passes.proof.verify import Expected, compare, compare_outputs, expect
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.report import Counts, Explanation

__all__ = ["check_model", "collapse_model", "explain_model"]

log = logging.getLogger("reparam")

_QUIET = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.RANK_UNKNOWN, Reason.CHANNELS, Reason.LAYOUT}
"""Reasons that only say where a region ends; they explain a batch norm that stays, and nothing else."""


def collapse_model(
    model: nn.Module, *, example_inputs: tuple[Any, ...] | None, verify: bool, inplace: bool
) -> tuple[nn.Module, Explanation]:
    """Fold every region of ``model`` that is one convolution; see :func:`reparam.collapse`."""
    check_model(model, numbers=verify)
    explanation = Explanation(before=Counts.of(model), seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
    if model.training:
        explanation.notes.append("the model was in training mode; its running statistics were folded")
        log.info("collapse: %s", explanation.notes[-1])
    wanted = None
    if example_inputs is not None:
        wanted = _run_examples(model, example_inputs, explanation, verify)
    # What the model's own eval() computes is computed on tensors of the result alone.
    result = model if inplace else deep_copy(model) if model.training and has_own_modes(model) else shadow(model)
    undos: list[Undo] = []
    # A module that stays in training mode while the model is evaluated does so on purpose.
    uneval = evaluate(result) if model.training else lambda: None
    try:
        with _no_collection():
            _compile(result, example_inputs, explanation, undos, verify)
        if not inplace:
            result = independent(result, model)
        if wanted is not None and example_inputs is not None:
            with _clock(explanation, "proof"):
                _compare(None if inplace else model, wanted, result, example_inputs)
    # Whatever went wrong, the caller's model must come back as it was; the error itself goes on.
    except BaseException:
        for undo in reversed(undos):
            undo()
        uneval()
        raise
    explanation.after = Counts.of(result)
    return result, explanation


def explain_model(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Explanation:
    """Decide as :func:`collapse_model` does, numbers included, and stop before surgery; the model is not changed.

    On the meta device there are no numbers: what only they can tell (a module that has to be probed, a weight that
    overflows) is left alone.
    """
    check_model(model, numbers=False)
    explanation = Explanation(before=Counts.of(model), seconds=dict.fromkeys(("trace", "plan", "fold"), 0.0))
    if model.training and has_own_modes(model):
        model = deep_copy(model)
    with kept_modes(model, training=None):
        if model.training:
            evaluate(model)
        for unit in _traced(model, explanation):
            _compile_unit(model, unit, _ranks(unit, example_inputs), explanation, None, verify=False)
    return explanation


def check_model(model: Any, *, numbers: bool = True) -> None:
    """Raise :class:`ReparamError` for anything that cannot be compiled at all, or, without ``numbers``, planned."""
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ReparamError(f"{type(model).__name__} has no parameters")
    for name, module in model.named_modules():
        if _is_quantised(module):
            raise ReparamError(f"{name} is quantised: rewrite the model first, quantise the result")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ReparamError(f"{name} is not initialised yet: run the model once first")
        if numbers and tensor.is_meta:
            raise ReparamError(f"{name} is on the meta device and has no numbers: load the weights first")
        if tensor.is_quantized:
            raise ReparamError(f"{name} is quantised: rewrite the model first, quantise the result")
    for name, tensor in _weights(model):
        if tensor.is_floating_point() and not all_finite(tensor):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "an infinite value"
            raise ReparamError(f"{name} holds {kind}: the model is broken before any fold; restore an older checkpoint")


def _is_quantised(module: nn.Module) -> bool:
    """A layer of torch's quantised ones; ``FloatFunctional`` adds floats, and only is made ready to be one of them."""
    home = type(module).__module__.split(".")
    floats = any(base.__name__ in ("FloatFunctional", "FXFloatFunctional") for base in type(module).__mro__)
    return home[0] == "torch" and "quantized" in home and not floats


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            for name, tensor in module.named_buffers(recurse=False):
                yield f"{path}.{name}", tensor


def _run_examples(model: nn.Module, inputs: tuple[Any, ...], explanation: Explanation, verify: bool) -> Expected | None:
    try:
        with _clock(explanation, "proof"):
            if verify:
                return expect(model, Example(inputs))
            outputs(model, Example(inputs), None)
            return None
    except ReparamError:
        raise
    # The model is user code: whatever it raises means that it does not take these inputs.
    except Exception as error:
        raise ReparamError(f"the model rejects example_inputs: {error}") from error


def _compare(reference: nn.Module | None, wanted: Expected, result: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Compare whole networks; edited in place, the reference is gone and the difference cannot be located."""
    outcome = compare_outputs(wanted, result, Example(inputs))
    if not outcome.ok and reference is not None:
        outcome = compare(reference, result, Example(inputs))
    outcome.raise_if_different()


# ------------------------------------------------------------------ one model


def _compile(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    explanation: Explanation,
    undos: list[Undo],
    verify: bool,
) -> None:
    while True:
        before, shared = len(explanation.folds), False
        explanation.refusals.clear()
        for unit in _traced(model, explanation):
            if all(unit.root is not m for m in model.modules()):
                continue  # inside a module that was probed and folded
            shared |= any(refusal.reason is Reason.SHARED for refusal in unit.opaque.values())
            _compile_unit(model, unit, _ranks(unit, example_inputs), explanation, undos, verify)
        # A container that is called twice may be one layer by now, and its surroundings can be read through it.
        if not shared or len(explanation.folds) == before:
            return


def _compile_unit(
    model: nn.Module,
    unit: Unit,
    ranks: list[int | None],
    explanation: Explanation,
    undos: list[Undo] | None,
    verify: bool,
) -> None:
    """Plan, fold and operate on one unit. What fails with real numbers is banned, and the unit is planned again.

    Without ``undos``, everything is decided and nothing done.
    """
    banned: list[Refusal] = []
    planner = _Planner(model, unit, ranks)
    said = len(explanation.refusals)
    while True:
        del explanation.refusals[said:]  # of a plan that failed
        with _clock(explanation, "plan"):
            regions = planner.plan(explanation)
        folded = [
            outcome
            for region in regions
            if (outcome := _fold(region, planner, explanation, verify, banned)) is not None
        ]
        if len(folded) == len(regions):
            with _clock(explanation, "fold"):
                try:
                    edited = edits_of(planner.layout, [(region, layer) for region, layer, _ in folded])
                    break
                except RefusalError as error:
                    banned.append(error.refusal)
                    planner.banned |= {r.key for r in regions if r.placement.rewrites}
        planner = _Planner(model, retrace(planner.flow.unit), ranks, planner.banned)
    explanation.refusals += [r for r in dict.fromkeys(banned) if r not in explanation.refusals]
    for region, _, gap in folded:
        explanation.folds.append(fold_of(region, "" if undos is None else edited.paths[region], gap))
    explanation.edits += edited.edits
    explanation.notes += edited.notes
    if undos is not None:
        undos.append(apply(model, edited.edits, edited.layers))


def _fold(
    region: Region, planner: _Planner, explanation: Explanation, verify: bool, banned: list[Refusal]
) -> tuple[Region, nn.Module, float | None] | None:
    layers = ", ".join(region.layers())
    try:
        with torch.no_grad():
            with _clock(explanation, "fold"):
                form = region.numeric()
                nodes = [*region.dying, *region.constants]
                layer = emit(form, target_of(t for n in nodes for t in planner.flow.tensors.get(n, ())))
            error = None
            if verify:
                with _clock(explanation, "proof"):
                    error = prove(region, form, layer)
    except RefusalError as refused:
        if refused.refusal.reason is Reason.NOT_FINITE:
            raise ReparamError(f"{layers}: {refused.refusal.message}") from refused
        banned.append(refused.refusal.at(layers))
        planner.banned.add(region.key)
        return None
    region.form = form.to("meta")  # the numbers are in the layer now
    return region, layer, error


class _Planner:
    """One attempt at one unit: its dataflow, its layout, and what is not to be tried again."""

    def __init__(
        self, model: nn.Module, unit: Unit, ranks: list[int | None], banned: set[tuple[str, ...]] | None = None
    ) -> None:
        owners: Counter[int] = Counter()
        for module in model.modules():
            tensors = [*module._parameters.values(), *module._buffers.values()]
            owners.update(id(t) for t in tensors if t is not None)
        self.flow = Flow(unit, owners, ranks)
        self.layout = Layout(self.flow, model)
        self.banned = banned if banned is not None else set()
        self._memory = Memory(self.flow)

    def plan(self, explanation: Explanation) -> list[Region]:
        """Regions to fold; refusals worth reporting go into ``explanation``."""
        refusals: list[Refusal] = []
        regions = plan_unit(self.flow, self._accept, self.banned, refusals)
        explanation.refusals += _worth_saying(self.flow, regions, refusals)
        return regions

    def _accept(self, region: Region, dead: set[fx.Node]) -> Refusal | None:
        refusal = self._memory.refusal(region)
        if refusal is not None:
            return refusal
        try:
            region.placement = place(self.layout, region)
        except RefusalError as error:
            return error.refusal
        return None


def _traced(model: nn.Module, explanation: Explanation) -> list[Unit]:
    with _clock(explanation, "trace"):
        units, explanation.untraced = trace_units(model)
    return units


def _ranks(unit: Unit, inputs: tuple[Any, ...] | None) -> list[int | None]:
    if unit.path or inputs is None:
        return []
    return [x.dim() if isinstance(x, Tensor) else None for x in inputs]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put off garbage collection: graphs are many small objects, and one full pass takes longer than the planning."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _clock(explanation: Explanation, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        explanation.seconds[stage] = explanation.seconds.get(stage, 0.0) + time.perf_counter() - start


# ------------------------------------------------------------------ saying what was done


def _worth_saying(flow: Flow, regions: list[Region], refusals: list[Refusal]) -> list[Refusal]:
    """One refusal per layer that stays: those of the laws, and for every batch norm why it is still there."""
    dead = {n for r in regions for n in r.dying}
    # Two operations of one module may have one name: it is gone when both are.
    gone = {flow.unit.name(n) for n in dead} - {
        flow.unit.name(n) for n in flow.nodes if n not in dead and "region" not in n.meta
    }
    said: dict[str, Refusal] = {}
    for refusal in refusals:
        if refusal.reason not in _QUIET and refusal.layer not in gone:
            said.setdefault(refusal.layer, refusal)
    for node in flow.nodes:
        if node in dead or not _is_norm(flow, node):
            continue
        name = flow.unit.name(node)
        said.setdefault(name, _why_norm_stays(flow, node).at(name))
    return list(said.values())


def _is_norm(flow: Flow, node: fx.Node) -> bool:
    return node.target is F.batch_norm or isinstance(flow.modules.get(node), _NormBase)


def _why_norm_stays(flow: Flow, node: fx.Node) -> Refusal:
    source = origin(node.all_input_nodes[0])
    name = flow.unit.name(source) if source.op != "placeholder" else "the input"
    readers = [u for u in source.users if "region" not in u.meta and not flow.shape_only(u)]
    if len(readers) > 1 and source in flow.affine:
        others = ", ".join(flow.unit.name(u) for u in readers if u is not node and u.op != "output") or "the output"
        return Refusal(Reason.SHARED, f"the output of {name} is used by {others} as well")
    return Refusal(Reason.NO_CONVOLUTION, f"{Reason.NO_CONVOLUTION.value}: it follows {name}")
