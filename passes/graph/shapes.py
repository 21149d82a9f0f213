"""How many dimensions the values of a graph have, how many channels, and which dtype, as far as its layers tell.

None stands for "not known", which is always allowed; what is told is true for every input that the network accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.graph.opset import Kind, Operation, Rank, argument, base_operation
from passes.graph.weights import weight_like, weight_maker

__all__ = ["Known", "Shapes", "cast_to", "shapes_of"]


@dataclass(frozen=True)
class Known:
    """What a graph says itself of the tensor that a node gives, as its ``meta["known"]``; None where it does not."""

    rank: int | None
    channels: int | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Shapes:
    """Facts about values: number of dimensions, size of dimension 1, dtype. A value that is missing is not known."""

    rank: dict[fx.Node, int | None]
    channels: dict[fx.Node, int]
    dtype: dict[fx.Node, torch.dtype]


def shapes_of(
    nodes: Sequence[fx.Node],
    operations: Mapping[fx.Node, Operation],
    modules: Mapping[fx.Node, nn.Module],
    held: Mapping[fx.Node, Any],
    constant: set[fx.Node],
    ranks: Iterable[int | None],
) -> Shapes:
    """Shapes of all values, ``ranks`` being those of the inputs."""
    found, given = Shapes({}, {}, {}), list(ranks)
    for node in nodes:  # an input that a layer reads has that layer's dtype, or the layer would not take it
        operation, value = operations.get(node), node.args[0] if node.args else None
        weighs = operation is not None and operation.affine and operation.kind in _WEIGHS
        dtype = _weight_dtype(node, modules.get(node), held) if weighs else None
        if isinstance(value, fx.Node) and value.op == "placeholder" and dtype is not None:
            found.dtype.setdefault(value, dtype)
    for node in nodes:
        operation, module = operations.get(node), modules.get(node)
        if node.op == "placeholder":
            found.rank[node] = given.pop(0) if given else None
        known: Known | None = node.meta.get("known")
        if known is not None:
            found.rank[node] = known.rank
            if known.channels is not None:
                found.channels[node] = known.channels
            if known.dtype is not None:
                found.dtype[node] = known.dtype
        if known is not None or node.op == "placeholder":
            continue
        if node.op == "get_attr":
            tensor = held[node]
            if isinstance(tensor, Tensor):
                found.rank[node], found.dtype[node] = tensor.dim(), tensor.dtype
            continue
        found.rank[node] = _rank(node, operation, module, constant, found.rank)
        if operation is None:
            continue
        count = _channels(node, operation, module, held, found)
        if count is not None:
            found.channels[node] = count
        dtype = _dtype(node, operation, module, found)
        if dtype is not None:
            found.dtype[node] = dtype
    return found


# ------------------------------------------------------------------ number of dimensions


def _rank(
    node: fx.Node,
    operation: Operation | None,
    module: nn.Module | None,
    constant: set[fx.Node],
    rank: dict[fx.Node, int | None],
) -> int | None:
    if operation is None:  # a convolution that pads by a rule of its own still gives maps
        base = None if module is None else base_operation(module)
        return base.n + 2 if base is not None and base.kind is Kind.CONV and base.n is not None else None
    inputs = [rank.get(n) for n in node.all_input_nodes if n not in constant] or [
        rank.get(n) for n in node.all_input_nodes
    ]
    first = inputs[0] if inputs else None
    if operation.rank is Rank.SPATIAL:
        assert operation.n is not None
        return operation.n + 2
    if operation.rank is Rank.SAME:
        return first
    if operation.id == "matmul":
        every = [rank.get(n) for n in node.all_input_nodes]
        known = [r for r in every if r is not None and r >= 2]  # a vector takes one away
        return max(known) if len(known) == len(every) else None
    if operation.rank is Rank.LARGEST:
        every = [rank.get(n) for n in node.all_input_nodes]
        known = [r for r in every if r is not None]
        return max(known) if None not in inputs and known else None
    if operation.id == "cat":  # all have as many; an empty one of a single dimension is passed over
        return max((r for r in inputs if r is not None and r > 1), default=None)
    if operation.kind is Kind.REDUCTION:
        return _reduced(node, first)
    if operation.id in ("view", "reshape") and node.op == "call_method":
        return len(node.args) - 1 if len(node.args) > 2 else None
    if operation.id == "flatten":
        return _flattened(node, module, first)
    if operation.id == "view_as":
        return rank.get(node.args[1]) if isinstance(argument(node, 1, "other"), fx.Node) else None  # type: ignore[arg-type]
    return None


def _reduced(node: fx.Node, rank: int | None) -> int | None:
    dims = argument(node, 1, "dim")
    if rank is None or dims is None:
        return None
    if argument(node, 2, "keepdim", False):
        return rank
    return rank - (len(dims) if isinstance(dims, (tuple, list)) else 1)


def _flattened(node: fx.Node, module: nn.Module | None, rank: int | None) -> int | None:
    start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    if isinstance(module, nn.Flatten):
        start, end = module.start_dim, module.end_dim
    if not isinstance(start, int) or not isinstance(end, int) or start < 0:
        return None
    if end == -1:
        return start + 1
    return rank - (end - start) if rank is not None and end >= 0 else None


# ------------------------------------------------------------------ channels


def _channels(
    node: fx.Node, operation: Operation, module: nn.Module | None, held: Mapping[fx.Node, Any], found: Shapes
) -> int | None:
    """Size of dimension 1 of a feature map, where a convolution or batch norm in front of it says so."""
    own = operation.kind in (Kind.CONV, Kind.CONV_TRANSPOSE) or operation.id.startswith("batch_norm")
    if own and module is not None:
        count = getattr(module, "out_channels", None) or getattr(module, "num_features", None)
        return int(count) if count else None
    tensor = held.get(argument(node, 1, "weight")) if own else None
    if isinstance(tensor, Tensor) and operation.kind is not Kind.CONV_TRANSPOSE and tensor.dim() > 0:
        return int(tensor.shape[0])
    if not operation.keeps_channels:
        return None
    counts = {found.channels.get(n) for n in node.all_input_nodes}  # with a constant, broadcasting may change it
    return counts.pop() if len(counts) == 1 else None


# ------------------------------------------------------------------ dtypes


def cast_to(node: fx.Node, operation: Operation, dtypes: Mapping[fx.Node, torch.dtype]) -> torch.dtype | None:
    """The dtype that a cast gives, None if it is not known or if there is more to it than a dtype."""
    fixed = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    options = {k: v for k, v in node.kwargs.items() if k not in ("memory_format", "copy", "non_blocking")}
    if operation.id in fixed:
        return None if options or len(node.args) > 1 else fixed[operation.id]
    given = [*node.args[1:], *options.values()]
    wanted = given[0] if len(given) == 1 and options.keys() <= {"dtype", "other"} else None
    if isinstance(wanted, fx.Node) and operation.id in ("to", "type_as"):
        return dtypes.get(wanted)
    return wanted if isinstance(wanted, torch.dtype) and operation.id == "to" else None


def _weight_dtype(node: fx.Node, module: nn.Module | None, held: Mapping[fx.Node, Any]) -> torch.dtype | None:
    weight: Any = _weight(module) if module is not None else held.get(argument(node, 1, "weight"))
    return weight.dtype if isinstance(weight, Tensor) else None


def _weight(module: nn.Module) -> Any:
    """A layer's weight, or one like it: what a hook has computed before the model was cast says nothing."""
    return getattr(module, "weight", None) if weight_maker(module) is None else weight_like(module)


