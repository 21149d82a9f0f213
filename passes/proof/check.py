"""What was rewritten, run against the module that it was made of: values, types, and all else that a caller can see.

Each network is run once in float64, on copies. Numbers that were rounded to the model's dtype enter as they were before
rounding, so that a float32 network is held to 1e-10 as well: that each shipped number is the exact one rounded once is
what the proof of its fold says. Only where a network casts by name (``x.float()``) it is also run as it is, for its
dtypes.

A network that leaves something behind on its modules is called up to three times in a row. Which random numbers it
draws has to be the same too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passes.graph.inputs import Example, as_example, likely
from passes.proof.compare import FLOAT64_TOLERANCE, Comparison, Difference, EquivalenceError, Verdict, compared
from passes.proof.run import Run, run, runner_of
from passes.refusal import ReparamError

__all__ = ["Checked", "NoInputError", "Observed", "check", "observe"]

CALLS = 3
"""How often a network is called that leaves something behind."""


class NoInputError(ReparamError):
    """No input could be made up for a module; the message says what was tried."""


@dataclass(frozen=True)
class Observed:
    """What a model does, seen before anything was changed.

    Args:
        example: what it was called with.
        calls: in float64, one after the other on one copy.
        shipped: one call in the model's own dtype; None where it would show nothing more.
        training: whether in training mode.
    """

    example: Example
    calls: tuple[Run, ...]
    shipped: Run | None
    training: bool


@dataclass(frozen=True)
class Checked:
    """What a comparison of a result with its original found.

    Args:
        verdict: equal, different, or inconclusive if there was nothing to run.
        compared: what was compared and on what, or why nothing could be.
        differences: each with its place.
        error: largest relative difference of any output.
        ran: paths of the result's modules that took part.
    """

    verdict: Verdict
    compared: str
    differences: tuple[Difference, ...] = ()
    error: float = 0.0
    ran: frozenset[str] = frozenset()

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the result."""
        return self.verdict is not Verdict.DIFFERENT

    def raise_if_different(self) -> None:
        """Raise :class:`EquivalenceError` if the result is seen to differ."""
        if not self.ok:
            first = self.differences[0]
            raise EquivalenceError(f"{first} ({self.compared})", layer=first.layer, error=first.error)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of ``paths`` that were not seen to run."""
        return [path for path in paths if path not in self.ran]

    def __str__(self) -> str:
        shown = "".join(f"; {difference}" for difference in self.differences[:3])
        return f"{self.compared}{shown}"


def observe(model: nn.Module, example: Any = None, *, training: bool = False) -> Observed:
    """Run ``model`` before it is changed.

    Args:
        model: is not changed.
        example: example inputs in any form, or None to make some up.
        training: the mode to run it in.

    Raises:
        NoInputError: none were given, and none could be made up.
        ReparamError: the model rejects those that were given, or cannot be copied.
    """
    given = as_example(example, model)
    if given is not None:
        try:
            return _observed(model, given, training)
        except ReparamError:
            raise
        # The model is user code: whatever it raises means that it does not take these inputs.
        except Exception as error:
            raise ReparamError(f"the model rejects example_inputs: {_first_line(error)}") from error
    tried = []
    for made in likely(model):
        try:
            return _observed(model, made, training)
        except ReparamError:
            raise
        # Any exception means that the model does not take these numbers.
        except Exception as error:
            tried.append(f"{made}: {_first_line(error)}")
    raise NoInputError(f"no input could be made up ({tried[0] if tried else 'its first layer tells no shape'})")


def check(
    original: nn.Module | Observed,
    result: nn.Module,
    example: Any = None,
    *,
    training: bool = False,
    exact: Mapping[int, Tensor] | None = None,
    moved: Mapping[str, str] | None = None,
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
        allowed: relative difference of values.

    Raises:
        ReparamError: as :func:`observe`, except that nothing to run is an inconclusive outcome.
    """
    if isinstance(original, nn.Module):
        try:
            original = observe(original, example, training=training)
        except NoInputError as error:
            return Checked(Verdict.INCONCLUSIVE, f"not run: {error}")
    observed = original
    runs, problem = _runs_of(result, observed, exact)
    differences, total = [*problem], Comparison()
    for i, (got, wanted) in enumerate(zip(runs, observed.calls, strict=False)):
        again = f" in call {i + 1}" if i else ""
        found = compared(got.value, wanted.value)
        differences += _said(found, allowed, again)
        differences += _left(got, wanted, result, moved or {}, allowed, again)
        if got.generators != wanted.generators:
            differences.append(Difference(f"draws other random numbers{again}"))
        total.gap(found.max_abs, found.max_rel)
        total.numbers += found.numbers
    if runs and observed.shipped is not None:
        differences += _as_shipped(result, observed)
    verdict = Verdict.DIFFERENT if differences else Verdict.EQUAL if total.numbers else Verdict.INCONCLUSIVE
    ran = frozenset().union(*(r.ran for r in runs))
    return Checked(verdict, _compared(observed, total), tuple(differences), total.max_rel, ran)


