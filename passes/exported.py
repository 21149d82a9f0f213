"""Collapse of graphs of aten calls: exported programs, and modules that hold such a graph.

The graph is there, so nothing is traced: it is translated to the terms of the table of operations
(:mod:`passes.graph.aten`), decided as any other unit, and edited on a copy. Each fold is proven against the calls that
were in the graph, and the whole result against the whole program.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from passes.compiler import clock, decide
from passes.edits.edit import Substitute
from passes.edits.layer import describe
from passes.edits.program_graph import ModuleGraph, ProgramGraph, substitute
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate, layers_of
from passes.fold.folds import Fold
from passes.fold.placement import Placement
from passes.graph.aten import Translated, is_aten, translated
from passes.graph.capture import Call, Unit
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example
from passes.graph.opset import Kind
from passes.proof.check import Checked, NoInputError, check, observe
from passes.proof.compare import Verdict
from passes.proof.hold import Exact, Ledger
from passes.refusal import Reason, Refusal
from passes.report import Counts, Explanation
from passes.report import Fold as Record

__all__ = ["Program", "collapse_program", "example_of", "explain_program", "is_program", "module_of"]

log = logging.getLogger("reparam")

Program = ExportedProgram | fx.GraphModule


def is_program(model: Any) -> bool:
    """Whether this is an exported program, or a module whose graph is one of aten calls."""
    return isinstance(model, ExportedProgram) or (isinstance(model, fx.GraphModule) and is_aten(model.graph))


def module_of(program: Program) -> nn.Module:
    """What a program runs."""
    return program.module(check_guards=False) if isinstance(program, ExportedProgram) else program


def explain_program(program: Program) -> Explanation:
    """Decide as :func:`collapse_program` does, and stop before the edits."""
    return _Compilation(program, Ledger(prove=False)).explanation


def collapse_program(
    program: Program, *, example: Example | None = None, verify: bool | str = True, strict: bool = False
) -> tuple[Program, Explanation]:
    """Fold every region of a program that is one convolution; the result is a program of the same kind.

    Args:
        program: not changed.
        example: what to compare the whole program on; that of the export, or one of the shapes it says, otherwise.
        verify: as for a module.
        strict: as for a module.
    """
    given = example_of(program) if example is None else example
    exact = Exact() if verify is True else None
    ledger = Ledger(prove=bool(verify), strict=strict, exact=exact)
    compilation = _Compilation(program, ledger)
    result, explanation = compilation.result(compilation.folds), compilation.explanation
    explanation.taken_back = list(ledger.taken_back.values())
    if verify is not True:
        return result, explanation
    with clock(explanation, "check"):
        checked = compilation.checked(result, given)
        if not checked.ok:
            if strict:
                checked.raise_if_different()
            result, checked = compilation.taken_back(given)
    explanation.checked = checked
    explanation.taken_back = list(ledger.taken_back.values())
    for refusal in explanation.taken_back:
        log.warning("collapse: %s", refusal)
    log.info("collapse: %s", checked)
    return result, explanation


class _Compilation:
    """One program, and what was decided about it."""

    def __init__(self, program: Program, ledger: Ledger) -> None:
        self.program, self.ledger = program, ledger
        self.explanation = Explanation(seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
        with clock(self.explanation, "trace"):
            self.source = program.graph
            self.names, self.numbers = _weights(program)
            self.found = translated(self.source, self.names)
            self.unit = _unit(self.found, self.numbers)
        with clock(self.explanation, "plan"):
            self.flow = Flow(self.unit, Counter(map(id, self.numbers.values())))
        self.memory, self.kept = Memory(self.flow), _interfaces(program)
        self.unit.replay = self._replay
        self.folds, self.edits = decide(self.flow, self._guard, self._edits, self.explanation, ledger)
        self._tell(self.folds)

    def result(self, folds: list[Fold]) -> Program:
        """The program with these folds."""
        into = ProgramGraph(self.program) if isinstance(self.program, ExportedProgram) else ModuleGraph(self.program)
        chosen = [(self.edits[fold], fold.layer) for fold in folds]
        self._tell(folds)
        result = substitute(into, chosen)
        after = _weights(result)
        self.explanation.after = _counts(Flow(_unit(translated(result.graph, after[0]), after[1]), Counter()))
        return result

    def checked(self, result: Program, example: Example | None) -> Checked:
        """The result against the program."""
        if example is None:
            return Checked(Verdict.INCONCLUSIVE, "not compared: no input could be made up from what the graph says")
        try:
            observed = observe(module_of(self.program), example)
        except NoInputError as error:
            return Checked(Verdict.INCONCLUSIVE, f"not compared: {error}")
        return check(observed, module_of(result), exact=self.ledger.exact, effects=False)

    def taken_back(self, example: Example | None) -> tuple[Program, Checked]:
        """The program with those folds that hold, each tried alone; raises if they do not hold together."""
        held = []
        for fold in self.folds:
            alone = self.checked(self.result([fold]), example)
            if alone.ok:
                held.append(fold)
            else:
                names = ", ".join(layers_of(self.flow, fold.candidate))
                self.ledger.take_back((names,), names, str(alone.differences[0]))
        result = self.result(held)
        checked = self.checked(result, example)
        checked.raise_if_different()
        return result, checked

    def _tell(self, folds: list[Fold]) -> None:
        told = self.explanation
        told.before = _counts(self.flow)
        told.folds = [
            Record.of(self.flow, f.candidate, f.form, self.edits[f].weight.rpartition(".")[0], f.error) for f in folds
        ]
        told.edits = [self.edits[fold] for fold in folds]
        unread = ", ".join(
            f"{count} call{'s' * (count > 1)} of {name}" for name, count in self.found.unread.most_common()
        )
        told.notes = [f"not read: {unread}"] if unread else []

    def _guard(self, candidate: Candidate) -> Placement | Refusal:
        found = self.memory.refusal(candidate)
        if found is not None:
            return found
        dying = {*candidate.dying, *candidate.constants}
        for node in candidate.dying:
            if node is not candidate.result:
                name = self.found.origin[node].name
                if any(user not in dying for user in node.users):
                    return Refusal(Reason.SHARED, f"the size of {name} is asked for")
                if name in self.kept:
                    return Refusal(Reason.SHARED, f"{name} is part of an interface that the export has kept")
        return Placement()

    def _edits(self, folds: list[Fold]) -> tuple[dict[Fold, Substitute], dict[Candidate, Refusal]]:
        edits = dict[Fold, Substitute]()
        taken = {str(n.target) for n in self.flow.nodes if n.op == "get_attr"}
        for fold in folds:
            candidate, origin = fold.candidate, self.found.origin
            weight, bias = self._names(fold, taken)
            taken |= {weight, bias}
            gone = _between(
                origin[candidate.entry], origin[candidate.result], [origin[n] for n in candidate.dying if n in origin]
            )
            edits[fold] = Substitute(
                origin[candidate.result].name,
                origin[candidate.entry].name,
                describe(fold.layer, {}),
                gone,
                weight,
                bias,
            )
        return edits, {}

    def _names(self, fold: Fold, taken: set[str]) -> tuple[str, str]:
        """Names for the folded numbers: those of the largest weight that goes, and of the bias beside it."""
        going = {str(n.target): self.flow.held[n] for n in fold.candidate.constants if n.op == "get_attr"}
        weights = [name for name, number in going.items() if number.dim() > 1]
        largest = max(weights, key=lambda name: going[name].numel(), default="")
        parameters = dict(fold.layer.named_parameters())
        prefix = largest.rpartition(".")[0] if largest else "folded"
        weight = largest or _fresh("folded.weight", taken)
        has_bias = any(name.endswith("bias") for name in parameters)
        bias = ".".join(filter(None, [prefix, "bias"]))
        if has_bias and bias not in going:
            bias = _fresh(bias, taken)
        return weight, bias if has_bias else ""

    def _replay(self, entry: fx.Node, result: fx.Node, inputs: list[Any]) -> list[tuple[Any, float]]:
        """Run the calls between two values in float64, as they stand in the graph."""
        first, last = self.found.origin[entry], self.found.origin[result]
        return [_run(first, last, x, self.names, self.numbers) for x in inputs]


def _fresh(name: str, taken: set[str]) -> str:
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


# ------------------------------------------------------------------ reading


def _weights(program: Program) -> tuple[dict[str, str], dict[str, Any]]:
    """For an exported program, placeholders of weights with their names; and the numbers by name."""
    if isinstance(program, ExportedProgram):
        signature = program.graph_signature
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        names = {spec.arg.name: str(spec.target) for spec in signature.input_specs if spec.kind in kinds}
        held = {**program.constants, **program.state_dict}
        return names, {name: held[name] for name in names.values()}
    found = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner: Any = program
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            found[str(node.target)] = owner
    return {}, found


def _unit(found: Translated, numbers: Mapping[str, Any]) -> Unit:
    root = nn.Module()
    floating = [t for t in numbers.values() if isinstance(t, Tensor) and t.is_floating_point()]
    root.any = nn.ParameterList(
        [nn.Parameter(t.detach(), requires_grad=False) for t in floating[:1]]
    )  # its device counts
    call = Call("", root, None)
    for node in found.graph.nodes:
        node.meta["call"] = call
        if node.op != "get_attr":
            node.meta["name"] = _name(found.origin.get(node, node))
    return Unit("", root, found.graph, [call], dict(numbers), {}, set(), set())


def _name(node: fx.Node) -> str:
    """The layer that a call was made in, and the call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).rpartition("slice(None, None, None)")[2] if stack else ""
    return f"{path}:{node.name}" if path else node.name


