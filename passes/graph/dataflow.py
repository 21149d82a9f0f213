"""The dataflow of one traced unit: what is constant, who holds which weight, how many dimensions a value has."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from passes.graph.capture import Unit
from passes.graph.copies import deep_copy
from passes.laws.laws import is_affine, is_shape_query
from passes.refusal import Reason, RefusalError

__all__ = ["ENTRY", "Constants", "Flow", "holder_tensors"]

ENTRY = "entry"
"""The virtual node in front of all inputs in the dominator tree."""

_RANDOM = {torch.rand, torch.randn, torch.randint, torch.bernoulli, torch.normal, torch.rand_like, torch.randn_like}


class Flow:
    """Facts about a unit's graph that every region needs.

    Args:
        unit: the traced unit.
        owners: how many places of the whole model register the tensor of an id.
        ranks: numbers of dimensions of the unit's placeholders, None where unknown.
    """

    def __init__(self, unit: Unit, owners: dict[int, int], ranks: Iterable[int | None] = ()) -> None:
        self.unit = unit
        self.owners = owners
        self.nodes: list[fx.Node] = list(unit.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.modules = {n: unit.module(n) for n in self.nodes if n.op == "call_module"}
        self.constant = self._find_constants()
        self.tensors = {n: holder_tensors(unit, n) for n in self.nodes if n.op in ("call_module", "get_attr")}
        self.holders: dict[int, set[fx.Node]] = defaultdict(set)
        for node, tensors in self.tensors.items():
            for tensor in tensors:
                self.holders[id(tensor)].add(node)
        self.affine = {
            n for n in self.nodes if is_affine(n.op, n.target, self.modules.get(n)) or self._may_be_probed(n)
        }
        self.rank = self._find_ranks(list(ranks))
        self.channels: dict[fx.Node, int] = {}
        for node in self.nodes:
            count = self._channels_of(node)
            if count is not None:
                self.channels[node] = count

    def add(self, node: fx.Node, after: fx.Node) -> None:
        """Enter a node that stands for a fold, at the place of the result it replaces."""
        self.nodes.append(node)
        self.order[node] = self.order[after]
        self.affine.add(node)
        self.rank[node] = self.rank.get(after)

    def sharers(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that hold one of the weights that ``node`` holds."""
        return {other for t in self.tensors.get(node, ()) for other in self.holders[id(t)]}

    def shape_only(self, user: fx.Node) -> bool:
        """Whether ``user`` asks only for its input's shape."""
        return is_shape_query(user.op, user.target, user.args)

    def _may_be_probed(self, node: fx.Node) -> bool:
        refusal = self.unit.opaque.get(str(node.target)) if node.op == "call_module" else None
        alone = len(node.args) == 1 and not node.kwargs
        return refusal is not None and refusal.reason is Reason.UNTRACEABLE and alone

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that ``node`` depends on, for their data or their shape; constants left out."""
        return [n for n in node.all_input_nodes if n not in self.constant]

    def dominators(self, dead: set[fx.Node]) -> dict[Any, Any]:
        """Immediate dominator of every live node that depends on an input."""
        import networkx as nx  # here, because loading it takes longer than loading all of this package

        graph = nx.DiGraph()
        graph.add_node(ENTRY)
        for node in self.nodes:
            if node in self.constant or node in dead or node.op == "output":
                continue
            inputs = self.inputs(node)
            if node.op == "placeholder" or not inputs:
                graph.add_edge(ENTRY, node)
            for source in inputs:
                graph.add_edge(source, node)
        return dict(nx.immediate_dominators(graph, ENTRY))

    def _find_constants(self) -> set[fx.Node]:
        constant: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr":
                if isinstance(self.unit.attribute(str(node.target)), Tensor):
                    constant.add(node)
            elif node.op in ("placeholder", "output") or node.target in _RANDOM:
                continue
            elif all(n in constant for n in node.all_input_nodes):
                opaque = node.op == "call_module" and str(node.target) in self.unit.opaque
                if not opaque and (node.all_input_nodes or node.op == "call_module"):
                    constant.add(node)
        return constant

    def _find_ranks(self, given: list[int | None]) -> dict[fx.Node, int | None]:
        rank: dict[fx.Node, int | None] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                rank[node] = given.pop(0) if given else None
            else:
                rank[node] = self._rank_of(node, rank)
        return rank

    def _channels_of(self, node: fx.Node) -> int | None:
        """Size of dimension 1 of a feature map, where a convolution or batch norm in front of it says so."""
        module = self.modules.get(node)
        if module is not None and (_spatial(module) is not None or isinstance(module, _BatchNorm)):
            return int(getattr(module, "out_channels", None) or module.num_features)  # type: ignore[arg-type]
        held = node.args[1] if len(node.args) > 1 and node.op == "call_function" else None
        if (
            isinstance(held, fx.Node)
            and held.op == "get_attr"
            and isinstance(self.unit.attribute(str(held.target)), Tensor)
        ):
            shape = self.unit.attribute(str(held.target)).shape
            if node.target in (F.conv1d, F.conv2d, F.conv3d) or (node.target is F.batch_norm and len(shape) == 1):
                return int(shape[0])
        counts = {self.channels.get(n) for n in node.all_input_nodes}  # with a constant, broadcasting may change it
        keeps = (type(module).__module__ in _SAME_CHANNELS) if module is not None else node.target in _ELEMENTWISE_ONE
        return counts.pop() if keeps and len(counts) == 1 and not isinstance(module, nn.GLU) else None

    def _rank_of(self, node: fx.Node, rank: dict[fx.Node, int | None]) -> int | None:
        inputs = [rank.get(n) for n in node.all_input_nodes if n not in self.constant]
        same = inputs[0] if inputs else None
        module = self.modules.get(node)
        if module is not None:
            n = _spatial(module)
            if n is not None:
                return n + 2
            if isinstance(module, nn.Flatten):
                return module.start_dim + 1 if module.end_dim == -1 and module.start_dim >= 0 else None
            return same if type(module).__module__ in _SAME_RANK else None
        if node.op == "call_method" and node.target in ("view", "reshape"):
            return len(node.args) - 1 if len(node.args) > 2 else None
        if node.target in ("flatten", torch.flatten):
            start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
            end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
            if not isinstance(start, int) or not isinstance(end, int) or start < 0:
                return None
            if end == -1:
                return start + 1
            return same - (end - start) if same is not None and end >= 0 else None
        if node.target in ("mean", "sum", "amax", torch.mean, torch.sum, torch.amax):
            return _reduced(node, same)
        if node.target in _CONV_RANK:
            return _CONV_RANK[node.target]
        if node.target in ("reshape_as", "view_as") and len(node.all_input_nodes) == 2:
            return rank.get(node.all_input_nodes[1])
        known = [r for r in inputs if r is not None]
        if node.target in _ELEMENTWISE:
            return max(known) if len(known) == len(inputs) and known else None
        if node.target in _KEEPS_RANK:
            return same
        return None


class Constants:
    """Values that depend on parameters only: in ``dtype`` for folding, meta tensors (``None``) for planning."""

    def __init__(self, flow: Flow, dtype: torch.dtype | None) -> None:
        self.flow = flow
        self.dtype = dtype
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Value of a constant node."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """A layer's weight; one that is computed on each access is computed in float64, or differentiably."""
        plain = module._parameters.get(name, module._buffers.get(name))
        if plain is not None or name in module._parameters or name in module._buffers:
            return None if plain is None else self._cast(plain)
        exact = module if torch.is_grad_enabled() else deep_copy(module).double()
        value = _computed(exact, name)
        return None if value is None else self._cast(value)

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = self.flow.unit.attribute(str(node.target))
            value = self._cast(held)
            # An expression may work in place; the model's own weight must never be what it works on.
            return value.clone() if isinstance(value, Tensor) and _share_memory(value, held) else value
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        try:
            if node.op == "call_module":
                module = self.flow.modules[node]
                real = Constants(self.flow, self.dtype or torch.float64)
                args = fx.map_arg(node.args, real.value)
                module = module if torch.is_grad_enabled() else deep_copy(module).double()
                return self._cast(module(*args, **fx.map_arg(node.kwargs, real.value)))
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        # User code on constants may fail in any way, on meta tensors above all; then the weight is not known.
        except Exception as error:
            raise RefusalError(Reason.NOT_AFFINE, f"weight expression failed: {error}".splitlines()[0]) from error

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not torch.is_grad_enabled():
            value = value.detach()
        if not value.is_floating_point():
            return value
        if self.dtype is None:
            return torch.empty(value.shape, dtype=torch.float64, device="meta")
        if value.device.type == "mps":  # no float64 there
            value = value.cpu()
        return value.to(self.dtype)


