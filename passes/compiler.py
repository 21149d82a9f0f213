"""The straight line from a model to its result: trace, find regions, select, fold, prove, edit.

Nothing of the caller's model changes until every fold of a unit is computed and proven.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from passes.algebra.geometry import CONVS
from passes.blocks.kit.layers import is_block
from passes.edits.apply import Moved, Undo, apply
from passes.edits.edit import Edit, Remove
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate, Key, Tie, altered, layers_of
from passes.fold.edits import Edited, edits_of
from passes.fold.folds import Fold, folded
from passes.fold.layout import Layout
from passes.fold.placement import Placement, place
from passes.fold.reasons import worth_saying
from passes.fold.selection import Guard, select
from passes.fold.whole import Whole
from passes.graph.capture import Unit, in_one_context, join, no_collection, trace_units
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example, observed_ranks
from passes.graph.opset import base_operation
from passes.graph.shapes import Known
from passes.graph.together import runs_of
from passes.graph.variants import OtherCalls
from passes.graph.weights import is_pruned
from passes.graph.within import Alone, Within
from passes.proof.compare import EquivalenceError
from passes.proof.hold import FoldKey, Ledger
from passes.proof.prove import prove, prove_spread
from passes.proof.settling import settled
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.report import Explanation
from passes.report import Fold as Record

__all__ = ["clock", "compile_model", "decide", "timed"]

Result = TypeVar("Result")

ROUNDS = 8
"""How often the candidates of one unit are selected again because some failed, before whole layers are given up."""


@no_collection()
def compile_model(
    model: nn.Module,
    example: Example | None,
    explanation: Explanation,
    undos: list[Undo],
    ledger: Ledger,
) -> None:
    """Trace a model, in eval mode, and fold what is one convolution; ``explanation`` tells what was done and why not.

    Args:
        model: edited in place.
        example: inputs of the whole model, if some are known.
        explanation: filled.
        undos: filled with what takes the edits back.
        ledger: which folds are proven, and which were given up before.
    """
    while True:
        before, again = len(explanation.folds), False
        explanation.refusals.clear()
        units = _traced(model, explanation, example)
        ranks = _ranks(model, units, example)
        whole, tried = Whole(model), dict[Any, bool]()
        for unit in units:
            root = next(unit.root.children()) if isinstance(unit.root, Alone) else unit.root
            if id(root) not in whole.modules:
                continue  # inside a module that was probed and folded
            # A container that is called twice may be one layer by now, and its surroundings can be read through it; so
            # may a layer whose block stands in the middle of its forward.
            again |= any(refusal.reason is Reason.SHARED for refusal in unit.opaque.values())
            inner = (unit.root.get_submodule(at) for at in unit.opaque)
            again |= any(isinstance(m, Within) and m.inside is not None and not m.inside.takes_norm for m in inner)
            folds, refusals = len(explanation.folds), len(explanation.refusals)
            for run in runs_of(unit):
                _compile_unit(whole, run, [], explanation, undos, ledger, tried)
            # What was decided for all calls of these layers is not told again of each call.
            told = {layer for fold in explanation.folds[folds:] for layer in fold.layers}
            told |= {refusal.layer for refusal in explanation.refusals[refusals:]}
            refusals = len(explanation.refusals)
            _compile_unit(whole, unit, ranks.get(unit, []), explanation, undos, ledger, tried)
            explanation.refusals[refusals:] = [r for r in explanation.refusals[refusals:] if r.layer not in told]
        if not again or len(explanation.folds) == before:
            folded = {layer for fold in explanation.folds for layer in fold.layers}
            explanation.untraced = [r for r in explanation.untraced if r.layer not in folded or not r.layer]
            for (method, some), owners in explanation.apart.items():
                more = f" and of {len(owners) - 1} more" if len(owners) > 1 else ""
                explanation.notes.append(f"{method} of {owners[0]}{more} uses {some} alone, which holds the fold now")
            edits = _settled_norms(model)
            explanation.edits += edits
            undos.append(apply(model, edits, {}))
            return


def _settled_norms(model: nn.Module) -> list[Edit]:
    """What takes away what norms left that went into blocks, once no block is there to be told of."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(is_block(module) for module in modules.values()):
        return []
    return [Remove(path) for path, module in modules.items() if isinstance(module, Moved)]


