"""From planned folds to edits: what :mod:`passes.fold.placement` decided, written as plain data.

Nothing is changed here. A child or a weight goes only when nothing that stays needs it, other methods of its class
included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import CONVS
from passes.edits.edit import Add, Clear, Delete, Edit, Fill, Remove, Replace, Rewrite
from passes.edits.layer import Layer, describe
from passes.edits.program import Program, Value
from passes.fold.candidates import Candidate, Key, Tie
from passes.fold.folds import Fold
from passes.fold.forward import new_forward
from passes.fold.layout import Layout
from passes.fold.methods import classes_of, deployed_as, folded_from_outside, needed_elsewhere, parts_used
from passes.fold.placement import Rewrite as Change
from passes.graph.capture import Call, call_of, join
from passes.graph.methods import MethodCall
from passes.graph.walk import named_of
from passes.portable import plain_class
from passes.refusal import RefusalError

__all__ = ["Edited", "edits_of"]

Changes = list[tuple[Change, Candidate]]
Uses = list[tuple[str, fx.Node]]


@dataclass(frozen=True)
class Edited:
    """What has to be done so that a unit runs its folds.

    Args:
        edits: in order.
        layers: the folded layers by path.
        paths: where each region's layer stands.
        notes: what a person should know.
        apart: modules with another method that uses a folded layer without what was folded into it, by both names.
    """

    edits: list[Edit] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    paths: dict[Candidate, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    apart: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def edits_of(layout: Layout, folds: Sequence[Fold]) -> Edited:
    """The edits that put the folded layers of one unit in place; raises :class:`RefusalError` with ``CODE``."""
    return _Writer(layout, folds).written()


class _Writer:
    def __init__(self, layout: Layout, folds: Sequence[Fold]) -> None:
        self.layout, self.unit = layout, layout.flow.unit
        self.folds = folds
        self.layers = {fold.candidate: fold.layer for fold in folds if fold.layer is not None}
        self.done = Edited()
        self.paths = dict(named_of(self.unit.root))
        self.described = {id(m._modules): join(self.unit.path, path) for path, m in self.paths.items()}
        self.classes = classes_of(self.paths.values())
        self.gone: set[str] = set()

    def written(self) -> Edited:
        changes: dict[Call, Changes] = {}
        for fold in self.folds:
            for path, is_layer in fold.placement.slots.items():
                self._fill(path, fold.candidate if is_layer else None)
            for rewrite in fold.placement.rewrites:
                changes.setdefault(rewrite.call, []).append((rewrite, fold.candidate))
        for slots, ahead in self._slots_together():
            self._note_methods(slots, ahead)
        for call, mine in _merged(changes).items():
            self._rewrite(call, mine)
        return self.done

    def _slots_together(self) -> list[tuple[dict[str, bool], bool]]:
        """The slots of each fold, those of a map and of its layers as one; and whether these are behind it."""
        found: dict[Key, tuple[dict[str, bool], bool]] = {}
        for fold in self.folds:
            spread = fold.candidate.spread
            slots, _ = found.setdefault(fold.candidate.together, ({}, spread is not None and spread.ahead))
            slots.update(fold.placement.slots)
        return list(found.values())

    def _note_methods(self, slots: Mapping[str, bool], ahead: bool) -> None:
        """Other methods that use the layer without what was folded into it find the fold there."""
        for owner in {path.rpartition(".")[0] for path in slots} | {""}:
            names = frozenset(_child(path, owner) for path in slots if _below(path, owner))
            if len(names) > 1:
                layer = {_child(path, owner) for path, is_layer in slots.items() if is_layer and _below(path, owner)}
                module, where = self.unit.root.get_submodule(owner), join(self.unit.path, owner) or "the model"
                for method, some in parts_used(module, names, handed=True) if ahead else ():
                    if not layer & some:  # what it returns is only the same for the forward
                        told = f"{method} of {where}, called by itself, gives what {', '.join(sorted(some))} would read"
                        self.done.notes.append(f"{told}: {', '.join(sorted(layer))} behind it holds the fold now")
                for method, some in parts_used(module, names):
                    if layer & some:
                        self.done.apart.setdefault((method, ", ".join(sorted(some))), []).append(where)

    def _fill(self, path: str, region: Candidate | None) -> None:
        full = join(self.unit.path, path)
        if region is None:
            keeping = tuple(sorted(name[len(path) + 1 :] for name in self.layout.read(path)))
            norm = isinstance(self.unit.root.get_submodule(path), _BatchNorm)
            answering = norm and not keeping and folded_from_outside(self.unit.root, path, self.classes)
            self.done.edits.append(Remove(full, keeping=keeping, answering=answering))
        else:
            self._place(full, region, Replace(full, self._description(region)))

    def _place(self, full: str, region: Candidate, edit: Edit) -> None:
        self.done.edits.append(edit)
        self.done.layers[full] = self.layers[region]
        self.done.paths[region] = full

    def _description(self, region: Candidate) -> Layer:
        return describe(self.layers[region], self.described)

    def _rewrite(self, call: Call, changes: Changes) -> None:
        dead = {n for change, region in changes for n in _dead_inside(region, change)}
        method = _method_of(call, dead)
        if method is not None:
            try:
                self._rewrite_method(call, changes, dead, method)
                return
            except RefusalError:
                pass  # it uses what it is not given; the forward that calls it has all at hand
        self._rewrite_method(call, changes, dead, None)

    def _rewrite_method(self, call: Call, changes: Changes, dead: set[fx.Node], method: MethodCall | None) -> None:
        uses = list(_uses(self.layout, call, dead))
        place = self._own_place(call, changes, dead)
        kept, notes = self._kept(call, dead, "forward" if method is None else method.name, place)
        names: dict[Candidate, str] = {}
        holders: dict[Tie, Candidate] = {}
        tied: dict[Candidate, nn.Module] = {}  # these convolve with what another layer holds
        filled: Any = None  # the layer whose numbers the module itself takes
        for change, region in changes:
            tie = region.tie if region.tie is not None and region.tie.one else None
            if change.layer and tie is not None and holders.setdefault(tie, region) is not region:
                names[region], tied[region] = names[holders[tie]], self.layers[region]
            elif change.layer:
                # A child that is written out stays as a holder only while something in it is still in use.
                alive = any(_below(used, change.call.path) and n not in dead for used, n in uses)
                holder = change.call if alive else call
                if filled is None and holder is call and self._fits(call, region, dead, uses, kept):
                    filled, names[region] = self.layers[region], call.path
                    continue
                taken = {*names.values(), *kept}
                local = place or _layer_name(self.layout, holder, region, dead, taken, uses)
                names[region] = join(holder.path, local)
        program = new_forward(self.layout, call, changes, names, dead, method, filled, tied)
        for region, name in names.items():
            full = join(self.unit.path, name)
            if region in tied:
                self.done.paths[region] = full
                continue
            own = filled is self.layers[region]
            kind = Fill if own else Replace if name in self.paths else Add
            self._place(full, region, kind(full, self._description(region)))
        path = join(self.unit.path, call.path)
        if isinstance(call.module, (_BatchNorm, _ConvNd)) and not names:
            self.done.edits.append(_remainder(path, program))
            return
        taken = {join(call.path, name) for name in ("weight", "bias")} if filled is not None else set()
        self._clean(call, dead, uses, {*names.values(), *kept, *taken} - {call.path})
        folded = tuple(sorted({name for n in dead if (name := _child_of(n, call))}))
        self.done.edits.append(Rewrite(path, program, "forward" if method is None else method.name, folded))
        self.done.notes.extend(notes)

    def _fits(self, call: Call, region: Candidate, dead: set[fx.Node], uses: Uses, kept: set[str]) -> bool:
        """Whether a convolution of a class of its own can hold the folded numbers itself, where its own were."""
        module, layer = call.module, self.layers[region]
        if type(layer) not in CONVS or not isinstance(module, type(layer)) or layer.padding_mode != "zeros":
            return False
        own = {join(call.path, name) for name in ("weight", "bias")}
        plain = isinstance(module._parameters.get("weight"), Tensor) and "bias" in module._parameters
        alone = not own & kept and all(n in dead for used, n in uses if used in own)
        asked = self.layout.reads_numbers(call.path) or self.layout.misled(module, region.form)
        return plain and alone and not asked

    def _own_place(self, call: Call, changes: Changes, dead: set[fx.Node]) -> str:
        """The name of the child in which the class itself keeps the layer that all of this folds into, if any."""
        folded = {name for n in dead if (name := _child_of(n, call))}
        name = deployed_as(plain_class(call.module), folded)
        free = name in folded or not hasattr(call.module, name)
        alone = len(changes) == 1 and bool(changes[0][0].layer) and changes[0][1].tie is None
        return name if free and alone and not self._alive_below(call, dead, folded) else ""

    def _alive_below(self, call: Call, dead: set[fx.Node], names: set[str]) -> bool:
        """Whether something in these children goes on."""
        paths = {join(call.path, name) for name in names}
        uses = (used for used, n in _uses(self.layout, call, dead) if n not in dead)
        return any(used == at or _below(used, at) for used in uses for at in paths)

    def _kept(self, call: Call, dead: set[fx.Node], rewritten: str, place: str) -> tuple[set[str], list[str]]:
        """Paths of children and tensors that other methods than the rewritten one use, and notes that say so.

        The child in its own ``place`` is what they expect there.
        """
        called, read = (
            {name for n in dead if n.op == op and (name := _child_of(n, call))} for op in ("call_module", "get_attr")
        )
        needed = needed_elsewhere(call.module, called, read, rewritten)
        methods = {method: some for method, names in needed.items() if (some := names - {place})}
        where = join(self.unit.path, call.path) or "the model"
        notes = [f"{', '.join(sorted(names))} of {where} stay for its method {m}" for m, names in methods.items()]
        return {join(call.path, name) for names in methods.values() for name in names}, notes

    def _clean(self, call: Call, dead: set[fx.Node], uses: Uses, kept: set[str]) -> None:
        """Take away the modules and weights below ``call`` that only dead nodes used."""
        use: dict[str, bool] = {}
        for path, node in uses:
            use[path] = use.get(path, False) or node not in dead
        for path in kept:
            use[path] = True
        self._prune(call.module, call.path, use)

    def _prune(self, module: nn.Module, path: str, use: dict[str, bool]) -> None:
        if use.get(path) and path:
            return
        for name, child in module._modules.items():
            at = join(path, name)
            below = [alive for target, alive in use.items() if target == at or target.startswith(at + ".")]
            if child is None or not below or all(below) or at in self.gone:
                continue
            if any(below):
                self._prune(child, at, use)
            else:
                self.gone.add(at)
                self.done.edits.append(Delete(join(self.unit.path, at)))
        for name in [*module._parameters, *module._buffers]:
            at = join(path, name)
            if use.get(at) is False and at not in self.gone:
                self.gone.add(at)
                self.done.edits.append(Clear(join(self.unit.path, at)))


def _dead_inside(region: Candidate, change: Change) -> list[fx.Node]:
    """Nodes of the region that vanish from the forward being rewritten."""
    found, dying = [], region.dying
    if change.head is not None:  # the layer, and what lies behind its value, are taken away one by one
        behind = change.head < change.old
        dying = tuple(n for n in dying if (change.head < n) is behind)
    for node in [*dying, *region.constants]:
        chain = list(call_of(node).chain())
        if change.call in chain and change.tail not in chain:
            found.append(node)
    return found


def _merged(changes: dict[Call, Changes]) -> dict[Call, Changes]:
    """Changes by the call whose forward is generated.

    A rewritten forward writes out the child calls that it edits; their own changes then become part of it.
    """
    merged = dict(changes)
    for outer in sorted(changes, key=lambda c: len(list(c.chain()))):
        if outer not in merged:
            continue
        while True:
            dead = {n for change, region in merged[outer] for n in _dead_inside(region, change)}
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


def _method_of(call: Call, dead: set[fx.Node]) -> MethodCall | None:
    """The innermost method to which the forward hands on all that vanishes, if it does so once and can be rewritten."""
    for method in call.methods:
        parameters = inspect.signature(getattr(call.module, method.name)).parameters.values()
        varying = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        once = sum(other.name == method.name for other in call.methods) == 1
        if once and not varying and dead and dead <= method.nodes:
            return method
    return None


def _child_of(node: fx.Node, call: Call) -> str:
    """The name of the child of ``call``'s module that a node calls or reads, or that holds it."""
    return _child(str(node.target), call.path) if node.op in ("call_module", "get_attr") else ""


