"""What a verb must keep of a module with Python in its forward, and the differences it makes.

A verb is given a network; its result and the network itself, built anew, are called several times in a row on two
input sizes, in every way that the signature allows, with all generators seeded before each call. Compared are values
(float64, 1e-10), types, whether gradients flow, attributes and buffers that calls left behind, what was put into outer
containers, and the generators' states. The network that the verb was given must be as it was. A result may instead be
a :class:`reparam.ReparamError`; and a call with an argument other than its default may be answered by a ``ValueError``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from python_modules import Program
from python_snippets import ARGUMENTS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import reparam

__all__ = ["VERBS", "Problem", "describe", "difference", "problems"]

TOLERANCE = 1e-10
"""Relative to the largest element; everything runs in float64."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

SIZES = ((2, 4, 9, 11), (3, 4, 12, 8), (2, 4, 9, 11))
"""Inputs of the calls in a row."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be; ``allowed`` for an error that says what is wrong in the library's words."""

    verb: str
    kind: str
    text: str
    allowed: bool = False

    def __str__(self) -> str:
        return f"{self.verb}: {self.kind}: {self.text}"


Verb = Callable[[nn.Module, Any], tuple[nn.Module, Any]]
"""From a network and example inputs to the result and the report."""


def _expand(block: str) -> Verb:
    return lambda model, inputs: (reparam.expand(model, block), None)


VERBS: dict[str, Verb] = {
    "collapse": lambda model, inputs: reparam.collapse_with_report(model),
    "collapse with inputs": lambda model, inputs: reparam.collapse_with_report(model, example_inputs=inputs),
    "expand acb": _expand("acb"),
    "expand doconv": _expand("doconv"),
}