def _compile_unit(
    whole: Whole,
    unit: Unit,
    ranks: list[int | None],
    explanation: Explanation,
    undos: list[Undo],
    ledger: Ledger,
    tried: dict[Any, bool],
) -> None:
    """Select, fold and edit one unit; ``tried`` goes on from unit to unit (:func:`passes.proof.settling.settled`)."""
    with clock(explanation, "plan"):
        flow = Flow(unit, whole.owners, ranks)
        layout = Layout(flow, whole)
        guard = _guard(flow, layout)
    folds, edited = decide(flow, guard, lambda folds: _edited(layout, folds), explanation, ledger)
    aliases = {fold.candidate.spread: fold for fold in folds if fold.layer is None}
    for fold in folds:
        if fold.layer is None:  # its layers are told of
            continue
        where = edited.paths[fold.candidate]
        explanation.folds.append(Record.of(flow, fold.candidate, fold.form, where, fold.error))
        pruned = [flow.unit.name(n) for n in fold.candidate.dying if n in flow.modules and is_pruned(flow.modules[n])]
        explanation.notes += [f"the pruning mask of {name} is in the folded weights" for name in pruned]
        around = [fold, *(aliases[spread] for spread in fold.candidate.spreads if spread in aliases)]
        edits = [path for each in around for path in each.placement.slots]
        edits += [rewrite.call.path for each in around for rewrite in each.placement.rewrites]
        key = _fold_key(flow, fold.candidate)
        ledger.touched[key] = where, *(join(unit.path, path) for path in edits)
        ledger.layers[key] = ", ".join(layers_of(flow, fold.candidate))
    with clock(explanation, "proof"):
        edited.edits.extend(settled(unit, edited.edits, whole, tried))
    explanation.edits += edited.edits
    explanation.notes += edited.notes
    for key, owners in edited.apart.items():
        explanation.apart.setdefault(key, []).extend(owners)
    if edited.edits:
        undos.append(apply(whole.model, edited.edits, edited.layers, held=whole.holders))
        whole.edited()
    if ledger.made is not None:
        ledger.made.append((flow, folds))


def decide(
    flow: Flow,
    guard: Guard,
    edits: Callable[[list[Fold]], tuple[Result, dict[Candidate, Refusal]]],
    explanation: Explanation,
    ledger: Ledger,
) -> tuple[list[Fold], Result]:
    """The proven folds of a unit, and the edits that they ask for; ``explanation`` is told why others are not made.

    A candidate that fails is banned with its reason, and the selection is made again among the others. After
    ``ROUNDS`` of these, the nodes of what fails stay for good: every further round is one of fewer nodes.

    Args:
        flow: the dataflow of the unit.
        guard: where the layer of a candidate goes, or why it can go nowhere.
        edits: what puts folds in their places, or which of them have none after all.
        explanation: its refusals and seconds are added to.
        ledger: which folds are proven, and which were given up before.
    """
    banned: dict[Key, Refusal] = {}
    staying: set[fx.Node] = set()
    made: dict[Key, Fold] = {}
    for attempt in range(ROUNDS + len(flow.nodes) + 1):
        with clock(explanation, "plan"):
            selection = select(flow, guard, banned.keys(), staying, ledger.rules)
        failed = dict[Candidate, Refusal]()
        for candidate, placement in selection.chosen:
            outcome = _fold(flow, candidate, placement, made, explanation, ledger)
            if isinstance(outcome, Refusal):
                failed[candidate] = outcome
        if not failed:
            folds = [made[candidate.key] for candidate, _ in selection.chosen]
            with clock(explanation, "fold"):
                edited, failed = edits(folds)
        if not failed:
            said = [refusal for refusal in banned.values() if refusal.reason is not Reason.TAKEN_BACK]
            explanation.refusals += dict.fromkeys([*worth_saying(flow, selection, banned), *said])
            return folds, edited
        banned.update({candidate.together: refusal for candidate, refusal in failed.items()})
        if attempt >= ROUNDS:
            staying.update(node for candidate in failed for node in candidate.together[2])
    raise AssertionError  # from some round on each leaves fewer nodes to choose from


def _guard(flow: Flow, layout: Layout) -> Guard:
    memory, calls = Memory(flow), OtherCalls(flow.unit)

    def place_safely(candidate: Candidate) -> Placement | Refusal:
        try:
            found = memory.refusal(candidate) or place(layout, candidate)
        except RefusalError as error:
            return error.refusal
        if not in_one_context(candidate.dying):
            return Refusal(Reason.CONTEXT, "a context, such as torch.no_grad(), begins or ends inside of it")
        # A forward that is written anew says itself which arguments it was made for.
        anew = isinstance(found, Placement) and any(rewrite.call.parent is None for rewrite in found.rewrites)
        if isinstance(found, Refusal) or anew:
            return found
        if candidate.spread is not None and not candidate.is_alias:
            return found  # asked for the map and all of its layers at once
        nodes = {node for each in (candidate, *candidate.parts) for node in (*each.dying, *each.constants)}
        nodes.update(() if candidate.tie is None else candidate.tie.nodes)
        if candidate.spread is not None:  # what stays of it between the layers and the map
            nodes.update(altered(flow, candidate.spread))
        ends = (
            candidate.spread.heads if candidate.spread is not None and candidate.spread.ahead else (candidate.result,)
        )
        return calls.refusal(sorted(nodes), ends) or found

    return place_safely


