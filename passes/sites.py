"""Where a model convolves, and which batch norm belongs to which convolution: by dataflow, never by registration order.

The graphs of evaluation and of training are both read. A norm belongs to a convolution when it is the only reader in
every graph in which the convolution runs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from passes.modes import kept_modes
from passes.refusal import Reason, Refusal
from passes.trace import Call, Unit, call_of, has_hooks, inherits_forward, join, trace_units
from passes.transfer import is_shape_query

__all__ = ["Found", "Norm", "find_convs", "plain_norm", "remainder"]


@dataclass(frozen=True)
class Norm:
    """A batch norm behind a convolution: its path, and the names of its children that run after it (activations)."""

    path: str
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A convolution of a model: its path, the norm that alone reads it, or the reason why it must be left alone."""

    path: str
    conv: _ConvNd
    norm: Norm | None = None
    refusal: Refusal | None = None


def find_convs(model: nn.Module) -> list[Found]:
    """Every convolution module of ``model``, in order of registration; the model is not changed."""
    seen: list[_Uses] = []
    for training in (False, True):
        with kept_modes(model, training=training):
            seen.append(_Uses(model))
    places = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = []
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd):
            refusal = _intrinsic(module, places, owners) or _usage(path, module, seen)
            norm = None if refusal else next(iter(u.norms[id(module)] for u in seen if id(module) in u.norms), None)
            if norm is not None and not _ordinary(model.get_submodule(norm.path), places, owners):
                norm = None
            found.append(Found(path, module, norm, None if refusal is None else refusal.at(path)))
    return found


def _intrinsic(conv: _ConvNd, places: Counter[int], owners: Counter[int]) -> Refusal | None:
    """What speaks against a convolution whatever surrounds it."""
    if isinstance(conv, _ConvTransposeNd):
        return Refusal(Reason.BLOCK, "a transposed convolution: no block is defined for it")
    if hasattr(conv, "parametrizations"):
        return Refusal(Reason.COMPUTED, f"{Reason.COMPUTED.value}: remove it first (torch.nn.utils.parametrize)")
    if "weight" not in conv._parameters:
        return Refusal(Reason.COMPUTED, "its weight is computed by weight_norm or spectral_norm: remove it first")
    if has_hooks(conv):
        return Refusal(Reason.HOOK, "it has a hook, which would no longer see this convolution alone")
    if places[id(conv)] > 1 or any(owners[id(p)] > 1 for p in conv._parameters.values() if p is not None):
        return Refusal(Reason.SHARED, "it, or its weight, is registered in more than one place")
    if not inherits_forward(conv):
        return Refusal(Reason.OWN_FORWARD, f"{type(conv).__name__} does more in its forward than convolve")
    return None


def _usage(path: str, conv: _ConvNd, seen: list[_Uses]) -> Refusal | None:
    """What speaks against it in the graphs of evaluation and training."""
    for uses in seen:
        if id(conv) in uses.shared:
            return Refusal(Reason.SHARED, "a module around it is called more than once")
        if uses.calls[id(conv)] > 1:
            return Refusal(Reason.SHARED, "it is called more than once")
    running = [u for u in seen if u.calls[id(conv)]]
    if not running:
        return seen[0].why_unseen(path)
    if len({u.norms.get(id(conv)) for u in running}) > 1:
        return Refusal(Reason.MODES, "in training another layer reads it than in evaluation")
    if any(id(conv) in u.unit_of and id(conv) in u.unit_of[id(conv)].pinned for u in running):
        return Refusal(Reason.UNTRACEABLE, "code that cannot be traced calls it")
    return None


def _ordinary(norm: nn.Module, places: Counter[int], owners: Counter[int]) -> bool:
    """Whether a norm may be moved: running statistics, no hooks, no parametrization, registered once."""
    own = [*norm._parameters.values(), *norm._buffers.values()]
    return (
        isinstance(norm, _BatchNorm)
        and norm.running_var is not None
        and not has_hooks(norm)
        and not hasattr(norm, "parametrizations")
        and places[id(norm)] == 1
        and all(owners[id(p)] == 1 for p in own if isinstance(p, nn.Parameter))
    )


