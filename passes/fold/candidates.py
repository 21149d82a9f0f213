"""Single-entry single-exit regions that one convolution could stand for, and what each would save.

For every node r the dominators d1 = idom(r), d2 = idom(d1), ... are walked up while all nodes between are affine. Each
(d, r) is a region; its form is evaluated from d alone, on meta tensors. It is a candidate when the single convolution
holds no more numbers (:mod:`passes.fold.cost`) and needs no more multiply-adds than the nodes that would die with it.
A node that is used from outside stays, and so do all nodes it needs: none of them counts as saved.

The search is linear in the size of the graph: the walk is bounded, and values are shared by all regions of an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.conv_form import ConvForm, Form
from passes.fold.cost import calls_of, numbers_of, staying_numbers
from passes.fold.rules import DEFAULT, Rules
from passes.graph.capture import Call, call_of
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind
from passes.laws.interpreter import Interpreter
from passes.laws.layouts import is_conv, views
from passes.laws.regions import Contraction, Region, Spread
from passes.laws.values import Signal
from passes.refusal import Reason, Refusal, RefusalError

__all__ = [
    "Candidate", "Key", "altered", "between_of", "cost_message", "dying_constants", "find_candidates", "in_order",
    "layers_of",
]  # fmt: skip

Key = tuple[fx.Node, fx.Node, frozenset[fx.Node]]

MAX_CLIMB = 32
"""Most dominators walked up from one node; regions that matter are far smaller."""


@dataclass(frozen=True, eq=False)
class Tie:
    """Calls of one weight that fold together.

    Args:
        nodes: all that vanish.
        one: whether one layer holds the numbers of all of them.
    """

    nodes: tuple[fx.Node, ...]
    one: bool


@dataclass(frozen=True, eq=False)
class Candidate(Region):
    """A region that might be folded; all nodes are traced ones, those of the inner regions included.

    Args:
        between: from the entry (not included) to the result, in order.
        dying: those of ``between`` that nothing else needs.
        constants: weight expressions that only dying nodes read.
        numbers, work: numbers held and multiply-adds per position of the entry that would be saved.
        computed: how many of these numbers are only there because a weight is computed.
        convs: the dying convolutions and linear layers.
        gain: what orders candidates.
        factor: how many times ``numbers`` and ``work`` the one layer may cost.
        parts: of a map that several layers take over: what each of them becomes.
        tie: of calls of one weight, what they have in common.
        sized: dying values whose size is asked for and is that of the entry, not that of the result.
    """

    between: tuple[fx.Node, ...]
    dying: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    numbers: int
    work: float
    computed: int
    convs: frozenset[fx.Node]
    gain: tuple[bool, float, bool, float, int]
    factor: float = field(default=1.0, kw_only=True)
    parts: tuple[Candidate, ...] = field(default=(), kw_only=True)
    tie: Tie | None = field(default=None, kw_only=True)
    sized: frozenset[fx.Node] = field(default=frozenset(), kw_only=True)

    @property
    def swallowed(self) -> tuple[Candidate, ...]:
        """The inner regions that vanish in this one; the others stay beside it."""
        return tuple(r for r in self.inner if isinstance(r, Candidate) and r.result in self.dying)

    @cached_property
    def by_call(self) -> dict[Call, list[tuple[fx.Node, Call | None]]]:
        """The dying nodes of each call, each with the call inside of it that made the node, if it did not itself."""
        found: dict[Call, list[tuple[fx.Node, Call | None]]] = {}
        for node in self.dying:
            below = None
            for call in call_of(node).chain():
                found.setdefault(call, []).append((node, below))
                below = call
        return found

    @property
    def key(self) -> Key:
        """What finds this candidate again in another selection."""
        return self.entry, self.result, frozenset(self.touched)

    @property
    def together(self) -> Key:
        """What finds again what it falls with: itself, the map that it takes part of, the calls that it is tied to."""
        spread, tie = self.spread, self.tie
        if tie is not None:
            return tie.nodes[0], tie.nodes[-1], frozenset(tie.nodes)
        return self.key if spread is None else (spread.source, spread.result, frozenset(spread.mapped))

    @property
    def touched(self) -> tuple[fx.Node, ...]:
        """What dies, and the maps that it takes part of."""
        return (*self.dying, *(node for spread in self.spreads for node in spread.mapped))

    def costs(self, form: Form) -> Refusal | None:
        """A refusal if ``form`` costs more than what would die."""
        if form.numbers > self.factor * self.numbers or form.multiply_adds > self.factor * self.work:
            return Refusal(Reason.LARGER, cost_message(form, self.numbers, self.work, self.factor))
        return None


def find_candidates(
    graph: Contraction, changed: set[fx.Node] | None, rules: Rules = DEFAULT
) -> tuple[list[Candidate], list[Refusal]]:
    """All regions worth folding, best first, and why others are not; with ``changed``, those around these nodes."""
    flow, dominator = graph.flow, graph.dominators()
    interpreters: dict[fx.Node, list[Interpreter]] = {}
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    near = _reach(graph, changed, dominator) if changed is not None else None
    for result in flow.nodes:
        if result not in flow.affine or result not in dominator or (near is not None and result not in near):
            continue
        said: list[Refusal] = []
        for entry in _climb(flow, dominator, result):
            if entry not in interpreters:
                interpreters[entry] = [Interpreter(graph, entry, v, c) for v, c in views(graph, entry)]
            values = [(interpreter, interpreter.value(result)) for interpreter in interpreters[entry]]
            for interpreter, value in values:
                if isinstance(value, Signal):
                    outcome = _weigh(interpreter, result, value, rules)
                    if isinstance(outcome, Candidate):
                        found.append(outcome)
                    elif outcome is not None:
                        said.append(outcome)
                elif isinstance(value, Refusal):
                    said.append(value)
            if values and all(_final(value) for _, value in values):
                break
        if said and not any(c.result is result for c in found[-MAX_CLIMB:]):
            refusals += said
    return sorted(found, key=lambda candidate: candidate.gain, reverse=True), refusals


def _climb(flow: Flow, dominator: dict[fx.Node, fx.Node | None], result: fx.Node) -> Iterator[fx.Node]:
    entry = dominator[result]
    for _ in range(MAX_CLIMB):
        if entry is None:
            return
        yield entry
        if entry not in flow.affine:
            return
        entry = dominator[entry]


def _final(value: object) -> bool:
    """Whether climbing further cannot help: something between is not affine or comes from elsewhere."""
    return isinstance(value, Refusal) and value.reason in _FINAL


_FINAL = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.NOT_A_CONVOLUTION}


def _reach(graph: Contraction, changed: set[fx.Node], dominator: dict[fx.Node, fx.Node | None]) -> set[fx.Node]:
    """Affine nodes behind a changed node, affine nodes between, whose walk up comes as far as to that one.

    A region around the changed node begins at a dominator of it, so not deeper than it lies itself; from further behind
    the walk ends before. Without this bound a long chain would be searched to its end for each fold in it.
    """
    depth: dict[fx.Node | None, int] = {None: 0}
    deepest: dict[fx.Node, int] = {}
    for node in graph.flow.nodes:
        if node not in dominator:
            continue
        depth[node] = depth[dominator[node]] + 1
        above = [deepest[source] for source in graph.sources(node) if source in deepest]
        if node in changed:
            above.append(depth[node])
        if above and (node in changed or node in graph.flow.affine):
            deepest[node] = max(above)
    return {node for node, most in deepest.items() if depth[node] <= most + MAX_CLIMB}


# ------------------------------------------------------------------ one region


def _weigh(interpreter: Interpreter, result: fx.Node, value: Signal, rules: Rules) -> Candidate | Refusal | None:
    """The region from the entry to ``result``, a refusal if it costs more, None if nothing would be gained."""
    graph, flow, entry, form = interpreter.graph, interpreter.flow, interpreter.entry, value.form
    between = between_of(graph, (entry,), result)
    if _parts_a_spread(graph, between, result):
        return None
    head, moved = None, list[fx.Node]()
    if not value.is_moved:
        dying = _dying(interpreter, between, result, form)
    else:
        try:
            parts = _moved(interpreter, between, result, value)
        except RefusalError as error:  # it is not known where the numbers of an average lie
            return error.refusal.at(flow.unit.name(result))
        if parts is None:
            return None
        head, moved, mapped = parts
        dying = [*_dying(interpreter, between_of(graph, (entry,), head), head, form), *mapped]
    signals = {n: s for n in dying if isinstance(s := interpreter.value(n), Signal)}
    convs = {n for n, s in signals.items() if s.conv}
    if not convs or _is_planned(graph, dying, entry):
        return None
    if any(isinstance(r := graph.regions.get(n), Candidate) and r.tie is not None for n in between):
        return None
    if rules.whole and any(n not in signals and (n in graph.regions or flow.tensors.get(n)) for n in between):
        return None
    constants = dying_constants(graph, dying)
    held, computed = numbers_of(interpreter, dying, signals, constants)
    numbers = held + computed
    work = sum(s.work * s.form.rate for s in signals.values())
    inner = [region for n in between if isinstance(region := graph.regions.get(n), Candidate)]
    swallowed = [region for region in inner if region.result in dying]
    if any(region.sized for region in swallowed):
        return None  # what was between may have that size
    fewer, factor = 0, 1.0
    if rules.factor is not None:
        fewer = sum(bool(s.work) for s in signals.values()) - calls_of(form)
        factor = rules.factor if fewer > 0 else 1.0
        for region in swallowed:  # what was replaced is measured, not what took its place
            numbers += region.numbers - region.form.numbers
            into = interpreter.value(region.entry)
            assert isinstance(into, Signal)
            work += (region.work - region.form.multiply_adds) * into.form.rate
    best = form.numbers, form.multiply_adds
    if form.widened:  # zeros may turn out to be block structure; decided with numbers
        groups = form.most_groups // form.groups
        best = form.weight.numel() // groups + (form.numbers - form.weight.numel()), form.multiply_adds / groups
    if best[0] > factor * numbers or best[1] > factor * work:
        if not computed and sum(bool(s.work) for s in signals.values()) == 1:
            return None  # a layer alone: there is nothing to fold
        staying = staying_numbers(graph, dying, constants)
        if staying and not numbers:
            return None  # nothing would be saved
        if best[0] <= numbers + staying and best[1] <= factor * work:
            names = ", ".join(dict.fromkeys(flow.unit.name(n) for n in dying if n in convs))
            return Refusal(
                Reason.SHARED, f"the weights of {names} are used in several places", _last(graph, dying, signals)
            )
        return Refusal(Reason.LARGER, cost_message(form, numbers, work, factor), _last(graph, dying, signals))
    if rules.plain and any(n.op != "get_attr" for n in constants):
        computed = max(computed, 1)  # a gain, whatever it saves
    if best == (numbers, work) and len(convs) == 1 and not computed:
        return None
    conv_first = _begins_with_conv(interpreter, between)
    pads = sum(_stays_in_code(flow, n) for n in dying)
    # A norm between two convolutions belongs to the one before it; then count the numbers saved, biases aside, then
    # multiply-adds, then the fewer nodes touched, but rather with a pad that code does than without: left alone, it
    # would keep that code from becoming one layer.
    gain = (
        conv_first or not _is_conv(graph, entry),
        numbers - sum(s.bias for s in signals.values()) - form.weight.numel(),
        conv_first,
        work - form.multiply_adds,
        2 * pads - len(dying),
    )
    return Candidate(
        entry, result, interpreter.view, interpreter.channels, form, tuple(inner),
        between=in_order(flow, between, *(region.between for region in inner)),
        dying=in_order(flow, dying, *(region.dying for region in swallowed)),
        constants=in_order(flow, constants, *(region.constants for region in swallowed)),
        numbers=numbers,
        work=work,
        computed=computed,
        convs=frozenset(convs - graph.regions.keys()).union(*(region.convs for region in swallowed)),
        gain=gain,
        factor=factor,
        moved=tuple(moved),
        head=head,
        sized=_sized(interpreter, dying, form),
    )  # fmt: skip


def _last(graph: Contraction, dying: list[fx.Node], signals: Mapping[fx.Node, Signal]) -> str:
    """The name of the last layer that would vanish: what only hands its input on is none."""
    last = [n for n in dying if n in signals and signals[n].work][-1]
    region = graph.regions.get(last)
    if isinstance(region, Candidate) and region.convs:
        last = max(region.convs, key=graph.flow.order.__getitem__)
    return graph.flow.unit.name(last)


def _moved(
    interpreter: Interpreter, between: list[fx.Node], result: fx.Node, value: Signal
) -> tuple[fx.Node, list[fx.Node], list[fx.Node]] | None:
    """Where the layout changed, what changes it, and the maps per channel behind that; None if others read in between.

    A map per channel may as well act before the layout changes.
    """
    if not value.work or value.conv:
        return None
    signals = {n: s for n in between if isinstance(s := interpreter.value(n), Signal)}
    mapped = [n for n in between if n in signals and signals[n].work and _lies_as(signals[n], value)]
    moved = [n for n in between if n in signals and signals[n].is_moved and n not in mapped]
    heads = [n for n in between if n in signals and not signals[n].is_moved]
    if result not in mapped or not moved or not heads or any(signals[n].work for n in moved):
        return None
    head, inside, order = heads[-1], {*moved, *mapped}, interpreter.flow.order
    if not order[head] < order[moved[0]] or not order[moved[-1]] < order[mapped[0]]:
        return None
    if signals[head].form.out_channels != value.form.out_channels:  # joined with itself, in another dimension
        return None
    for node in (head, *moved, *mapped[:-1]):
        readers = interpreter.graph.readers(node)
        if not all(reader in inside or interpreter.flow.shape_only(reader) for reader in readers):
            return None
    return head, moved, mapped


def _lies_as(signal: Signal, other: Signal) -> bool:
    return signal.is_moved and torch.equal(signal.ids, other.ids)


def _stays_in_code(flow: Flow, node: fx.Node) -> bool:
    """Whether this is a pad that a module with operations of its own does."""
    operation = flow.operations.get(node)
    if operation is None or operation.kind is not Kind.PAD:
        return False
    return node.op == "call_function" or isinstance(call_of(node).module, _ConvNd)


def in_order(flow: Flow, *groups: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Each node of these once, in the order of the graph."""
    return tuple(sorted({n for group in groups for n in group}, key=flow.order.__getitem__))


