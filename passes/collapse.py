"""The contraction compiler: trace, find regions, fold, prove, operate.

Nothing of the caller's model changes until every fold of a unit is computed and proven; a failure after that takes
every edit back.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.algebra.lowering import all_finite
from passes.edits.apply import Undo, apply
from passes.edits.edit import remember
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate, Key, layers_of
from passes.fold.edits import Edited, edits_of
from passes.fold.folds import Fold, folded
from passes.fold.layout import Layout
from passes.fold.placement import Placement, place
from passes.fold.reasons import worth_saying
from passes.fold.selection import Guard, select
from passes.graph.capture import Unit, join, trace_units
from passes.graph.copies import deep_copy, independent, shadow
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example, observed_ranks
from passes.graph.modes import evaluate, has_own_modes, kept_modes
from passes.graph.variants import OtherCalls
from passes.proof.check import Checked, explained
from passes.proof.compare import EquivalenceError, Verdict
from passes.proof.hold import Before, Exact, FoldKey, Ledger, check_against, place_of
from passes.proof.prove import prove
from passes.proof.run import outputs, runner_of
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.report import Counts, Explanation
from passes.report import Fold as Record

__all__ = ["check_model", "collapse_model", "explain_model"]

log = logging.getLogger("reparam")

ROUNDS = 8
"""How often the candidates of one unit are selected again because some failed, before whole layers are given up."""


def collapse_model(
    model: nn.Module,
    *,
    example: Example | None = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
    exact: Exact | None = None,
) -> tuple[nn.Module, Explanation]:
    """Fold every region of ``model`` that is one convolution; see :func:`reparam.collapse`.

    ``exact``, if given, is filled with the numbers before rounding.
    """
    check_model(model, numbers=bool(verify))
    clock: dict[str, float] = {}
    before = None
    with timed(clock, "check"):
        if verify is True:
            before, exact = Before.of(model, example, inplace=inplace), exact or Exact()
        elif example is not None:
            _run_once(model, example)
    ledger = Ledger(prove=bool(verify), strict=strict, exact=exact)
    excused: Checked | None = None
    while True:
        ledger.begin()
        attempt = _attempt(model, example, ledger, inplace=inplace)
        with timed(clock, "check"), attempt.undone_on_error():
            checked = excused
            if not ledger.touched:
                checked = Checked(Verdict.EQUAL, "nothing was rewritten")
            elif before is not None and excused is None:
                checked = check_against(before, attempt.result, ledger)
            if checked is None or checked.ok:
                return _finished(attempt, checked, ledger, clock)
            assert before is not None
            excused = _take_back(model, attempt, checked, before, ledger)


@dataclass(frozen=True)
class _Attempt:
    """A result, and how to take its edits back."""

    result: nn.Module
    explanation: Explanation
    undo: Callable[[], None]

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        try:
            yield
        # Whatever went wrong, the caller's model must come back as it was; the error itself goes on.
        except BaseException:
            self.undo()
            raise


def _attempt(model: nn.Module, example: Example | None, ledger: Ledger, *, inplace: bool) -> _Attempt:
    explanation = Explanation(before=Counts.of(model), seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
    if model.training:
        explanation.notes.append("the model was in training mode; its running statistics were folded")
        log.info("collapse: %s", explanation.notes[-1])
    # What the model's own eval() computes is computed on tensors of the result alone.
    result = model if inplace else deep_copy(model) if model.training and has_own_modes(model) else shadow(model)
    undos: list[Undo] = []
    # A module that stays in training mode while the model is evaluated does so on purpose.
    uneval = evaluate(result) if model.training else lambda: None

    def undo() -> None:
        while undos:
            undos.pop()()
        uneval()

    with _Attempt(result, explanation, undo).undone_on_error():
        with _no_collection():
            _compile(result, example, explanation, undos, ledger)
        if not inplace:
            result = independent(result, model)
    return _Attempt(result, explanation, undo)


def _take_back(model: nn.Module, attempt: _Attempt, checked: Checked, before: Before, ledger: Ledger) -> Checked | None:
    """Undo an attempt that does not hold and give up the folds nearest to the difference; or why it holds after all."""
    observed = before.observed
    candidate = None if observed is None else runner_of(attempt.result, double=observed.double, exact=ledger.exact)
    attempt.undo()
    place = checked.differences[0].layer
    if observed is not None and candidate is not None:
        if observed.source is None and (excused := explained(checked, observed, model, deep_copy(candidate))):
            return excused
        place = place_of(checked, observed, model, candidate)
    if ledger.strict:
        checked.raise_if_different(place)
    ledger.patience -= 1
    for key in ledger.near(place):
        ledger.take_back(key, ledger.layers[key], str(checked.differences[0]))
    return None


def _finished(
    attempt: _Attempt, checked: Checked | None, ledger: Ledger, clock: dict[str, float]
) -> tuple[nn.Module, Explanation]:
    explanation = attempt.explanation
    explanation.after = Counts.of(attempt.result)
    explanation.checked = checked
    explanation.taken_back = list(ledger.taken_back.values())
    explanation.seconds.update(clock)
    remember(attempt.result, explanation.edits)
    for refusal in explanation.taken_back:
        log.warning("collapse: %s", refusal)
    if checked is not None:
        log.info("collapse: %s", checked)
    return attempt.result, explanation


def _run_once(model: nn.Module, example: Example) -> None:
    try:
        outputs(model, example, None)
    except ReparamError:
        raise
    # The model is user code: whatever it raises means that it does not take these inputs.
    except Exception as error:
        raise ReparamError(f"the model rejects example_inputs: {error}") from error


def explain_model(model: nn.Module, example: Example | None = None) -> Explanation:
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
        units = _traced(model, explanation, example)
        ranks = _ranks(model, units, example)
        for unit in units:
            _compile_unit(model, unit, ranks.get(unit, []), explanation, None, Ledger(prove=False))
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
    for name, tensor, layer in _weights(model):
        if not tensor.is_floating_point() or all_finite(tensor):  # on the meta device, everything is
            continue
        # Code of one's own may hold infinities on purpose, such as a mask; a layer that does is broken.
        broken = bool(torch.isnan(tensor).any())
        if broken or isinstance(layer, (_ConvNd, nn.Linear, _NormBase)):
            kind = "NaN" if broken else "an infinite value"
            raise ReparamError(f"{name} holds {kind}: the model is broken before any fold; restore an older checkpoint")


def _is_quantised(module: nn.Module) -> bool:
    """A layer of torch's quantised ones; ``FloatFunctional`` adds floats, and only is made ready to be one of them."""
    home = type(module).__module__.split(".")
    floats = any(base.__name__ in ("FloatFunctional", "FXFloatFunctional") for base in type(module).__mro__)
    return home[0] == "torch" and "quantized" in home and not floats


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    for path, module in model.named_modules():
        buffers = module.named_buffers(recurse=False) if isinstance(module, _NormBase) else ()
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            yield join(path, name), tensor, module


