"""Surgery: put the folded layers into the caller's own model and disturb as little as possible.

In this order: (a) the region is a chain of modules: the first convolution's slot gets the folded one, the others
become Identity, or what remains of them; (b) the region is one module's whole forward: that module becomes the layer;
(c) the region is part of a forward: only the smallest enclosing module gets a new forward.

:func:`place` decides, from the graph alone, before anything is changed. :class:`Surgeon` carries it out and can take
everything back.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from passes.flow import Flow
from passes.refusal import Reason, RefusalError
from passes.region import Region, origin
from passes.rewritten import rewrite_forward
from passes.trace import Call, call_of, join

__all__ = ["Layout", "Placement", "Surgeon", "place"]


@dataclass(frozen=True)
class Rewrite:
    """In the forward of ``call``, ``old`` is replaced by ``source``, through the folded layer if ``layer``.

    ``tail`` is a child call that keeps part of the region and is edited on its own.
    """

    call: Call
    old: fx.Node
    source: fx.Node
    layer: bool
    tail: Call | None = None


@dataclass
class Placement:
    """Where a region's layer goes. ``slots`` maps a module path to True (the layer) or False (Identity)."""

    slots: dict[str, bool] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)


class Layout:
    """Facts about one unit's modules that surgery needs: how often each is called, and where it is registered."""

    def __init__(self, flow: Flow, registered: Counter[int]) -> None:
        self.flow = flow
        self.registered = registered
        unit = flow.unit
        self.leaf_calls = Counter(str(n.target) for n in flow.modules)
        self.calls = Counter(id(call.module) for call in unit.calls)
        self.items: dict[Call, list[fx.Node | Call]] = {call: [] for call in unit.calls}
        entered: set[Call] = set()
        for node in flow.nodes:
            if node.op in ("placeholder", "output"):
                continue
            item: fx.Node | Call = node
            for call in call_of(node).chain():
                self.items[call].append(item)
                if call in entered:
                    break
                entered.add(call)
                item = call

    def inside(self, call: Call) -> Iterator[fx.Node]:
        """All traced nodes of a call and of the calls in it, in order."""
        for item in self.items[call]:
            if isinstance(item, Call):
                yield from self.inside(item)
            else:
                yield item

    def replaceable(self, module: nn.Module, path: str, parent: Call | None) -> bool:
        """Whether putting another module into this slot changes this one call and nothing else."""
        once = self.leaf_calls[path] == 1 if parent is not None and path in self.leaf_calls else True
        around = all(self.calls[id(c.module)] == 1 for c in (parent.chain() if parent is not None else ()))
        pinned = id(module) in self.flow.unit.pinned
        return once and around and not pinned and self.registered[id(module)] == 1 and path != ""

    def rewritable(self, call: Call) -> bool:
        """Whether this module's forward may be replaced."""
        return all(self.calls[id(c.module)] == 1 for c in call.chain()) and self.registered[id(call.module)] == 1


def place(layout: Layout, region: Region) -> Placement:
    """Decide where the folded layer goes; raises :class:`RefusalError` with ``CODE`` if nowhere."""
    entry = origin(region.entry)
    common = _common_call([call_of(n) for n in region.dying])
    while common.parent is not None and not _sees(common, entry):
        common = common.parent
    placement = Placement()
    _substitute(layout, region, common, Step(origin(region.result), origin(region.entry), True), placement)
    return placement


def _sees(call: Call, node: fx.Node) -> bool:
    """Whether the forward of ``call`` gets at the value of ``node``: made inside, or given."""
    return call in call_of(node).chain() or node in _nodes([call.args, call.kwargs])


@dataclass(frozen=True)
class Step:
    """What is asked of a call: wherever ``old`` was, give ``source``, through the folded layer if ``layer``."""

    old: fx.Node
    source: fx.Node
    layer: bool


def _sees(call: Call, node: fx.Node) -> bool:
    """Whether the forward of ``call`` gets at the value of ``node``: made inside, or given."""
    return call in call_of(node).chain() or node in _nodes([call.args, call.kwargs])


@dataclass(frozen=True)
class Step:
    """What is asked of a call: wherever ``old`` was, give ``source``, through the folded layer if ``layer``."""

    old: fx.Node
    source: fx.Node
    layer: bool


def _common_call(calls: list[Call]) -> Call:
    chains = [list(c.chain())[::-1] for c in calls]
    common = chains[0][0]
    for level in zip(*chains, strict=False):
        if any(c is not level[0] for c in level):
            break
        common = level[0]
    return common