def _child(target: str, path: str) -> str:
    """The name of what ``target`` is, or lies in, below ``path``; empty if it stands elsewhere."""
    inside = target.startswith(path + ".") if path else True
    return target[len(path) + 1 if path else 0 :].split(".")[0] if inside else ""


def _below(path: str, other: str) -> bool:
    return path.startswith(other + ".") or not other


def _layer_name(layout: Layout, call: Call, region: Candidate, dead: set[fx.Node], taken: set[str], uses: Uses) -> str:
    """The name of the child that held the largest convolution, if all of it dies; else a new one."""
    flow = layout.flow
    convs = [n for n in region.dying if n.op == "call_module" and isinstance(flow.modules[n], (_ConvNd, nn.Linear))]
    convs += [n for n in region.constants if n.op == "get_attr"]
    convs.sort(key=lambda n: -sum(t.numel() for t in flow.tensors[n]))
    for node in convs:
        name = _child(str(node.target), call.path)
        at = join(call.path, name)
        users = [n for used, n in uses if used == at or _below(used, at)]
        if name in call.module._modules and at not in taken and all(n in dead for n in users):
            return name
    base, number = "folded", 0
    while hasattr(call.module, base) or join(call.path, base) in taken:
        number += 1
        base = f"folded_{number}"
    return base


def _remainder(path: str, program: Program) -> Remove:
    """What is left of a norm or convolution that also does something else: its activation, under its old name.

    Assertions about the input's shape go with the norm that made them.
    """
    chain: list[str] = []
    by_name = {op.name: op for op in program.operations}
    value = program.output
    while isinstance(value, Value) and (op := by_name.get(value.name)) is not None:
        if op.op != "call_module" or len(op.args) != 1 or op.kwargs or "." in op.target:
            break
        chain.insert(0, op.target)
        value = op.args[0]
    others = [op for op in program.operations if op.op in ("call_module", "get_attr") and op.target not in chain]
    starts = isinstance(value, Value) and value.name in {argument.name for argument in program.arguments}
    return Remove(path, tuple(chain)) if starts and not others else Remove(path, program=program)