# ------------------------------------------------------------------ one model


def _compile(
    model: nn.Module,
    example: Example | None,
    explanation: Explanation,
    undos: list[Undo],
    ledger: Ledger,
) -> None:
    while True:
        before, shared = len(explanation.folds), False
        explanation.refusals.clear()
        units = _traced(model, explanation, example)
        ranks = _ranks(model, units, example)
        for unit in units:
            if all(unit.root is not m for m in model.modules()):
                continue  # inside a module that was probed and folded
            shared |= any(refusal.reason is Reason.SHARED for refusal in unit.opaque.values())
            _compile_unit(model, unit, ranks.get(unit, []), explanation, undos, ledger)
        # A container that is called twice may be one layer by now, and its surroundings can be read through it.
        if not shared or len(explanation.folds) == before:
            return


def _compile_unit(
    model: nn.Module,
    unit: Unit,
    ranks: list[int | None],
    explanation: Explanation,
    undos: list[Undo] | None,
    ledger: Ledger,
) -> None:
    """Select, fold and edit one unit; without ``undos``, everything is decided and nothing done.

    A candidate that fails is banned with its reason, and the selection is made again among the others. After
    ``ROUNDS`` of these, the nodes of what fails stay for good: every further round is one of fewer nodes.
    """
    with _clock(explanation, "plan"):
        flow = Flow(unit, _owners(model), ranks)
        layout = Layout(flow, model)
        guard = _guard(flow, layout)
    banned: dict[Key, Refusal] = {}
    staying: set[fx.Node] = set()
    made: dict[Key, Fold] = {}
    for attempt in range(ROUNDS + len(flow.nodes) + 1):
        with _clock(explanation, "plan"):
            selection = select(flow, guard, banned.keys(), staying)
        edited, failed = Edited(), dict[Candidate, Refusal]()
        for candidate, placement in selection.chosen:
            outcome = _fold(flow, candidate, placement, made, explanation, ledger)
            if isinstance(outcome, Refusal):
                failed[candidate] = outcome
        folds = [made[candidate.key] for candidate, _ in selection.chosen if candidate not in failed]
        if not failed:
            with _clock(explanation, "fold"):
                edited, failed = _edited(layout, folds)
        if not failed:
            break
        banned.update({candidate.key: refusal for candidate, refusal in failed.items()})
        if attempt >= ROUNDS:
            staying.update(node for candidate in failed for node in candidate.dying)
    said = [refusal for refusal in banned.values() if refusal.reason is not Reason.TAKEN_BACK]
    explanation.refusals += dict.fromkeys([*worth_saying(flow, selection), *said])
    for fold in folds:
        where = "" if undos is None else edited.paths[fold.candidate]
        explanation.folds.append(Record.of(flow, fold.candidate, fold.form, where, fold.error))
        if undos is not None:
            edits = [*fold.placement.slots, *(rewrite.call.path for rewrite in fold.placement.rewrites)]
            key = _fold_key(flow, fold.candidate)
            ledger.touched[key] = where, *(join(unit.path, path) for path in edits)
            ledger.layers[key] = ", ".join(layers_of(flow, fold.candidate))
    explanation.edits += edited.edits
    explanation.notes += edited.notes
    if undos is not None:
        undos.append(apply(model, edited.edits, edited.layers))