def _substitute(layout: Layout, region: Region, call: Call, step: Step, placement: Placement) -> None:
    """Decide how ``call`` is edited so that it does what ``step`` asks."""
    trial = Placement()
    if _as_chain(layout, region, call, step, trial) or _with_tail(layout, region, call, step, trial):
        placement.slots.update(trial.slots)
        placement.rewrites += trial.rewrites
        return
    if _is_whole(layout, region, call, step.old) and call.args == (step.source,) and not call.kwargs:
        outer = call.parent is None and layout.flow.unit.path != "" and layout.registered[id(call.module)] == 1
        if outer or (call.parent is not None and layout.replaceable(call.module, call.path, call.parent)):
            placement.slots[call.path] = step.layer
            return
    _check_rewritable(layout, call)
    placement.rewrites.append(Rewrite(call, step.old, step.source, step.layer))


def _with_tail(layout: Layout, region: Region, call: Call, step: Step, trial: Placement) -> bool:
    """Rewrite ``call`` up to the child that ends the region, and edit that child on its own: it keeps what is left."""
    tail = _tail(call, step.old)
    passed = _passed(region, tail) if tail is not None and tail.output is not step.old else None
    if tail is None or passed is None:
        return False
    try:
        _check_rewritable(layout, call)
        _substitute(layout, region, tail, Step(step.old, passed, False), trial)
    except RefusalError:
        return False  # what is left of the tail is then written out in the new forward
    trial.rewrites.append(Rewrite(call, passed, step.source, step.layer, tail))
    return True


def _check_rewritable(layout: Layout, call: Call) -> None:
    where = call.path or type(call.module).__name__
    if not layout.rewritable(call):
        raise RefusalError(Reason.CODE, f"{where} is called more than once, so its forward cannot be rewritten")
    outermost = list(call.chain())[-1]
    if layout.flow.unit.path and _untraced_options(outermost):
        options = ", ".join(_untraced_options(outermost))
        raise RefusalError(Reason.CODE, f"untraceable code calls {layout.flow.unit.path} and may pass {options}")
    parameters = inspect.signature(call.module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise RefusalError(Reason.CODE, f"the forward of {where} takes *args or **kwargs and cannot be rewritten")


def _untraced_options(call: Call) -> list[str]:
    """Optional arguments that were at their defaults when this forward was traced."""
    signature = inspect.signature(call.module.forward)
    given = signature.bind(*call.args, **call.kwargs).arguments
    return [p.name for p in signature.parameters.values() if p.name not in given and p.default is not p.empty]


def _tail(call: Call, old: fx.Node) -> Call | None:
    """The child call of ``call`` in which ``old`` was made."""
    chain = list(call_of(old).chain())
    at = chain.index(call)
    return chain[at - 1] if at > 0 else None


def _passed(region: Region, tail: Call) -> fx.Node | None:
    """The one dying value that ``tail`` is given."""
    inside = {n for n in region.dying if tail in call_of(n).chain()}
    given = {origin(i) for n in inside for i in n.all_input_nodes} & (set(region.dying) - inside)
    if len(given) != 1:
        return None
    (value,) = given
    return value if _nodes([tail.args, tail.kwargs]).count(value) == 1 else None


def _as_chain(layout: Layout, region: Region, call: Call, step: Step, trial: Placement) -> bool:
    """Try (a): the dying nodes of ``call`` are modules one after another; the first convolution's slot gets the layer."""
    items = _items(region, call)
    if items is None:
        return False
    at = next((i for i, item in enumerate(items) if _has_conv(layout, region, item)), 0) if step.layer else -1
    source = step.source
    for i, item in enumerate(items):
        last = i == len(items) - 1
        target = step.old if last else (item if isinstance(item, fx.Node) else item.output)
        if not isinstance(target, fx.Node) or (not last and not _only_feeds(layout, target, items[i + 1], call)):
            return False
        if isinstance(item, fx.Node):
            if item is not target or not _leaf_slot(layout, item, source, call, i == at, trial):
                return False
        elif item.kwargs or _nodes(item.args).count(source) != 1:
            return False
        else:
            try:
                _substitute(layout, region, item, Step(target, source, i == at), trial)
            except RefusalError:
                return False
        source = target
    return True


def _leaf_slot(
    layout: Layout, node: fx.Node, source: fx.Node, call: Call, is_layer: bool, trial: Placement
) -> bool:
    """Put the layer or Identity into a leaf module's slot; a layer that does nothing in eval may stay."""
    if len(node.args) != 1 or node.kwargs or [origin(n) for n in _nodes(node.args)] != [source]:
        return False
    module, path = layout.flow.modules[node], str(node.target)
    if not is_layer and isinstance(module, (nn.Identity, _DropoutNd)):
        return True
    if not layout.replaceable(module, path, call):
        return False
    trial.slots[path] = is_layer
    return True


def _has_conv(layout: Layout, region: Region, item: fx.Node | Call) -> bool:
    nodes = [item] if isinstance(item, fx.Node) else [n for n in region.dying if item in call_of(n).chain()]
    kinds = (_ConvNd, nn.Linear)
    return any(isinstance(layout.flow.modules.get(n), kinds) or n in region.convs for n in nodes)


def _items(region: Region, call: Call) -> list[fx.Node | Call] | None:
    """What ``call`` itself runs of the region: leaf modules and child calls, in order; None if bare operations too."""
    items: list[fx.Node | Call] = []
    for node in region.dying:
        chain = list(call_of(node).chain())
        if call not in chain:
            continue
        at = chain.index(call)
        item: fx.Node | Call = node if at == 0 else chain[at - 1]
        if at == 0 and node.op != "call_module":
            return None
        if item not in items:
            items.append(item)
    return items or None


def _only_feeds(layout: Layout, node: fx.Node, item: fx.Node | Call, call: Call) -> bool:
    """Whether ``node`` goes into ``item`` and nowhere else, questions about its shape aside."""
    for user in node.users:
        inside = user is item if isinstance(item, fx.Node) else item in call_of(user).chain()
        if not inside and not layout.flow.shape_only(user) and "region" not in user.meta:
            return False
    return node not in _nodes(call.output)


def _is_whole(layout: Layout, region: Region, call: Call, old: fx.Node) -> bool:
    """Whether nothing of ``call`` is left once ``old`` is replaced (``old`` is all it returns)."""
    if call.output is not old:
        return False
    dying = {*region.dying, *region.constants}
    alive = [n for n in layout.inside(call) if n not in dying]
    return all(n.op in ("call_function", "call_method", "get_attr") and _stays_inside(n, call) for n in alive)


def _stays_inside(node: fx.Node, call: Call) -> bool:
    return all(call in call_of(user).chain() and user.op != "output" for user in node.users)


def _check_signature(call: Call) -> None:
    parameters = inspect.signature(call.module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        where = call.path or type(call.module).__name__
        raise RefusalError(Reason.CODE, f"the forward of {where} takes *args or **kwargs and cannot be rewritten")


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n) or n)
    return found


