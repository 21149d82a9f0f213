"""What a node of a graph under construction tells: whether it is a tensor, a constant, or only asked a question."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from passes.graph.opset import Kind, Operation, argument, is_torch, operation_of
from passes.graph.within import Within

__all__ = ["LAYERS", "is_constant", "is_query", "may_draw", "surely_tensor"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Module, nn.DataParallel)

LAYERS = frozenset(
    cls
    for space in (nn, torch.ao.nn.quantizable, torch.ao.nn.qat, torch.ao.nn.intrinsic)
    for cls in vars(space).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in _CONTAINERS
)
"""Torch's own layers, by their exact class: one call each, known to the laws or not."""

_OF_TENSORS = {
    Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR, Kind.NORM, Kind.PAD, Kind.POINTWISE, Kind.SOFTMAX,
}  # fmt: skip
"""Operations that take a tensor and give one."""

_KEEPS_KIND = {Kind.ARITHMETIC, Kind.CAST, Kind.DROPOUT, Kind.MOVEMENT}
"""Operations that give a tensor for a tensor, those that take it apart aside; numbers and sizes know them as well."""

_APART = {"getitem", "chunk", "split", "tensor_split", "unbind", "split_with_sizes"}


def surely_tensor(node: fx.Node, called: Callable[[fx.Node], nn.Module | None]) -> bool:
    """Whether a node's value is a tensor whatever the inputs are; ``called`` gives what a node calls."""
    module = called(node)
    if node.op == "get_attr" or isinstance(module, Within):  # which was seen to give one, or stands where a layer does
        return True
    operation = operation_of(node, module)
    if operation is None:
        return False
    if operation.kind in _OF_TENSORS:
        return True
    if operation.kind not in _KEEPS_KIND or operation.id in _APART:
        return False
    return any(surely_tensor(source, called) for source in node.all_input_nodes)


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on parameters and constants only."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder" or (node.op != "get_attr" and not node.all_input_nodes):
            return False
        sources = set(node.all_input_nodes) - seen
        seen |= sources
        todo += sources
    return True


def may_draw(node: fx.Node, operation: Operation | None) -> bool:
    """Whether the value may be another one in the next call."""
    if operation is None:
        return not is_torch(node)
    if operation.kind is Kind.DROPOUT and node.op == "call_function":
        return argument(node, 2, "training", True) is not False
    return operation.random and operation.kind is not Kind.DROPOUT


def is_query(node: fx.Node) -> bool:
    """An operation that may have been put in only so that a question could be asked of its result."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _QUERIES


_QUERIES = frozenset((
    "getattr", "getitem", "size", "dim", "numel", "nelement", "eq", "ne", "lt", "le", "gt", "ge", "is_floating_point",
    "is_contiguous", "add", "sub", "mul", "floordiv", "mod", "and_", "or_", "not_", "chunk", "split", "unbind",
))  # fmt: skip