def problems(program: Program, verbs: tuple[str, ...] = tuple(VERBS)) -> list[Problem]:
    """What is wrong with each verb on this program; ordered by verb."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scope = program.load()
        wanted = _Observed(scope, scope["build"](), program)
        found = []
        for verb in verbs:
            found += list(_problems_of(verb, program, scope, wanted))
        return found


def _problems_of(verb: str, program: Program, scope: dict[str, Any], wanted: _Observed) -> Iterator[Problem]:
    model = scope["build"]()
    before, generators = _snapshot(model), _generators()
    _clear(scope)
    inputs = _arguments(ARGUMENTS[program.arguments].calls[0], SIZES[0])[0]
    result = report = None
    try:
        result, report = VERBS[verb](model, inputs)
    except reparam.ReparamError as error:
        yield Problem(verb, f"{type(error).__name__}", _first(error), allowed=True)
    except Exception as error:  # anything that comes out raw is what is looked for
        yield Problem(verb, "raw exception", f"{type(error).__name__}: {_first(error)}")
    said = difference(before, _snapshot(model), "model")
    if said:
        yield Problem(verb, "model disturbed", said)
    for name, state in _generators().items():
        if state != generators[name] and not (name == "torch" and verb.startswith("expand")):
            yield Problem(verb, "generator disturbed", name)
    leak = _leak([scope["LOG"], scope["STORE"]])
    if leak:
        yield Problem(verb, "left in a container", leak)
    if result is None:
        return
    observed = _Observed(scope, result, program)
    found = list(wanted.compare(verb, observed))
    yield from found
    if report is not None:
        yield from _unexplained(verb, result, report, observed)
    elif not found:
        yield from _in_training(verb, program, scope, VERBS[verb](scope["build"](), inputs)[0])


def _in_training(verb: str, program: Program, scope: dict[str, Any], result: nn.Module) -> Iterator[Problem]:
    """One forward in training mode, and evaluation behind it: statistics of norms went the same way."""
    verb = f"{verb}, training"
    wanted = _Trained(scope, scope["build"](), program)
    try:
        trained = _Trained(scope, result, program)
    except Exception as error:  # from train() or eval(): they are the model's own code
        yield Problem(verb, "train() raises", f"{type(error).__name__}: {_first(error)}")
        return
    found = list(wanted.compare(verb, trained))
    # A copy that differs by itself (a closure holds the layers of the original) can tell nothing.
    if found and not list(wanted.compare(verb, _Trained(scope, copy.deepcopy(scope["build"]()), program))):
        yield from found
    if found:
        return
    try:
        folded = reparam.collapse(result)
    except reparam.ReparamError as error:
        yield Problem(f"{verb}, collapse", f"{type(error).__name__}", _first(error), allowed=True)
        return
    except Exception as error:  # anything that comes out raw is what is looked for
        yield Problem(f"{verb}, collapse", "raw exception", f"{type(error).__name__}: {_first(error)}")
        return
    try:
        twin = copy.deepcopy(result)
    except RuntimeError:  # holds a tensor with a gradient function: torch copies none
        return
    yield from _Observed(scope, twin, program).compare(f"{verb}, collapse", _Observed(scope, folded, program))


def _unexplained(verb: str, result: nn.Module, report: Any, observed: _Observed) -> Iterator[Problem]:
    """A norm that still runs has a line in the report, or stands in something that has one."""
    named = [r.layer.partition(":")[0] for r in [*report.refusals, *report.untraced]]
    for path, module in result.named_modules():
        explained = any(name in ("", "(model)") or f"{path}.".startswith(f"{name}.") for name in named)
        if isinstance(module, _NormBase) and id(module) in observed.called and not explained:
            yield Problem(verb, "unexplained", f"{path} stays and the report does not say why")


# ------------------------------------------------------------------ what calls do


class _Observed:
    """Everything that a network shows in several calls."""

    def __init__(self, scope: dict[str, Any], model: nn.Module, program: Program) -> None:
        before = _state(model)
        _clear(scope)
        self.called: set[int] = set()
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.register_forward_pre_hook(lambda module, _: self.called.add(id(module)))
        self.calls = [(call, _run(function, call, shape, k)) for k, (function, call, shape) in _calls(model, program)]
        after = _state(model)
        self.state = after
        self.changed = {key for key in after if key not in before or difference(before[key], after[key], "")}
        self.containers = describe([scope["LOG"], scope["STORE"]])

    def compare(self, verb: str, other: _Observed) -> Iterator[Problem]:
        """What the other one does differently."""
        for (call, mine), (_, its) in zip(self.calls, other.calls, strict=True):
            optional = call.endswith("?")
            if "error" in its and "error" not in mine:
                if optional and isinstance(its["error"], ValueError):
                    return  # an answer; from here on the two have been called differently
                error = its["error"]
                yield Problem(verb, "call raises", f"({call}) {type(error).__name__}: {_first(error)}")
                return
            if "error" in mine:
                if "error" not in its:
                    yield Problem(verb, "call does not raise", f"({call}) {mine['error']!r}")
                    return
                continue
            for part in ("output", "generators"):
                said = difference(mine[part], its[part], part)
                if said:
                    yield Problem(verb, f"{part} differs", f"({call}) {said}")
                    return
        yield from self._left_behind(verb, other)

    def _left_behind(self, verb: str, other: _Observed) -> Iterator[Problem]:
        for key in sorted(self.changed):
            if verb.startswith("expand") and key.rpartition(".")[2] in _STATISTICS:
                continue  # the norm has moved into a block, and what it leaves may answer as the exact identity
            if key not in other.state:
                yield Problem(verb, "state lost", key)
            elif said := difference(self.state[key], other.state[key], key):
                yield Problem(verb, "state differs", said)
        said = difference(self.containers, other.containers, "containers")
        if said:
            yield Problem(verb, "state differs", said)


class _Trained(_Observed):
    """One call in training mode, with the gradients' way back, and one in evaluation."""

    def __init__(self, scope: dict[str, Any], model: nn.Module, program: Program) -> None:
        _clear(scope)
        model.train()
        call = ARGUMENTS[program.arguments].calls[0]
        first = _run(model, call, SIZES[0], 0)
        model.eval()
        self.calls = [(f"{call} in training", first), (f"{call} after it", _run(model, call, SIZES[1], 1))]
        self.state, self.changed, self.containers = {}, set(), describe(None)


def _calls(model: nn.Module, program: Program) -> Iterator[tuple[int, tuple[Callable[..., Any], str, Any]]]:
    arguments = ARGUMENTS[program.arguments]
    calls = [(model, call) for call in arguments.calls]
    calls = [calls[k % len(calls)] for k in range(max(len(SIZES), len(calls)))]
    if program.style == "through_a_method":
        calls.append((model._forward, arguments.calls[0]))
    calls += [(model, f"{call} ?") for call in arguments.optional]
    return enumerate((function, call, SIZES[k % len(SIZES)]) for k, (function, call) in enumerate(calls))


