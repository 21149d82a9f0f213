"""The other ways to call a unit: with values for the optional arguments that its trace leaves at their defaults.

``forward(x, aux=False)`` may send a value somewhere else when ``aux`` is true. What a trace with defaults says of a
layer ("its norm alone reads it") holds for the module only if it holds for these calls as well. A flag is flipped; any
other argument is left open, as the inputs are; where the code asks for its value, values that the code names are tried.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from types import CodeType
from typing import Any

from torch import fx, nn

from passes.graph.capture import Call, Unit, join, trace_variant
from passes.graph.opset import is_shape_query
from passes.graph.patches import patched
from passes.refusal import Reason, Refusal

__all__ = ["OtherCalls", "Variant", "own_calls", "variants"]

MAX_GUESSES = 8
"""Most values that are tried for one argument whose value decides."""


@dataclass(frozen=True)
class Variant:
    """A unit as it is when called with ``given``; ``unit`` is None where it cannot be traced so, ``why`` says why.

    ``at`` is the path in the unit of the module that is called, where a wrapper passes its arguments on to it.
    """

    given: str
    unit: Unit | None
    why: str = ""
    at: str = ""


def own_calls(unit: Unit) -> list[Call]:
    """Calls whose arguments are the caller's: of the unit, and of what it wraps in ``forward(*args, **kwargs)``."""
    found = [call for call in unit.calls if call.parent is None]
    for call in unit.calls:
        more = call.parent in found and _passes_on(call.parent.module)
        if more and (_optional(call.module) or _passes_on(call.module)):  # else there is nothing to be handed on
            found.append(call)
    return found


def variants(unit: Unit) -> list[Variant]:
    """Every optional argument of the unit's forward with another value: one at a time, then all at once."""
    found = [Variant("another size", other) for other in unit.others]
    calls = [call for call in own_calls(unit) if _optional(call.module)]
    with patched() if calls else nullcontext():  # for all of these traces at once
        for call in calls:
            inner = replace(unit, path=join(unit.path, call.path), root=call.module) if call.path else unit
            found += [replace(variant, at=call.path) for variant in _variants(inner)]
    return found


def _variants(unit: Unit) -> list[Variant]:
    optional = _optional(unit.root)
    if not optional:
        return []
    if whole := _open(unit, optional):
        # One at a time says which of them it is.
        alone = [variant for parameter in optional for variant in _open(unit, [parameter])] if len(optional) > 1 else []
        return [*alone, *whole]
    found: list[Variant] = []
    together: dict[str, Any] = {}
    for parameter in optional:
        worked, tried = _of(unit, parameter)
        found += tried
        together |= worked
    if len(together) > 1:
        everything = _traced(unit, together)
        found += [everything] if everything.unit is not None else []
    return found


def _open(unit: Unit, parameters: list[inspect.Parameter]) -> list[Variant]:
    """The unit with these arguments left open, and what it does for either answer to what it asks of them."""
    first = _traced(unit, {parameter.name: ... for parameter in parameters})
    if first.unit is None:
        return []
    return [first, *(replace(first, unit=other) for other in first.unit.others)]


def _of(unit: Unit, parameter: inspect.Parameter) -> tuple[dict[str, Any], list[Variant]]:
    """The first value that can be traced, and what to look at.

    Where the code asks for more than yes or no, a few values are no proof for all, unless there are no others.
    """
    name, default = parameter.name, parameter.default
    if found := _open(unit, [parameter]):
        return {name: ...}, found
    worked: dict[str, Any] = {}
    for value in itertools.islice(_guesses(unit, default), MAX_GUESSES):
        guess = _traced(unit, {name: value})
        if guess.unit is not None:  # else the forward may well reject it
            found.append(guess)
            worked = worked or {name: value}
    if not found or not isinstance(default, (bool, Enum)):
        found.append(_traced(unit, {name: ...}))
    return worked, found


def _traced(unit: Unit, given: dict[str, Any]) -> Variant:
    open_ones = [name for name, value in given.items() if value is ...]
    what = ["another value of " + " and ".join(open_ones)] if open_ones else []
    text = ", ".join([*what, *(f"{name}={value!r}" for name, value in given.items() if value is not ...)])
    try:
        return Variant(text, trace_variant(unit, given))
    # Any exception at all may come out of user code that runs on proxies.
    except Exception as error:
        said = str(error).strip().splitlines()
        return Variant(text, None, f"{type(error).__name__}: {said[0] if said else ''}"[:120])


