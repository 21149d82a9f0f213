"""What was rewritten, run against the module that it was made of: values, types, and all else that a caller can see.

Each network is run once in float64, on copies. Numbers that were rounded to the model's dtype enter as they were before
rounding, so that a float32 network is held to 1e-10 as well: that each shipped number is the exact one rounded once is
what the proof of its fold says. Only where a network casts by name (``x.float()``) it is also run as it is, for its
dtypes. One that refuses float64 is run in its own dtype alone, and allowed what rounding its weights does to it.

A network that leaves something behind on its modules is called up to three times in a row. Which random numbers it
draws has to be the same too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passes.graph.errors import first_line, said_in
from passes.graph.inputs import Example, as_example, likely
from passes.proof.compare import (
    FLOAT64_TOLERANCE,
    Comparison,
    Difference,
    EquivalenceError,
    Verdict,
    ceiling,
    coarsest_dtype,
    compared,
    tolerance,
)
from passes.proof.locate import Choices, choose_alike
from passes.proof.run import Run, hooked, nudged, run, runner_of
from passes.refusal import ReparamError

__all__ = ["Checked", "NoInputError", "Observed", "check", "explained", "observe", "without_hooks_of"]

ROUNDING = 1e-6
"""The most that rounding in float64 may explain in a network that amplifies it; beyond it, nothing can be told."""
CONSTANTS = 0.1
"""Which part of a coarser dtype's rounding may come from constants that a network has computed in it."""
UNKNOWN = "unknown"
"""Stands for where a network leaves the generators, if that was not the same twice."""
CALLS = 3
"""How often a network is called that leaves something behind."""


class NoInputError(ReparamError):
    """A module cannot be run: no input could be made up, or it cannot be copied; the message says what was tried."""


@dataclass(frozen=True)
class Observed:
    """What a model does, seen before anything was changed.

    Args:
        example: what it was called with.
        calls: one after the other on one copy, in float64 if ``double``.
        shipped: one call in the model's own dtype; None where it would show nothing more.
        training: whether in training mode.
        double: False for a model that refuses float64.
        allowed: relative difference that rounding explains.
        names: the names by which the positional arguments can be passed.
        hooks: how many hooks of a person's own each module has.
        source: the module, while it is as it was.
    """

    example: Example
    calls: tuple[Run, ...]
    shipped: Run | None
    training: bool
    double: bool
    allowed: float
    names: tuple[str, ...]
    hooks: Mapping[str, int]
    source: nn.Module | None

    @property
    def ran(self) -> frozenset[str]:
        """Paths of the modules that took part."""
        return frozenset().union(*(call.ran for call in self.calls))

    @property
    def by_name(self) -> Example:
        """The same call, its arguments passed by name: no keyword is to be lost."""
        args, kwargs = self.example.args, self.example.kwargs
        if len(self.names) < len(args):
            return self.example
        return Example((), {**dict(zip(self.names, args, strict=False)), **kwargs}, self.example.made_up)


@dataclass(frozen=True)
class Checked:
    """What a comparison of a result with its original found.

    Args:
        verdict: equal, different, or inconclusive if there was nothing to run or rounding decides.
        compared: what was compared and on what, or why nothing could be.
        differences: each with its place.
        error: largest relative difference of any output.
        ran: paths of the result's modules that took part.
        called: paths of those that were called themselves.
    """

    verdict: Verdict
    compared: str
    differences: tuple[Difference, ...] = ()
    error: float = 0.0
    ran: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the result."""
        return self.verdict is not Verdict.DIFFERENT

    def raise_if_different(self, place: str = "") -> None:
        """Raise :class:`EquivalenceError` if the result is seen to differ, first at ``place`` if that is known."""
        if not self.ok:
            first = self.differences[0]
            where = f", first at {place}" if place and place != first.layer else ""
            message = f"the result differs from the module that it was made of{where}: {first} ({self.compared})"
            raise EquivalenceError(message, layer=first.layer or place, error=first.error)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of ``paths`` that were not seen to be called."""
        return [path for path in paths if path not in self.called]

    def __str__(self) -> str:
        return "; ".join([self.compared, *map(str, self.differences[:3])])


# ------------------------------------------------------------------ the original