def _owners(model: nn.Module) -> Counter[int]:
    """How many places of the model register each tensor."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        owners.update(id(t) for t in tensors if t is not None)
    return owners


def _guard(flow: Flow, layout: Layout) -> Guard:
    memory, calls = Memory(flow), OtherCalls(flow.unit)

    def place_safely(candidate: Candidate) -> Placement | Refusal:
        try:
            found = memory.refusal(candidate) or place(layout, candidate)
        except RefusalError as error:
            return error.refusal
        # A forward that is written anew says itself which arguments it was made for.
        anew = isinstance(found, Placement) and any(rewrite.call.parent is None for rewrite in found.rewrites)
        if isinstance(found, Refusal) or anew:
            return found
        return calls.refusal([*candidate.dying, *candidate.constants], candidate.result) or found

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
            with _clock(explanation, "fold"):
                fold = folded(flow, candidate, placement)
            if ledger.prove:
                with _clock(explanation, "proof"):
                    fold = replace(fold, error=prove(flow, candidate, fold.form, fold.layer, layers))
            if ledger.exact is not None:
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
    return candidate.costs(fold.form)


def _fold_key(flow: Flow, candidate: Candidate) -> FoldKey:
    """What finds a fold again in another trace of the same unit."""
    names = sorted(node.name for node in candidate.dying)
    return flow.unit.path, candidate.entry.name, candidate.result.name, *names


def _edited(layout: Layout, folds: list[Fold]) -> tuple[Edited, dict[Candidate, Refusal]]:
    """The edits that put the folded layers in place, or which of them have no place after all."""
    try:
        return edits_of(layout, folds), {}
    except RefusalError as error:
        rewriting = [fold for fold in folds if fold.placement.rewrites] or folds
        return Edited(), {fold.candidate: error.refusal for fold in rewriting}


def _traced(model: nn.Module, explanation: Explanation, example: Example | None) -> list[Unit]:
    with _clock(explanation, "trace"):
        units, explanation.untraced = trace_units(model, None if example is None else example.args)
    return units


def _ranks(model: nn.Module, units: list[Unit], example: Example | None) -> dict[Unit, list[int | None]]:
    """Numbers of dimensions of what each unit is given, where an example shows them."""
    if example is None:
        return {}
    if len(units) == 1 and units[0].root is model:
        return {units[0]: [x.dim() if isinstance(x, Tensor) else None for x in example.args]}
    seen = observed_ranks(model, [unit.path for unit in units], example)
    return {unit: seen.get(unit.path, []) for unit in units}


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


def _clock(explanation: Explanation, stage: str) -> AbstractContextManager[None]:
    return timed(explanation.seconds, stage)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside to a stage's."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