def _interfaces(program: Program) -> set[str]:
    """Values that the signatures of kept modules speak of."""
    if not isinstance(program, ExportedProgram):
        return set()
    entries = [entry.signature for entry in program.module_call_graph if entry.fqn and entry.signature is not None]
    return {
        each.name for entry in entries for each in [*entry.inputs, *entry.outputs] if isinstance(each, TensorArgument)
    }


def _counts(flow: Flow) -> Counts:
    kinds = Counter(
        op.kind for node, op in flow.operations.items() if node.op == "call_function" and node not in flow.constant
    )
    norms = sum(op.id in ("batch_norm", "aten_batch_norm") for node, op in flow.operations.items())
    read = {id(t): t for n, tensors in flow.tensors.items() if n.users for t in tensors if isinstance(t, nn.Parameter)}
    convs = kinds[Kind.CONV] + kinds[Kind.CONV_TRANSPOSE]
    return Counts(convs, norms, kinds[Kind.LINEAR], sum(t.numel() for t in read.values()))


def example_of(program: Program) -> Example | None:
    """The example of the export, or random numbers of the shapes that the inputs are said to have."""
    if isinstance(program, ExportedProgram) and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return Example(tuple(args), dict(kwargs or {}))
    if isinstance(program, ExportedProgram):
        return None
    generator = torch.Generator().manual_seed(0)
    made = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return None
            shape = [int(size) if isinstance(size, int) else size.node.hint for size in value.shape]
            made.append(torch.randn(shape, generator=generator, dtype=value.dtype).to(value.device))
    return Example(tuple(made), made_up=True) if made else None


