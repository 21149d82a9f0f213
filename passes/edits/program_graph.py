"""Edits of a graph of aten calls: one layer's calls in the place of a region's, on a copy of the graph.

Weights are attributes of a ``GraphModule``, or placeholders of an ``ExportedProgram`` that its signature and state dict
speak of. New ones take over the name of a weight that goes, so that a state dict keeps its layout as far as it can.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import PADS
from passes.edits.edit import Substitute
from passes.portable import ScaleShift

__all__ = ["ModuleGraph", "ProgramGraph", "substitute"]

aten: Any = torch.ops.aten
_MODES = {kind: mode for mode, kinds in PADS.items() for kind in kinds}


class ModuleGraph:
    """A copy of a module with a graph, whose weights are its attributes."""

    def __init__(self, source: fx.GraphModule) -> None:
        self.result = _copied(source)
        self.graph = self.result.graph
        self.core = _is_core(self.graph)

    def weights(self) -> dict[str, fx.Node]:
        """The nodes that read weights, by name."""
        return {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}

    def put(self, name: str, number: nn.Parameter, near: fx.Node | None) -> fx.Node:
        """The node of a weight that is now ``number``."""
        owner: nn.Module = self.result
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        for table in (owner._parameters, owner._buffers):
            table.pop(last, None)
        owner.register_parameter(last, number)
        node = self.weights().get(name)
        if node is None:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_after(near) if near is not None else self.graph.inserting_before(first):
                node = self.graph.get_attr(name)
        return node

    def drop(self, names: Iterable[str]) -> None:
        """Take away weights that nothing reads, and the modules that held nothing else."""
        for name in names:
            for node in [n for n in self.graph.nodes if n.op == "get_attr" and n.target == name]:
                self.graph.erase_node(node)
            path, _, last = name.rpartition(".")
            owner = self.result.get_submodule(path)
            owner._parameters.pop(last, None)
            owner._buffers.pop(last, None)

    def returned(self, old: str, new: str) -> None:
        """Return another value where this one was: the graph says so itself."""

    def finished(self) -> fx.GraphModule:
        self.graph.lint()
        self.result.recompile()
        return self.result


class ProgramGraph:
    """A copy of an exported program's graph; its weights are placeholders."""

    def __init__(self, source: ExportedProgram) -> None:
        self.source = source
        self.module = _copied(source.graph_module)
        self.graph = self.module.graph
        self.signature = copy.deepcopy(source.graph_signature)
        # Both may be written into when the program runs or is trained: then only in the copy.
        self.state, self.constants = copy.deepcopy((dict(source.state_dict), _tensors(source.constants)))
        self.core = source.dialect != "TRAINING" or _is_core(self.graph)

    def weights(self) -> dict[str, fx.Node]:
        """The placeholders of weights, by name in the state dict."""
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        return {str(spec.target): nodes[spec.arg.name] for spec in self.signature.input_specs if _is_weight(spec)}

    def put(self, name: str, number: nn.Parameter, near: fx.Node | None) -> fx.Node:
        """The placeholder of a weight that is now ``number``."""
        specs = self.signature.input_specs
        node = self.weights().get(name)
        if node is None:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_after(near) if near is not None else self.graph.inserting_before(first):
                node = self.graph.placeholder("p_" + name.replace(".", "_"))
            node.target = node.name  # which is unique, unlike the name that was asked for
            at = next((i + 1 for i, s in enumerate(specs) if near is not None and s.arg.name == near.name), 0)
            specs.insert(at, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        else:
            at = next(i for i, spec in enumerate(specs) if spec.arg.name == node.name)
            specs[at] = replace(specs[at], kind=InputKind.PARAMETER, persistent=None)
        self.state[name] = number
        mode = next((v.fake_mode for n in self.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")), None)
        node.meta = {"val": number if mode is None else mode.from_tensor(number, static_shapes=True)}
        return node

    def drop(self, names: Iterable[str]) -> None:
        """Take away weights that nothing reads."""
        nodes = self.weights()
        for name in names:
            self.signature.input_specs[:] = [s for s in self.signature.input_specs if s.arg.name != nodes[name].name]
            self.graph.erase_node(nodes[name])
            self.state.pop(name, None)

    def returned(self, old: str, new: str) -> None:
        """Return another value where this one was."""
        specs = self.signature.output_specs
        specs[:] = [replace(s, arg=TensorArgument(new)) if s.arg.name == old else s for s in specs]

    def finished(self) -> ExportedProgram:
        self.graph.lint()
        self.module.recompile()
        source = self.source
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=self.signature,
            state_dict=self.state,
            range_constraints=copy.deepcopy(source.range_constraints),
            module_call_graph=copy.deepcopy(source.module_call_graph),
            example_inputs=source.example_inputs,
            constants={**source.constants, **self.constants},
            verifiers=source.verifiers,
        )


def _tensors(constants: Mapping[str, Any]) -> dict[str, Tensor]:
    """The constants that are tensors; torch copies none that was computed with gradients."""
    found = {name: value for name, value in constants.items() if isinstance(value, Tensor)}
    return {name: value if value.is_leaf else value.detach() for name, value in found.items()}


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes are called as those of ``module``: a signature and edits speak of them by name.

    torch.fx gives the nodes of a copy new names where they are builtins of Python, as the input of a ``Sequential``.
    A module that torch has noted of it, such as the one that it was unflattened to, says nothing of the copy.
    """
    noted = {name: value for name, value in module.meta.items() if isinstance(value, nn.Module)}
    copied = copy.deepcopy(module, {id(value): value for value in noted.values()})
    for name in noted:
        del copied.meta[name]
    for node, original in zip(copied.graph.nodes, module.graph.nodes, strict=True):
        node.name = original.name
    return copied


def _is_weight(spec: InputSpec) -> bool:
    return spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None


def _is_core(graph: fx.Graph) -> bool:
    """Whether convolutions are written as in core aten."""
    return any(node.target is aten.convolution.default for node in graph.nodes)


def substitute(
    into: ModuleGraph | ProgramGraph, edits: Sequence[tuple[Substitute, nn.Module]]
) -> fx.GraphModule | ExportedProgram:
    """Carry out edits, each with the layer whose numbers are meant."""
    idle = {name for name, node in into.weights().items() if not node.users}
    for edit, layer in edits:
        nodes = {node.name: node for node in into.graph.nodes}
        result = nodes[edit.path]
        weight, bias = _numbers(layer)
        last = next(reversed(into.weights().values()), None)
        at = into.put(edit.weight, weight, last)
        shift = None if bias is None else into.put(edit.bias, bias, at)
        with into.graph.inserting_before(result):
            made = _Writer(into.graph, into.core, result).layer(layer, nodes[edit.source], at, shift)
        host = next((nodes[name] for name in edit.gone if at in nodes[name].all_input_nodes), result)
        result.meta.update({key: host.meta[key] for key in _ORIGIN if key in host.meta})
        # The last call takes the place of the one that gave the value: its name, its readers and what is said of it.
        result.target, result.args, result.kwargs = made.target, made.args, made.kwargs
        into.graph.erase_node(made)
        if edit.end:
            nodes[edit.end].replace_all_uses_with(nodes[edit.moved])
            into.returned(edit.end, edit.moved)
        for name in reversed(edit.gone):
            into.graph.erase_node(nodes[name])
    into.drop(_unread(into.weights(), idle))
    return into.finished()


_ORIGIN = ("nn_module_stack", "source_fn_stack", "torch_fn", "stack_trace")
"""What says which layer a call was: that of the convolution whose name the numbers have."""


def _numbers(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    found = {name.rpartition(".")[2]: parameter for name, parameter in layer.named_parameters()}
    return found["weight"], found.get("bias")


def _unread(weights: dict[str, fx.Node], idle: set[str]) -> list[str]:
    """Weights that lost their readers, and what nobody read beside them: a batch norm's count of batches."""
    lost = {name for name, node in weights.items() if not node.users and name not in idle}
    owners = {name.rpartition(".")[0] for name in lost}
    left = {name.rpartition(".")[0] for name, node in weights.items() if node.users}
    return [*lost, *(name for name in idle if name.rpartition(".")[0] in owners - left)]


# ------------------------------------------------------------------ layers as calls


class _Writer:
    """Writes a layer as calls, each with what it gives, if the graph says that of its own."""

    def __init__(self, graph: fx.Graph, core: bool, like: fx.Node) -> None:
        self.graph, self.core, self.like = graph, core, like

    def layer(self, layer: nn.Module, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """The calls of a layer that was emitted."""
        if isinstance(layer, nn.Sequential):
            for part in layer:
                x = self.layer(part, x, weight, bias)
            return x
        if type(layer) in _MODES:
            return self.pad(x, list(layer.padding), _MODES[type(layer)], float(getattr(layer, "value", 0.0)))  # type: ignore[arg-type]
        if isinstance(layer, nn.Linear):
            return self.linear(x, weight, bias)
        if isinstance(layer, ScaleShift):
            return self.call(aten.addcmul.default, bias, x, weight)
        assert isinstance(layer, _ConvNd)
        return self.conv(layer, x, weight, bias)

    def conv(self, layer: _ConvNd, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        n = len(layer.kernel_size)
        stride, dilation, groups = list(layer.stride), list(layer.dilation), layer.groups
        padding, back = layer.padding, list(layer.output_padding)
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            x = self.pad(x, list(layer._reversed_padding_repeated_twice), layer.padding_mode)
            padding = (0,) * n
        args: tuple[Any, ...] = (x, weight, bias, stride, list(padding))
        if self.core:
            return self.call(aten.convolution.default, *args, dilation, layer.transposed, back, groups)
        if layer.transposed:
            name = "default" if n == 1 else "input"
            return self.call(getattr(getattr(aten, f"conv_transpose{n}d"), name), *args, back, groups, dilation)
        return self.call(getattr(aten, f"conv{n}d").default, *args, dilation, groups)

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        if not self.core:
            return self.call(aten.linear.default, x, weight, bias)
        value = x.meta.get("val")
        leading = list(value.shape[:-1]) if isinstance(value, Tensor) else [-1]
        open_ = [i for i, size in enumerate(leading) if not isinstance(size, int)]
        sizes = [self.call(aten.sym_size.int, x, i) if i in open_ else size for i, size in enumerate(leading)]
        rows = x if len(sizes) == 1 else self.call(aten.view.default, x, [-1, weight.meta["val"].shape[1]])
        turned = self.call(aten.permute.default, weight, [1, 0])
        product = aten.mm.default if bias is None else aten.addmm.default
        made = self.call(product, *([] if bias is None else [bias]), rows, turned)
        return made if rows is x else self.call(aten.view.default, made, [*sizes, weight.meta["val"].shape[0]])

    def pad(self, x: fx.Node, amounts: list[int], mode: str, value: float = 0.0) -> fx.Node:
        if mode == "zeros":
            return self.call(aten.constant_pad_nd.default, x, amounts, value)
        return self.call(aten.pad.default, x, amounts, mode)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        mode = getattr(self.like.meta.get("val"), "fake_mode", None)
        if mode is not None:
            values = fx.map_arg(args, lambda n: _within(mode, n.meta.get("val")))
            with mode:
                node.meta["val"] = target(*values)
        return node


def _within(mode: Any, value: Any) -> Any:
    """What is said of a value, in one mode: ``make_fx`` notes each value in a mode of its own."""
    if not isinstance(value, Tensor) or getattr(value, "fake_mode", None) is mode:
        return value
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
