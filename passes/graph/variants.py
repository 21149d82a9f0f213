"""The other ways to call a unit: with values for the optional arguments that its trace leaves at their defaults.

``forward(x, aux=False)`` may send a value somewhere else when ``aux`` is true. What a trace with defaults says of a
layer ("its norm alone reads it") holds for the module only if it holds for these calls as well. A flag is flipped; any
other argument is left open, as the inputs are; where the code asks for its value, values that the code names are tried.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import CodeType
from typing import Any

from torch import fx, nn

from passes.graph.capture import Unit, trace_variant
from passes.graph.opset import is_shape_query
from passes.refusal import Reason, Refusal

__all__ = ["OtherCalls", "Variant", "variants"]

MAX_GUESSES = 8
"""Most values that are tried for one argument whose value decides."""


@dataclass(frozen=True)
class Variant:
    """A unit as it is when called with ``given``; ``unit`` is None where it cannot be traced so, ``why`` says why."""

    given: str
    unit: Unit | None
    why: str = ""


def variants(unit: Unit) -> list[Variant]:
    """Every optional argument of the unit's forward with another value: one at a time, then all at once."""
    found: list[Variant] = []
    together: dict[str, Any] = {}
    for parameter in _optional(unit.root):
        worked, tried = _of(unit, parameter)
        found += tried
        together |= worked
    if len(together) > 1:
        everything = _traced(unit, together)
        found += [everything] if everything.unit is not None else []
    return found


def _of(unit: Unit, parameter: inspect.Parameter) -> tuple[dict[str, Any], list[Variant]]:
    """The first value that can be traced, and what to look at; a failure counts if no value can."""
    name, default = parameter.name, parameter.default
    first = _traced(unit, {name: (not default) if isinstance(default, bool) else ...})
    if first.unit is not None:
        return {name: (not default) if isinstance(default, bool) else ...}, [first]
    worked: dict[str, Any] = {}
    found = []
    for value in itertools.islice(_guesses(unit, default), MAX_GUESSES):
        guess = _traced(unit, {name: value})
        if guess.unit is not None:  # else the forward may well reject it
            found.append(guess)
            worked = worked or {name: value}
    return worked, found or [first]


def _traced(unit: Unit, given: dict[str, Any]) -> Variant:
    text = ", ".join(name if value is ... else f"{name}={value!r}" for name, value in given.items())
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


def _guesses(unit: Unit, default: Any) -> Iterator[Any]:
    """Values that an argument might take, judged by its default and by what the code compares with."""
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
        self._graphs: list[tuple[str, fx.Graph | None, str]] | None = None

    def refusal(self, nodes: list[fx.Node], result: fx.Node) -> Refusal | None:
        """Why ``nodes`` cannot become one layer in place of their modules: some call uses them in another way.

        Args:
            nodes: what becomes one layer, ``result`` included.
            result: the last of them, whose value stays.
        """
        if self._graphs is None:
            found = variants(self._unit) if _optional(self._unit.root) else []
            self._graphs = [(v.given, None if v.unit is None else v.unit.graph, v.why) for v in found]
        for given, graph, why in self._graphs:
            if graph is None:
                if any(_calls_itself(node) for node in nodes):
                    return Refusal(Reason.ARGUMENT, f"cannot be traced with {given}, which may use it otherwise: {why}")
            elif not _together(nodes, result, graph):
                return Refusal(Reason.ARGUMENT, f"with {given} it is used in another way")
        return None


def _calls_itself(node: fx.Node) -> bool:
    """Whether it is the unit's own code that calls a layer, not that of a module inside."""
    return node.meta["call"].parent is None


def _together(nodes: list[fx.Node], result: fx.Node, graph: fx.Graph) -> bool:
    """Whether ``graph`` has these nodes with the very same connections, or calls none of their modules."""
    anchors = [n for n in nodes if n.op in ("call_module", "get_attr")]
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            calls.setdefault(str(node.target), []).append(node)
    used = [calls.get(str(n.target), []) for n in anchors]
    if not any(used):
        return True
    inside = set(nodes)
    same: dict[fx.Node, fx.Node] = {}
    for anchor, found in zip(anchors, used, strict=True):
        if anchor.op == "get_attr" and len(found) > 1:
            continue  # each use of a weight is found from the operation that uses it
        if len(found) != 1 or not _match(anchor, found[0], inside, same):
            return False
    for node in nodes:
        if node not in same:
            sources = [same[s] for s in node.all_input_nodes if s in same]
            candidates = list(dict.fromkeys(u for s in sources for u in s.users))
            if not any(_match(node, candidate, inside, same) for candidate in candidates):
                return False
    mine = {same[node] for node in nodes}
    inner = [n for n in mine if n is not same[result] and n.op != "get_attr"]
    return all(u in mine or is_shape_query(u.op, u.target, u.args) for n in inner for u in n.users)


def _match(node: fx.Node, other: fx.Node, inside: set[fx.Node], same: dict[fx.Node, fx.Node]) -> bool:
    """Whether two nodes do the same to the same values; ``same`` then holds what corresponds, sources included."""
    if node in same:
        return same[node] is other
    weight = node.op == "get_attr"
    if (node in inside or weight) and (node.op != other.op or node.target != other.target):
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
            if not _match(a, b, inside, trial):
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