def _optional(root: nn.Module) -> list[inspect.Parameter]:
    """Arguments of a forward that a caller may leave out; the first of all counts as an input."""
    try:
        parameters = list(inspect.signature(root.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = any(p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return [p for i, p in enumerate(named) if p.default is not p.empty and (required or i > 0)]


def _passes_on(module: nn.Module) -> bool:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _guesses(unit: Unit, default: Any) -> Iterator[Any]:
    """Values that an argument might take, judged by its default and by what the code compares with."""
    if isinstance(default, bool):
        yield not default
        return
    if isinstance(default, Enum):
        yield from (member for member in type(default) if member is not default)
        return
    if default is None:
        yield from (True, False)
    kinds = {int: (int,), str: (str,), float: (float, int), type(None): (str, int)}.get(type(default), ())
    near = [default + 1, default - 1, 0, 1] if isinstance(default, (int, float)) else []
    seen = [default]
    for value in [*near, *_constants(unit)]:
        if type(value) in kinds and not any(value == other for other in seen):
            seen.append(value)
            yield value


def _constants(unit: Unit) -> list[Any]:
    """Numbers and names that stand in the forwards of a unit, its own first."""
    codes = {id(f): f for m in [unit.root, *(c.module for c in unit.calls)] if (f := _code(m)) is not None}
    found: dict[Any, None] = {}
    todo = list(codes.values())
    while todo:
        code = todo.pop(0)
        inner = [c for c in code.co_consts if isinstance(c, CodeType)]
        todo += inner
        groups = [c if isinstance(c, (tuple, frozenset)) else (c,) for c in code.co_consts if c not in inner]
        plain = [c for group in groups for c in group if type(c) in (int, str)]
        found |= {(type(c), c): None for c in plain if not isinstance(c, str) or c.isidentifier()}
    return [value for _, value in found]


def _code(module: nn.Module) -> CodeType | None:
    return getattr(inspect.unwrap(getattr(module.forward, "__func__", module.forward)), "__code__", None)


# ------------------------------------------------------------------ what holds in every call


class OtherCalls:
    """Whether a part of a unit is together in all calls of it; nothing is traced until the first question.

    Args:
        unit: as it is when called with defaults.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._variants: list[Variant] | None = None
        self._own: set[Call] = set()

    def refusal(self, nodes: list[fx.Node], results: Collection[fx.Node]) -> Refusal | None:
        """Why ``nodes`` cannot become one layer in place of their modules: some call uses them in another way.

        Args:
            nodes: what becomes one layer, ``results`` included.
            results: those of them whose values stay.
        """
        if self._variants is None:
            self._variants, self._own = variants(self._unit), set(own_calls(self._unit))
        for variant in self._variants:
            if variant.unit is None:
                # The code of modules inside is not touched by arguments that they are not given.
                if any(node.meta["call"] in self._own for node in nodes):
                    why = f"cannot be traced with {variant.given}, which may use it otherwise: {variant.why}"
                    return Refusal(Reason.ARGUMENT, why)
            elif not _together(nodes, results, variant):
                return Refusal(Reason.ARGUMENT, f"with {variant.given} it is used in another way")
        return None


def _together(nodes: list[fx.Node], results: Collection[fx.Node], variant: Variant) -> bool:
    """Whether a variant has these nodes with the very same connections, or calls none of their modules."""
    assert variant.unit is not None
    at = variant.at
    if at:  # what lies around the wrapped module is as before
        nodes = [n for n in nodes if any(call.path == at for call in n.meta["call"].chain())]
    anchors = [n for n in nodes if n.op in ("call_module", "get_attr")]
    calls: dict[tuple[str, str], list[fx.Node]] = {}
    for node in variant.unit.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            calls.setdefault((node.op, str(_target(node, at))), []).append(node)
    used = [calls.get((n.op, str(n.target)), []) for n in anchors]
    if not any(used):
        return True
    inside = set(nodes)
    same: dict[fx.Node, fx.Node] = {}
    for anchor, found in zip(anchors, used, strict=True):
        if anchor.op == "get_attr" and len(found) > 1:
            continue  # each use of a weight is found from the operation that uses it
        if len(found) != 1 or not _match(anchor, found[0], at, inside, same):
            return False
    for node in nodes:
        if node not in same:
            sources = [same[s] for s in node.all_input_nodes if s in same]
            candidates = list(dict.fromkeys(u for s in sources for u in s.users))
            if not any(_match(node, candidate, at, inside, same) for candidate in candidates):
                return False
    mine = {same[node] for node in nodes}
    ends = {same.get(result) for result in results}
    inner = [n for n in mine if n not in ends and n.op != "get_attr"]
    leaves = None in ends  # the part goes on behind the wrapped module

    def among(user: fx.Node) -> bool:
        return user in mine or (leaves and user.op == "output") or is_shape_query(user.op, user.target, user.args)

    return all(among(user) for node in inner for user in node.users)


def _target(node: fx.Node, at: str) -> Any:
    """What a node of a variant calls or reads, as the unit names it."""
    return join(at, str(node.target)) if node.op in ("call_module", "get_attr") else node.target


def _match(node: fx.Node, other: fx.Node, at: str, inside: set[fx.Node], same: dict[fx.Node, fx.Node]) -> bool:
    """Whether two nodes do the same to the same values; ``same`` then holds what corresponds, sources included."""
    if node in same:
        return same[node] is other
    weight = node.op == "get_attr"
    if (node in inside or weight) and (node.op != other.op or node.target != _target(other, at)):
        return False
    if node not in inside:  # what the part reads may be computed in any way, as long as it is one value
        same[node] = other
        return True
    trial = {**same, node: other}
    mine, theirs = (_flat(n) for n in (node, other))
    if len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, fx.Node) != isinstance(b, fx.Node):
            return False
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if not _match(a, b, at, inside, trial):
                return False
        elif a is not b and a != b:
            return False
    same.update(trial)
    return True


def _flat(node: fx.Node) -> list[Any]:
    """Everything that a node is called with, in order."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            found.append(len(value))
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for key, item in sorted(value.items()):
                found.append(key)
                visit(item)
        elif isinstance(value, slice):
            for part in (value.start, value.stop, value.step):
                visit(part)
        else:
            found.append(value)

    visit(node.args)
    visit(node.kwargs)
    return found
