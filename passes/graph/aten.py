"""Graphs of aten calls, as ``torch.export`` gives them, in the terms of the table of operations.

Each call whose meaning the laws know becomes one of the torch function that they are written for; all others stay as
they are, and are read through by nobody. What a region computes is never taken from here: its proof replays the
calls that were in the graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.graph.opset import operation_of
from passes.graph.shapes import Known
from passes.refusal import Reason, Refusal

__all__ = ["CONVS", "TRANSPOSED", "Translated", "is_aten", "is_idle", "retarget", "translated"]

Rule = Callable[..., fx.Node | None]

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Translated:
    """A graph in the terms of the table.

    Args:
        graph: placeholders are the inputs, weights are ``get_attr`` nodes.
        origin: the node of the source that gives the same value.
        unread: calls that are not in the table, by name.
        constants: what calls give that make the same tensor each time, by the name of their ``get_attr`` node.
    """

    graph: fx.Graph
    origin: Mapping[fx.Node, fx.Node]
    unread: Counter[str]
    constants: Mapping[str, Tensor]


def is_aten(graph: fx.Graph) -> bool:
    """Whether this is a graph of aten calls: all that computes in it is one."""
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    overloads = [node for node in calls if isinstance(node.target, torch._ops.OpOverload)]
    others = [n for n in calls if n not in overloads and n.target is not operator.getitem and not _is_guard(n)]
    return bool(overloads) and all(n.op == "call_function" and not _is_function(n.target) for n in others)


def translated(source: fx.Graph, weights: Mapping[str, str]) -> Translated:
    """Translate a graph.

    Args:
        source: not changed.
        weights: for placeholders that stand for weights, their name in the state dict.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    origin: dict[fx.Node, fx.Node] = {}
    unread = Counter[str]()
    refusals: dict[fx.Node, Refusal] = {}
    constants: dict[str, Tensor] = {}
    # Where something is written, what is read depends on when.
    compute = _nothing if any(_is_changing(node.target) for node in source.nodes) else _computed
    inner, parts = _inner_graphs(source), _parts_of_rows(source)
    for node in source.nodes:
        if _is_guard(node) or node in inner or node in parts or is_idle(node):
            continue
        rows = _rows(node)
        if node.op == "placeholder" and node.name in weights:
            made = graph.get_attr(weights[node.name])
        elif (constant := _filled(node)) is not None or (constant := compute(node, constants)) is not None:
            constants[node.name] = constant
            made = graph.get_attr(node.name)
        elif rows is not None:
            made = _linear_of_rows(graph, *rows, new)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: None if n in inner else new[n])
            made = _call(graph, node, args, kwargs)
            if operation_of(made) is None and made.target is not operator.getitem:
                unread[str(node.target)] += 1
                refusals[made] = Refusal(Reason.NOT_AFFINE, f"{node.target} is not read")
        else:
            made = graph.node_copy(node, new.__getitem__)
        new[node] = made
        origin.setdefault(made, node)
        if made not in origin or origin[made] is node:
            made.meta = {"known": _known(node)}
        else:  # the first of several results, which is the value itself
            origin[made] = node
            made.meta["known"] = _known(node)
        if made in refusals:
            made.meta["refusal"] = refusals[made]
    return Translated(graph, origin, unread, constants)


_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
_PRODUCTS = ("aten.mm.default", "aten.addmm.default")