# ------------------------------------------------------------------ carrying it out


class Surgeon:
    """Edits one model. Every step is recorded, so that :meth:`undo` gives the caller's model back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def operate(self, layout: Layout, regions: list[tuple[Region, nn.Module]]) -> dict[Region, str]:
        """Put all folded layers of one unit in place; gives each layer's path."""
        unit = layout.flow.unit
        paths: dict[Region, str] = {}
        rewrites: dict[Call, list[tuple[Rewrite, Region]]] = {}
        layers = dict(regions)
        for region, layer in regions:
            placement: Placement = region.placement
            for path, is_layer in placement.slots.items():
                full = join(unit.path, path)
                self._set(full, layer if is_layer else nn.Identity().eval())
                if is_layer:
                    paths[region] = full
            for rewrite in placement.rewrites:
                rewrites.setdefault(rewrite.call, []).append((rewrite, region))
        for call, changes in _merged(layout, rewrites).items():
            paths.update(self._rewrite(layout, call, changes, layers))
        return paths

    def undo(self) -> None:
        """Take back every edit, last one first."""
        while self._undo:
            self._undo.pop()()

    def _rewrite(
        self,
        layout: Layout,
        call: Call,
        changes: list[tuple[Rewrite, Region]],
        layers: dict[Region, nn.Module],
    ) -> dict[Region, str]:
        unit = layout.flow.unit
        dead = {n for rewrite, region in changes for n in _dead_inside(region, rewrite)}
        names: dict[Region, str] = {}
        for rewrite, region in changes:
            if rewrite.layer:
                local = _layer_name(layout, rewrite.call, region, dead, set(names.values()))
                names[region] = join(rewrite.call.path, local)
        graph = _Local(layout, call, changes, names, dead).build()
        self._clean(layout, call, dead)
        paths = {}
        for rewrite, region in changes:
            if rewrite.layer:
                self._add(rewrite.call.module, names[region].rsplit(".", 1)[-1], layers[region])
                paths[region] = join(unit.path, names[region])
        if isinstance(call.module, (_BatchNorm, _ConvNd)) and not any(r.layer for r, _ in changes):
            self._set(join(unit.path, call.path), _remainder(call.module, graph))
        else:
            before = call.module.__class__
            rewrite_forward(call.module, graph)
            self._undo.append(lambda: setattr(call.module, "__class__", before))
        return paths

    def _clean(self, layout: Layout, call: Call, dead: set[fx.Node]) -> None:
        """Remove the modules and weights below ``call`` that only dead nodes used."""
        prefix = call.path
        use: dict[str, bool] = {}
        for node in layout.inside(call):
            if node.op in ("call_module", "get_attr"):
                use[str(node.target)] = use.get(str(node.target), False) or node not in dead
        self._prune(call.module, prefix, use)

    def _prune(self, module: nn.Module, path: str, use: dict[str, bool]) -> None:
        for name, child in list(module._modules.items()):
            at = join(path, name)
            below = [alive for target, alive in use.items() if target == at or target.startswith(at + ".")]
            if child is None or not below or all(below):
                continue
            if any(below):
                self._prune(child, at, use)
            else:
                self._remove(module._modules, name)
        for table in (module._parameters, module._buffers):
            for name in list(table):
                if use.get(join(path, name)) is False:
                    self._clear(table, name)

    def _set(self, path: str, new: nn.Module) -> None:
        *parent, name = path.split(".")
        owner = self.model.get_submodule(".".join(parent))
        old = owner._modules[name]
        owner._modules[name] = new
        self._undo.append(lambda: owner._modules.__setitem__(name, old))

    def _add(self, owner: nn.Module, name: str, new: nn.Module) -> None:
        before = dict(owner._modules)
        owner._modules[name] = new

        def restore() -> None:
            owner._modules.clear()
            owner._modules.update(before)

        self._undo.append(restore)

    def _remove(self, table: dict[str, Any], name: str) -> None:
        before = dict(table)
        del table[name]

        def restore() -> None:
            table.clear()
            table.update(before)

        self._undo.append(restore)

    def _clear(self, table: dict[str, Any], name: str) -> None:
        old = table[name]
        table[name] = None
        self._undo.append(lambda: table.__setitem__(name, old))