def _is_planned(graph: Contraction, dying: list[fx.Node], entry: fx.Node) -> bool:
    """Whether this is a fold that is planned already; from further up it may be another one."""
    region = graph.regions.get(dying[0]) if len(dying) == 1 else None
    return region is not None and region.entry is entry


def _is_conv(graph: Contraction, node: fx.Node) -> bool:
    return node in graph.regions or is_conv(graph.flow, node)


def _parts_a_spread(graph: Contraction, between: list[fx.Node], result: fx.Node) -> bool:
    """Whether the original of a region would have a map in it of which only some layers take their part inside."""
    inside = set(between)
    for spread in {s for n in between if n in graph.regions for s in graph.regions[n].spreads}:
        heads = inside.intersection(spread.heads)
        if spread.ahead and spread.result not in inside and heads:  # its part acts in front of it
            return True
        if (len(heads) < len(spread.heads)) if spread.result in inside else (heads != {result}):
            return True
    return False


def _begins_with_conv(interpreter: Interpreter, between: list[fx.Node]) -> bool:
    signals = (s for n in between if isinstance(s := interpreter.value(n), Signal))
    return next((s.conv for s in signals if s.work), False)


def between_of(graph: Contraction, entries: Sequence[fx.Node], result: fx.Node) -> list[fx.Node]:
    """Nodes from the entries (not included) to ``result``, in order."""
    if result in entries:
        return []
    seen, todo = {result}, [result]
    while todo:
        for source in graph.sources(todo.pop()):
            if source not in entries and source not in seen and source not in graph.flow.constant:
                seen.add(source)
                todo.append(source)
    return sorted(seen, key=graph.flow.order.__getitem__)