def observe(model: nn.Module, example: Any = None, *, training: bool = False) -> Observed:
    """Run ``model`` before it is changed.

    Args:
        model: is not changed.
        example: example inputs in any form, or None to make some up.
        training: the mode to run it in.

    Raises:
        NoInputError: none were given, and none could be made up; or the model cannot be copied.
        ReparamError: the model rejects those that were given.
    """
    given = as_example(example, model)
    tried = []
    for made in likely(model) if given is None else [given]:
        try:
            observed = _observed(model, made, training)
            if given is None or any(compared(call.value, call.value).numbers for call in observed.calls):
                return observed
        except ReparamError as error:
            raise NoInputError(f"{error}") from error
        # The model is user code: whatever it raises means that it does not take these inputs.
        except Exception as error:
            if given is not None:
                said = f"{said_in(error)}{without_hooks_of(model)}"
                raise ReparamError(f"the model rejects example_inputs: {said}") from error
            tried.append(f"{made}: {first_line(error)}")
        if given is not None:
            raise ReparamError("nothing to compare: the model returns no numbers for these inputs")
    raise NoInputError(f"no input could be made up ({tried[0] if tried else 'its first layer tells no shape'})")


def _observed(model: nn.Module, example: Example, training: bool) -> Observed:
    double, allowed = True, FLOAT64_TOLERANCE
    try:
        calls = _calls(model, example, training, double)
    # Code that insists on its own dtype.
    except Exception:
        if coarsest_dtype(model) == torch.float64:
            raise
        double = False
        calls = _calls(model, example, training, double)
        dtype = coarsest_dtype(model)
        allowed = tolerance(rounding(model, example, calls[0].value, training, precision=dtype, double=False), dtype)
    if any(call.generators for call in calls):  # by this network, or by another thread meanwhile
        again = _calls(model, example, training, double)
        if [call.generators for call in again] != [call.generators for call in calls]:
            calls = [replace(call, generators=UNKNOWN) for call in calls]
    casts = double and any(call.cast for call in calls)
    shipped = _shipped(model, example, training) if casts else None
    return Observed(example, tuple(calls), shipped, training, double, allowed, _names(model), hooked(model), model)


def _calls(model: nn.Module, example: Example, training: bool, double: bool) -> list[Run]:
    runner = runner_of(model, double=double, training=training)
    calls = [run(runner, example, double=double)]
    while calls[-1].left and len(calls) < (1 if training else CALLS):
        calls.append(run(runner, example, double=double))
    return calls


def _shipped(model: nn.Module, example: Example, training: bool) -> Run | None:
    """A call in the model's own dtype; None where it fails: a CPU has no kernels for some half-precision layers."""
    try:
        return run(runner_of(model, double=False, training=training), example, double=False)
    # The model is user code, which may fail in any way.
    except Exception:
        return None


def rounding(
    model: nn.Module,
    example: Example,
    value: Any,
    training: bool = False,
    *,
    precision: torch.dtype = torch.float64,
    double: bool = True,
) -> float:
    """How far outputs move, relatively, when every weight moves by one unit in the last place of ``precision``."""
    runner = nudged(runner_of(model, double=double, training=training), torch.finfo(precision).eps)
    return compared(run(runner, example, double=double).value, value, types=False).max_rel


def _names(model: nn.Module) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # code that shows none: a compiled extension
        return ()
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


# ------------------------------------------------------------------ the result