def _dead_inside(region: Region, rewrite: Rewrite) -> list[fx.Node]:
    """Nodes of the region that vanish from the forward being rewritten."""
    found = []
    for node in [*region.dying, *region.constants]:
        chain = list(call_of(node).chain())
        if rewrite.call in chain and rewrite.tail not in chain:
            found.append(node)
    return found


def _merged(
    layout: Layout, rewrites: dict[Call, list[tuple[Rewrite, Region]]]
) -> dict[Call, list[tuple[Rewrite, Region]]]:
    """Rewrites by the call whose forward is generated.

    A rewritten forward writes out the child calls that it edits; their own rewrites then become part of it.
    """
    merged = dict(rewrites)
    for outer in sorted(rewrites, key=lambda c: len(list(c.chain()))):
        if outer not in merged:
            continue
        while True:
            dead = {n for rewrite, region in merged[outer] for n in _dead_inside(region, rewrite)}
            opened = {c for n in dead for c in call_of(n).chain()}
            inner = [c for c in merged if c is not outer and c in opened and outer in c.chain()]
            if not inner:
                break
            for call in inner:
                merged[outer] = merged[outer] + merged.pop(call)
    return merged


def unchanged(got: Any, wanted: Any, name: str) -> None:
    """Called by a rewritten forward for each optional argument that its caller left at a fixed value."""
    if got is not wanted and not (type(got) is type(wanted) and got == wanted):
        raise ValueError(f"this forward was collapsed for {name}={wanted!r} and cannot be called with another value")


def _layer_name(layout: Layout, call: Call, region: Region, dead: set[fx.Node], taken: set[str]) -> str:
    """The name of the child that held the largest convolution, if all of it dies; else a new one."""
    flow = layout.flow
    convs = [n for n in region.dying if n.op == "call_module" and isinstance(flow.modules[n], (_ConvNd, nn.Linear))]
    convs += [n for n in region.constants if n.op == "get_attr"]
    convs.sort(key=lambda n: -sum(t.numel() for t in flow.tensors[n]))
    for node in convs:
        path = str(node.target)
        if call.path and not path.startswith(call.path + "."):
            continue
        name = path[len(call.path) + 1 if call.path else 0 :].split(".")[0]
        at = join(call.path, name)
        users = [
            n
            for n in layout.inside(call)
            if n.op in ("call_module", "get_attr") and (n.target == at or str(n.target).startswith(at + "."))
        ]
        if name in call.module._modules and at not in taken and all(n in dead for n in users):
            return name
    base, number = "folded", 0
    while hasattr(call.module, base) or join(call.path, base) in taken:
        number += 1
        base = f"folded_{number}"
    return base