def _compared(observed: Observed, total: Comparison) -> str:
    calls = f", {len(observed.calls)} calls in a row" if len(observed.calls) > 1 else ""
    mode = " in training" if observed.training else ""
    found = f"largest relative difference {total.max_rel:.1g}" if total.numbers else "it returns no numbers"
    return f"whole network{mode}, {observed.example}{calls}, float64: {found}"


# ------------------------------------------------------------------ running


def _observed(model: nn.Module, example: Example, training: bool) -> Observed:
    runner = runner_of(model, training=training)
    calls = [run(runner, example)]
    while calls[-1].left and len(calls) < (1 if training else CALLS):
        calls.append(run(runner, example))
    shipped = _try(model, example, training) if any(call.cast for call in calls) else None
    return Observed(example, tuple(calls), shipped, training)


def _try(model: nn.Module, example: Example, training: bool) -> Run | None:
    """A call in the model's own dtype; None where it fails: a CPU has no kernels for some half-precision layers."""
    try:
        return run(runner_of(model, double=False, training=training), example, double=False)
    # The model is user code, which may fail in any way.
    except Exception:
        return None


def _runs_of(
    result: nn.Module, observed: Observed, exact: Mapping[int, Tensor] | None
) -> tuple[list[Run], list[Difference]]:
    runner = runner_of(result, training=observed.training, exact=exact)
    runs: list[Run] = []
    try:
        for i in range(len(observed.calls)):
            runs.append(run(runner, observed.example if i else by_name(observed)))
    # Whatever the result raises, the original did not.
    except Exception as error:
        return runs, [Difference(f"raises {type(error).__name__}: {_first_line(error)}")]
    return runs, []


def by_name(observed: Observed) -> Example:
    """The first call, its arguments passed by name: a keyword is not to be lost."""
    return observed.example


def _as_shipped(result: nn.Module, observed: Observed) -> list[Difference]:
    """Compare dtypes and classes of one call in the model's own dtype."""
    wanted = observed.shipped
    assert wanted is not None
    try:
        got = run(runner_of(result, double=False, training=observed.training), observed.example, double=False)
    # Whatever the result raises, the original did not.
    except Exception as error:
        return [Difference(f"raises {type(error).__name__} in its own dtype: {_first_line(error)}")]
    return compared(got.value, wanted.value).differences


# ------------------------------------------------------------------ comparing


def _said(found: Comparison, allowed: float, again: str) -> list[Difference]:
    if found.differences or found.max_rel <= allowed:
        return [Difference(d.what + again, d.layer, d.error) for d in found.differences]
    return [Difference(f"returns other numbers{again}: they differ by {found.max_rel:.3g}", error=found.max_rel)]


def _left(
    got: Run, wanted: Run, result: nn.Module, moved: Mapping[str, str], allowed: float, again: str
) -> list[Difference]:
    """What the two calls left behind on modules that both networks have."""
    found = []
    theirs = {(_where(path, moved), name): value for (path, name), value in wanted.left.items()}
    for (path, name), value in theirs.items():
        if (path, name) not in got.left:
            found.append(Difference(f"no longer sets {name}{again}", path))
            continue
        gap = compared(got.left[path, name], value)
        if gap.differences or gap.max_rel > allowed:
            found.append(Difference(f"leaves another {name} behind{again}", path, gap.max_rel))
    return found


def _where(path: str, moved: Mapping[str, str]) -> str:
    """The path of a module in the result."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        before = ".".join(parts[:i])
        if before in moved:
            return ".".join([moved[before], *parts[i:]])
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