def _fold(
    flow: Flow,
    candidate: Candidate,
    placement: Placement,
    made: dict[Key, Fold],
    explanation: Explanation,
    ledger: Ledger,
) -> Refusal | None:
    """Enter the proven fold of a candidate into ``made``, which holds those of earlier rounds, or say why not."""
    names, key = layers_of(flow, candidate), _fold_key(flow, candidate)
    layers = ", ".join(names)
    if ledger.refuses(key, names):
        return Refusal(Reason.TAKEN_BACK, Reason.TAKEN_BACK.value, layers)
    fold = made.get(candidate.key)
    try:
        if fold is None:
            with clock(explanation, "fold"):
                fold = folded(flow, candidate, placement)
            if ledger.prove:
                with clock(explanation, "proof"):
                    if fold.layer is None:
                        prove_spread(flow, candidate, layers)
                    else:
                        fold = replace(fold, error=prove(flow, candidate, fold.form, fold.layer, layers))
            if ledger.exact is not None and fold.layer is not None:
                sources = [t for n in (*candidate.dying, *candidate.constants) for t in flow.tensors.get(n, ())]
                ledger.exact.note(fold.layer, fold.form, sources)
            fold = replace(fold, form=fold.form.to("meta"))  # the numbers are in the layer now
    except RefusalError as refused:
        if refused.refusal.reason is Reason.NOT_FINITE:
            raise ReparamError(f"{layers}: {refused.refusal.message}") from refused
        return refused.refusal.at(layers)
    except EquivalenceError as error:
        if ledger.strict:
            raise
        return ledger.take_back(key, layers, str(error).removeprefix(f"{layers}: "))
    made[candidate.key] = replace(fold, candidate=candidate, placement=placement)
    return None if fold.layer is None else candidate.costs(fold.form)


def _fold_key(flow: Flow, candidate: Candidate) -> FoldKey:
    """What finds a fold again in another trace of the same unit."""
    names = sorted(node.name for node in candidate.touched)
    return flow.unit.path, candidate.entry.name, candidate.result.name, *names


def _edited(layout: Layout, folds: list[Fold]) -> tuple[Edited, dict[Candidate, Refusal]]:
    """The edits that put the folded layers in place, or which of them have no place after all."""
    if failed := _not_alike(folds):
        return Edited(), failed
    try:
        return edits_of(layout, folds), {}
    except RefusalError as error:
        rewriting = [fold for fold in folds if fold.placement.rewrites] or folds
        return Edited(), {fold.candidate: error.refusal for fold in rewriting}


def _not_alike(folds: list[Fold]) -> dict[Candidate, Refusal]:
    """Folds that should share their numbers, which turned out to be others."""
    first: dict[Tie, nn.Module] = {}
    refusal = Refusal(Reason.SHARED, "its weight is used by several calls, and no one layer computes them all")
    failed = {}
    for fold in folds:
        tie = fold.candidate.tie
        if tie is not None and tie.one and fold.layer is not None:
            held, mine = (dict(m.named_parameters()) for m in (first.setdefault(tie, fold.layer), fold.layer))
            plain = type(fold.layer) in (*CONVS, nn.Linear) and getattr(fold.layer, "padding_mode", "zeros") == "zeros"
            if not plain or held.keys() != mine.keys() or not all(torch.equal(held[key], mine[key]) for key in mine):
                failed[fold.candidate] = refusal
    return failed


def _traced(model: nn.Module, explanation: Explanation, example: Example | None) -> list[Unit]:
    with clock(explanation, "trace"):
        units, explanation.untraced = trace_units(model, None if example is None else example.args)
    return units


def _ranks(model: nn.Module, units: list[Unit], example: Example | None) -> dict[Unit, list[int | None]]:
    """Numbers of dimensions of what each unit is given, where an example shows them.

    What it shows of the results of calls that are not read is noted in the graphs.
    """
    if example is None:
        return {}
    calls = [
        (join(unit.path, str(node.target)), node)
        for unit in units
        for node in unit.graph.nodes
        if node.op == "call_module" and str(node.target) in unit.opaque
    ]
    if len(units) == 1 and units[0].root is model and not calls:
        return {units[0]: [x.dim() if isinstance(x, Tensor) else None for x in example.args]}
    given, returned = observed_ranks(model, [unit.path for unit in units], {path for path, _ in calls}, example)
    for path, node in calls:
        (rank,) = returned.get(path, [None])
        if rank is not None and base_operation(model.get_submodule(path)) is None:
            node.meta["known"] = Known(rank, None, None)
    return {unit: given.get(unit.path, []) for unit in units if not isinstance(unit.root, Alone)}


def clock(explanation: Explanation, stage: str) -> AbstractContextManager[None]:
    """Add the time spent inside to one of the seconds that are reported."""
    return timed(explanation.seconds, stage)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to a stage's."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
