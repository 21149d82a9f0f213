"""Where a model convolves, and which batch norm belongs to which convolution: by dataflow, never by registration order.

The graphs of evaluation and of training are both read, and those of calls with other values for optional arguments
(:mod:`passes.graph.variants`). A norm belongs to a convolution when it is the only reader in every graph in which the
convolution runs, and runs in no other. Code that reads a layer's tensors itself would no longer find them: such a
convolution is left alone, such a norm stays where it is.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Layer
from passes.edits.holders import apart
from passes.graph.capture import Call, Unit, call_of, has_hooks, in_one_context, inherits_forward, join, trace_units
from passes.graph.modes import kept_modes
from passes.graph.opset import is_shape_query
from passes.graph.outside import speaks_of_weights
from passes.graph.patches import patched
from passes.graph.variants import own_calls, variants
from passes.graph.weights import is_pruned, weight_maker, weight_sources
from passes.graph.within import Inside, arounds
from passes.refusal import UNREAD, Reason, Refusal, RefusalError
from passes.training.hooks import hook_refusal, sees_result
from passes.training.inside import inside_of, kind_of
from passes.training.retrace import Reading

__all__ = ["Found", "Norm", "find_convs", "layers_in", "plain_norm"]


@dataclass(frozen=True)
class Norm:
    """A batch norm behind a convolution: its path, and the names of its children that run after it (activations)."""

    path: str
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A layer that may get a block: its path, the norm that alone reads it, or the reason why it must be left alone.

    ``norm_stays`` says why a norm that reads it does not belong to it; ``always``, whether each call with defaults runs
    it, in evaluation or in training; ``unread``, why the graphs do not show how it is used: then a run has to;
    ``inside``, where a class with a forward of its own convolves; ``again``, whether some call of the model calls it
    more than once.
    """

    path: str
    conv: Layer
    norm: Norm | None = None
    refusal: Refusal | None = None
    norm_stays: Refusal | None = None
    always: bool = False
    unread: Refusal | None = None
    inside: Inside | None = None
    again: bool = False

    @property
    def norms(self) -> bool:
        """Whether added branches may have batch norms: several calls share statistics only where its own norm does."""
        return self.norm is not None or not self.again


def find_convs(
    model: nn.Module,
    *,
    linear: bool = False,
    read: list[Reading] | None = None,
    wanted: Container[str] | None = None,
) -> list[Found]:
    """Every convolution module of ``model``, in order of registration; the model is not changed.

    With ``linear``, linear layers too; norms behind them stay where they are. ``read`` is filled with what was read of
    the model, in evaluation and in training. Of layers that are not ``wanted`` nothing is said but where they are.
    """
    layers = layers_in(model, linear=linear)
    paths = {path for path in layers if wanted is None or path in wanted}
    if not paths:
        return [Found(path, layer) for path, layer in layers.items()]
    found = _found(apart(model), _kinds(linear), [] if read is None else read, paths)
    return [replace(each, conv=layers[each.path]) for each in found]


def layers_in(model: nn.Module, *, linear: bool = False) -> dict[str, Layer]:
    """The convolutions, and with ``linear`` the linear layers, by path."""
    kinds = _kinds(linear)
    return {
        path: m for path, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear)) and isinstance(m, kinds)
    }


_Kinds = tuple[type[nn.Module], ...]


def _kinds(linear: bool) -> _Kinds:
    return (_ConvNd, nn.Linear) if linear else (_ConvNd,)