def _remainder(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """What is left of a norm or convolution that also does something else: its activation, under its old name.

    Assertions about the input's shape go with the norm that made them.
    """
    chain: list[fx.Node] = []
    node = next(iter(reversed(graph.nodes))).args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        chain.insert(0, node)
        node = node.args[0]
    others = [n for n in graph.nodes if n.op in ("call_module", "get_attr") and n not in chain]
    names = [str(n.target) for n in chain]
    if not isinstance(node, fx.Node) or node.op != "placeholder" or others or any("." in name for name in names):
        return fx.GraphModule(module, graph).eval()
    kept = OrderedDict((n, m) for n in names if type(m := module.get_submodule(n)) is not nn.Identity)
    return nn.Sequential(kept).eval() if kept else nn.Identity().eval()


class _Local:
    """Builds the new forward of one call: its own operations, and its child modules called as before."""

    def __init__(
        self,
        layout: Layout,
        call: Call,
        changes: list[tuple[Rewrite, Region]],
        names: dict[Region, str],
        dead: set[fx.Node],
    ) -> None:
        self.layout, self.call, self.names, self.dead = layout, call, names, dead
        self.touched = self._calls_with(dead)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.parts: list[fx.Node] = []
        self.given = {rewrite.old: rewrite.source for rewrite, _ in changes if not rewrite.layer}
        self.first = {}
        for rewrite, region in changes:
            if rewrite.layer:
                self.first[next(n for n in region.dying if call in call_of(n).chain())] = (rewrite.source, region)

    def build(self) -> fx.Graph:
        self._placeholders()
        self._copy(self.call)
        self.graph.output(self._map(self.call.output))
        for node in self.parts:
            if not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.graph

    def _placeholders(self) -> None:
        signature = inspect.signature(self.call.module.forward)
        for name, value in signature.bind(*self.call.args, **self.call.kwargs).arguments.items():
            parameter = signature.parameters[name]
            default = () if parameter.default is parameter.empty else (parameter.default,)
            node = self.graph.placeholder(name, None, *default)
            self._name(value, node)
            if default and not _nodes(value):
                # The new forward holds for the option that was traced; any other must not be ignored in silence.
                self.graph.call_function(unchanged, (node, value, name))

    def _copy(self, call: Call) -> None:
        for item in self.layout.items[call]:
            if isinstance(item, fx.Node):
                self._node(item)
            elif item in self.touched:
                self._copy(item)
            else:
                self._call(item)

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
            new.target = self._relative(str(node.target))
        self.env[node] = new

    def _fold(self, source: fx.Node, region: Region) -> None:
        new = self.graph.call_module(self._relative(self.names[region]), (self._value(source),))
        for node in region.dying:  # whoever still asks for their shape asks the result
            self.env[node] = new

    def _call(self, call: Call) -> None:
        target = self._relative(call.path)
        try:
            new = self.graph.call_module(target, self._map(call.args), self._map(call.kwargs))
        except KeyError:
            return
        self._name(call.output, new)

    def _name(self, value: Any, new: fx.Node) -> None:
        """Let the traced nodes in ``value``, a node or nested tuples of them, be found as parts of ``new``."""
        if isinstance(value, fx.Node):
            self.env.setdefault(value, new)
            return
        for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ():
            if _nodes(part):
                taken = self.graph.call_function(operator.getitem, (new, key))
                self.parts.append(taken)
                self._name(part, taken)

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        """The new node of a traced one; a fold made elsewhere is found under the result that it replaced."""
        return self.env[origin(node)]  # type: ignore[no-any-return]

    def _relative(self, target: str) -> str:
        if not self.call.path:
            return target
        if not target.startswith(self.call.path + "."):
            raise RefusalError(Reason.CODE, f"{self.call.path} uses {target}, which stands elsewhere in the model")
        return target[len(self.call.path) + 1 :]

    def _calls_with(self, dead: set[fx.Node]) -> set[Call]:
        return {c for n in dead for c in call_of(n).chain()}