def check(
    original: nn.Module | Observed,
    result: nn.Module,
    example: Any = None,
    *,
    training: bool = False,
    exact: Mapping[int, Tensor] | None = None,
    moved: Mapping[str, str] | None = None,
    effects: bool = True,
    by_name: bool = True,
    allowed: float = FLOAT64_TOLERANCE,
) -> Checked:
    """Compare ``result`` with the module that it was made of.

    Args:
        original: the module, or what was observed of it before it was changed in place.
        result: is not changed, and runs on a copy.
        example: example inputs in any form, or None to make some up.
        training: run both in training mode; running statistics are then compared as well.
        exact: float64 numbers by the id of the tensor of ``result`` that is their rounding.
        moved: where a module of the original stands in the result, by its path there, if its path has changed.
        effects: whether hooks and what the forward leaves behind have to be the same.
        by_name: whether arguments have to be taken by the same names.
        allowed: relative difference of values.

    Raises:
        ReparamError: as :func:`observe`, except that nothing to run is an inconclusive outcome.
    """
    if isinstance(original, nn.Module):
        try:
            original = observe(original, example, training=training)
        except NoInputError as error:
            return Checked(Verdict.INCONCLUSIVE, f"not compared: {error}")
    observed, allowed = original, max(allowed, original.allowed)
    runs, differences = _runs_of(result, observed, exact, by_name)
    if effects:
        left = hooked(result)
        lost = [
            path
            for path, count in observed.hooks.items()
            if max(left.get(path, 0), left.get(_where(path, moved or {}), 0)) < count
        ]
        differences += [Difference("has lost its hook", path) for path in lost]
    total, unknown = Comparison(), False
    there = {path for path, _ in result.named_modules()}
    for i, (got, wanted) in enumerate(zip(runs, observed.calls, strict=False)):
        again = f" in call {i + 1}" if i else ""
        gap = compared(got.value, wanted.value)
        total.gap(gap.max_abs, gap.max_rel)
        total.numbers += gap.numbers
        if effects:
            differences += _left(got, wanted, moved or {}, allowed, again, there)
            changed = compared(got.given, wanted.given)
            if changed.differences or changed.max_rel > allowed:
                what, numbers = f"changes its input to something else{again}", not changed.differences
                differences.append(Difference(what, error=changed.max_rel, numbers=numbers))
        differences += _said(gap, allowed, again)
        if got.generators != wanted.generators:
            drawn = _drawn(got, wanted, result, observed, i)
            if drawn is False:
                differences.append(Difference(f"draws other random numbers{again}"))
            unknown |= drawn is None
    if runs and observed.shipped is not None:
        differences += _as_shipped(result, observed)
    verdict = Verdict.DIFFERENT if differences else Verdict.EQUAL if total.numbers else Verdict.INCONCLUSIVE
    ran, called = (frozenset().union(*sets) for sets in ((r.ran for r in runs), (r.called for r in runs)))
    said = _sentence(observed, total) + ("; not which random numbers: another thread draws some" if unknown else "")
    found = Checked(verdict, said, tuple(differences), total.max_rel, ran, called)
    if found.ok or observed.source is None or len(runs) < len(observed.calls):
        return found
    candidate = runner_of(result, double=observed.double, training=training, exact=exact)
    return explained(found, observed, observed.source, candidate) or found


def explained(found: Checked, observed: Observed, original: nn.Module, candidate: nn.Module) -> Checked | None:
    """A kinder verdict, if rounding explains all differences, or chance.

    - A network may amplify rounding, in float64 as well.
    - What a network computes once for its dtype (a constant) is rounded to it and may be computed anew in float64.
    - A selection decides between numbers that are equal but for rounding.

    Args:
        found: the differences.
        observed: what the original did.
        original: the module, as it was.
        candidate: a copy of the result in float64, to be run.
    """
    example, value, training = observed.example, observed.calls[0].value, observed.training
    again = _calls(original, example, training, observed.double)
    if any(compared(a.value, b.value).max_rel > observed.allowed for a, b in zip(again, observed.calls, strict=False)):
        why = f"not compared: the network itself does not return the same twice ({example})"
        return replace(found, verdict=Verdict.INCONCLUSIVE, compared=why, differences=())
    if not observed.double or not all(d.numbers for d in found.differences):
        return None
    dtype = coarsest_dtype(original)
    error = max([found.error, *(d.error for d in found.differences)])  # also of what is left behind
    lost = ""
    for precision, times, most in ((torch.float64, 10, ROUNDING), (dtype, CONSTANTS, ceiling(dtype))):
        noise = rounding(original, example, value, training, precision=precision)
        what = f"{found.compared}, no more than rounding in {_dtype(precision)} makes of it ({noise:.1g})"
        if error <= min(times * noise, most):
            return replace(found, verdict=Verdict.EQUAL, compared=what, differences=())
        if error <= times * noise and not lost:
            lost = f"{found.compared}, which tells nothing: rounding in {_dtype(precision)} alone makes {noise:.1g}"
    if lost:
        return replace(found, verdict=Verdict.INCONCLUSIVE, compared=lost, differences=())
    try:
        choices = Choices.of(runner_of(original, training=training), example), Choices.of(candidate, example)
    # A result that raises cannot be followed.
    except Exception:
        return None
    choice = choose_alike(*choices, None, torch.float64)
    if choice is None:
        return None
    why = f"{found.compared}; {choice} selects otherwise by numbers that agree to {FLOAT64_TOLERANCE:.0e}"
    return replace(found, verdict=Verdict.INCONCLUSIVE, compared=why, differences=())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sentence(observed: Observed, total: Comparison) -> str:
    calls = f", {len(observed.calls)} calls in a row" if len(observed.calls) > 1 else ""
    mode = " in training" if observed.training else ""
    dtype = "float64" if observed.double else "its own dtype (it refuses float64)"
    found = f"largest relative difference {total.max_rel:.1g}" if total.numbers else "it returns no numbers to compare"
    return f"whole network{mode}, {observed.example}{calls}, {dtype}: {found}"


