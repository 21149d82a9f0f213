"""The new forward of a module that held part of a region: its own operations, its children called as before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from passes.edits.errors import EditError
from passes.edits.program import Argument, Program
from passes.fold.candidates import Candidate
from passes.fold.layout import Layout
from passes.fold.placement import Rewrite, nodes_in
from passes.graph.capture import Call, call_of, join
from passes.graph.methods import MethodCall
from passes.graph.structures import Made, parts_of
from passes.laws.deform import is_deforming_call, with_numbers
from passes.portable import function_of, source_of
from passes.refusal import Reason, RefusalError

__all__ = ["new_forward"]


def new_forward(
    layout: Layout,
    call: Call,
    changes: list[tuple[Rewrite, Candidate]],
    names: dict[Candidate, str],
    dead: set[fx.Node],
    method: MethodCall | None = None,
    filled: _ConvNd | None = None,
    tied: Mapping[Candidate, nn.Module] | None = None,
) -> Program:
    """The forward of ``call``'s module after ``changes``, its paths relative to that module, or another of its methods.

    ``names`` are the paths of the folded layers, ``dead`` the traced nodes that vanish, ``filled`` is the folded layer
    whose numbers the module itself takes: that fold has the module's own path. What is ``tied`` to another layer
    convolves with its numbers, as the layer would that is given. Refuses with ``CODE`` if the forward uses a module or
    weight that stands elsewhere.
    """
    where = call.path or type(call.module).__name__
    try:
        program = _Local(layout, call, changes, names, dead, method, filled, tied or {}).build()
        if any(type(constant) not in _WRITTEN for constant in program.constants_of_code()):
            function_of(
                source_of(program.graph(), program.defaults()), "forward"
            )  # a thing of a class of its own may have no text
        return program
    except KeyError as missing:
        raise RefusalError(Reason.CODE, f"{missing} is not at hand in the forward of {where}") from missing
    except (EditError, SyntaxError, TypeError, NameError) as error:
        raise RefusalError(Reason.CODE, f"the forward of {where} cannot be written anew: {error}") from error


_WRITTEN = frozenset({bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.Size})
"""Of what torch.fx writes into code, that which means the same there."""


class _Local:
    """Builds the new forward of one call: its own operations, and its child modules called as before."""

    def __init__(
        self,
        layout: Layout,
        call: Call,
        changes: list[tuple[Rewrite, Candidate]],
        names: dict[Candidate, str],
        dead: set[fx.Node],
        method: MethodCall | None,
        filled: _ConvNd | None,
        tied: Mapping[Candidate, nn.Module],
    ) -> None:
        self.filled, self.tied = filled, tied
        self.layout, self.call, self.names, self.dead = layout, call, names, dead
        self.body: Call | MethodCall = call if method is None else method
        self.function = getattr(call.module, "forward" if method is None else method.name)
        self.touched = self._calls_with(dead)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.parts: list[fx.Node] = []
        self.constants: dict[str, Tensor] = {}
        self.given = {rewrite.old: rewrite.source for rewrite, _ in changes if not rewrite.layer}
        for rewrite, region in changes:
            if rewrite.head is not None and not rewrite.layer:  # whoever still asks for their shape asks what goes on
                self.given |= {n: rewrite.source for n in region.dying if rewrite.head < n}
        self.first = {}
        for rewrite, region in changes:
            if rewrite.layer:
                self.first[next(n for n in region.dying if call in call_of(n).chain())] = (rewrite.source, region)

    def build(self) -> Program:
        arguments = tuple(self._arguments())
        self._copy(self.call)
        self.graph.output(self._map(self.body.output))
        for node in reversed(self.graph.nodes):  # parts and containers that nobody takes
            if not node.users and (node in self.parts or node.op == "get_attr" or isinstance(node.target, type)):
                self.graph.erase_node(node)
        self.graph.lint()
        return Program.of(self.graph, arguments, self.constants)

    def _arguments(self) -> Iterator[Argument]:
        """All parameters that the original takes; one that was traced at a fixed value may have no other."""
        signature = inspect.signature(self.function)
        given = signature.bind(*self.body.args, **self.body.kwargs).arguments
        for name, parameter in signature.parameters.items():
            optional = parameter.default is not parameter.empty
            value = given.get(name, parameter.default)
            self._name(value, self.graph.placeholder(name))
            fixed = not nodes_in(value)
            default = parameter.default if optional else None
            yield Argument(name, parameter.kind.name, default, optional, fixed, value if fixed else None)

    def _copy(self, call: Call) -> None:
        for item in self.layout.items[call]:
            if call is self.call and not self._is_in_body(item):
                continue
            if isinstance(item, fx.Node):
                self._node(item)
            elif item in self.touched:
                self._copy(item)
            else:
                self._call(item)

    def _is_in_body(self, item: fx.Node | Call) -> bool:
        if isinstance(self.body, Call):
            return True
        return (item if isinstance(item, fx.Node) else next(self.layout.inside(item))) in self.body.nodes

    def _node(self, node: fx.Node) -> None:
        if node in self.first:
            self._fold(*self.first[node])
        if node in self.given:
            self.env[node] = self._value(self.given[node])
        if node in self.dead:
            return
        try:
            new = self.graph.node_copy(node, self._value)
        except KeyError:
            return  # an assertion about a value that is gone
        if node.op in ("call_module", "get_attr"):
            new.target = self._held(node) or self._relative(str(node.target))
        self.env[node] = new

    def _fold(self, source: fx.Node, region: Candidate) -> None:
        own = self.filled is not None and self.names[region] == self.call.path
        if is_deforming_call(self.layout.flow, region.result):
            new = self._deform(region.result, self._value(source), "" if own else self._relative(self.names[region]))
        elif own or region in self.tied:
            holder = "" if own else self._relative(self.names[region])
            new = self._convolve(self.tied.get(region, self.filled), self._value(source), holder)
        else:
            new = self.graph.call_module(self._relative(self.names[region]), (self._value(source),))
        for node in region.dying:  # whoever still asks for their shape asks the result, or what goes in
            self.env[node] = self._value(source) if node in region.sized else new

    def _deform(self, node: fx.Node, x: fx.Node, holder: str) -> fx.Node:
        """The same call, with the weight and bias that the module itself or a child holds."""
        numbers = {name: self.graph.get_attr(join(holder, name)) for name in ("weight", "bias")}
        return self.graph.call_function(node.target, *with_numbers(node, {"input": x, **numbers}, self._map))  # type: ignore[arg-type]

    def _convolve(self, layer: Any, x: fx.Node, holder: str) -> fx.Node:
        """The weight and bias that the module itself or a child holds, used as the folded layer would use them."""
        weight = self.graph.get_attr(join(holder, "weight"))
        bias = None if layer.bias is None else self.graph.get_attr(join(holder, "bias"))
        if isinstance(layer, nn.Linear):
            return self.graph.call_function(F.linear, (x, weight, bias))
        function = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return self.graph.call_function(function, (x, weight, bias, *geometry))

    def _call(self, call: Call) -> None:
        target = self._relative(call.path)
        try:
            new = self.graph.call_module(target, self._map(call.args), self._map(call.kwargs))
        except KeyError:
            return
        self._name(call.output, new)

    def _name(self, value: Any, new: fx.Node) -> None:
        """Let the traced nodes in ``value``, a node or a structure of them, be found as parts of ``new``."""
        if isinstance(value, fx.Node):
            self.env.setdefault(value, new)
        for take, key, part in parts_of(value):
            if nodes_in(part):
                taken = self.graph.call_function(take, (new, key))
                self.parts.append(taken)
                self._name(part, taken)

    def _map(self, value: Any) -> Any:
        """A structure of traced nodes as one of new ones, its containers made again as what they were."""
        if isinstance(value, Made):
            return self.graph.call_function(value.kind, self._map(value.args), self._map(value.kwargs))
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self._map, value))
        if isinstance(value, dict):
            return {key: self._map(item) for key, item in value.items()}
        return self._tensor(value) if isinstance(value, Tensor) else fx.map_arg(value, self._value)

    def _tensor(self, value: Tensor) -> fx.Node:
        """A tensor that no operation of the forward has made: one that it made itself, or held all the time."""
        held = chain(self.call.module.named_parameters(), self.call.module.named_buffers())
        name = next((name for name, tensor in held if tensor is value), None)
        return self.graph.get_attr(name or self._constant("_constant", value))

    def _value(self, node: fx.Node) -> fx.Node:
        """The new node of a traced one; a fold is found under the result that it replaced."""
        return self.env[node]  # type: ignore[no-any-return]

    def _held(self, node: fx.Node) -> str | None:
        """The name of a tensor that the forward makes itself, whatever it is given: it goes with the program."""
        unit, target = self.layout.flow.unit, str(node.target)
        if node.op != "get_attr" or target not in unit.constants or _is_there(unit.root, target):
            return None
        return self._constant(target.replace(".", "_"), unit.constants[target])

    def _constant(self, name: str, value: Tensor) -> str:
        """The name of a constant: none of the module's, nor of a constant of another method that was rewritten."""
        while self.constants.get(name, value) is not value or (
            name not in self.constants and hasattr(self.call.module, name)
        ):
            name += "_"
        self.constants[name] = value
        return name

    def _relative(self, target: str) -> str:
        if not self.call.path:
            return target
        if target.startswith(self.call.path + "."):
            return target[len(self.call.path) + 1 :]
        # A module that is shared (one activation for all layers) is traced by the first of its names.
        shared = next((m for name, m in self.layout.flow.unit.root.named_modules() if name == target), None)
        own = next((name for name, m in self.call.module._modules.items() if m is shared and m is not None), None)
        if own is None:
            raise RefusalError(Reason.CODE, f"{self.call.path} uses {target}, which stands elsewhere in the model")
        return own

    def _calls_with(self, dead: set[fx.Node]) -> set[Call]:
        return {c for n in dead for c in call_of(n).chain()}


def _is_there(root: Any, target: str) -> bool:
    for name in target.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True