def _found(model: nn.Module, kinds: _Kinds, read: list[Reading], wanted: Container[str]) -> list[Found]:
    seen: list[_Uses] = []
    other: list[_Uses] = []
    asked = [module for path, module in model.named_modules() if path in wanted]
    inside = _insides(model, asked)
    leaves = [layer for layer, where in inside.items() if isinstance(where, Inside)]
    about = {id(m) for m in [*asked, *(m for m in model.modules() if isinstance(m, _BatchNorm))]}
    with patched():  # for all of these traces at once
        for training in (False, True):
            with kept_modes(model, training=training):
                units, untraced = trace_units(model, numbers=not training, leaves=leaves)
                read.append((units, untraced))
                seen.append(_Uses(kinds, units, untraced, "in training" if training else "in evaluation"))
                other += [uses for unit in units for uses in _other_calls(kinds, unit, about)]
    places = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found = []
    for path, module in layers_in(model, linear=nn.Linear in kinds).items():
        if path not in wanted:
            found.append(Found(path, module))
            continue
        where = inside.get(module)
        around = where if isinstance(where, Inside) else None
        refusal = _intrinsic(module, places, owners) or (where if isinstance(where, Refusal) else None)
        refusal = refusal or _usage(path, module, seen, other)
        if refusal is not None:
            found.append(Found(path, module, refusal=refusal.at(path)))
            continue
        if (unread := _unread(path, module, seen)) is not None:
            speaking = _speaks(path, model, seen)
            unread = None if speaking else unread.at(path)
            found.append(Found(path, module, refusal=speaking, unread=unread, inside=around))
            continue
        always = any(u.calls[id(module)] and not u.unit_of[id(module)].path for u in seen)
        norm = None if isinstance(module, nn.Linear) else _norm_of(module, [*seen, *other])
        if isinstance(norm, Norm) and sees_result(module):
            norm = Refusal(Reason.HOOK, "it has a hook, which sees its result before the norm")
        if isinstance(norm, Norm):
            norm = _stays(model.get_submodule(norm.path), places, owners, around) or norm
        more = any(id(module) in u.shared or u.calls[id(module)] > 1 for u in [*seen, *other])
        each = Found(path, module, always=always, inside=around, again=more)
        if isinstance(norm, Refusal):
            found.append(replace(each, norm_stays=norm.at(path)))
        else:
            found.append(replace(each, norm=norm))
    return found


def _insides(model: nn.Module, asked: list[nn.Module]) -> dict[nn.Module, Inside | Refusal]:
    """Where convolutions of a class with a forward of its own convolve, or why that cannot be said."""
    found: dict[nn.Module, Inside | Refusal] = {}
    tried: dict[Any, Inside | Refusal] = {}
    around = arounds(model.modules())
    for conv in asked:
        if not isinstance(conv, _ConvNd) or inherits_forward(conv) or id(conv) in around or _computed(conv):
            continue
        kind = kind_of(conv)
        if kind is None or kind not in tried:
            try:
                found[conv] = inside_of(conv)
            except RefusalError as error:
                found[conv] = error.refusal
            tried[kind] = found[conv]
        else:
            found[conv] = tried[kind]
    return found


def _other_calls(kinds: _Kinds, unit: Unit, about: Container[int]) -> list[_Uses]:
    """What calls with other values for optional arguments show; nothing where none of these modules is called."""
    called = (unit.module(node) for node in unit.graph.nodes if node.op == "call_module")
    if not any(id(module) in about for module in itertools.chain(called, (call.module for call in unit.calls))):
        return []
    found = []
    for variant in variants(unit):
        if variant.unit is None:
            why, at = f"{Reason.UNTRACEABLE.value}: {variant.why}", join(unit.path, variant.at)
            untraced = [Refusal(Reason.UNTRACEABLE, why, at)]
            found.append(_Uses(kinds, [], untraced, f"with {variant.given}", unit))
            continue
        hidden = [
            refusal.at(join(unit.path, variant.at, at))
            for at, refusal in variant.unit.opaque.items()
            if join(variant.at, at) not in unit.opaque
        ]
        found.append(_Uses(kinds, [variant.unit], hidden, f"with {variant.given}", unit))
    return found


def _intrinsic(conv: Any, places: Counter[int], owners: Counter[int]) -> Refusal | None:
    """What speaks against a convolution whatever surrounds it."""
    if (computed := _computed(conv)) is not None:
        return computed
    if (hooked := hook_refusal(conv)) is not None:
        return hooked
    own = [*weight_sources(conv), *(p for p in conv._parameters.values() if p is not None)]
    if any(owners[id(p)] > 1 for p in own):
        return Refusal(Reason.SHARED, "its weight is that of another layer too")
    if isinstance(conv, nn.Linear) and not inherits_forward(conv):
        return Refusal(Reason.OWN_FORWARD, f"{type(conv).__name__} does more in its forward than a linear layer")
    return None


def _computed(conv: _ConvNd) -> Refusal | None:
    """Why a layer whose tensors are no parameters cannot be a branch of a block as it is."""
    if "bias" not in conv._parameters:
        return Refusal(Reason.COMPUTED, "its bias is computed in each call: make that permanent first")
    if "weight" in conv._parameters:
        return None
    if is_pruned(conv):
        filled = "torch.nn.utils.prune masks its weight, and what a block adds would fill the zeros"
        return Refusal(Reason.COMPUTED, f"{filled}: prune what collapse returns, or make the mask permanent")
    if (maker := weight_maker(conv)) is None:
        return Refusal(Reason.COMPUTED, "its weight is no parameter, and nothing that is known computes it")
    if not inherits_forward(conv):
        told = f"{maker} computes its weight, and {type(conv).__name__} does more in its forward than convolve"
        return Refusal(Reason.COMPUTED, f"{told}: make that permanent first")
    return None