# ------------------------------------------------------------------ regions in the source


def _between(entry: fx.Node, result: fx.Node, dying: list[fx.Node]) -> tuple[str, ...]:
    """Names of the calls that go, in order: those that die, and what is only there for them."""
    gone = {node for node in dying if node.op == "call_function"}
    todo = list(gone)
    while todo:
        for source in todo.pop().all_input_nodes:
            if (
                source is not entry
                and source.op == "call_function"
                and source not in gone
                and gone.issuperset(source.users)
            ):
                gone.add(source)
                todo.append(source)
    return tuple(node.name for node in result.graph.nodes if node in gone and node is not result)


def _run(
    entry: fx.Node, result: fx.Node, x: Tensor, names: Mapping[str, str], numbers: Mapping[str, Any]
) -> tuple[Any, float]:
    """The result's value for a value of the entry, in float64, and the largest magnitude on the way."""
    needed, todo = {result}, [result]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is not entry and source not in needed:
                needed.add(source)
                todo.append(source)
    values: dict[fx.Node, Any] = {entry: x.clone()}
    peak = float(x.abs().max())
    for node in result.graph.nodes:  # in the original order: some work in place
        if node not in needed:
            continue
        if node.op in ("placeholder", "get_attr"):
            number = numbers[names.get(node.name, str(node.target))]
            values[node] = number.detach().to(x.device, torch.float64) if number.is_floating_point() else number
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            if isinstance(values[node], Tensor) and values[node].is_floating_point() and values[node].numel():
                peak = max(peak, float(values[node].abs().max()))
    return values[result], peak