def _rows(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product of rows behind which a map of more dimensions is put together again, and the map before.

    Core aten has no linear layer for those: it lays all positions in one dimension, whatever their number is.
    """
    product = node.args[0] if str(node.target) in _VIEWS else None
    if not isinstance(product, fx.Node) or str(product.target) not in _PRODUCTS:
        return None
    flat = product.args[-2]
    if not isinstance(flat, fx.Node) or str(flat.target) not in _VIEWS or product.kwargs:
        return None
    whole = flat.args[0]
    assert isinstance(whole, fx.Node)
    before, between, after = (_shape(each) for each in (whole, flat, node))
    alike = len(before) > 2 and before[:-1] == after[:-1] and before[-1:] == between[1:]
    return (whole, product) if alike else None


def _shape(node: fx.Node) -> tuple[str, ...]:
    """Sizes as they are written, since open ones must not be asked."""
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()


def _linear_of_rows(graph: fx.Graph, whole: fx.Node, product: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    *bias, _, weight = product.args
    turned = graph.call_function(torch.transpose, (fx.map_arg(weight, new.__getitem__), 0, 1))
    return graph.call_function(F.linear, (new[whole], turned, *fx.map_arg(bias, new.__getitem__)))


def _parts_of_rows(graph: fx.Graph) -> set[fx.Node]:
    """The calls that are only there for such products."""
    products = {rows[1] for node in graph.nodes if (rows := _rows(node)) is not None}
    parts = {node for node in products if all(_rows(user) is not None for user in node.users)}
    flat = {node.args[-2] for node in parts}
    return parts | {n for n in flat if isinstance(n, fx.Node) and parts.issuperset(n.users)}


def retarget(graph: fx.Graph) -> None:
    """The same in place, for a traced module in whose code aten calls stand: each node stays the one that it is."""
    for node in list(graph.nodes):
        rule = _RULES.get(str(node.target)) if isinstance(node.target, torch._ops.OpOverload) else None
        if node.target is operator.getitem and _is_norm_of_several(node.args[0]) and node.args[1] == 0:
            node.target, node.args = torch.positive, node.args[:1]
        if rule is None:
            continue
        before = set(graph.nodes)
        with graph.inserting_before(node):
            made = rule(graph, node, *node.args, **node.kwargs)
        if made is None or made.op != node.op:
            if made is not None:
                graph.erase_node(made)
            continue
        node.target, node.args, node.kwargs = made.target, made.args, made.kwargs
        graph.erase_node(made)
        for new in set(graph.nodes) - before:
            new.meta = dict(node.meta)


def _call(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    if node.target is operator.getitem and _is_norm_of_several(node.args[0]) and node.args[1] == 0:
        return args[0]  # type: ignore[no-any-return]
    rule = _RULES.get(str(node.target))
    made = rule(graph, node, *args, **kwargs) if rule is not None else None
    assert callable(node.target)
    return graph.call_function(node.target, args, kwargs) if made is None else made


_FILLED = {"full": None, "new_full": None, "ones": 1, "new_ones": 1, "zeros": 0, "new_zeros": 0}
MOST = 1 << 20
"""Numbers of a tensor that a call fills."""


def _filled(node: fx.Node) -> Tensor | None:
    """The tensor that a call makes of one number, whatever it takes dtype and device from."""
    value, target = node.meta.get("val"), node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, Tensor):
        return None
    name = target._schema.name.removeprefix("aten::")
    if name not in _FILLED or not all(isinstance(size, int) for size in value.shape) or value.numel() > MOST:
        return None
    number = _FILLED[name] if _FILLED[name] is not None else node.args[-1]
    if not isinstance(number, (int, float)) or not value.is_floating_point():
        return None
    return torch.full(tuple(value.shape), number, dtype=value.dtype, device=value.device)


def _computed(node: fx.Node, constants: Mapping[str, Tensor]) -> Tensor | None:
    """What a call gives that reads nothing but such tensors, or nothing: core aten makes identities and masks so."""
    value, target = node.meta.get("val"), node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(value, Tensor):
        return None
    fixed = all(isinstance(size, int) for size in value.shape) and value.numel() <= MOST
    if (
        torch.Tag.nondeterministic_seeded in target.tags
        or not fixed
        or not all(source.name in constants for source in node.all_input_nodes)
    ):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: constants[source.name])
    with torch.no_grad():
        made = target(*args, **kwargs)
    return made if isinstance(made, Tensor) and not made.is_meta else None


def _nothing(node: fx.Node, constants: Mapping[str, Tensor]) -> None:
    return None


def _is_changing(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _known(node: fx.Node) -> Known | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    channels = value.shape[1] if value.dim() > 1 else None
    return Known(value.dim(), channels if isinstance(channels, int) else None, value.dtype)


def _is_guard(node: fx.Node) -> bool:
    """The checks of the input's shape that a module of an exported program begins with."""
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == "_guards_fn" and not node.users


def _inner_graphs(graph: fx.Graph) -> set[fx.Node]:
    """The graphs inside of calls: what runs without gradients, branches. Of those only the call is read."""
    root = graph.owning_module
    modules = set() if root is None else {name for name, _ in root.named_modules(remove_duplicate=False)}
    return {node for node in graph.nodes if node.op == "get_attr" and str(node.target) in modules}


def _is_function(target: Any) -> bool:
    """Whether this is a function of torch that a traced module calls, and no operator or control flow of an export."""
    home = str(getattr(target, "__module__", "") or "torch")
    return home.startswith("torch") and not isinstance(target, torch._ops.OperatorBase)


# ------------------------------------------------------------------ one call


def _same(function: Any) -> Rule:
    """Of the same signature."""
    return lambda graph, node, *args, **kwargs: graph.call_function(function, args, kwargs)


def _method(name: str) -> Rule:
    return lambda graph, node, *args, **kwargs: graph.call_method(name, args, kwargs)


def _alone(function: Any) -> Rule:
    """Whatever else it is given is about memory."""
    return lambda graph, node, x, *args, **kwargs: graph.call_function(function, (x,))


def _convolution(
    graph: fx.Graph, node: fx.Node, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *_: Any,
) -> fx.Node | None:  # fmt: skip
    n = len(stride)
    if n not in CONVS:
        return None
    if transposed:
        args = (x, weight, bias, stride, padding, output_padding, groups, dilation)
        return graph.call_function(TRANSPOSED[n], args)
    return graph.call_function(CONVS[n], (x, weight, bias, stride, padding, dilation, groups))


def _batch_norm(
    graph: fx.Graph, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *_: Any,
) -> fx.Node:  # fmt: skip
    return graph.call_function(F.batch_norm, (x, mean, var, weight, bias, training, momentum, eps))


def _batch_norm_in_evaluation(
    graph: fx.Graph, node: fx.Node, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> fx.Node | None:
    return _batch_norm(graph, node, x, weight, bias, mean, var, False, momentum, eps) if _only_first(node) else None


def _batch_norm_of_several(graph: fx.Graph, node: fx.Node, *args: Any) -> fx.Node | None:
    return _batch_norm(graph, node, *args) if _only_first(node) else None


_SEVERAL = ("aten._native_batch_norm_legit_no_training.default", "aten.native_batch_norm.default")


def _is_norm_of_several(node: Any) -> bool:
    return isinstance(node, fx.Node) and str(node.target) in _SEVERAL and _only_first(node)


def _only_first(node: fx.Node) -> bool:
    """Whether only the first of several results is read."""
    return all(user.target is operator.getitem and (user.args[1] == 0 or is_idle(user)) for user in node.users)


def is_idle(node: fx.Node) -> bool:
    """Whether this is one of several results, which nobody reads: ``make_fx`` leaves them in its graphs."""
    return node.target is operator.getitem and not node.users


def _slice(
    graph: fx.Graph, node: fx.Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> fx.Node | None:
    rank = _rank(node)
    if rank is None or not all(value is None or isinstance(value, int) for value in (start, end, step)):
        return None
    whole = end is None or end >= (1 << 62)
    index = (*(slice(None),) * (dim % rank), slice(start or None, None if whole else end, None if step == 1 else step))
    return graph.call_function(operator.getitem, (x, index))


def _index(graph: fx.Graph, node: fx.Node, x: Any, indices: Any) -> fx.Node:
    return graph.call_function(operator.getitem, (x, tuple(slice(None) if i is None else i for i in indices)))


def _mm(graph: fx.Graph, node: fx.Node, x: Any, weight: Any) -> fx.Node:
    return graph.call_function(F.linear, (x, graph.call_function(torch.transpose, (weight, 0, 1))))


def _addmm(graph: fx.Graph, node: fx.Node, bias: Any, x: Any, weight: Any, **scales: Any) -> fx.Node | None:
    if any(scale != 1 for scale in scales.values()):
        return None
    return graph.call_function(F.linear, (x, graph.call_function(torch.transpose, (weight, 0, 1)), bias))


def _in_place(function: Any) -> Rule:
    def rule(graph: fx.Graph, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> fx.Node | None:
        return graph.call_function(function, (x, y)) if alpha == 1 else None

    return rule


def _pad_mode(mode: str) -> Rule:
    return lambda graph, node, x, pad: graph.call_function(F.pad, (x, pad, mode))


_SMOOTH = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}


def _upsample(mode: str) -> Rule:
    return lambda graph, node, x, size, align_corners, scale=None: graph.call_function(
        F.interpolate, (x, size, scale, mode, align_corners)
    )


def _rank(node: fx.Node) -> int | None:
    known = _known(node)
    return None if known is None else known.rank


_RULES: dict[str, Rule] = {
    **{f"aten.conv{n}d.{name}": _same(function) for n, function in CONVS.items() for name in ("default", "padding")},
    **{f"aten.conv_transpose{n}d.{'default' if n == 1 else 'input'}": _same(f) for n, f in TRANSPOSED.items()},
    **dict.fromkeys(("aten.convolution.default", "aten._convolution.default"), _convolution),
    "aten.linear.default": _same(F.linear),
    "aten.matmul.default": _same(torch.matmul),
    "aten.mm.default": _mm,
    "aten.addmm.default": _addmm,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm_in_evaluation,
    "aten.native_batch_norm.default": _batch_norm_of_several,
    **{f"aten.avg_pool{n}d.default": _same(getattr(F, f"avg_pool{n}d")) for n in (1, 2, 3)},
    **{f"aten.adaptive_avg_pool{n}d.default": _same(getattr(F, f"adaptive_avg_pool{n}d")) for n in (1, 2, 3)},
    **{f"aten._adaptive_avg_pool{n}d.default": _same(getattr(F, f"adaptive_avg_pool{n}d")) for n in (2, 3)},
    **{f"aten.mean.{kind}": _same(torch.mean) for kind in ("default", "dim")},
    **{f"aten.upsample_nearest{n}d.vec": _same(F.interpolate) for n in (1, 2, 3)},
    **{f"aten.upsample_{mode}{n}d.vec": _upsample(mode) for mode, n in _SMOOTH.items()},
    "aten.pad.default": _same(F.pad),
    "aten.constant_pad_nd.default": lambda graph, node, x, pad, value=0.0: graph.call_function(
        F.pad, (x, pad, "constant", value)
    ),
    **{f"aten.reflection_pad{n}d.default": _pad_mode("reflect") for n in (1, 2, 3)},
    **{f"aten.replication_pad{n}d.default": _pad_mode("replicate") for n in (1, 2, 3)},
    **{f"aten.{name}.{kind}": _same(getattr(torch, name)) for name in ("add", "sub") for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.{kind}": _same(getattr(torch, name)) for name in ("mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"aten.rsub.{kind}": _same(torch.rsub) for kind in ("Tensor", "Scalar")},
    **{f"aten.add_.{kind}": _in_place(operator.iadd) for kind in ("Tensor", "Scalar")},
    **{f"aten.sub_.{kind}": _in_place(operator.isub) for kind in ("Tensor", "Scalar")},
    **{f"aten.mul_.{kind}": _in_place(operator.imul) for kind in ("Tensor", "Scalar")},
    **{f"aten.div_.{kind}": _in_place(operator.itruediv) for kind in ("Tensor", "Scalar")},
    "aten.neg.default": _same(torch.neg),
    "aten.addcmul.default": _same(torch.addcmul),
    "aten.dropout.default": _same(F.dropout),
    "aten.clone.default": _alone(torch.clone),
    "aten.lift_fresh_copy.default": _alone(torch.clone),
    **dict.fromkeys(("aten.alias.default", "aten.contiguous.default"), _alone(torch.positive)),
    **dict.fromkeys(("aten.view.default", "aten._unsafe_view.default"), _same(torch.reshape)),
    "aten.reshape.default": _same(torch.reshape),
    "aten.flatten.using_ints": _same(torch.flatten),
    "aten.unflatten.int": _same(torch.unflatten),
    "aten.transpose.int": _same(torch.transpose),
    "aten.t.default": lambda graph, node, x: graph.call_function(torch.transpose, (x, 0, 1)),
    "aten.permute.default": _same(torch.permute),
    "aten.movedim.int": _same(torch.movedim),
    **{f"aten.squeeze.{kind}": _same(torch.squeeze) for kind in ("default", "dim", "dims")},
    "aten.unsqueeze.default": _same(torch.unsqueeze),
    "aten.flip.default": _same(torch.flip),
    "aten.roll.default": _same(torch.roll),
    "aten.pixel_shuffle.default": _same(F.pixel_shuffle),
    "aten.pixel_unshuffle.default": _same(F.pixel_unshuffle),
    "aten.channel_shuffle.default": _same(F.channel_shuffle),
    "aten.chunk.default": _same(torch.chunk),
    **dict.fromkeys(
        (
            "aten.split.Tensor",
            "aten.split.sizes",
            "aten.split_with_sizes.default",
            "aten.split_with_sizes_copy.default",
        ),
        _same(torch.split),
    ),
    "aten.narrow.default": _same(torch.narrow),
    "aten.select.int": _same(torch.select),
    "aten.unbind.int": _same(torch.unbind),
    "aten.index_select.default": _same(torch.index_select),
    "aten.index.Tensor": _index,
    "aten.slice.Tensor": _slice,
    "aten.cat.default": _same(torch.cat),
    "aten.stack.default": _same(torch.stack),
    "aten.to.dtype": _method("to"),
    "aten._to_copy.default": _method("to"),
    "aten.sym_size.int": _method("size"),
}
"""By the name that an overload prints; a rule may give None, then the call stays as it is."""