def _usage(path: str, conv: nn.Module, seen: list[_Uses], other: list[_Uses]) -> Refusal | None:
    """What speaks against it in the graphs of evaluation and training, and in those of other calls."""
    if any(u.reads(path) for u in [*seen, *other]):
        return Refusal(Reason.CODE, "the code around it reads its weight or bias itself")
    if any(id(conv) in unit.asked for u in [*seen, *other] for unit in u.units):
        return Refusal(Reason.CODE, "other code looks at its class")
    given = (why for u in seen for unit in u.units for at, why in unit.handed.items() if join(unit.path, at) == path)
    if (handed := next(given, None)) is not None:
        return handed
    running = [u for u in [*seen, *other] if u.calls[id(conv)]]
    if not running and _unread(path, conv, seen) is None:
        around = next((at for u in seen for at in u.entered_whole if path.startswith(f"{at}.")), None)
        if around is not None:
            return Refusal(Reason.CODE, f"{around} is read as one call, so it is not seen how that uses it")
        return Refusal(Reason.NEVER_CALLED, Reason.NEVER_CALLED.value)
    modes = [u for u in seen if u.calls[id(conv)]]
    if len({u.norm(conv) for u in modes}) > 1 and len({u.readers[id(conv)] for u in modes}) > 1:
        return Refusal(Reason.MODES, "in training another layer reads it than in evaluation")
    if any(id(conv) in u.unit_of[id(conv)].pinned for u in running):
        return Refusal(Reason.UNTRACEABLE, "code that cannot be traced calls it")
    if any(id(conv) in u.named for u in running):
        return Refusal(Reason.CODE, "it is called with a keyword argument, or more than its input")
    return None


def _unread(path: str, conv: nn.Module, seen: list[_Uses]) -> Refusal | None:
    """The code around it that cannot be traced, in a mode in which no graph shows it.

    What one mode shows says nothing about the other.
    """
    hidden = (uses.untraced_around(path) for uses in seen if not uses.calls[id(conv)])
    return next((refusal for refusal in hidden if refusal is not None), None)


def _speaks(path: str, model: nn.Module, seen: list[_Uses]) -> Refusal | None:
    """Code around a convolution that cannot be traced and names tensors: no run shows all that it does with them."""
    around = {r.layer for uses in seen for r in uses.untraced if r.reason in UNREAD and _within(path, r.layer)}
    for at in sorted(around):
        if speaks_of_weights(model.get_submodule(at)):
            told = f"the code of {at or 'the model'}, which cannot be traced, speaks of weights: they may be its own"
            return Refusal(Reason.CODE, told, path)
    return None


def _norm_of(conv: nn.Module, ways: list[_Uses]) -> Norm | Refusal | None:
    """The norm that alone reads a convolution whenever that runs, and reads nothing else; or why it does not."""
    running = [w for w in ways if w.calls[id(conv)]]
    norm = next((n for w in running if (n := w.norm(conv)) is not None), None)
    if norm is None:
        said = (w.norms[id(conv)] for w in running)
        return next((n for n in said if isinstance(n, Refusal)), None)
    for uses in ways:
        reason = Reason.MODES if uses.around is None else Reason.ARGUMENT
        if uses.calls[id(conv)]:
            if uses.norm(conv) != norm:
                return Refusal(reason, f"{uses.how} the norm {norm.path} is not what alone reads it")
        elif uses.norm_calls[norm.path]:
            return Refusal(reason, f"{uses.how} the norm {norm.path} reads something else")
        elif uses.around is not None and not uses.units:
            # The code of modules inside is not touched by arguments that they are not given.
            if any(uses.around is w.unit_of.get(id(conv)) and id(conv) in w.own_code for w in running):
                return Refusal(reason, f"{uses.how} what reads it {uses.untraced[0].message}")
        elif (hidden := uses.untraced_around(norm.path)) is not None:
            return Refusal(hidden.reason, f"{uses.how} its norm may be used otherwise {hidden.message}")
    return norm


_NORM_HOOKED = Refusal(Reason.HOOK, "its norm has a hook")


