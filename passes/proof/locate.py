"""Where two networks part, and whether a selection made them.

A folded convolution gives what its batch norm gave, so it differs from the original convolution of the same name and
nothing is wrong: the difference is healed before it gets anywhere. Where the networks really part is a module with
the same input and another output whose difference reaches the end. To know what reaches what, the tensors of one run
are followed from operation to operation.

A selection (top-k, a threshold, non-maximum suppression) turns a difference in the last place into another choice. It
is an operation that makes whole numbers or truths of reals; where two runs choose differently by the same numbers,
rounding has chosen, and what comes behind cannot be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from passes.graph.inputs import Example, tensors_in
from passes.proof.compare import Verdict, distance, judge
from passes.proof.run import run

__all__ = ["Choices", "Record", "choose_alike", "first_difference"]

NOWHERE = "(model)"
"""The place of a difference that starts in no module but in the outermost forward."""

Version = tuple[int, int]
"""A tensor as it was at one moment: identity and how often it had been changed in place."""


def first_difference(wanted: Record, got: Record, rough: Record | None, dtype: torch.dtype) -> str:
    """Path of the innermost module where a difference starts that reaches the output; :data:`NOWHERE` if in none.

    Args:
        wanted: a run of the reference in float64.
        got: one of the candidate.
        rough: the reference in the candidate's ``dtype``, for its noise; None in float64.
        dtype: of the candidate.
    """
    starts: list[str] = []
    others: list[str] = []
    same: set[Version] = set()
    for name in [name for name in wanted.calls if name in got.calls]:
        ours, theirs = wanted.calls[name], got.calls[name]
        own = rough.calls.get(name, ours) if rough is not None else None
        given = _judged(theirs.given, ours.given, own.given if own is not None else None, dtype)
        made = _judged(theirs.result, ours.result, own.result if own is not None else None, dtype)
        same |= set(ours.given_versions) if given is Verdict.EQUAL else set()
        same |= set(ours.result_versions) if made is Verdict.EQUAL else set()
        if given is Verdict.EQUAL and made is Verdict.DIFFERENT:
            starts.append(name)
        elif (ours.kind, ours.draws) != (theirs.kind, theirs.draws):
            others.append(name)
    return next((name for name in starts if wanted.reaches_end(name, same)), next(iter(others), NOWHERE))


def choose_alike(wanted: Choices, got: Choices, rough: Choices | None, dtype: torch.dtype) -> str | None:
    """The first selection that two runs decide differently by the same numbers; None if there is none."""
    for i, (ours, theirs) in enumerate(zip(wanted.made, got.made, strict=False)):
        if (ours.name, ours.options) != (theirs.name, theirs.options):
            return None
        if distance(theirs.chosen, ours.chosen)[1] == 0:
            continue
        own = rough.made[i].given if rough is not None and i < len(rough.made) else None
        verdict = _judged(theirs.given, ours.given, own, dtype)
        return ours.name if verdict is Verdict.EQUAL else None
    return None


def _judged(got: list[Tensor], wanted: list[Tensor], rough: list[Tensor] | None, dtype: torch.dtype) -> Verdict:
    noise = None
    if dtype != torch.float64:
        noise = 0.0 if rough is None else distance([_double(t) for t in rough], wanted)[1]
    return judge(distance(got, wanted)[1], noise, dtype)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# ------------------------------------------------------------------ what a run did


@dataclass
class _CallRecord:
    """Copies of what a module was given and returned in its first call, and which tensors those were.

    ``kind`` are the classes and dtypes that it returned; ``draws`` says whether it drew random numbers.
    """

    given: list[Tensor]
    given_versions: list[Version]
    result: list[Tensor]
    result_versions: list[Version]
    kind: str
    draws: bool


@dataclass
class Record(TorchFunctionMode):
    """One run of a model: its module calls in order of completion, and which tensor was made from which."""

    calls: dict[str, _CallRecord] = field(default_factory=dict)
    made: dict[Version, set[Version]] = field(default_factory=lambda: defaultdict(set))
    ends: set[Version] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, runner: nn.Module, example: Example, *, double: bool = True) -> Record:
        """Run a copy that nobody else uses."""
        record = cls()
        for name, module in runner.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                record._watch(name, module)
        record.ends = set(record._versions(run(runner, example, double=double, within=record).value))
        return record

    def reaches_end(self, name: str, same: set[Version]) -> bool:
        """Whether what a module returned reaches an output other than through tensors known to be the same."""
        todo = [v for v in self.calls[name].result_versions if v not in same]
        seen = set(todo)
        while todo:
            version = todo.pop()
            if version in self.ends:
                return True
            following = self.made.get(version, set()) - same - seen
            seen |= following
            todo += following
        return False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = list(self._versions((args, kwargs)))
        result = func(*args, **kwargs)
        self._link(sources, result)
        return result

    def _watch(self, name: str, module: nn.Module) -> None:
        before: list[tuple[list[Tensor], list[Version], Tensor]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (args, kwargs)
            before.append((_clones(given), list(self._versions(given)), torch.default_generator.get_state()))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            given, versions, generator = before.pop()
            self._link(versions, output)
            if name not in self.calls:
                draws = not torch.equal(generator, torch.default_generator.get_state())
                made = list(self._versions(output))
                self.calls[name] = _CallRecord(given, versions, _clones(output), made, _kind(output), draws)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def _link(self, sources: list[Version], result: Any) -> None:
        for version in self._versions(result):
            for source in sources:
                if source != version:
                    self.made[source].add(version)

    def _versions(self, value: Any) -> Iterator[Version]:
        for tensor in tensors_in(value):
            self.alive.append(tensor)  # so that its identity is not given to another
            yield id(tensor), tensor._version


@dataclass(frozen=True)
class _Choice:
    """One selection: the operation with its options, the reals that it was given, and what it made of them."""

    name: str
    options: str
    given: list[Tensor]
    chosen: list[Tensor]


class Choices(TorchDispatchMode):
    """All selections of one run, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[_Choice] = []

    @classmethod
    def of(cls, runner: nn.Module, example: Example, *, double: bool = True) -> Choices:
        """Run a copy that nobody else uses."""
        choices = cls()
        run(runner, example, double=double, within=choices)
        return choices

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.numel()]
        chosen = [t for t in tensors_in(result) if not (t.is_floating_point() or t.is_complex())]
        if given and chosen:
            options = repr([None if isinstance(a, Tensor) else a for a in (*args, *(kwargs or {}).values())])
            self.made.append(_Choice(str(func), options, _clones(given), _clones(chosen)))
        return result


def _kind(value: Any) -> str:
    """Classes and dtypes of what a module returns."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {value.dtype}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__}{ {str(key): _kind(part) for key, part in value.items()} }"
    parts = [_kind(part) for part in value] if isinstance(value, (list, tuple)) else []
    return f"{type(value).__name__}{parts}"


def _clones(value: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_in(value)]
