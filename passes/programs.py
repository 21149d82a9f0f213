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
from typing import Any, Generic, TypeVar

from torch import Tensor, fx, nn

from passes.algebra.scale_shift import ScaleShift
from passes.compiler import clock, decide
from passes.edits.edit import Substitute
from passes.edits.layer import describe
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate, layers_of
from passes.fold.folds import Fold
from passes.fold.placement import Placement
from passes.graph.capture import Call, Unit
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind
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
        unit.replay = lambda entry, result, inputs: self.replay(names[entry], names[result], inputs)
        with clock(explanation, "plan"):
            self.flow = Flow(unit, {})
            self.memory = Memory(self.flow)
        self.edits: dict[Fold, Substitute] = {}
        self.folds, _ = decide(self.flow, self._guard, self._edits, explanation, ledger)
        explanation.before = counts_of(self.flow)
        self._tell(self.folds)

    @abstractmethod
    def replay(self, entry: str, result: str, inputs: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
        """The value of ``result`` for each value of ``entry``, in float64, and the largest magnitude on the way."""

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
        result, self.explanation.after = self.substituted([(self.edits[fold], fold.layer) for fold in folds])
        return result

    def without_what_fails(self, example: Any) -> tuple[Graph, Checked]:
        """The graph with those folds that hold, each tried alone; raises if they do not hold together."""
        held = []
        for fold in self.folds:
            alone = self.compared(self.result([fold]), example)
            if alone.ok:
                held.append(fold)
            else:
                names = ", ".join(layers_of(self.flow, fold.candidate))
                self.ledger.take_back((names,), names, str(alone.differences[0]))
        result = self.result(held)
        checked = self.compared(result, example)
        checked.raise_if_different()
        return result, checked

    def _tell(self, folds: list[Fold]) -> None:
        told = self.explanation
        told.folds = [
            Record.of(self.flow, fold.candidate, fold.form, self.edits[fold].weight.rpartition(".")[0], fold.error)
            for fold in folds
        ]
        told.edits = [self.edits[fold] for fold in folds]
        unread = [f"{count} call{'s' * (count > 1)} of {name}" for name, count in self.unread.most_common()]
        told.notes = [f"not read: {', '.join(unread)}"] if unread else []

    def _guard(self, candidate: Candidate) -> Placement | Refusal:
        ends = [candidate.entry, candidate.last, candidate.result, *candidate.moved[-1:]]
        if any(node not in self.names for node in ends):
            return Refusal(Reason.LAYOUT, "begins or ends inside of one operation of the graph")
        found = self.memory.refusal(candidate) or self.guard(candidate)
        if found is not None:
            return found
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
        for fold in folds:
            candidate = fold.candidate
            weight, bias = self._numbers(fold, taken)
            taken |= {weight, bias}
            dying = {self.names[node] for node in candidate.dying if node in self.names}
            entry, result = self.names[candidate.entry], self.names[candidate.last]
            staying = {self.names[node] for node in candidate.moved if node in self.names}
            gone = tuple(name for name in self.gone(entry, dying, staying) if name != result)
            ends = (candidate.moved[-1], candidate.result) if candidate.moved else ()
            layer = describe(fold.layer, {})
            self.edits[fold] = Substitute(result, entry, layer, gone, weight, bias, *(self.names[n] for n in ends))
        return None, {}

    def _numbers(self, fold: Fold, taken: set[str]) -> tuple[str, str]:
        """Names for the folded numbers: those of the largest weight that goes, and of the bias beside it."""
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


def needed_for(result: Any, entry: Any, inputs: Any) -> set[Any]:
    """What a value is computed from, itself included, back to ``entry``, which is not; ``inputs(x)`` are x's own."""
    needed, todo = {result}, [result]
    while todo:
        for source in inputs(todo.pop()):
            if source is not entry and source not in needed:
                needed.add(source)
                todo.append(source)
    return needed