def altered(flow: Flow, spread: Spread) -> list[fx.Node]:
    """The values that are others once the layers have their parts of a map; that of the map becomes its source's."""
    if not spread.ahead:
        return [*spread.heads, *between_of(Contraction(flow), spread.heads, spread.source)]
    above = {n for entry in spread.entries for n in between_of(Contraction(flow), (spread.result,), entry)}
    found = [spread.result]  # and what reads it: what only asks for sizes comes from elsewhere
    for node in sorted(above, key=flow.order.__getitem__):
        if not flow.shape_only(node) and any(source in found for source in node.all_input_nodes):
            found.append(node)
    return found


def _dying(interpreter: Interpreter, between: list[fx.Node], result: fx.Node, form: Form) -> list[fx.Node]:
    dying = {result}
    for node in reversed(between):
        readers = interpreter.graph.readers(node)
        if all(u in dying or _harmless(interpreter, u, node, form) for u in readers):
            dying.add(node)
    return [n for n in between if n in dying]


def _harmless(interpreter: Interpreter, user: fx.Node, node: fx.Node, form: Form) -> bool:
    """A question about the shape may be asked of the result or the entry instead, if that has the same shape."""
    if not interpreter.flow.shape_only(user):
        return False
    value = interpreter.value(node)
    if not isinstance(value, Signal):
        return True
    return not value.is_moved and (value.form.same_size(form) or _keeps_size(value.form))