def _run(function: Callable[..., Any], call: str, shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    args, kwargs = _arguments(call, shape)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        output = function(*args, **kwargs)
    except Exception as error:  # compared with what the other network does
        return {"error": error}
    return {"output": describe(output), "generators": _generators()}


def _arguments(call: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return eval(f"take({call.rstrip('?')})", {"take": lambda *a, **k: (a, k), "x": x, "y": y})  # type: ignore[no-any-return]


def _clear(scope: dict[str, Any]) -> None:
    scope["LOG"].clear()
    scope["STORE"].clear()
    for name, value in scope.items():
        if name.startswith("COUNT"):
            value[:] = [0]


def _generators() -> dict[str, str]:
    """A digest of each generator's state."""
    states = {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "random": repr(random.getstate()).encode(),
        "numpy": repr(np.random.get_state()[1:3]).encode(),
    }
    return {name: hashlib.sha256(state).hexdigest() for name, state in states.items()}


def _state(model: nn.Module) -> dict[str, Any]:
    """Attributes and buffers by path; weights are left out: a fold may do away with what was written into them."""
    found = {}
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None:
                found[f"{path}.{name}"] = describe(value)
        for name, value in module.__dict__.items():
            if not name.startswith("_") and name != "training":
                found[f"{path}.{name}"] = describe(value)
    return found


def _snapshot(model: nn.Module) -> Any:
    """What a caller can see of a model, numbers copied."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        seen[f"{path} class"] = type(module), id(module)
        seen[f"{path} forward"] = "forward" in module.__dict__
        seen[f"{path} children"] = [(k, id(v)) for k, v in module._modules.items()]
        for name, value in {**module._parameters, **module._buffers}.items():
            seen[f"{path}.{name}"] = id(value), describe(value)
        for name, value in module.__dict__.items():
            if not name.startswith("_"):
                seen[f"{path}.{name}"] = describe(value)
    return seen


# ------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class _Leaf:
    """A tensor as it was."""

    value: Tensor
    grad: bool


def describe(value: Any, depth: int = 0) -> Any:
    """A value as nested tuples of types, names and copied numbers."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            return ("a strange tensor", type(value).__name__)
        return _Leaf(value.detach().clone(), value.requires_grad)
    kind = type(value).__name__
    if isinstance(value, (nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return ("code", kind if not isinstance(value, nn.Module) else "module")
    if depth > 6:
        return kind
    if isinstance(value, dict):
        items = tuple((str(k), describe(v, depth + 1)) for k, v in value.items())
        return (kind, items, _attributes(value, depth))
    if isinstance(value, (list, tuple, set)):
        return (kind, tuple(describe(v, depth + 1) for v in value))
    if dataclasses.is_dataclass(value):
        return (kind, tuple((f.name, describe(getattr(value, f.name), depth + 1)) for f in dataclasses.fields(value)))
    if type(value).__module__ in ("builtins", "numpy", "torch"):
        return (kind, value)
    return (kind, _attributes(value, depth))


def _attributes(value: Any, depth: int) -> Any:
    return tuple((k, describe(v, depth + 1)) for k, v in getattr(value, "__dict__", {}).items())


def difference(a: Any, b: Any, at: str) -> str:
    """Where two descriptions differ, in words; empty if they do not."""
    if isinstance(a, _Leaf) and isinstance(b, _Leaf):
        if (a.value.dtype, a.value.shape) != (b.value.dtype, b.value.shape):
            return f"{at}: {a.value.dtype} {tuple(a.value.shape)} became {b.value.dtype} {tuple(b.value.shape)}"
        if a.grad != b.grad:
            return f"{at}: requires_grad {a.grad} became {b.grad}"
        return _numbers_differ(a.value, b.value, at)
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"{at}: {sorted(set(a) ^ set(b)) or 'the order'} differs"
        return next((d for k in a if (d := difference(a[k], b[k], f"{at} {k}"))), "")
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        if len(a) != len(b):
            return f"{at}: {len(a)} items became {len(b)}"
        return next((d for k, (p, q) in enumerate(zip(a, b, strict=True)) if (d := difference(p, q, f"{at}.{k}"))), "")
    return "" if type(a) is type(b) and a == b else f"{at}: {str(a)[:60]} became {str(b)[:60]}"


def _numbers_differ(a: Tensor, b: Tensor, at: str) -> str:
    if not a.is_floating_point() or not a.numel():
        return "" if torch.equal(a, b) else f"{at}: other numbers"
    if not torch.equal(a.isfinite(), b.isfinite()):
        return f"{at}: other elements are finite"
    gap = float((a - b)[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    scale = max(float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0, 1.0)
    # What the forward computes in a narrow dtype (a draw in float32) is rounded there, twice over a sum.
    tolerance = TOLERANCE if a.dtype == torch.float64 else 1e-5
    return "" if gap <= tolerance * scale else f"{at}: differs by {gap:.1e} of {scale:.1e}"


def _leak(value: Any) -> str:
    """A proxy or a tensor without numbers that tracing left in an outer container."""
    if isinstance(value, torch.fx.Proxy) or (
        isinstance(value, Tensor) and (value.is_meta or type(value) is not Tensor)
    ):
        return f"a {type(value).__name__}"
    if isinstance(value, dict):
        value = list(value.values())
    return next((leak for v in value if (leak := _leak(v))), "") if isinstance(value, (list, tuple)) else ""


def _first(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
