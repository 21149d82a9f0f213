"""The contraction compiler: trace, find regions, fold, prove, operate.

Nothing of the caller's model changes until every fold of a unit is computed and proven; a failure after that takes
every edit back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.algebra.lowering import all_finite
from passes.compiler import compile_model, timed
from passes.edits.apply import Undo
from passes.edits.carried import other_network, remember
from passes.fold.rules import DEFAULT, Rules
from passes.graph.capture import join, no_collection
from passes.graph.copies import deep_copy, independent, shadow
from passes.graph.errors import said_in
from passes.graph.inputs import Example
from passes.graph.leaf import SCRIPT
from passes.graph.modes import evaluate, has_own_modes
from passes.graph.shards import check_whole
from passes.graph.walk import named_of
from passes.proof.check import Checked, explained
from passes.proof.compare import Verdict
from passes.proof.hold import Before, Exact, Ledger, check_against, place_of
from passes.proof.run import outputs, runner_of
from passes.refusal import ReparamError
from passes.report import Counts, Explanation
from passes.training.forms import note_on_samples

__all__ = ["check_model", "collapse_model", "explain_model"]

log = logging.getLogger("reparam")


def collapse_model(
    model: nn.Module,
    *,
    example: Example | None = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
    exact: Exact | None = None,
    rules: Rules = DEFAULT,
) -> tuple[nn.Module, Explanation]:
    """Fold every region of ``model`` that is one convolution; see :func:`reparam.collapse`.

    The model has been looked at (:func:`check_model`). ``exact``, if given, is filled with the numbers before rounding.
    """
    clock: dict[str, float] = {}
    before = None
    with timed(clock, "check"):
        if verify is True:
            before, exact = Before.of(model, example, inplace=inplace), exact or Exact()
        elif example is not None:
            _run_once(model, example)
    ledger = Ledger(prove=bool(verify), strict=strict, exact=exact, rules=rules)
    excused: Checked | None = None
    while True:
        ledger.begin()
        attempt = _attempt(model, example, ledger, inplace=inplace)
        with attempt.undone_on_error():
            checked = excused
            with timed(clock, "check"):
                if not ledger.touched:
                    checked = Checked(Verdict.EQUAL, "nothing was rewritten")
                elif before is not None and excused is None:
                    checked = check_against(before, attempt.result, ledger)
            if checked is None or checked.ok:
                return _finished(attempt, checked, ledger, clock)
            assert before is not None
            with timed(clock, "check"):
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


@no_collection()
def _attempt(model: nn.Module, example: Example | None, ledger: Ledger, *, inplace: bool) -> _Attempt:
    explanation = Explanation(before=Counts.of(model), seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
    if model.training:
        explanation.notes.append("the model was in training mode; its running statistics were folded")
        log.info("collapse: %s", explanation.notes[-1])
    if note := note_on_samples(model):
        explanation.notes.append(note)
        log.warning("collapse: %s", note)
    result = model if inplace else _to_edit(model)
    undos: list[Undo] = []
    # A module that stays in training mode while the model is evaluated does so on purpose.
    uneval = evaluate(result) if model.training else lambda: None

    def undo() -> None:
        while undos:
            undos.pop()()
        uneval()

    with _Attempt(result, explanation, undo).undone_on_error():
        compile_model(result, example, explanation, undos, ledger)
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
    if explanation.edits and (warning := other_network(attempt.result)):
        explanation.notes.append(warning)
        log.warning("collapse: %s", warning)
    for refusal in (*explanation.taken_back, *(each for each in explanation.untraced if each.message == SCRIPT)):
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
        raise ReparamError(f"the model rejects example_inputs: {said_in(error)}") from error


def explain_model(model: nn.Module, example: Example | None = None, rules: Rules = DEFAULT) -> Explanation:
    """Do what :func:`collapse_model` does, numbers included and without proof, on a copy; the model is not changed.

    On the meta device there are no numbers: what only they can tell (a module that has to be probed, a weight that
    overflows) is left alone. The model has been looked at (:func:`check_model`).
    """
    try:
        edited = _to_edit(model)
    except ReparamError:  # what cannot be copied is edited itself, and restored
        edited = model
    if example is not None and edited is not model and not any(p.is_meta for p in model.parameters()):
        _run_once(model, example)
    attempt = _attempt(edited, example, Ledger(prove=False, rules=rules), inplace=True)
    attempt.undo()
    return attempt.explanation


def _to_edit(model: nn.Module) -> nn.Module:
    """A copy, which shares tensors; what the model's own eval() computes is computed on tensors of the copy alone."""
    return deep_copy(model) if model.training and has_own_modes(model) else shadow(model)


def check_model(model: Any, *, numbers: bool = True) -> None:
    """Raise :class:`ReparamError` for anything that cannot be compiled at all, or, without ``numbers``, planned."""
    if not isinstance(model, nn.Module):
        onnx = (
            str(model).endswith(".onnx") if isinstance(model, (str, os.PathLike)) else "onnx" in type(model).__module__
        )
        fix = ": for an ONNX file or model there is reparam.onnx" if onnx else ""
        raise ReparamError(f"expected a torch.nn.Module, got {type(model).__name__}{fix}")
    if next(model.parameters(), None) is None:
        script = f": {SCRIPT}" if isinstance(model, torch.jit.ScriptModule) else ""  # a frozen one
        raise ReparamError(f"{type(model).__name__} has no parameters{script}")
    modules = named_of(model)
    quantised = {kind for kind in {type(module) for _, module in modules} if _is_quantised(kind)}
    for name, module in modules:
        if type(module) in quantised:
            raise ReparamError(f"{name} is quantised: rewrite the model first, quantise the result")
    check_whole(model)
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


def _is_quantised(kind: type[nn.Module]) -> bool:
    """A layer of torch's quantised ones; ``FloatFunctional`` adds floats, and only is made ready to be one of them."""
    home = kind.__module__.split(".")
    floats = any(base.__name__ in ("FloatFunctional", "FXFloatFunctional") for base in kind.__mro__)
    return home[0] == "torch" and "quantized" in home and not floats


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    for path, module in named_of(model):
        buffers = module.named_buffers(recurse=False) if isinstance(module, _NormBase) else ()
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            yield join(path, name), tensor, module