class _Uses:
    """How often each convolution is called in one mode of the model, and which norm alone reads it."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[int] = Counter()
        self.norms: dict[int, Norm | None] = {}
        self.unit_of: dict[int, Unit] = {}
        self.shared: set[int] = set()
        units, self.untraced = trace_units(model)
        for unit in units:
            leaves = Counter(str(n.target) for n in unit.graph.nodes if n.op == "call_module")
            entered = Counter(id(call.module) for call in unit.calls)
            for at, refusal in unit.opaque.items():
                if refusal.reason is Reason.SHARED:
                    self.shared |= {id(m) for m in unit.root.get_submodule(at).modules()}
            for node in unit.graph.nodes:
                conv = unit.module(node) if node.op == "call_module" else None
                if isinstance(conv, _ConvNd):
                    self.calls[id(conv)] += 1
                    self.unit_of[id(conv)] = unit
                    self.norms[id(conv)] = _norm_behind(unit, node, leaves, entered)

    def why_unseen(self, path: str) -> Refusal:
        """Why a convolution appears in no graph: something around it cannot be traced, or nothing calls it."""
        around = [r for r in self.untraced if not r.layer or path == r.layer or path.startswith(r.layer + ".")]
        if not around:
            return Refusal(Reason.NEVER_CALLED, Reason.NEVER_CALLED.value)
        nearest = max(around, key=lambda r: len(r.layer))
        return Refusal(nearest.reason, f"inside {nearest.layer or 'the model'}, {nearest.message}")


def _norm_behind(unit: Unit, conv: fx.Node, leaves: Counter[str], entered: Counter[int]) -> Norm | None:
    """The batch norm that alone reads a convolution, as a layer or inside a class that also activates."""
    readers = [u for u in conv.users if not is_shape_query(u.op, u.target, u.args)]
    if len(readers) != 1:
        return None
    (reader,) = readers
    if reader.op == "call_module":
        once = leaves[str(reader.target)] == 1 and id(unit.module(reader)) not in unit.pinned
        is_norm = isinstance(unit.module(reader), _BatchNorm) and str(reader.target) not in unit.opaque
        return Norm(join(unit.path, str(reader.target))) if once and is_norm else None
    call = call_of(reader)
    if reader.target is not F.batch_norm or not isinstance(call.module, _BatchNorm) or reader.args[0] is not conv:
        return None
    around = all(entered[id(c.module)] == 1 for c in call.chain())
    if not around or id(call.module) in unit.pinned or not _normalises_with(reader, call):
        return None
    rest = _rest(reader, call)
    return None if rest is None else Norm(join(unit.path, call.path), rest)


def _normalises_with(norm: fx.Node, call: Call) -> bool:
    """Whether a functional batch norm uses just the tensors of the module that calls it."""
    read = [n for n in norm.all_input_nodes if n.op == "get_attr"]
    return {str(n.target) for n in read} >= {join(call.path, "running_mean"), join(call.path, "running_var")}


def _rest(norm: fx.Node, call: Call) -> tuple[str, ...] | None:
    """Names of the children that run one after another on the normalised map; None if anything else does."""
    names: list[str] = []
    node = norm
    while call.output is not node:
        readers = [u for u in node.users if not is_shape_query(u.op, u.target, u.args)]
        if len(readers) != 1 or readers[0].op != "call_module" or readers[0].args != (node,) or readers[0].kwargs:
            return None
        (node,) = readers
        name = str(node.target)[len(call.path) + 1 :]
        if "." in name or name not in call.module._modules:
            return None
        names.append(name)
    return tuple(names)


def remainder(norm: nn.Module, rest: tuple[str, ...]) -> nn.Module:
    """What stays in a norm's place when the norm has moved: its activation, under its old name, or nothing."""
    kept = OrderedDict(
        (name, norm.get_submodule(name)) for name in rest if type(norm.get_submodule(name)) is not nn.Identity
    )
    left = nn.Sequential(kept) if kept else nn.Identity()
    left.training = norm.training
    return left


def plain_norm(norm: _BatchNorm, n: int) -> _BatchNorm:
    """The norm alone of a class that also activates, holding the very same tensors."""
    if inherits_forward(norm):
        return norm
    kinds: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    made = nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else kinds[n - 1]
    plain = made(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta")
    plain._parameters.update({name: norm._parameters[name] for name in plain._parameters})
    plain._buffers.update({name: norm._buffers[name] for name in plain._buffers})
    plain.training = norm.training
    return plain
