"""The branches of a block as straight-line code, in which a norm that measures is taken into the layer behind it.

Once its mean and variance are known, a batch norm is a factor and a shift per channel. Where only convolutions and
means over windows read what it gives, neither is applied to a map: the convolution takes the factor into its kernel and
the shift into its bias. Zeros that were padded in front of the norm become the convolution's own padding, for there the
map is the shift alone: ``shift + factor * pad(x)``. So a row of 1x1, padding, norm and kxk keeps one map, not three.

Norms whose input needs the same number of others first are measured together, so that :class:`torch.nn.SyncBatchNorm`,
which shares what it measures among processes, takes one small reduction for all of them: one for ``acb``, two for
``dbb``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.padding import _ConstantPadNd

from passes.blocks.kit.layers import BranchSum, WindowMean
from passes.graph.patches import suspended
from passes.refusal import Reason, RefusalError
from passes.training.statistics import Affine, affine, per_channel, statistics

__all__ = ["branches_code", "statistics_code"]

Code = Callable[[nn.Module, Tensor], Any]

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_MEANS = (WindowMean, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def statistics_code(block: BranchSum, norms: tuple[str, ...]) -> Code:
    """A function of a block and a sample that gives mean and variance for each of its norms, in their order.

    What only the sum needs is left out: the last norm of a branch is measured and not run. Raises
    :class:`RefusalError` if a norm is not called just once.
    """
    rows = _Rows(block, norms)
    if missing := [path for path in norms if path not in rows.calls]:
        raise RefusalError(Reason.BLOCK, f"nothing calls its norm {missing[0]}: it cannot be sampled")
    rows.write(norms, applies=False)
    return rows.code([rows.moments[path] for path in norms])


def branches_code(block: BranchSum, norms: tuple[str, ...]) -> Code | None:
    """A function of a block in training and a batch that gives the sum of its branches; None if that spares nothing."""
    rows = _Rows(block, norms)
    inner = [path for path, call in rows.calls.items() if call.users and all(map(rows.absorbs, call.users))]
    if not inner:
        return None
    rows.write(rows.behind(inner), applies=True)
    return rows.code(rows.applied(rows.result))


class _Branches(fx.Tracer):
    """Reads a block down to the modules that hold no batch norm, and rows to their layers.

    Nothing of Python's is replaced for it, as :class:`torch.fx.Tracer` would for all threads: it runs a copy of the
    block, without its weights, whose layers write themselves down.
    """

    def trace(self, block: nn.Module) -> fx.Graph:  # type: ignore[override]
        self.root, self.graph, self.tensor_attrs = block, fx.Graph(), {}
        self.copies: dict[nn.Module, nn.Module] = {}
        with suspended():
            y = self._copy(block, "")(self.create_proxy("placeholder", "x", (), {}))
            self.create_node("output", "output", (self.create_arg(y),), {})
        return self.graph

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise TypeError("a tensor that is no parameter and no buffer")
        return super().create_arg(a)

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        if module in self.copies:
            return self.copies[module]
        copied = self.copies[module] = object.__new__(type(module))
        copied.__dict__.update(module.__dict__)
        whole = isinstance(module, _BatchNorm) or not any(isinstance(child, _BatchNorm) for child in module.modules())
        if whole and type(module) is not nn.Sequential:
            called: Any = partial(self._called, path)
        else:
            called = partial(type(module).forward, copied)
            for table in ("_parameters", "_buffers", "_modules"):
                copied.__dict__[table] = {
                    name: None if held is None else self._held(held, f"{path}.{name}".lstrip("."))
                    for name, held in module.__dict__[table].items()
                }
        copied.__dict__["_compiled_call_impl"] = called  # what runs in place of forward and hooks
        return copied

    def _held(self, held: Any, path: str) -> Any:
        return self._copy(held, path) if isinstance(held, nn.Module) else self.create_proxy("get_attr", path, (), {})

    def _called(self, path: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_module", path, args, kwargs)


class _Value(NamedTuple):
    """``shift + factor * pad(x)`` of a map ``x``, padded with zeros as :func:`torch.nn.functional.pad` takes it."""

    x: fx.Node
    pads: tuple[int, ...] = ()
    affine: fx.Node | None = None
    """Of factor and shift; None: 1 and 0."""


class _Rows:
    """A block's graph, written anew."""

    def __init__(self, block: BranchSum, norms: tuple[str, ...]) -> None:
        self.old = _Branches().trace(block)
        self.modules = dict(block.named_modules())
        self.norms = norms
        self.calls: dict[str, fx.Node] = {}
        self.result = self.old.output_node().args[0]
        for node in self.old.find_nodes(op="call_module"):
            if node.target in norms:
                if node.target in self.calls:
                    raise RefusalError(Reason.BLOCK, f"its norm {node.target} is called twice: it cannot be sampled")
                if self.modules[str(node.target)]._forward_pre_hooks:
                    raise RefusalError(Reason.HOOK, f"a hook computes what its norm {node.target} holds")
                self.calls[str(node.target)] = node
        self.graph = fx.Graph()
        self.values: dict[Any, _Value] = {}
        self.moments: dict[str, fx.Node] = {}
        self.maps: dict[str, fx.Node] = {}

    def absorbs(self, node: fx.Node) -> bool:
        """Whether a layer takes a factor and a shift of what it reads into its own numbers, or past itself."""
        layer: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if type(layer) in _CONVOLVE:  # a hook may give it its kernel when it is called
            return not _any(layer.padding) and not layer._forward_pre_hooks
        if type(layer) in _MEANS:
            return not _any(layer.padding) and getattr(layer, "divisor_override", None) is None
        crops = isinstance(layer, _ConstantPadNd) and all(p <= 0 for p in layer.padding)
        return crops and bool(node.users) and all(map(self.absorbs, node.users))

    def behind(self, measured: Iterable[str]) -> list[str]:
        """These norms, and those which read what such a norm gives while it is not applied."""
        found, waiting = set(measured), set[fx.Node]()
        for node in self.old.nodes:
            path = str(node.target) if node.op == "call_module" else ""
            if path in self.calls and waiting.intersection(node.all_input_nodes):
                found.add(path)
            passes_on = type(self.modules.get(path)) not in _CONVOLVE and bool(path) and self.absorbs(node)
            if path in found or (passes_on and waiting.intersection(node.all_input_nodes)):
                waiting.add(node)
        return list(found)

    def write(self, measured: Iterable[str], *, applies: bool) -> None:
        """Write all nodes, those norms measured; they in the order of how many others stand before them.

        ``applies``: all other norms are applied to the maps that they measure.
        """
        wanted, self.applies = set(measured), applies
        depth: dict[fx.Node, int] = {}
        for node in self.old.nodes:
            own = node.op == "call_module" and node.target in wanted
            depth[node] = max((depth[each] for each in node.all_input_nodes), default=0) + own
        for node in sorted(self.old.nodes, key=depth.__getitem__):  # a stable sort: values stay behind their inputs
            if node.op == "output":
                continue
            if node.op == "call_module" and node.target in wanted:
                if node.target not in self.moments:
                    self._measure({p: n for p, n in self.calls.items() if p in wanted and depth[n] == depth[node]})
                self.values[node] = self._normed(node)
            else:
                self.values[node] = self._written(node)

    def applied(self, node: Any) -> fx.Node:
        """The map that a node is, itself."""
        value = self.values[node]
        if value.pads or value.affine is not None:
            value = _Value(self.graph.call_function(whole, tuple(value)))
            self.values[node] = value
        return value.x

    def code(self, result: Any) -> Code:
        self.graph.output(result)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        code = self.graph.python_code("self")
        names: dict[str, Any] = dict(code.globals)
        exec(code.src, names)
        return names["forward"]  # type: ignore[no-any-return]

    def _measure(self, calls: dict[str, fx.Node]) -> None:
        values = [self.values[node.args[0]] for node in calls.values()]
        held = tuple(self.graph.get_attr(path) for path in calls)
        found = self.graph.call_function(statistics, (held, tuple(map(tuple, values))))
        for i, path in enumerate(calls):
            both = self.graph.call_function(_item, (found, i))
            self.moments[path], self.maps[path] = (self.graph.call_function(_item, (both, at)) for at in (0, 1))

    def _normed(self, node: fx.Node) -> _Value:
        value, path = self.values[node.args[0]], str(node.target)
        pair = self.graph.call_function(affine, (self.graph.get_attr(path), self.moments[path], value.affine))
        return value._replace(x=self.maps[path], affine=pair)

    def _padded(self, value: _Value, more: tuple[int, ...]) -> _Value:
        """Padded or cropped: what is cut off from the map itself is gone before a norm measures it."""
        pads = tuple(a + b for a, b in zip_longest(value.pads, more, fillvalue=0))
        cut = tuple(min(p, 0) for p in pads)
        x = self.graph.call_function(F.pad, (value.x, cut)) if any(cut) else value.x
        return value._replace(x=x, pads=tuple(max(p, 0) for p in pads))

    def _written(self, node: fx.Node) -> _Value:
        value = self.values.get(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
        layer: Any = self.modules.get(str(node.target)) if node.op == "call_module" else None
        pads = isinstance(layer, _ConstantPadNd) and layer.value == 0
        # A shift stands on what was padded before it, and not on what is padded behind it.
        if value is not None and pads and (value.affine is None or all(p <= 0 for p in layer.padding)):
            return self._padded(value, tuple(layer.padding))
        if value is not None and (value.pads or value.affine is not None) and self.absorbs(node):
            held = self.graph.get_attr(str(node.target))
            if type(layer) in _MEANS:
                return _Value(self.graph.call_function(averaged, (held, value.x, value.pads)), (), value.affine)
            normed = (user.op == "call_module" and user.target in self.norms for user in node.users)
            centred = self.applies and all(normed)
            return _Value(self.graph.call_function(convolved, (held, *value, centred)))
        return _Value(self.graph.node_copy(node, self.applied))


def whole(x: Tensor, pads: tuple[int, ...], pair: Affine | None) -> Tensor:
    """``shift + factor * pad(x)`` in the dtype of ``x``."""
    padded = F.pad(x, pads) if pads else x
    if pair is None:
        return padded
    factor, shift = (per_channel(each, x.dim() - 2) for each in pair)
    return (padded * factor + shift).to(x.dtype)  # the gradient of addcmul multiplies twice as often


def convolved(conv: Any, x: Tensor, pads: tuple[int, ...], pair: Affine | None, centred: bool) -> Tensor:
    """What a convolution without padding gives for ``shift + factor * pad(x)``.

    ``centred`` says that a norm takes its mean away: then the shift only moves that norm's running mean, and has no
    gradient on the kernel.
    """
    weight, bias = conv.weight, conv.bias
    if pair is not None:
        factor, shift = pair
        taps = (weight.detach() if centred else weight).flatten(2).sum(2).unflatten(0, (conv.groups, -1))
        constant = (taps * shift.reshape(conv.groups, 1, -1)).sum(2).flatten().to(weight.dtype)
        bias = constant if bias is None else bias + constant
        # The smaller one takes the factor; a kernel might leave the range of float16 with it, and a map does not.
        if x.dtype == torch.float16 or x.numel() < weight.numel():
            x = (x * per_channel(factor, x.dim() - 2)).to(x.dtype)
        else:
            grouped = weight.unflatten(0, (conv.groups, -1))
            scaled = grouped * factor.reshape(conv.groups, 1, -1, *(1,) * (weight.dim() - 2))
            weight = scaled.flatten(0, 1).to(weight.dtype)
    lead, trail = pads[::2], pads[1::2]
    if lead != trail:
        x, lead = F.pad(x, pads), ()
    padding = lead[::-1] or 0
    y: Tensor = _CONVOLVE[type(conv)](x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    return y


def averaged(pool: Any, x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """The mean over windows of ``pad(x)``, of which the padding counts."""
    lead, trail = pads[::2], pads[1::2]
    # Pooling pads at most half a window.
    if pads and isinstance(pool, WindowMean) and lead == trail and pool.pads(lead[::-1]):
        return pool.mean(x, lead[::-1])
    y: Tensor = pool(F.pad(x, pads) if pads else x)
    return y


def _item(found: Any, i: int) -> Any:
    return found[i]


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, tuple) else bool(padding)
