"""Hierarchical capture: any model becomes a list of units, each a maximal part whose forward can be read.

A unit is one flat graph whose nodes remember the module call they were made in, so that regions may cross module
boundaries and edits can still change the smallest module. A module whose forward cannot be read
(:mod:`passes.graph.tracer`) becomes an opaque leaf, tracing goes on around it, and its children become units of their
own. Modules that eval never runs (auxiliary heads) are units too, so that no block is left behind.

A forward that does something beside its graph is traced twice, the second time from the state that the first has left:
if the graphs differ, it keeps something between calls, and no single graph says what it does.
"""

from __future__ import annotations

import gc
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from passes.graph.aten import retarget
from passes.graph.call import Call
from passes.graph.errors import NotCapturedError, RejectedError, refusal_of
from passes.graph.generators import states
from passes.graph.leaf import SCRIPT, has_hooks, inherits_forward, is_based_on_layer
from passes.graph.looks import takes_apart
from passes.graph.marks import Snapshot, no_mark
from passes.graph.patches import patched
from passes.graph.questions import Asked
from passes.graph.tracer import Tracer
from passes.graph.walk import modules_of
from passes.graph.within import Alone, Within, arounds
from passes.refusal import UNREAD, Reason, Refusal

__all__ = [
    "Call",
    "Unit",
    "call_of",
    "first_difference",
    "has_hooks",
    "in_one_context",
    "inherits_forward",
    "join",
    "no_collection",
    "trace_units",
    "trace_variant",
]


@dataclass(eq=False)
class Unit:
    """A traced part of a model: ``graph`` is flat, node targets are relative to ``root``."""

    path: str
    root: nn.Module
    graph: fx.Graph
    calls: list[Call]
    constants: dict[str, Any]
    opaque: dict[str, Refusal]
    pinned: set[int]
    """ids of modules that opaque code reaches as well: they must stay as they are."""
    read: set[str]
    """Tensors that the traced code reads itself, used or not; the modules that hold them must stay as they are."""
    fixed: dict[Call, Refusal] = field(default_factory=dict)
    """Calls whose forward must keep its code, since it does more than its graph says."""
    asked: frozenset[int] = frozenset()
    """ids of modules whose class the code looks at."""
    looked: frozenset[str] = frozenset()
    """Plain attributes that functions which are one call ask the layers for that they are handed."""
    functions: frozenset[Any] = frozenset()
    """Functions that could not be read, and are one call each."""
    handed: Mapping[str, Refusal] = field(default_factory=dict)
    """Modules that such functions are given, and may call."""
    others: tuple[Unit, ...] = ()
    """The unit as it is for sizes that answer a question the other way."""
    memos: frozenset[fx.Node] = frozenset()
    """Values that the model has kept from a call before: what it keeps may be of other weights than it has now."""
    leaves: Mapping[int, Refusal] = field(default_factory=dict)
    """ids of modules that were to be one call each."""
    replay: Callable[[list[dict[fx.Node, Any]], fx.Node], list[tuple[Any, float]]] | None = None
    """What computes the value of the second node from those of the first, in float64, and the largest magnitude on the
    way; None where the nodes themselves can be run."""
    sizes: Callable[[fx.Node], tuple[int, ...] | None] | None = None
    """The shape of a node's value for which its readers were written, where those may take no other."""

    def attribute(self, target: str) -> Any:
        """What a ``get_attr`` node reads."""
        if target in self.constants:
            return self.constants[target]
        path, _, name = target.rpartition(".")
        owner = _at(self.root, path) if path else self.root
        if name not in vars(owner) and not hasattr(type(owner), name):
            for table in (owner._parameters, owner._buffers, owner._modules):
                if table.get(name) is not None:  # as the module itself looks for it, at a fraction of the time
                    return table[name]
        return getattr(owner, name)

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        return _at(self.root, str(node.target))

    def name(self, node: fx.Node) -> str:
        """How a person finds this node: its layer's path in the model, and the operation where it is not a layer."""
        if "name" in node.meta:
            return str(node.meta["name"])
        if node.op == "call_module":
            return join(self.path, str(node.target))
        if node.op == "get_attr":
            return join(self.path, str(node.target).rpartition(".")[0]) or "(model)"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"{join(self.path, call_of(node).path) or '(model)'}:{target}"