def _stays(norm: nn.Module, places: Counter[int], owners: Counter[int], inside: Inside | None) -> Refusal | None:
    """Why a norm may not be moved into the block of a convolution that its layer does ``inside`` of more."""
    if inside is not None and not inside.takes_norm:
        return Refusal(Reason.OWN_FORWARD, "its class does more behind the convolution, or has no place for a bias")
    own = [*norm._parameters.values(), *norm._buffers.values()]
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return Refusal(Reason.BATCH_STATISTICS, "its norm has no running statistics")
    if has_hooks(norm) or hook_refusal(norm) is not None:
        return _NORM_HOOKED
    if hasattr(norm, "parametrizations"):
        return Refusal(Reason.COMPUTED, "its norm's weight is computed by a parametrization")
    if places[id(norm)] != 1 or any(owners[id(p)] != 1 for p in own if isinstance(p, nn.Parameter)):
        return Refusal(Reason.SHARED, "its norm, or the norm's weight, is registered in more than one place")
    return None


class _Uses:
    """How often each convolution is called in one mode of the model, or one way to call a part, and what reads it.

    Args:
        kinds: classes of the layers that are asked about.
        units: their graphs.
        untraced: what could not be read.
        how: when that is, in words.
        around: the unit that is called in another way than with defaults; None for the whole model.
    """

    def __init__(
        self, kinds: _Kinds, units: list[Unit], untraced: list[Refusal], how: str, around: Unit | None = None
    ) -> None:
        self.units, self.untraced, self.how, self.around = units, untraced, how, around
        self.calls: Counter[int] = Counter()
        self.norms: dict[int, Norm | Refusal | None] = {}
        self.norm_calls: Counter[str] = Counter()
        self.readers: dict[int, frozenset[str]] = {}
        self.unit_of: dict[int, Unit] = {}
        self.own_code: set[int] = set()
        self.shared: set[int] = set()
        self.named: set[int] = set()
        self.entered_whole: set[str] = set()
        self.tensors_read = {(unit.path, join(unit.path, name)) for unit in self.units for name in unit.read}
        for unit in self.units:
            leaves = Counter(str(n.target) for n in unit.graph.nodes if n.op == "call_module")
            entered = Counter(id(call.module) for call in unit.calls)
            own = own_calls(unit)
            norms = [call.path for call in unit.calls if isinstance(call.module, _BatchNorm)]
            self.norm_calls.update(join(unit.path, path) for path in norms)
            for at, refusal in unit.opaque.items():
                if refusal.reason is Reason.SHARED:
                    self.shared |= {id(m) for m in unit.root.get_submodule(at).modules()}
            for node in unit.graph.nodes:
                conv = unit.module(node) if node.op == "call_module" else None
                if conv is not None:
                    self.entered_whole.add(join(unit.path, str(node.target)))
                if isinstance(conv, _BatchNorm):
                    self.norm_calls[join(unit.path, str(node.target))] += 1
                if isinstance(conv, kinds):
                    self.calls[id(conv)] += 1
                    self.unit_of[id(conv)] = unit
                    norm = self._norm_behind(unit, node, leaves, entered)
                    if self.norms.setdefault(id(conv), norm) != norm:
                        norm = Refusal(Reason.SHARED, "it is called more than once, and not always read by one norm")
                    self.norms[id(conv)] = norm
                    readers = frozenset(_where_read(unit, reader) for reader in _readers(node))
                    self.readers[id(conv)] = self.readers.get(id(conv), frozenset()) | readers
                    if node.kwargs or len(node.args) > 1:  # the output_size of a transposed convolution
                        self.named.add(id(conv))
                    if any(_meeting(node, reader) in own for reader in _readers(node)):
                        self.own_code.add(id(conv))

    def norm(self, conv: nn.Module) -> Norm | None:
        """The norm that alone reads a convolution that runs."""
        found = self.norms[id(conv)]
        return found if isinstance(found, Norm) else None

    def reads(self, path: str) -> bool:
        """Whether traced code around the layer at ``path`` reads a tensor of it instead of calling it."""
        return any(name.startswith(f"{path}.") and not _within(at, path) for at, name in self.tensors_read)

    def untraced_around(self, path: str) -> Refusal | None:
        """The nearest code around a layer that cannot be traced, unless something nearer to the layer can."""
        # The last word about a module that is first set apart and then cannot be traced either is the reason.
        around = [r for r in reversed(self.untraced) if r.reason in UNREAD and _within(path, r.layer)]
        nearest = max(around, key=lambda r: len(r.layer), default=None)
        if nearest is None or any(_within(path, u.path) and _within(u.path, nearest.layer) for u in self.units):
            return None
        return Refusal(nearest.reason, f"inside {nearest.layer or 'the model'}, {nearest.message}")

    def _norm_behind(
        self, unit: Unit, conv: fx.Node, leaves: Counter[str], entered: Counter[int]
    ) -> Norm | Refusal | None:
        """The batch norm that alone reads a convolution, as a layer or inside a class that also activates."""
        readers = _readers(conv)
        if len(readers) != 1:
            return None
        (reader,) = readers
        if reader.op == "call_module":
            path, norm = join(unit.path, str(reader.target)), unit.module(reader)
            if not isinstance(norm, _BatchNorm):
                return None
            if (opaque := unit.opaque.get(str(reader.target))) is not None:
                return _NORM_HOOKED if opaque.reason is Reason.HOOK else opaque.at(path)
            if leaves[str(reader.target)] != leaves[str(conv.target)]:
                return Refusal(Reason.SHARED, f"the norm {path} is called more than once")
            if not in_one_context([conv, reader]):
                return Refusal(Reason.CONTEXT, _ANOTHER.format(path))
            if id(norm) in unit.pinned:
                return Refusal(Reason.UNTRACEABLE, f"code that cannot be traced calls the norm {path}")
            if self.reads(path):
                return Refusal(Reason.CODE, f"other code reads the tensors of the norm {path}")
            if any(id(norm) in each.asked for each in self.units):
                return Refusal(Reason.CODE, f"other code looks at the class of the norm {path}")
            return Norm(path)
        call = call_of(reader)
        if not isinstance(call.module, _BatchNorm) or not _normalises(reader, conv, call):
            return None
        if any(entered[id(c.module)] != 1 for c in call.chain()) or id(call.module) in unit.pinned:
            return None
        if not in_one_context([conv, reader]):
            return Refusal(Reason.CONTEXT, _ANOTHER.format(join(unit.path, call.path)))
        rest = _rest(unit, reader, call)
        return None if rest is None else Norm(join(unit.path, call.path), rest)