_WEIGHS = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR)
_AS_INPUT = {Kind.POINTWISE, Kind.SOFTMAX, Kind.POOL, Kind.PAD, Kind.MOVEMENT, Kind.DROPOUT, Kind.NORM}


def _dtype(node: fx.Node, operation: Operation, module: nn.Module | None, found: Shapes) -> torch.dtype | None:
    if operation.kind is Kind.CAST:
        return cast_to(node, operation, found.dtype)
    if operation.kind in _WEIGHS:
        weight: Any = _weight(module) if module is not None else argument(node, 1, "weight")
        return weight.dtype if isinstance(weight, Tensor) else found.dtype.get(weight)
    inputs = node.all_input_nodes
    if operation.kind is Kind.ARITHMETIC:
        return promoted([*node.args, *node.kwargs.values()], found)
    if operation.id == "getattr":  # what is asked for the dtype of a value is cast to that
        return found.dtype.get(inputs[0]) if inputs and node.args[1:] == ("dtype",) else None
    if operation.kind not in _AS_INPUT or not inputs:
        return None
    kinds = {found.dtype.get(n) for n in inputs[: 1 if operation.kind is Kind.NORM else None]}
    return kinds.pop() if len(kinds) == 1 else None


def promoted(operands: list[Any], found: Shapes) -> torch.dtype | None:
    """The dtype of arithmetic: numbers and tensors without dimensions count for less; None if not known."""
    weak: torch.dtype | None = None
    strong: torch.dtype | None = None
    for operand in operands:
        if isinstance(operand, fx.Node):
            dtype, rank = found.dtype.get(operand), found.rank.get(operand)
            if dtype is None or (rank is None and strong not in (None, dtype)):
                return None
            if rank == 0:
                weak = dtype if weak is None else torch.promote_types(weak, dtype)
            else:
                strong = dtype if strong is None else torch.promote_types(strong, dtype)
        elif not isinstance(operand, (int, float)):
            return None
    if strong is None or (strong.is_floating_point and not (weak is not None and weak.is_complex)):
        return strong or weak
    return None
