"""Facts about a unit's modules that decide how they may be edited: who calls, holds and reads them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from functools import cached_property
from itertools import chain, islice

from torch import fx, nn

from passes.algebra.conv_form import Form
from passes.edits.holders import Holder
from passes.fold.methods import asked_of_others
from passes.fold.whole import Whole
from passes.graph.capture import Call, call_of
from passes.graph.dataflow import Flow
from passes.graph.walk import modules_of

__all__ = ["Layout"]


class Layout:
    """Facts about one unit's modules that surgery needs: how often each is called, and where it is registered."""

    def __init__(self, flow: Flow, whole: Whole) -> None:
        self.flow = flow
        self.whole = whole
        self._asked: set[str] | None = None
        self._inside = {id(m) for m in modules_of(flow.unit.root)}
        unit = flow.unit
        self.leaf_calls = Counter(str(n.target) for n in flow.modules)
        self.calls = Counter(id(call.module) for call in unit.calls)
        self.items: dict[Call, list[fx.Node | Call]] = {call: [] for call in unit.calls}
        made_nodes = {call for node in flow.nodes for call in call_of(node).chain()}
        silent = defaultdict[fx.Node | None, list[Call]](list)
        for call in unit.fixed:  # it does more than its graph says, and makes no node that would stand for it
            if call not in made_nodes:
                silent[call.after].append(call)
        entered: set[Call] = set()
        for call in silent.pop(None, []):
            self._enter(call, entered)
        for node in flow.nodes:
            if node.op not in ("placeholder", "output"):
                self._enter(node, entered)
            for call in silent.pop(node, []):
                self._enter(call, entered)
        for call in chain(*silent.values()):  # a question came before it, which is no operation
            self._enter(call, entered)

    def _enter(self, item: fx.Node | Call, entered: set[Call]) -> None:
        """Note a node, or a call without any, in the call around it, and that in the next, if they are new."""
        if isinstance(item, Call):
            if item in entered:
                return
            entered.add(item)
        for call in call_of(item).chain() if isinstance(item, fx.Node) else islice(item.chain(), 1, None):
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
        once = self.leaf_calls[path] <= 1 and self.calls[id(module)] <= 1
        around = all(self.calls[id(c.module)] == 1 for c in (parent.chain() if parent is not None else ()))
        held = any(not holder.changeable for holder in self.whole.holders.get(id(module), ()))
        pinned = held or id(module) in self.flow.unit.pinned
        return once and around and not pinned and self.whole.registered[id(module)] == 1 and path != ""

    def rewritable(self, call: Call) -> bool:
        """Whether this module's forward may be replaced."""
        # A unit is the same one wherever it stands.
        once = self.whole.registered[id(call.module)] <= 1 or call.parent is None
        return once and all(self.calls[id(c.module)] == 1 for c in call.chain())

    def out_of_reach(self, module: nn.Module) -> Holder | None:
        """An attribute through which code that was not read, or that an edit cannot change, may call this module.

        What a forward replaced on an instance closes over was read with it; such a forward can be rewritten.
        """
        unit = self.flow.unit
        for holder in self.whole.holders.get(id(module), ()):
            owner = id(holder.owner)
            if owner == id(module) or (self.calls[owner] and (holder.changeable or holder.name == "forward")):
                continue
            untouched = owner in self._inside and owner not in unit.pinned and not self._is_opaque(holder.owner)
            if not (untouched and holder.changeable):
                return holder
        return None

    def _is_opaque(self, module: nn.Module) -> bool:
        return any(self.flow.unit.root.get_submodule(path) is module for path in self.flow.unit.opaque)

    def read(self, path: str) -> dict[str, list[fx.Node]]:
        """Tensors of the module at ``path`` that other code reads itself, each with the nodes that do.

        There are none where it only asked (``bn.weight is None``, or for a dtype), which leaves no node.
        """
        calls, nodes, names = self._by_path
        inside: Set[int] = calls.get(path, set())
        found: dict[str, list[fx.Node]] = {}
        if not inside and path not in self.flow.unit.opaque:  # nor were they read in vain by the module itself
            found = {name: [] for name in names.get(path, ())}
        for node in nodes.get(path, ()):
            if not any(id(c) in inside for c in call_of(node).chain()):
                found.setdefault(str(node.target), []).append(node)
        return found

    @cached_property
    def _by_path(self) -> tuple[dict[str, set[int]], dict[str, list[fx.Node]], dict[str, list[str]]]:
        """By the path of a module: its calls, the nodes that read tensors in it, and the names of such tensors."""
        calls: dict[str, set[int]] = defaultdict(set)
        for call in self.flow.unit.calls:
            calls[call.path].add(id(call))
        nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.flow.nodes:
            if node.op == "get_attr":
                for path in _paths_above(str(node.target)):
                    nodes[path].append(node)
        names: dict[str, list[str]] = defaultdict(list)
        for name in self.flow.unit.read:
            for path in _paths_above(name):
                names[path].append(name)
        return dict(calls), dict(nodes), dict(names)

    def misled(self, module: nn.Module, form: Form) -> bool:
        """Whether other code asks the module for something that the layer of this form would answer differently."""
        told = {
            "in_channels": form.in_channels, "out_channels": form.out_channels, "kernel_size": form.kernel,
            "stride": form.stride, "dilation": form.dilation, "groups": form.groups,
        }  # fmt: skip
        differs = {name for name, value in told.items() if getattr(module, name, value) != value}
        if differs and self._asked is None:
            self._asked = asked_of_others(self.whole.model) | self.flow.unit.looked
        return bool(differs and self._asked and differs & self._asked)

    def reads_numbers(self, path: str) -> bool:
        """Whether other code reads more of a tensor of the module at ``path`` than its dtype and device."""
        return any(not _asks_for_kind(user) for nodes in self.read(path).values() for n in nodes for user in n.users)


def _paths_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _asks_for_kind(node: fx.Node) -> bool:
    """Whether this asks a tensor for its dtype or device, which the folded layer's has as well."""
    return node.target is getattr and node.args[1] in ("dtype", "device")
