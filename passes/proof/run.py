"""Running whole networks on copies, how far their outputs are apart, and where they part.

A folded convolution gives what its batch norm gave, so it differs from the original convolution of the same name and
nothing is wrong: the difference is healed before it gets anywhere. Where the networks really part is a module with
the same input and another output whose difference reaches the end. To know what reaches what, the tensors of one run
are followed from operation to operation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from passes.graph.copies import deep_copy

__all__ = ["FLOAT64_TOLERANCE", "coarsest_dtype", "distance", "first_difference", "outputs", "tolerance"]

FLOAT64_TOLERANCE = 1e-10
"""Largest relative difference between two float64 computations of the same thing."""

Version = tuple[int, int]
"""A tensor as it was at one moment: identity and how often it had been changed in place."""


def outputs(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
    """All tensors that ``model`` returns, run on a copy in eval mode and in ``dtype`` (None: as it is)."""
    return _run(_runner(model, dtype), inputs, dtype)


def distance(got: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Largest absolute and relative difference; infinite for different shapes or where either is not finite."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return math.inf, math.inf
    max_abs = max_rel = 0.0
    for g, w in zip(map(_real, got), map(_real, wanted), strict=True):
        if not w.is_floating_point():
            gap = 0.0 if torch.equal(g, w) else math.inf
            max_abs, max_rel = max(max_abs, gap), max(max_rel, gap)
        elif w.numel():
            gap = float((g.double() - w.double()).abs().max())
            if not math.isfinite(gap):
                return math.inf, math.inf
            max_abs = max(max_abs, gap)
            max_rel = max(max_rel, gap / max(float(w.abs().max()), 1e-300))
    return max_abs, max_rel


def tolerance(noise: float | None, dtype: torch.dtype) -> float:
    """What a relative difference may be: ten times the noise floor, but no less than 64 units in the last place."""
    if noise is None:
        return FLOAT64_TOLERANCE
    least = 64 * torch.finfo(dtype).eps
    return max(10 * noise, least) if math.isfinite(noise) else least


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype with the fewest digits among the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float64)


def first_difference(reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Path of the innermost module where a difference starts that reaches the output; "(model)" if in none."""
    dtype = coarsest_dtype(candidate)
    wanted, got = _Record.of(reference, inputs), _Record.of(candidate, inputs)
    rough = None if dtype == torch.float64 else _Record.of(reference, inputs, dtype)
    starts: list[str] = []
    same: set[Version] = set()
    for name in [name for name in wanted.calls if name in got.calls]:
        ours, theirs = wanted.calls[name], got.calls[name]
        own = rough.calls.get(name, ours) if rough is not None else None
        same_in = _same(theirs.given, ours.given, own.given if own is not None else None, dtype)
        same_out = _same(theirs.result, ours.result, own.result if own is not None else None, dtype)
        same |= set(ours.given_versions) if same_in else set()
        same |= set(ours.result_versions) if same_out else set()
        if same_in and not same_out:
            starts.append(name)
    return next((name for name in starts if wanted.reaches_end(name, same)), "(model)")


def _same(got: list[Tensor], wanted: list[Tensor], rough: list[Tensor] | None, dtype: torch.dtype) -> bool:
    noise = None if rough is None else distance([t.double() for t in rough], wanted)[1]
    return distance(got, wanted)[1] <= tolerance(noise, dtype)


@dataclass
class _CallRecord:
    """Copies of what a module was given and returned in its first call, and which tensors those were."""

    given: list[Tensor]
    given_versions: list[Version]
    result: list[Tensor]
    result_versions: list[Version]


@dataclass
class _Record(TorchFunctionMode):
    """One run of a model: its module calls in order of completion, and which tensor was made from which."""

    calls: dict[str, _CallRecord] = field(default_factory=dict)
    made: dict[Version, set[Version]] = field(default_factory=lambda: defaultdict(set))
    ends: set[Version] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> _Record:
        record = cls()
        runner = _runner(model, dtype)
        for name, module in runner.named_modules():
            if name:
                record._watch(name, module)
        with record:
            record.ends = set(record._versions(_run(runner, inputs, dtype)))
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
        before: list[tuple[list[Tensor], list[Version]]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (args, kwargs)
            before.append((_tensors(given, clone=True), list(self._versions(given))))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            given, versions = before.pop()
            self._link(versions, output)
            if name not in self.calls:
                made = list(self._versions(output))
                self.calls[name] = _CallRecord(given, versions, _tensors(output, clone=True), made)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def _link(self, sources: list[Version], result: Any) -> None:
        for version in self._versions(result):
            for source in sources:
                if source != version:
                    self.made[source].add(version)

    def _versions(self, value: Any) -> Iterator[Version]:
        for tensor in _tensors(value):
            self.alive.append(tensor)  # so that its identity is not given to another
            yield id(tensor), tensor._version


def _runner(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    runner = deep_copy(model).eval()
    if dtype is None:
        return runner
    if any(p.device.type == "mps" for p in model.parameters()):  # no float64 there
        runner = runner.cpu()
    return runner.to(dtype)


def _run(runner: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> list[Tensor]:
    """Networks that draw random numbers get the same ones each time, and the caller's random state stays."""
    device = next((p.device for p in runner.parameters()), None)

    def prepared(value: Any) -> Any:
        if dtype is None or not isinstance(value, Tensor):
            return value
        value = value.cpu() if value.device.type == "mps" and device is not None else value
        return value.to(dtype) if value.is_floating_point() else value

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _tensors(runner(*tree_map(prepared, inputs)))


def _tensors(value: Any, *, clone: bool = False) -> list[Tensor]:
    found = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return [t.detach().clone() for t in found] if clone else found


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