def holder_tensors(unit: Unit, node: fx.Node) -> list[Tensor]:
    """Floating-point parameters and buffers that a node holds."""
    if node.op == "call_module":
        module = unit.module(node)
        tensors: list[Any] = [*module.parameters(), *module.buffers()]
    else:
        tensors = [unit.attribute(str(node.target))]
    return [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those that hold none do not."""
    if a.device.type == "meta" or isinstance(a, FakeTensor):
        return False
    return a.data_ptr() == b.data_ptr()


def _computed(module: nn.Module, name: str) -> Tensor | None:
    """A weight behind torch.nn.utils' weight_norm or spectral_norm hooks, or behind a parametrization."""
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            extra = {"do_power_iteration": False} if "n_power_iterations" in vars(hook) else {}
            return hook.compute_weight(module, **extra)  # type: ignore[no-any-return]
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _spatial(module: nn.Module) -> int | None:
    for n, kinds in enumerate(_BY_DIMENSION, start=1):
        if isinstance(module, kinds):
            return n
    return None


def _reduced(node: fx.Node, rank: int | None) -> int | None:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if rank is None or dims is None:
        return None
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return rank if keep else rank - (len(dims) if isinstance(dims, (tuple, list)) else 1)


_BY_DIMENSION = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
)
_SAME_RANK = {
    f"torch.nn.modules.{name}" for name in ("activation", "dropout", "linear", "batchnorm", "normalization", "pooling")
}
_SAME_CHANNELS = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "linear", "pooling")}
_ELEMENTWISE_ONE = {
    F.relu, F.gelu, F.silu, F.hardswish, F.dropout, F.relu6, F.leaky_relu, F.hardsigmoid, torch.relu, torch.sigmoid,
    torch.tanh, "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", operator.add, operator.iadd, torch.add,
    F.max_pool2d, F.avg_pool2d,
}  # fmt: skip
_CONV_RANK: dict[Any, int] = {
    F.conv1d: 3, F.conv2d: 4, F.conv3d: 5, F.conv_transpose1d: 3, F.conv_transpose2d: 4, F.conv_transpose3d: 5,
    torch.conv1d: 3, torch.conv2d: 4, torch.conv3d: 5,
    F.avg_pool2d: 4, F.max_pool2d: 4, F.adaptive_avg_pool2d: 4,
}  # fmt: skip
_ELEMENTWISE = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul, torch.add, torch.mul,
    "add", "mul", "add_", "mul_", "sub", "div",
}  # fmt: skip
_KEEPS_RANK = {
    F.linear, F.relu, F.gelu, F.silu, F.hardswish, F.dropout, F.layer_norm, F.batch_norm, F.softmax, torch.relu,
    torch.sigmoid, torch.tanh, F.normalize, "transpose", "permute", "contiguous", "clone", "sigmoid", "tanh", "relu",
    "softmax", torch.transpose, torch.permute, operator.neg, "chunk", torch.chunk, F.pad, "to", "float",
    F.leaky_relu, F.hardsigmoid, F.relu6, torch.flip, torch.roll,
}  # fmt: skip