def call_of(node: fx.Node) -> Call:
    """The module call whose forward made ``node``."""
    call = node.meta["call"]
    assert isinstance(call, Call)
    return call


def in_one_context(nodes: Iterable[fx.Node]) -> bool:
    """Whether gradients, autocast and default dtype are the same for all of these operations of traced code."""
    return len({node.meta.get("context") for node in nodes}) <= 1


def join(*parts: str) -> str:
    """Dotted path of the non-empty parts."""
    return ".".join(p for p in parts if p)


@contextmanager
def no_collection() -> Iterator[None]:
    """Put off garbage collection: graphs are many small objects, and one full pass takes longer than the planning."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@no_collection()
def trace_units(
    model: nn.Module,
    inputs: tuple[Any, ...] | None = None,
    *,
    numbers: bool = True,
    leaves: Iterable[nn.Module] = (),
) -> tuple[list[Unit], list[Refusal]]:
    """All units of ``model``, outermost first, and what could not be traced.

    The model must be in the mode that is wanted. Nothing about it is changed.

    Args:
        model: any module.
        inputs: example inputs of the whole model, which help to answer questions about shapes.
        numbers: whether the numbers of parameters may decide which way the code goes; not while training.
        leaves: modules that are one call each, whatever their forward does; their insides are not traced.
    """
    named = {id(leaf): Refusal(Reason.UNTRACEABLE, "") for leaf in leaves}
    # Around a block a layer's forward runs without its weight: it says nothing by itself.
    whole = named | {layer: Refusal(Reason.UNTRACEABLE, "") for layer in arounds(modules_of(model))}
    units: list[Unit] = []
    untraced: list[Refusal] = []
    seen: set[int] = set()
    queue: list[tuple[str, nn.Module]] = [("", model)]
    with no_mark(model) as snapshot, patched():
        drawing = snapshot.outside.drawing(modules_of(model))
        whole |= {id(m): Refusal(Reason.STATE, "its forward goes on with an iterator") for m in drawing}
        while queue:
            path, module = queue.pop(0)
            if module in drawing and id(module) not in seen:
                seen.add(id(module))
                untraced.append(whole[id(module)].at(path))
                queue += _children(path, module)
            if id(module) in seen or id(module) in whole or not _worth_tracing(module):
                continue
            seen.add(id(module))
            if isinstance(module, torch.jit.ScriptModule):
                if all(refusal.layer != path for refusal in untraced):
                    untraced.append(Refusal(Reason.UNTRACEABLE, SCRIPT, path))
                continue
            if not _has_forward(module):
                queue += _children(path, module)
                continue
            if isinstance(module, Within) and module.inside is not None and path:
                path, _, name = path.rpartition(".")
                module = Alone(name, module)
            try:
                unit = _trace_unit(path, module, snapshot, None if path else inputs, numbers, whole)
                unit.leaves = named
            # Any exception at all may come out of user code that runs on proxies; it becomes a refusal.
            except Exception as error:
                untraced.append(replace(refusal_of(error), layer=path))
                queue += _children(path, module)
                continue
            finally:
                snapshot.restore()
            units.append(unit)
            untraced += [why.at(join(path, at)) for at, why in [*unit.opaque.items(), *unit.handed.items()]]
            queue += _remaining(unit)
    return units, untraced


def trace_variant(unit: Unit, given: Mapping[str, Any]) -> Unit:
    """The same unit called with other values for its optional arguments; ``...`` stands for one that a caller makes.

    Raises whatever the forward raises on proxies.
    """
    with no_mark(unit.root) as snapshot:
        return _trace_unit(unit.path, unit.root, snapshot, None, True, unit.leaves, dict(given), unit.functions)


def _trace_unit(
    path: str,
    root: nn.Module,
    snapshot: Snapshot,
    inputs: tuple[Any, ...] | None,
    numbers: bool,
    leaves: Mapping[int, Refusal] = MappingProxyType({}),
    given: dict[str, Any] | None = None,
    known: Iterable[Any] = (),
) -> Unit:
    """One unit, as the first call of a new network would find it."""
    with snapshot.forgetting(root):
        return _traced(path, root, snapshot, inputs, numbers, leaves, given, known)


def _traced(
    path: str,
    root: nn.Module,
    snapshot: Snapshot,
    inputs: tuple[Any, ...] | None,
    numbers: bool,
    leaves: Mapping[int, Refusal],
    given: dict[str, Any] | None,
    known: Iterable[Any],
) -> Unit:
    leaves, known = dict(leaves), set(known)
    careful = False
    while True:
        before = torch.get_rng_state(), states()
        tracer = Tracer(
            root,
            leaves,
            inputs=inputs,
            given=given,
            numbers=numbers,
            careful=careful,
            outside=snapshot.outside,
            forks=given is not None or (not path and _is_small(root)),
            known=known,
        )
        graph = _of_first_call(tracer, snapshot)
        if graph is None:
            continue
        drawn = not torch.equal(before[0], torch.get_rng_state()) or states() != before[1]
        if drawn and not careful:  # who draws is found by looking after each call
            careful = True
            snapshot.restore()
            continue
        found = _called_twice(tracer)
        if not found and (tracer.fixed or next(snapshot.filled(), None) is not None):
            found = _states(root, tracer, graph, snapshot, leaves, inputs, numbers, given)
        others: tuple[Unit, ...] = ()
        if not found:
            found, others, unread = _forks(path, tracer, graph, snapshot, inputs, numbers, given)
            if unread is not None:
                known.add(unread)
                snapshot.restore()
                continue
        if not found:
            break
        # A container with weights that is called twice is compiled once, as a unit of its own.
        leaves |= found
        snapshot.restore()
    return _unit(path, tracer, graph, snapshot, others)


def _of_first_call(tracer: Tracer, snapshot: Snapshot) -> fx.Graph | None:
    """The graph; None where something was emptied that the code does not fill again, and which it finds filled now."""
    error = None
    try:
        graph = tracer.trace()
    # Any exception at all may come out of user code that runs on proxies, and finds something empty.
    except Exception as caught:
        error = caught
    if others := [memo for memo in snapshot.forgotten if not memo.is_filled(tracer.written)]:
        snapshot.remember(others)
        return None
    if error is not None:
        raise error
    return graph


def _unit(path: str, tracer: Tracer, graph: fx.Graph, snapshot: Snapshot, others: tuple[Unit, ...] = ()) -> Unit:
    root = tracer.root
    if any(isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes):
        retarget(graph)
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    constants = {t: tracer._attribute(t) for t in targets - set(tracer.names.values())}
    reached = [root.get_submodule(at) for at in tracer.opaque]
    pinned = {id(inner) for leaf in reached for inner in leaf.modules() if inner is not leaf} | tracer.pinned
    inside = [m for m in root.modules() if id(m) in pinned] if pinned else []
    stateful = {id(m) for m in inside if next(iter(m.state_dict()), None) is not None}
    return Unit(
        path, root, graph, tracer.calls, constants, tracer.opaque, stateful, tracer.read_names,
        tracer.fixed, frozenset(tracer.asked), frozenset(tracer.looked), frozenset(tracer.functions),
        {at: why for at, why in tracer.handed.items() if at not in tracer.opaque}, others,
        frozenset(tracer.left if snapshot.forgotten else ()),
    )  # fmt: skip


MAX_FORKS = 8
"""Most other ways through the code of one unit that are traced."""


FORKING = 40
"""Most modules in a unit whose questions are answered both ways: every way is a trace of all of it."""


def _is_small(root: nn.Module) -> bool:
    return sum(1 for _ in islice(root.modules(), FORKING + 1)) <= FORKING


def _other_ways(tracer: Tracer) -> list[tuple[Asked, tuple[bool, ...]]]:
    """Each question beyond those that were forced, with the answers that lead there and the other one to it."""
    answers = tuple(asked.answer for asked in tracer.either)
    return [
        (asked, (*answers[:i], not asked.answer)) for i, asked in enumerate(tracer.either) if i >= len(tracer.forced)
    ]


def _forks(
    path: str,
    first: Tracer,
    graph: fx.Graph,
    snapshot: Snapshot,
    inputs: tuple[Any, ...] | None,
    numbers: bool,
    given: dict[str, Any] | None,
) -> tuple[dict[int, Refusal], tuple[Unit, ...], Any]:
    """What the forward does where a question about a size has the other answer.

    Where that cannot be read, gives the function that asked, which then is one call, or else the module, to be left
    alone; and the unit as it is then. Code that raises then takes no such sizes.
    """
    others: list[Unit] = []
    todo = _other_ways(first)
    tried = 0
    while todo:
        asked, forced = todo.pop(0)
        snapshot.restore()
        tried += 1
        other = Tracer(
            first.root, first.leaves, inputs=inputs, given=given, numbers=numbers, forks=True, forced=forced,
            known=first.functions,
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nobody has asked for this way
                flipped = other.trace() if tried <= MAX_FORKS else None
        except RejectedError:
            continue
        # Any exception at all may come out of user code that runs on proxies.
        except Exception:
            flipped = None
        if flipped is None or other.opaque.keys() - first.opaque.keys():
            if asked.function is not None:
                return {}, (), asked.function
            told = Refusal(Reason.QUESTION, "asks for the truth of a value: it depends on the size of the input")
            if asked.call.module is first.root:
                raise NotCapturedError(told.reason, told.message)
            return {id(asked.call.module): told}, (), None
        todo += _other_ways(other)
        if first_difference(graph, flipped) is not None:
            others.append(_unit(path, other, flipped, snapshot))
            for call in first.calls:
                if call.path == asked.call.path:
                    first.fixed.setdefault(
                        call, Refusal(Reason.QUESTION, "its forward decides by a size, or by the mode of the call")
                    )
    if tried:
        snapshot.restore()
    return {}, tuple(others), None


def _called_twice(tracer: Tracer) -> dict[int, Refusal]:
    counts = Counter(id(call.module) for call in tracer.calls)
    told = Refusal(Reason.SHARED, "compiled on its own: it is called more than once")
    return {
        id(c.module): told
        for c in tracer.calls
        if counts[id(c.module)] > 1 and next(c.module.parameters(), None) is not None
    }


def _states(
    root: nn.Module,
    first: Tracer,
    graph: fx.Graph,
    snapshot: Snapshot,
    leaves: dict[int, Refusal],
    inputs: tuple[Any, ...] | None,
    numbers: bool,
    given: dict[str, Any] | None,
) -> dict[int, Refusal]:
    """Modules that another call finds in another state, by a second trace from what the first has left behind."""
    filled = {id(module): name for module, name in snapshot.filled()}
    for call in first.calls:
        if id(call.module) in filled:
            told = Refusal(Reason.EFFECT, f"its forward fills {filled[id(call.module)]}")
            first.fixed.setdefault(call, told)
    second = Tracer(root, leaves, inputs=inputs, given=given, numbers=numbers, known=first.functions)
    other = second.trace()
    found = {id(root.get_submodule(at)): why for at, why in second.opaque.items() if at not in first.opaque}
    if not found and (node := first_difference(graph, other)) is not None:
        call = next((c for c in call_of(node).chain() if c in first.fixed), call_of(node))
        found[id(call.module)] = Refusal(Reason.STATE, "a second call does something else than the first")
    if id(root) in found:
        raise NotCapturedError(found[id(root)].reason, found[id(root)].message)
    return found


def first_difference(graph: fx.Graph, other: fx.Graph, whole: Container[str] = ()) -> fx.Node | None:
    """The first node of ``graph`` that computes something else in ``other``.

    Calls of the modules at the paths ``whole`` count as one operation each, whatever they do.
    """
    for (node, a), (_, b) in zip_longest(_steps(graph, whole), _steps(other, whole), fillvalue=(None, "")):
        if a != b:
            return node or next(iter(reversed(graph.nodes)))
    return None


def _steps(graph: fx.Graph, whole: Container[str]) -> list[tuple[fx.Node | None, str]]:
    """What each node that depends on an input computes, in order; constants may be computed anywhere.

    What was only asked is left out: code that finds its cache filled asks less.
    """
    names: dict[fx.Node, str] = {}
    constant: set[fx.Node] = set()
    steps: list[tuple[fx.Node | None, str]] = []
    asked: set[fx.Node] = set()
    entered: set[Call] = set()

    def name(node: fx.Node) -> str:  # what nobody outside may read is like nothing in another graph
        return names.get(node) or f"inside {id(node)}"

    for node in reversed(graph.nodes):
        if node.target in _ASKING and asked.issuperset(node.users):
            asked.add(node)
    for node in graph.nodes:
        if node in asked:
            continue
        if (call := _whole_call(node, whole)) is not None:
            if call not in entered:
                entered.add(call)
                steps.append((node, f"call_module {call.path} {fx.map_arg((call.args, call.kwargs), name)}"))
                if isinstance(call.output, fx.Node) and call in call_of(call.output).chain():
                    names[call.output] = f"step {len(steps) - 1}"
            continue
        does = f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), name)}"
        if node.op == "get_attr" or (node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
            names[node] = f"constant {hash(does)}"
        else:
            names[node] = f"step {len(steps)}"
            steps.append((node, does))
    return steps


def _whole_call(node: fx.Node, whole: Container[str]) -> Call | None:
    """The outermost call around a node that counts as one operation."""
    return next((call for call in reversed([*call_of(node).chain()]) if call.path in whole), None) if whole else None


_ASKING = frozenset(
    {getattr, "size", "dim", operator.getitem}
    | {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
)
"""What code that asks for a device or a size is made of; none of it changes anything."""


def _has_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _worth_tracing(module: nn.Module) -> bool:
    """A single layer has nothing to fold with; a module without weights neither."""
    return next(module.parameters(), None) is not None and not (
        type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None
    )


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is compiled on its own where a module is not read; of a row whose layers the module calls itself, those.

    What such a row would do as a whole, nothing runs.
    """
    found = []
    for name, child in module.named_children():
        apart = type(child).forward is nn.Sequential.forward and takes_apart(module, name)
        found += _children(join(path, name), child) if apart else [(join(path, name), child)]
    return found