def _runs_of(
    result: nn.Module, observed: Observed, exact: Mapping[int, Tensor] | None, by_name: bool
) -> tuple[list[Run], list[Difference]]:
    runner, runs = result, list[Run]()
    try:
        runner = runner_of(result, double=observed.double, training=observed.training, exact=exact)
        for i in range(len(observed.calls)):
            example = observed.by_name if by_name and not i else observed.example
            runs.append(run(runner, example, double=observed.double))
    # Whatever the result raises, the original did not.
    except Exception as error:
        return runs, [Difference(f"raises {type(error).__name__}: {first_line(error)}", _where_raised(error, runner))]
    return runs, []


def _drawn(got: Run, wanted: Run, result: nn.Module, observed: Observed, call: int) -> bool | None:
    """Whether a result that seemed to draw other random numbers draws the same after all.

    None if that cannot be told: the generators are the whole process's, and one of the two does not leave them the same
    twice, since another thread draws meanwhile.
    """
    example, double, training = observed.example, observed.double, observed.training

    def again(model: nn.Module) -> str:
        runner, end = runner_of(model, double=double, training=training), ""
        for _ in range(call + 1):
            end = run(runner, example, double=double).generators
        return end

    if wanted.generators == UNKNOWN:
        return None
    ours, theirs = again(result), wanted.generators if observed.source is None else again(observed.source)
    if ours == theirs:
        return True
    return False if (ours, theirs) == (got.generators, wanted.generators) else None


def _where_raised(error: Exception, runner: nn.Module) -> str:
    """Path of the innermost module in whose code an error arose."""
    paths = {id(module): path for path, module in runner.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = paths.get(id(frame.tb_frame.f_locals.get("self")), found)
        frame = frame.tb_next
    return found


def _as_shipped(result: nn.Module, observed: Observed) -> list[Difference]:
    """Compare dtypes and classes of one call in the model's own dtype."""
    wanted = observed.shipped
    assert wanted is not None
    try:
        got = run(runner_of(result, double=False, training=observed.training), observed.example, double=False)
    # Whatever the result raises, the original did not.
    except Exception as error:
        return [Difference(f"raises {type(error).__name__} in its own dtype: {first_line(error)}")]
    return compared(got.value, wanted.value).differences


# ------------------------------------------------------------------ comparing


def _said(found: Comparison, allowed: float, again: str) -> list[Difference]:
    if found.differences or found.max_rel <= allowed:
        return [replace(d, what=d.what + again) for d in found.differences]
    what = f"returns other numbers{again}: they differ by {found.max_rel:.3g}"
    return [Difference(what, error=found.max_rel, numbers=True)]


def _left(
    got: Run, wanted: Run, moved: Mapping[str, str], allowed: float, again: str, there: set[str]
) -> list[Difference]:
    """What the two calls left behind on their modules; a tensor that is written anew goes with a layer that is gone."""
    # A hook that went on to the block leaves its marks there, and not where the layer is now.
    theirs = {key if key in got.left else (_where(key[0], moved), key[1]): value for key, value in wanted.left.items()}
    found = []
    for (path, name), value in theirs.items():
        if path not in there and isinstance(value, Tensor) and (path, name) in wanted.had:
            continue
        if (path, name) not in got.left:
            found.append(Difference(f"no longer sets {name}{again}", path))
            continue
        gap = compared(got.left[path, name], value)
        if gap.differences or gap.max_rel > allowed:
            numbers = not gap.differences
            found.append(Difference(f"leaves another {name} behind{again}", path, gap.max_rel, numbers))
    extra = [key for key in got.left if key not in theirs and key in wanted.had]
    return found + [Difference(f"sets {name}, which the original does not{again}", path) for path, name in extra]


def _where(path: str, moved: Mapping[str, str]) -> str:
    """The path of a module in the result."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        before = ".".join(parts[:i])
        if before in moved:
            return ".".join([moved[before], *parts[i:]])
    return path


def without_hooks_of(*models: nn.Module) -> str:
    """That a network was run without its hooks, which its own code may need; empty if it has none."""
    paths = list(dict.fromkeys(path for model in models for path in hooked(model)))
    at = ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return f" (it runs without the hooks at {at}; if it needs them, leave example_inputs out)" if paths else ""
