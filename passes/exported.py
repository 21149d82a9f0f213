"""Exported programs, and modules whose graph is one of aten calls: reading them, running parts, comparing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from passes.compiler import clock
from passes.edits.edit import Substitute
from passes.edits.program_graph import ModuleGraph, ProgramGraph, substitute
from passes.fold.rules import DEFAULT, Rules
from passes.graph.aten import is_aten, is_idle, translated
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example
from passes.programs import Compilation, collapse_graph, counts_of, needed_for, unit_of
from passes.proof.check import Checked, NoInputError, check, observe
from passes.proof.compare import Verdict
from passes.proof.hold import Exact, Ledger
from passes.refusal import ReparamError
from passes.report import Counts, Explanation

__all__ = ["Program", "collapse_program", "example_of", "explain_program", "is_program", "module_of"]

Program = ExportedProgram | fx.GraphModule


def is_program(model: Any) -> bool:
    """Whether this is an exported program, or a module whose graph is one of aten calls."""
    return isinstance(model, ExportedProgram) or (isinstance(model, fx.GraphModule) and is_aten(model.graph))


def module_of(program: Program) -> nn.Module:
    """What a program runs."""
    return program.module(check_guards=False) if isinstance(program, ExportedProgram) else program


def explain_program(program: Program, rules: Rules = DEFAULT) -> Explanation:
    """Decide as :func:`collapse_program` does, and stop before the edits."""
    return _Compilation(program, Ledger(prove=False, rules=rules)).explanation


def collapse_program(
    program: Program,
    *,
    example: Example | None = None,
    verify: bool | str = True,
    strict: bool = False,
    rules: Rules = DEFAULT,
) -> tuple[Program, Explanation]:
    """Fold every region of a program that is one convolution; the result is a program of the same kind.

    Args:
        program: not changed.
        example: what to compare the whole program on; that of the export, or one of the shapes it says, otherwise.
        verify: as for a module.
        strict: as for a module.
        rules: what may fold.
    """
    ledger = Ledger(prove=bool(verify), strict=strict, exact=Exact() if verify is True else None, rules=rules)
    given = example_of(program) if example is None else example
    return collapse_graph(_Compilation(program, ledger), example=given, verify=verify, strict=strict)


class _Compilation(Compilation[Program]):
    """A program: placeholders that stand for weights are read as such, and each call as what it means."""

    def __init__(self, program: Program, ledger: Ledger) -> None:
        explanation = Explanation(seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
        with clock(explanation, "trace"):
            self.program = program
            self.weights, self.numbers = _weights(program)
            self.nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
            found = translated(program.graph, self.weights)
            names = {node: origin.name for node, origin in found.origin.items()}
            told = {node: _told(origin) for node, origin in found.origin.items()}
            unit = unit_of(found.graph, {**self.numbers, **found.constants}, told)
        super().__init__(unit, names, self.numbers, found.unread, _interfaces(program), ledger, explanation)

    def substituted(self, edits: Iterable[tuple[Substitute, nn.Module]]) -> tuple[Program, Counts]:
        into = ProgramGraph(self.program) if isinstance(self.program, ExportedProgram) else ModuleGraph(self.program)
        result = substitute(into, list(edits))
        weights, numbers = _weights(result)
        found = translated(result.graph, weights)
        return result, counts_of(Flow(unit_of(found.graph, {**numbers, **found.constants}, {}), {}))

    def compared(self, result: Program, example: Any) -> Checked:
        if example is None:
            return Checked(Verdict.INCONCLUSIVE, "not compared: no input could be made up from what the graph says")
        try:
            observed = observe(module_of(self.program), example)
        except NoInputError as error:
            return Checked(Verdict.INCONCLUSIVE, f"not compared: {error}")
        except ReparamError as error:
            if not example.made_up:
                raise
            said = " ".join(str(error.__cause__ or error).split())[:200]
            return Checked(Verdict.INCONCLUSIVE, f"not compared: it takes no input of the shapes that it says: {said}")
        return check(observed, module_of(result), exact=self.ledger.exact, effects=False)

    def taken(self) -> set[str]:
        if isinstance(self.program, ExportedProgram):
            return {*self.program.state_dict, *self.program.constants}
        found = set[str]()
        for path, module in self.program.named_modules(remove_duplicate=False):
            registered = {**module._modules, **module._parameters, **module._buffers}
            held = [*vars(module), *(name for name, value in registered.items() if value is not None)]
            found.update(f"{path}.{name}" if path else name for name in held)
        return found

    def gone(self, entry: str, dying: Collection[str], staying: Collection[str] = ()) -> tuple[str, ...]:
        gone = {self.nodes[name] for name in dying}
        todo = list(gone)
        while todo:
            for source in todo.pop().all_input_nodes:
                read = {user for user in source.users if not is_idle(user)}
                only_here = source.op == "call_function" and gone.issuperset(read)
                if source.name not in {entry, *staying} and source not in gone and only_here:
                    gone.add(source)
                    todo.append(source)
        gone |= {user for node in gone for user in node.users if is_idle(user)}
        return tuple(node.name for node in self.program.graph.nodes if node in gone)

    def replay(self, given: Sequence[Mapping[str, Tensor]], result: str) -> list[tuple[Tensor, float]]:
        return [self._run({self.nodes[name]: x for name, x in each.items()}, self.nodes[result]) for each in given]

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """Core aten lays the rows of a linear layer in one dimension, by sizes that stand in the graph."""
        value = self.nodes[name].meta.get("val")
        return tuple(_hint(size) for size in value.shape) if isinstance(value, Tensor) and value.numel() else None

    def _run(self, given: Mapping[fx.Node, Tensor], result: fx.Node) -> tuple[Tensor, float]:
        own = all(tuple(x.shape) == self.sizes(node.name) for node, x in given.items())
        fixed = {n for n in self.program.graph.nodes if own and isinstance(n.meta.get("val"), (int, torch.SymInt))}
        needed = needed_for(result, given, lambda node: [] if node in fixed else node.all_input_nodes)
        values: dict[fx.Node, Any] = {entry: x.clone() for entry, x in given.items()}  # it may be changed in place
        device = next(iter(given.values())).device
        peak = max(float(x.abs().max()) for x in given.values())
        for node in self.program.graph.nodes:  # in the original order: some work in place
            if node not in needed:
                continue
            if node.op in ("placeholder", "get_attr"):
                number = self.numbers[self.weights.get(node.name, str(node.target))]
                value = number.detach().to(device, torch.float64) if number.is_floating_point() else number
            elif node in fixed:
                value = _hint(node.meta["val"])
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                value = node.target(*args, **kwargs)
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    peak = max(peak, float(value.abs().max()))
            values[node] = value
        return values[result], peak


_WRITTEN = {"BUFFER_MUTATION", "PARAMETER_MUTATION"}
"""By name: torch 2.8 knows the former only."""


def _weights(program: Program) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """For an exported program, placeholders of weights with their names; and the numbers by name."""
    if isinstance(program, ExportedProgram):
        signature = program.graph_signature
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        # The next call has others of what it writes.
        written = {spec.target for spec in signature.output_specs if spec.kind.name in _WRITTEN}
        specs = [spec for spec in signature.input_specs if spec.kind in kinds and spec.target not in written]
        names = {spec.arg.name: str(spec.target) for spec in specs}
        held = {**program.constants, **program.state_dict}
        return names, {name: held[name] for name in names.values()}
    found = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner: Any = program
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            if not isinstance(owner, nn.Module):  # a graph inside of a call
                found[str(node.target)] = owner
    return {}, found


def _told(node: fx.Node) -> str:
    """The layer that a call was made in, and the call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return f"{path}:{node.name}" if path else node.name


def _interfaces(program: Program) -> set[str]:
    """Values that the signatures of kept modules speak of."""
    if not isinstance(program, ExportedProgram):
        return set()
    entries = [entry.signature for entry in program.module_call_graph if entry.fqn and entry.signature is not None]
    return {
        each.name for entry in entries for each in [*entry.inputs, *entry.outputs] if isinstance(each, TensorArgument)
    }


def example_of(program: Program) -> Example | None:
    """The example of the export, or random numbers of the shapes that the inputs are said to have."""
    if isinstance(program, ExportedProgram):
        if program.example_inputs is None:
            return None
        args, kwargs = program.example_inputs
        return Example(tuple(args), dict(kwargs or {}))
    generator = torch.Generator().manual_seed(0)
    made = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return None
            shape, strides = ([_hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
            numbers = torch.randn(shape, generator=generator, dtype=value.dtype)
            if 0 not in strides:  # views in the graph are for data that lies as it did
                numbers = torch.empty_strided(shape, strides, dtype=value.dtype).copy_(numbers)
            made.append(numbers.to(value.device))
    return Example(tuple(made), made_up=True) if made else None


def _hint(size: Any) -> int:
    """A size, or that of the example where it is open."""
    return size if isinstance(size, int) else int(size.node.hint)