def _at(root: nn.Module, path: str) -> nn.Module:
    """What is registered at a path; torch's own way asks more than once at each step, and this is asked often."""
    for name in path.split("."):
        child = root._modules.get(name)
        root = root.get_submodule(name) if child is None else child
    return root


def _remaining(unit: Unit) -> list[tuple[str, nn.Module]]:
    """Inside of opaque leaves, and the outermost modules that this unit never called."""
    root, todo = unit.root, []
    called = {call.path for call in unit.calls}
    leaves = {str(n.target) for n in unit.graph.nodes if n.op == "call_module"}
    for at, refusal in unit.opaque.items():
        leaf = root.get_submodule(at)
        if id(leaf) in unit.leaves:
            continue
        failed = refusal.reason in UNREAD and not refusal.message.startswith("compiled")
        failed = failed and not isinstance(leaf, torch.jit.ScriptModule)
        todo += _children(join(unit.path, at), leaf) if failed else [(join(unit.path, at), leaf)]
    entered = {id(call.module) for call in unit.calls} | {id(_at(root, at)) for at in leaves}
    above = {p.rsplit(".", i)[0] for p in called | leaves for i in range(1, p.count(".") + 1)}
    reading = {p.rsplit(".", i)[0] for p in unit.read for i in range(1, p.count(".") + 1)}

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            at = join(path, name)
            if id(child) in unit.leaves or (at in leaves and (at in unit.opaque or is_based_on_layer(child))):
                continue
            if at in leaves:  # a container of torch
                todo.extend(_children(join(unit.path, at), child))
            elif at in called or at in above:
                visit(at, child)
            elif id(child) not in entered and at not in reading:
                # Not the same module under another name, nor one whose weights are used without it.
                todo.append((join(unit.path, at), child))

    visit("", root)
    return todo
