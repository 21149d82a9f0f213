"""The one convolution that a module is: its form on meta tensors, in numbers, or as a program that runs in training.

All three come from the same laws that :mod:`passes.collapse` folds with. Nothing here knows a block.
"""

from __future__ import annotations

import copy
import math
import threading
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module

from passes.algebra.conv_form import ConvForm, Form
from passes.algebra.geometry import Geometry
from passes.algebra.kernels import times_pointwise
from passes.algebra.lowering import emit, held_weight, target_of
from passes.algebra.opaque import OpaqueForm
from passes.algebra.told import Told
from passes.fold.candidates import Candidate
from passes.graph.capture import trace_units
from passes.graph.copies import shadow
from passes.graph.dataflow import Flow
from passes.graph.generated import forget_with
from passes.graph.leaf import without_hooks
from passes.graph.modes import kept_modes
from passes.graph.opset import Kind
from passes.laws.interpreter import Interpreter
from passes.laws.layouts import views
from passes.laws.regions import Contraction
from passes.laws.values import Signal
from passes.refusal import Reason, Refusal, RefusalError

__all__ = ["KernelProgram", "Reading", "plain_layer"]


class Reading:
    """A module read as one map from its input to its output.

    Raises :class:`RefusalError` if the module is not one convolution or linear layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        with kept_modes(module):
            units, untraced = trace_units(_Holder(module).eval())
        if not units or units[0].path:
            reason = untraced[0] if untraced else Refusal(Reason.UNTRACEABLE, Reason.UNTRACEABLE.value)
            raise RefusalError(reason.reason, reason.message, reason.layer)
        self.flow = Flow(units[0], {})
        self.entry = next(n for n in self.flow.nodes if n.op == "placeholder")
        returned = self.flow.nodes[-1].args[0]
        if not isinstance(returned, fx.Node):
            raise RefusalError(Reason.NOT_AFFINE, "it does not return one tensor")
        self.result = returned
        self.graph = Contraction(self.flow)
        found = views(self.graph, self.entry)
        if not found:
            raise RefusalError(Reason.NO_CONVOLUTION)
        self.view, self.channels = found[0]

    def form(self, dtype: torch.dtype | None = torch.float64) -> ConvForm:
        """The map with its numbers in ``dtype``; shapes only with None. Differentiable where gradients are on."""
        form = self.layer(dtype)
        return form.refuse() if isinstance(form, OpaqueForm) else form

    def layer(self, dtype: torch.dtype | None = torch.float64) -> Form:
        """The same of a layer that pads by a rule of its own too."""
        form: Form = self._signal(dtype)[0].form
        return form

    def multiply_adds(self) -> float:
        """Multiply-adds of all layers inside, per output position."""
        signal, interpreter = self._signal(None)
        inside = [n for n in self.flow.nodes if n not in self.flow.constant and n is not self.entry]
        with kept_modes(self.module):
            found = [(n, s) for n in inside if isinstance(s := interpreter.value(n), Signal)]
        # A transposed convolution multiplies each pixel of its input with each tap, and no zero between them.
        spread = {n for n in inside if (known := self.flow.operations.get(n)) and known.kind is Kind.CONV_TRANSPOSE}
        zeros = (math.prod(s.form.up) if n in spread and isinstance(s.form, ConvForm) else 1 for n, s in found)
        return float(sum(s.work * s.form.rate / z for (_, s), z in zip(found, zeros, strict=True)) / signal.form.rate)

    def candidate(self) -> Candidate:
        """The whole module as a region."""
        flow, (signal, interpreter) = self.flow, self._signal(None)
        inner = [n for n in flow.nodes if n.op not in ("placeholder", "output")]
        dying = tuple(n for n in inner if n not in flow.constant)
        signals = [s for n in dying if isinstance(s := interpreter.value(n), Signal)]
        tensors = {id(t): t for n in inner for t in flow.tensors.get(n, ())}
        return Candidate(
            self.entry, self.result, self.view, self.channels, signal.form, (),
            between=dying,
            dying=dying,
            constants=tuple(n for n in inner if n in flow.constant),
            numbers=sum(t.numel() for t in tensors.values()),
            work=sum(s.work * s.form.rate for s in signals),
            computed=0,
            convs=frozenset(),
            gain=(True, 0, True, 0, 0),
        )  # fmt: skip

    def _signal(self, dtype: torch.dtype | None) -> tuple[Signal, Interpreter]:
        interpreter = Interpreter(self.graph, self.entry, self.view, self.channels, dtype)
        with kept_modes(self.module):
            value = interpreter.value(self.result)
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        if not isinstance(value, Signal) or value.is_moved:
            raise RefusalError(Reason.LAYOUT)
        return value, interpreter


def plain_layer(block: nn.Module) -> tuple[dict[str, Tensor | None], nn.Module]:
    """The convolution that a block is in eval mode, in its dtype and on its device; before it, its numbers by name.

    The numbers are differentiable, and refuse a change in place, which would change nothing.

    Raises :class:`RefusalError` if the block is not one convolution.
    """
    alone = copy.copy(without_hooks(block))
    vars(alone)["folded"] = None  # the sum of its branches, whatever form it trains in: nothing is recorded meanwhile
    form, target = Reading(alone).form(), target_of(block.parameters())
    with torch.no_grad():
        layer = emit(form, target).eval()

    def told(number: Tensor) -> Tensor:
        return number.to(target.device, target.dtype).as_subclass(Told)

    return {"weight": told(held_weight(form)), "bias": None if form.bias is None else told(form.bias)}, layer


class _Holder(nn.Module):
    """Gives a module a parent, so that a single layer is read like any other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class KernelProgram:
    """Weight and bias of a module's equivalent convolution as straight-line code over its parameters and buffers.

    The laws run once, on fake tensors; what they did is recorded and runs again in every call, with autograd.

    Raises :class:`RefusalError` if the module is not one convolution.

    Args:
        module: the module.
        dtype: in which the kernel is computed; what is given later has it, too, or all of it another one.

    Attributes:
        form: the convolution without numbers.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        # While a kernel is recorded, weights in other modules stand for the real ones, which another thread may use.
        module = shadow(module)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.names = tuple(name for name, tensor in state.items() if tensor.is_floating_point())
        reading = Reading(module)
        self.form = reading.form(None)

        def kernel(*values: Tensor) -> tuple[Tensor, Tensor | None]:
            named = {f"module.{name}": value for name, value in zip(self.names, values, strict=True)}
            # With gradients on, weights are read as they are, not through a copy in float64.
            with _reparametrize_module(reading.flow.unit.root, named), torch.enable_grad():
                form = reading.form(dtype)
            return form.weight.contiguous(), form.bias

        # Not on the meta device: there the laws tell shapes only.
        floats = [state[name] for name in self.names]
        example = [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="cpu") for t in floats]
        # Without in-place operations, so that every value is a function of others wherever the code is read again.
        functional = torch.func.functionalize(kernel, remove="mutations")
        # What the caller computes in is none of the kernel's business: autocast would be recorded, too.
        with torch.autocast("cpu", enabled=False):
            recorded = make_fx(functional, tracing_mode="fake")(*example)
        forget_with(type(recorded).forward)
        for node in recorded.graph.nodes:
            if node.target in _COPIES and not node.kwargs:
                node.replace_all_uses_with(node.args[0])  # nothing is changed in place: no copy is needed
            # A view is recorded for the layout that the weights have now; channels_last may come or go later.
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
        _follow_the_device(recorded)
        for node in recorded.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
            _as_product(node)
        _scale_small_numbers(recorded.graph)
        _have_own_gradients(recorded.graph)
        recorded.graph.eliminate_dead_code()
        recorded.recompile()
        forget_with(type(recorded).forward)
        self._run: Any = recorded.forward  # plain code: not a module of its own, for whoever traces the caller

    @staticmethod
    def of(module: nn.Module, dtype: torch.dtype) -> KernelProgram:
        """The program of a module; modules that differ in their numbers only have one between them."""
        key = _structure(module)
        program = None if key is None else _PROGRAMS.get((dtype, key))
        if program is None:
            with _ONE_AT_A_TIME:
                program = KernelProgram(module, dtype)
            if key is not None:
                _PROGRAMS[dtype, key] = program
        return program

    def __call__(self, values: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return self._run(*values)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: Any) -> KernelProgram:
        return self  # it holds code, no weights


def _follow_the_device(recorded: fx.GraphModule) -> None:
    """Let recorded code make its tensors where its weights are, wherever those were when it was recorded.

    Constants are written as numbers, so that the code has no tensors of its own. One that is the same number throughout
    is made on a GPU itself, which nobody waits for.
    """
    graph = recorded.graph
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (inputs[0], "device"))
    for node in list(graph.nodes):
        if node.op == "call_function" and node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        elif node.op == "get_attr":
            held = getattr(recorded, node.target)
            same = held.numel() > 0 and bool((held == held.flatten()[0]).all())
            maker: Any = torch.full if same else torch.tensor
            given = (tuple(held.shape), held.flatten()[0].item()) if same else (held.tolist(),)
            with graph.inserting_after(device):
                made = graph.call_function(maker, given, {"dtype": held.dtype, "device": device})
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _as_product(node: fx.Node) -> None:
    """Let a product of kernels be recorded as such: which way is best depends on the device that it runs on."""
    b, weight = node.args[:2]
    with node.graph.inserting_before(node):
        a = node.graph.call_function(torch.ops.aten.transpose.int, (weight, 0, 1))
        product = node.graph.call_function(times_pointwise, (b, a))
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _scale_small_numbers(graph: fx.Graph) -> None:
    """Let a factor per output channel multiply the smaller part of an outer product, not the whole kernel.

    A mean over windows behind a 1x1 is such a product: of as many numbers per channel as there are taps, and of as many
    as there are channels.
    """
    for node in graph.find_nodes(op="call_function", target=_aten.mul.Tensor):
        product, factor = node.args
        shapes: list[Any] = []
        while _calls(product, _aten.reshape.default) and len(product.users) == 1:
            product, shape = product.args
            shapes.append(shape)
        if not _calls(product, _aten.mul.Tensor) or len(product.users) > 1 or not isinstance(factor, fx.Node):
            continue
        a, b, numbers, kernel = (each.meta["val"].shape for each in (*product.args, factor, node))
        outer = len(a) == len(b) == 3 and a[0] == b[0] == kernel[0] and 1 in (a[1] * b[2], a[2] * b[1])
        if not outer or numbers != (kernel[0], *(1,) * (len(kernel) - 1)):
            continue
        small, large = sorted(product.args, key=lambda each: each.meta["val"].numel())
        with graph.inserting_before(node):
            per_row = graph.call_function(_aten.reshape.default, (factor, [-1, 1, 1]))
            scaled = graph.call_function(_aten.mul.Tensor, (small, per_row))
            result = graph.call_function(_aten.mul.Tensor, (scaled, large))
            for shape in reversed(shapes):
                result = graph.call_function(_aten.reshape.default, (result, shape))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _have_own_gradients(graph: fx.Graph) -> None:
    """Let no two inputs have one gradient between them.

    The parts of a sum do, and autograd takes a view of it for a parameter's own: unscaling or clipping one gradient in
    place would do so to all. A product has a gradient for each of its factors.
    """
    parts: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        whole, last = node, None
        while last is not whole and len(whole.users) == 1:
            last, (user,) = whole, whole.users
            if user.target in _VIEWS or user.target in _SUMS:
                whole = user
        parts.setdefault(whole, []).append(node)
    for node in (node for sharing in parts.values() if len(sharing) > 1 for node in sharing):
        (user,) = node.users
        with graph.inserting_before(user):
            user.replace_input_with(node, graph.call_function(torch.ops.aten.mul.Tensor, (node, 1)))


_aten = torch.ops.aten
_VIEWS = {
    _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.permute.default, _aten.alias.default,
}  # fmt: skip
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.lift_fresh_copy.default)

_PROGRAMS: WeakValueDictionary[Any, KernelProgram] = WeakValueDictionary()
"""By the structure of the module, for as long as some block runs it: a network has few kinds of layers."""

_ONE_AT_A_TIME = threading.RLock()
"""make_fx puts its own in the place of Python's functions, for all threads."""