def _meeting(conv: fx.Node, reader: fx.Node) -> Call:
    """The innermost call whose code gives one layer's output to another."""
    around = list(call_of(reader).chain())
    return next(call for call in call_of(conv).chain() if call in around)


def _within(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(around + ".")


def _readers(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if not is_shape_query(u.op, u.target, u.args)]


def _where_read(unit: Unit, reader: fx.Node) -> str:
    return join(unit.path, str(reader.target) if reader.op == "call_module" else call_of(reader).path)


_ANOTHER = "the norm {} is called in another context, such as torch.no_grad()"
_BATCH_NORM = inspect.signature(F.batch_norm)
_TENSORS = ("running_mean", "running_var", "weight", "bias")


def _normalises(node: fx.Node, value: fx.Node, call: Call) -> bool:
    """Whether a node is just torch's batch norm of ``value``, with the tensors and options of the calling module."""
    if node.target is not F.batch_norm:
        return False
    norm: Any = call.module
    given = _BATCH_NORM.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    used = given.arguments
    for name in _TENSORS:
        tensor = used[name]
        own = (
            tensor.op == "get_attr" and tensor.target == join(call.path, name) if isinstance(tensor, fx.Node) else True
        )
        if not own or (tensor is None) != (getattr(norm, name) is None):
            return False
    steps = not norm.training or used["momentum"] == norm.momentum
    return used["input"] is value and used["training"] == norm.training and used["eps"] == norm.eps and steps


def _rest(unit: Unit, norm: fx.Node, call: Call) -> tuple[str, ...] | None:
    """Names of the children that run one after another on the normalised map; None if anything else does.

    A child is one node if it is a leaf; else it was traced through, and may give its input back (dropout in eval).
    """
    inner = [c for c in unit.calls if c.parent is call]
    names: list[str] = []
    node = norm
    while True:
        if inner and inner[0].args == (node,) and not inner[0].kwargs:
            child = inner.pop(0)
            if isinstance(child.output, fx.Node) and all(
                child in call_of(u).chain() or child.output is node for u in _readers(node)
            ):
                names.append(child.path)
                node = child.output
                continue
            return None
        if node is call.output:
            break
        readers = _readers(node)
        if len(readers) != 1 or readers[0].op != "call_module" or readers[0].args != (node,) or readers[0].kwargs:
            return None
        (node,) = readers
        names.append(str(node.target))
    local = tuple(name[len(call.path) + 1 :] for name in names)
    return local if all(name in call.module._modules for name in local) else None


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