def _keeps_size(form: Form) -> bool:
    return isinstance(form, ConvForm) and form.same_size(ConvForm.identity(form.in_channels, len(form.stride)))


def _sized(interpreter: Interpreter, dying: list[fx.Node], form: Form) -> frozenset[fx.Node]:
    """The values of :attr:`Candidate.sized`."""
    found = set()
    for node in dying:
        asked = any(interpreter.flow.shape_only(user) and user not in dying for user in interpreter.graph.readers(node))
        value = interpreter.value(node) if asked else None
        if isinstance(value, Signal) and not value.is_moved and not value.form.same_size(form):
            found.add(node)
    return frozenset(found)


def dying_constants(graph: Contraction, dying: list[fx.Node]) -> list[fx.Node]:
    """Weight expressions that only dying nodes read."""
    gone = set(dying)
    found: list[fx.Node] = []
    todo = [c for n in dying for c in graph.sources(n) if c in graph.flow.constant]
    while todo:
        node = todo.pop()
        if node in gone or not all(u in gone or u in graph.gone for u in node.users):
            continue
        gone.add(node)
        found.append(node)
        todo += node.all_input_nodes
    return found


# ------------------------------------------------------------------ words


def layers_of(flow: Flow, candidate: Candidate) -> tuple[str, ...]:
    """Paths of the layers that vanish, in order of execution."""
    owners = {call_of(n) for n in candidate.constants}  # modules that hold weights: their names say enough
    order = in_order(flow, candidate.constants, candidate.touched)
    named = [
        n
        for n in order
        if not flow.shape_only(n)
        and not isinstance(flow.modules.get(n), nn.Identity)
        and (n.op not in ("call_function", "call_method") or call_of(n) not in owners)
    ]
    return tuple(dict.fromkeys(flow.unit.name(n) for n in named or order))


def cost_message(form: Form, numbers: int, work: float, factor: float = 1.0) -> str:
    """What a fold would cost, and what the layers cost that it would replace."""
    return (
        f"{Reason.LARGER.value}: {form.numbers} numbers and {form.multiply_adds:.0f} multiply-adds per position "
        f"instead of {numbers} and {work:.0f}" + (f", over {factor:g} times as much" if factor > 1 else "")
    )
