"""Surgery: put the folded layers into the caller's own model and disturb as little as possible.

:class:`Surgeon` carries out what :mod:`passes.fold.placement` decided, and can take everything back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.fold.forward import new_forward
from passes.fold.placement import Layout, Placement, Rewrite
from passes.fold.regions import Region
from passes.fold.rewritten import rewrite_forward
from passes.graph.capture import Call, call_of, join

__all__ = ["Surgeon"]


Uses = list[tuple[str, fx.Node]]


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
                self.replace(full, layer if is_layer else nn.Identity().eval())
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
        owners: dict[Region, nn.Module] = {}
        uses = list(_uses(layout, call, dead))
        for rewrite, region in changes:
            if rewrite.layer:
                # A child that is written out stays as a holder only while something in it is still in use.
                holder = rewrite.call if any(_below(u, rewrite.call.path) and n not in dead for u, n in uses) else call
                local = _layer_name(layout, holder, region, dead, set(names.values()), uses)
                names[region], owners[region] = join(holder.path, local), holder.module
        graph = new_forward(layout, call, changes, names, dead)
        self._clean(call, dead, uses)
        paths = {}
        for rewrite, region in changes:
            if rewrite.layer:
                self._add(owners[region], names[region].rsplit(".", 1)[-1], layers[region])
                paths[region] = join(unit.path, names[region])
        if isinstance(call.module, (_BatchNorm, _ConvNd)) and not any(r.layer for r, _ in changes):
            self.replace(join(unit.path, call.path), _remainder(call.module, graph))
        else:
            before = call.module.__class__
            rewrite_forward(call.module, graph)
            self._undo.append(lambda: setattr(call.module, "__class__", before))
        return paths

    def _clean(self, call: Call, dead: set[fx.Node], uses: Uses) -> None:
        """Remove the modules and weights below ``call`` that only dead nodes used."""
        prefix = call.path
        use: dict[str, bool] = {}
        for path, node in uses:
            use[path] = use.get(path, False) or node not in dead
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

    def replace(self, path: str, new: nn.Module) -> None:
        """Put ``new`` in the place of the module at ``path``."""
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


def _uses(layout: Layout, call: Call, dead: set[fx.Node]) -> Iterator[tuple[str, fx.Node]]:
    """Paths of the modules and weights that ``call`` uses, leaves and whole child calls, each with a node that does."""
    opened = {c for n in dead for c in call_of(n).chain()}
    for node in layout.inside(call):
        if node.op in ("call_module", "get_attr"):
            yield str(node.target), node
        for inner in call_of(node).chain():
            if inner is call:
                break
            if inner not in opened:  # called as before, whatever it does
                yield inner.path, node


def _below(path: str, other: str) -> bool:
    return path.startswith(other + ".") or not other


def _layer_name(layout: Layout, call: Call, region: Region, dead: set[fx.Node], taken: set[str], uses: Uses) -> str:
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
        users = [n for used, n in uses if used == at or _below(used, at)]
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