_INTERNAL = nn.Module().__dict__.keys()


def _structure(module: nn.Module) -> Any:
    """Everything that a module's graph can depend on but its numbers; None where that cannot be told."""
    found: list[Any] = []
    for path, part in module.named_modules():
        own = part.__dict__
        if any(own[name] for name in _INTERNAL if name.endswith("_hooks")):
            return None
        # The graph is that of eval mode, whatever mode the module is in.
        facts = {name: value for name, value in own.items() if name not in _INTERNAL}
        tensors = [(name, t) for table in (own["_parameters"], own["_buffers"]) for name, t in table.items()]
        layouts = [(name, None if t is None else (t.shape, t.stride(), t.dtype, t.device)) for name, t in tensors]
        frozen = _frozen(facts)
        if frozen is None:
            return None
        found.append((path, type(part), frozen, tuple(layouts)))
    return tuple(found)


def _frozen(facts: dict[str, Any]) -> Any:
    """Plain attributes by name, in a form that can be compared; None if one of them is anything else."""
    plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, Geometry)
    found = []
    for name, value in facts.items():
        items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(item, plain) for item in items):
            return None
        # 1, 1.0 and True are equal, and may mean different things.
        found.append((name, type(value), tuple((type(item), item) for item in items)))
    return tuple(found)
