"""Collapse of graphs that are there already, and need not be traced: what all kinds of them have in common.

A front end says what the graph computes in the terms of the table of operations, how to run a part of it in float64,
how to put a layer in the place of a region, and how to compare two of its kind. What folds is decided as for any other
unit; each fold is proven against the operations that were in the graph, and the whole result against the whole graph.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import Tensor, fx, nn

from passes.algebra.by_rule import BY_RULE
from passes.compiler import clock, decide
from passes.edits.edit import Substitute
from passes.edits.layer import describe
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate, altered, layers_of
from passes.fold.folds import Fold
from passes.fold.placement import Placement
from passes.graph.capture import Call, Unit
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind
from passes.laws.regions import Spread
from passes.portable import ScaleShift
from passes.proof.check import Checked
from passes.proof.hold import Ledger
from passes.refusal import Reason, Refusal
from passes.report import Counts, Explanation
from passes.report import Fold as Record

__all__ = ["Compilation", "collapse_graph", "counts_of", "fresh", "needed_for", "unit_of"]

log = logging.getLogger("reparam")

Graph = TypeVar("Graph")


class Compilation(ABC, Generic[Graph]):
    """One graph, and what was decided about it.

    Args:
        unit: the graph in the terms of the table.
        names: of the value that each node gives, in the graph itself.
        weights: names of the weights, which folded numbers may take over.
        unread: operations that are not in the table, by name.
        kept: names of values that must stay.
        ledger: which folds are proven.
        explanation: filled.
    """

    def __init__(
        self,
        unit: Unit,
        names: Mapping[fx.Node, str],
        weights: Collection[str],
        unread: Counter[str],
        kept: Collection[str],
        ledger: Ledger,
        explanation: Explanation,
    ) -> None:
        self.names, self.reusable, self.unread, self.kept = names, frozenset(weights), unread, kept
        self.ledger, self.explanation = ledger, explanation
        unit.replay = lambda given, result: self.replay(
            [{names[node]: x for node, x in each.items()} for each in given], names[result]
        )
        unit.sizes = lambda node: self.sizes(names[node])
        with clock(explanation, "plan"):
            self.flow = Flow(unit, {})
            self.memory = Memory(self.flow)
        self.edits: dict[Fold, Substitute] = {}
        self.folds, _ = decide(self.flow, self._guard, self._edits, explanation, ledger)
        explanation.before = counts_of(self.flow)
        self._tell(self.folds)

    @abstractmethod
    def replay(self, given: Sequence[Mapping[str, Tensor]], result: str) -> list[tuple[Tensor, float]]:
        """The value of ``result`` each time that values are given, in float64, and the largest magnitude on the way."""

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value that the graph was written for, where it takes no other."""
        return None

    @abstractmethod
    def gone(self, entry: str, dying: Collection[str], staying: Collection[str] = ()) -> tuple[str, ...]:
        """The values that are no longer computed, in order: those that die, and what is only there for them."""

    @abstractmethod
    def substituted(self, edits: Iterable[tuple[Substitute, nn.Module]]) -> tuple[Graph, Counts]:
        """A copy of the graph with these edits."""

    @abstractmethod
    def compared(self, result: Graph, example: Any) -> Checked:
        """The result against the graph."""

    def guard(self, candidate: Candidate) -> Refusal | None:
        """Why a candidate would be no gain in a graph of this kind."""
        return None

    @abstractmethod
    def taken(self) -> set[str]:
        """Names that no new weight may get."""

    def result(self, folds: list[Fold]) -> Graph:
        """The graph with these folds."""
        self._tell(folds)
        edits = [(self.edits[fold], fold.layer) for fold in folds if fold.layer is not None]
        result, self.explanation.after = self.substituted(edits)
        return result

    def without_what_fails(self, example: Any) -> tuple[Graph, Checked]:
        """The graph with those folds that hold, each tried alone; raises if they do not hold together."""
        held: list[Fold] = []
        for folds in self._together():
            alone = self.compared(self.result(folds), example)
            if alone.ok:
                held += folds
            else:
                names = ", ".join(layers_of(self.flow, folds[0].candidate))
                self.ledger.take_back((names,), names, str(alone.differences[0]))
        result = self.result(held)
        checked = self.compared(result, example)
        checked.raise_if_different()
        return result, checked

    def _together(self) -> list[list[Fold]]:
        """The folds, those in one list that take over one map."""
        found: list[tuple[set[Spread], list[Fold]]] = []
        for fold in self.folds:
            spreads, folds = set(fold.candidate.spreads), [fold]
            for other in [each for each in found if each[0] & spreads]:
                found.remove(other)
                spreads, folds = spreads | other[0], [*other[1], *folds]
            found.append((spreads, folds))
        return [folds for _, folds in found]

    def _tell(self, folds: list[Fold]) -> None:
        told = self.explanation
        told.folds = [
            Record.of(self.flow, fold.candidate, fold.form, self.edits[fold].weight.rpartition(".")[0], fold.error)
            for fold in folds
            if fold.layer is not None
        ]
        told.edits = [self.edits[fold] for fold in folds if fold.layer is not None]
        unread = [f"{count} call{'s' * (count > 1)} of {name}" for name, count in self.unread.most_common()]
        told.notes = [f"not read: {', '.join(unread)}"] if unread else []

    def _guard(self, candidate: Candidate) -> Placement | Refusal:
        if candidate.tie is not None:
            return Refusal(Reason.SHARED, "its weight is used by several calls")
        ends = [candidate.entry, candidate.last, candidate.result, *candidate.moved[-1:]]
        if any(node not in self.names for node in ends):
            return Refusal(Reason.LAYOUT, "begins or ends inside of one operation of the graph")
        found = self.memory.refusal(candidate) or self.guard(candidate)
        if found is not None:
            return found
        if candidate.spread is not None:  # these give other numbers from now on
            changed = altered(self.flow, candidate.spread) if candidate.is_alias else []
            if not candidate.spread.ahead:
                changed.append(candidate.result)
            if any(self.names.get(node) in self.kept for node in changed):
                return Refusal(Reason.SHARED, f"{self.names[candidate.result]} is part of an interface that is kept")
        dying = {*candidate.dying, *candidate.constants, *candidate.moved}
        for node in [*candidate.dying, *candidate.moved]:
            if node is candidate.result or node not in self.names:
                continue
            if any(user not in dying and not self._is_part(user, dying) for user in node.users):
                return Refusal(Reason.SHARED, f"the size of {self.names[node]} is asked for")
            if self.names[node] in self.kept:
                return Refusal(Reason.SHARED, f"{self.names[node]} is part of an interface that is kept")
        return Placement()

    def _is_part(self, node: fx.Node, of: Collection[fx.Node]) -> bool:
        """Whether a question about a size is no call of the graph itself, but part of what others of them mean."""
        return node not in self.names and all(user in of for user in node.users)

    def _edits(self, folds: list[Fold]) -> tuple[None, dict[Candidate, Refusal]]:
        taken = self.taken()
        # Of what pads by a rule, only the numbers change: an edit speaks of the operator that it is.
        called = [node for node in self.flow.nodes if node.target in BY_RULE.values()]
        paths = {id(node.args[3]._modules): self.names[node] for node in called}  # type: ignore[union-attr]
        for fold in folds:
            candidate = fold.candidate
            if fold.layer is None:
                continue
            weight, bias = self._numbers(fold, taken)
            taken |= {weight, bias}
            dying = {self.names[node] for node in candidate.dying if node in self.names}
            entry, result = self.names[candidate.entry], self.names[candidate.last]
            staying = {self.names[node] for node in candidate.moved if node in self.names}
            gone = tuple(name for name in self.gone(entry, dying, staying) if name != result)
            moved, end = (
                (self.names[n] for n in (candidate.moved[-1], candidate.result)) if candidate.moved else ("", "")
            )
            layer = describe(fold.layer, paths)
            self.edits[fold] = Substitute(result, entry, layer, gone, weight, bias, moved, end)
        without = {
            fold.candidate: refusal for fold in folds if fold.layer is None and (refusal := self._end(fold, folds))
        }
        instead = {edit.end: edit.moved for edit in self.edits.values() if edit.ahead}
        for fold, edit in self.edits.items():  # whichever is made first
            self.edits[fold] = replace(edit, source=_last(instead, edit.source), moved=_last(instead, edit.moved))
        return None, without

    def _end(self, alias: Fold, folds: list[Fold]) -> Refusal | None:
        """Let a map vanish with the edit of one of the layers that took it over."""
        candidate = alias.candidate
        for fold in reversed(folds):
            edit = self.edits.get(fold)
            if edit is not None and not edit.end and candidate.spread in fold.candidate.spreads:
                source, end = self.names[candidate.entry], self.names[candidate.result]
                dying = {self.names[node] for node in candidate.dying if node in self.names}
                gone, ahead = self.gone(source, dying), candidate.spread is not None and candidate.spread.ahead
                self.edits[fold] = replace(edit, gone=(*edit.gone, *gone), moved=source, end=end, ahead=ahead)
                return None
        return Refusal(Reason.CODE, "its layers take more over than one edit of a graph says")

    def _numbers(self, fold: Fold, taken: set[str]) -> tuple[str, str]:
        """Names for the folded numbers: those of the largest weight that goes, and of the bias beside it."""
        assert fold.layer is not None
        going = {str(n.target): self.flow.held[n] for n in fold.candidate.constants if n.op == "get_attr"}
        numbers = [(name, going[name]) for name in going if name in self.reusable]
        least = 1 if isinstance(fold.layer, ScaleShift) else 2
        weights = [name for name, number in numbers if isinstance(number, Tensor) and number.dim() >= least]
        weights = [name for name in weights if name.endswith("weight")] or weights
        weight = max(weights, key=lambda name: going[name].numel(), default="") or fresh("folded.weight", taken)
        if not any(name.endswith("bias") for name, _ in fold.layer.named_parameters()):
            return weight, ""
        bias = f"{weight.removesuffix('weight')}bias" if weight.endswith("weight") else f"{weight}_bias"
        return weight, bias if bias in going else fresh(bias, taken)


def _last(instead: Mapping[str, str], name: str) -> str:
    while name in instead:
        name = instead[name]
    return name


def collapse_graph(
    compilation: Compilation[Graph], *, example: Any, verify: bool | str, strict: bool
) -> tuple[Graph, Explanation]:
    """Carry out what was decided, and check it.

    Args:
        compilation: the graph, and its folds.
        example: what the whole is compared on, as the front end has it.
        verify: ``True`` compares the whole; proofs of folds were made before.
        strict: raise where a fold does not hold.
    """
    explanation, ledger = compilation.explanation, compilation.ledger
    result = compilation.result(compilation.folds)
    if verify is True:
        with clock(explanation, "check"):
            checked = compilation.compared(result, example)
            if not checked.ok:
                if strict:
                    checked.raise_if_different()
                result, checked = compilation.without_what_fails(example)
        explanation.checked = checked
        log.info("collapse: %s", checked)
    explanation.taken_back = list(ledger.taken_back.values())
    for refusal in explanation.taken_back:
        log.warning("collapse: %s", refusal)
    return result, explanation


# ------------------------------------------------------------------ helpers of the front ends


def unit_of(graph: fx.Graph, numbers: Mapping[str, Any], names: Mapping[fx.Node, str]) -> Unit:
    """A graph in the terms of the table, whose weights are ``numbers``; ``names`` are those that a person is told."""
    root = nn.Module()
    floats = [t for t in numbers.values() if isinstance(t, Tensor) and t.is_floating_point()]
    if floats:  # its device is that of the graph
        root.register_parameter("any", nn.Parameter(floats[0].detach(), requires_grad=False))
    call = Call("", root, None)
    for node in graph.nodes:
        node.meta["call"] = call
        if node.op == "get_attr":
            node.meta["name"] = str(node.target).rpartition(".")[0] or str(node.target)
        elif node in names:
            node.meta["name"] = names[node]
    return Unit("", root, graph, [call], dict(numbers), {}, set(), set())


def counts_of(flow: Flow) -> Counts:
    """Layers of a graph: its calls by kind, and the numbers of the parameters that they read."""
    calls = [op for node, op in flow.operations.items() if node.op == "call_function" and node not in flow.constant]
    kinds = Counter(op.kind for op in calls)
    norms = sum("batch_norm" in op.id for op in calls)
    read = {id(t): t for n, ts in flow.tensors.items() if n.users for t in ts if isinstance(t, nn.Parameter)}
    convs = kinds[Kind.CONV] + kinds[Kind.CONV_TRANSPOSE]
    return Counts(convs, norms, kinds[Kind.LINEAR], sum(t.numel() for t in read.values()))


def fresh(name: str, taken: Collection[str]) -> str:
    """``name``, or that with a number behind it."""
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def needed_for(result: Any, given: Collection[Any], inputs: Any) -> set[Any]:
    """What a value is computed from, itself included, back to what is given, not included; ``inputs(x)`` are x's."""
    needed, todo = {result}, [result]
    while todo:
        for source in inputs(todo.pop()):
            if source not in given and source not in needed:
                needed.add(source)
                todo.append(source)
    return needed
