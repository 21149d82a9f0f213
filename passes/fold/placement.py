"""Where a folded layer goes: decided from the graph alone, before anything is changed.

In this order: (a) the region is a chain of modules: the first convolution's slot gets the folded one, the others
become Identity, or what remains of them; (b) the region is one module's whole forward: that module becomes the layer;
(c) the region is part of a forward: only the smallest enclosing module gets a new forward.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from passes.algebra.conv_form import Form
from passes.algebra.geometry import CONVS
from passes.fold.candidates import Candidate, Tie
from passes.fold.layout import Layout
from passes.graph.capture import Call, call_of, join
from passes.laws.deform import deformed, is_deforming_call
from passes.refusal import Reason, RefusalError

__all__ = ["Placement", "Rewrite", "nodes_in", "place"]


@dataclass(frozen=True)
class Rewrite:
    """In the forward of ``call``, ``old`` is replaced by ``source``, through the folded layer if ``layer``.

    ``tail`` is a child call that keeps part of the region and is edited on its own. With ``head``, the region's layer
    stands where that node was, and what lies behind it vanishes on its own.
    """

    call: Call
    old: fx.Node
    source: fx.Node
    layer: bool
    tail: Call | None = None
    head: fx.Node | None = None


@dataclass
class Placement:
    """Where a region's layer goes. ``slots`` maps a module path to True (the layer) or False (Identity)."""

    slots: dict[str, bool] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What is asked of a call: wherever ``old`` was, give ``source``, through the folded layer if ``layer``."""

    old: fx.Node
    source: fx.Node
    layer: bool


def place(layout: Layout, region: Candidate) -> Placement:
    """Decide where the folded layer goes; raises :class:`RefusalError` with ``CODE`` if nowhere."""
    _check_reach(layout, region)
    if region.tie is not None:
        return _tied(layout, region, region.tie)
    if region.is_alias:
        placement = Placement()
        _put(layout, region, Step(region.result, region.entry, False), placement)
        return placement
    if region.head is not None:
        return _apart(layout, region, region.head, region.moved[-1])
    placement = Placement()
    _put(layout, region, Step(region.result, region.entry, True), placement)
    conv = _conv_elsewhere(layout, region, placement)
    if conv is not None:
        with suppress(RefusalError):
            apart = _apart(layout, region, conv, conv)
            if not any(rewrite.layer for rewrite in apart.rewrites):
                return apart
    return placement


def _tied(layout: Layout, region: Candidate, tie: Tie) -> Placement:
    """Calls of one weight are rewritten in the one forward that makes all of them: there it is at hand."""
    call = _common_call([call_of(node) for node in tie.nodes])
    if not _sees(call, region.entry) or _hides(call, region.entry, region) is not None:
        raise RefusalError(Reason.CODE, f"{call.path} does not see the value that the fold would read")
    _check_rewritable(layout, call)
    return Placement(rewrites=[Rewrite(call, region.result, region.entry, True)])


def _apart(layout: Layout, region: Candidate, head: fx.Node, source: fx.Node) -> Placement:
    """The layer where ``head`` was, and its value, as ``source`` has it, in the result's place."""
    placement, order = Placement(), layout.flow.order
    before = tuple(n for n in region.dying if order[n] <= order[head])
    behind = tuple(n for n in region.dying if order[n] > order[head])
    _put(layout, replace(region, dying=before), Step(head, region.entry, True), placement)
    _put(layout, replace(region, dying=behind), Step(region.result, source, False), placement)
    placement.rewrites = [replace(rewrite, head=head) for rewrite in placement.rewrites]
    return placement


def _conv_elsewhere(layout: Layout, region: Candidate, placement: Placement) -> fx.Node | None:
    """The region's only convolution, if it is a layer that a rewritten forward would take away from where it stands.

    There its weights have names that files know.
    """
    first, *behind = region.dying
    calls = [rewrite.call for rewrite in placement.rewrites if rewrite.layer]
    if region.convs != {first} or first.op != "call_module" or not behind or not calls:
        return None
    if str(first.target).rpartition(".")[0] in {call.path for call in calls}:
        return None
    inside = {first, *behind, *region.constants}
    chained = all(source in inside or source in layout.flow.constant for n in behind for source in n.all_input_nodes)
    return first if chained else None


def _put(layout: Layout, region: Candidate, step: Step, placement: Placement) -> None:
    common = _common_call([call_of(n) for n in region.dying])
    while common.parent is not None and not _sees(common, step.source):
        common = common.parent
    hidden = _hides(common, step.source, region)
    if hidden is not None:
        raise RefusalError(Reason.CODE, f"{hidden.path} does not return the value that the fold would read")
    _substitute(layout, region, common, step, placement)


def _check_reach(layout: Layout, region: Candidate) -> None:
    """Refuse with ``HELD`` if a layer of the region may be called past the place where it is registered."""
    called = {id(m): m for n in region.dying if (m := layout.flow.modules.get(n)) is not None}
    called.update({id(c.module): c.module for n in region.dying for c in call_of(n).chain() if c.parent is not None})
    for module in called.values():
        holder = layout.out_of_reach(module)
        if holder is not None:
            name = next(path for path, m in layout.flow.unit.root.named_modules() if m is module)
            raise RefusalError(Reason.HELD, f"{join(layout.flow.unit.path, name)} is also held by {holder}")


def _common_call(calls: list[Call]) -> Call:
    chains = [list(c.chain())[::-1] for c in calls]
    common = chains[0][0]
    for level in zip(*chains, strict=False):
        if any(c is not level[0] for c in level):
            break
        common = level[0]
    return common


def _sees(call: Call, node: fx.Node) -> bool:
    """Whether the forward of ``call`` gets at the value of ``node``: made inside, or given."""
    return call in call_of(node).chain() or node in nodes_in([call.args, call.kwargs])


def _hides(call: Call, node: fx.Node, region: Candidate) -> Call | None:
    """The call inside ``call`` that keeps ``node`` to itself; one that loses nodes is written out instead."""
    inner = [c for c in call_of(node).chain() if call in c.chain() and c is not call]
    for c in reversed(inner):
        if node in nodes_in(c.output):
            return None
        if not any(c in call_of(n).chain() for n in region.dying):
            return c
    return None


def _substitute(layout: Layout, region: Candidate, call: Call, step: Step, placement: Placement) -> None:
    """Decide how ``call`` is edited so that it does what ``step`` asks."""
    trial = Placement()
    if _as_chain(layout, region, call, step, trial) or _with_tail(layout, region, call, step, trial):
        placement.slots.update(trial.slots)
        placement.rewrites += trial.rewrites
        return
    fixed = call in layout.flow.unit.fixed
    fixed |= is_deforming_call(layout.flow, region.result)  # it reads more than a layer would
    if not fixed and _is_whole(layout, region, call, step.old) and call.args == (step.source,) and not call.kwargs:
        outer = call.parent is None and layout.flow.unit.path != ""
        inner = call.parent is not None and layout.replaceable(call.module, call.path, call.parent)
        told = (step.layer and layout.misled(call.module, region.form)) or id(call.module) in layout.flow.unit.asked
        if (outer or inner) and not told and not layout.reads_numbers(call.path):
            placement.slots[call.path] = step.layer
            return
    _check_rewritable(layout, call)
    placement.rewrites.append(Rewrite(call, step.old, step.source, step.layer))


def _with_tail(layout: Layout, region: Candidate, call: Call, step: Step, trial: Placement) -> bool:
    """Rewrite ``call`` up to the child that ends the region, and edit that child on its own: it keeps what is left."""
    tail = _tail(call, step.old)
    passed = _passed(region, tail) if tail is not None and tail.output is not step.old else None
    if tail is None or passed is None:
        return False
    if step.layer and (passed in region.sized or _makes(tail, region.sized, False)):
        return False  # that value would be the layer's
    try:
        _check_rewritable(layout, call)
        _substitute(layout, region, tail, Step(step.old, passed, False), trial)
    except RefusalError:
        return False  # what is left of the tail is then written out in the new forward
    trial.rewrites.append(Rewrite(call, passed, step.source, step.layer, tail))
    return True


def _check_rewritable(layout: Layout, call: Call) -> None:
    where = call.path or type(call.module).__name__
    if (fixed := layout.flow.unit.fixed.get(call)) is not None:
        raise RefusalError(fixed.reason, f"{fixed.message}, so the forward of {where} stays as it is")
    if not layout.rewritable(call):
        raise RefusalError(Reason.CODE, f"{where} is called more than once, so its forward cannot be rewritten")
    outermost = list(call.chain())[-1]
    if layout.flow.unit.path and _untraced_options(outermost):
        options = ", ".join(_untraced_options(outermost))
        raise RefusalError(Reason.CODE, f"untraceable code calls {layout.flow.unit.path} and may pass {options}")
    if call.module._forward_pre_hooks_with_kwargs:  # it says what the forward is called with, in every call
        raise RefusalError(Reason.HOOK, f"a hook of {where} changes its arguments, so its forward stays as it is")
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


def _passed(region: Candidate, tail: Call) -> fx.Node | None:
    """The one dying value that ``tail`` is given."""
    inside = {n for n in region.dying if tail in call_of(n).chain()}
    given = {i for n in inside for i in n.all_input_nodes} & (set(region.dying) - inside)
    if len(given) != 1:
        return None
    (value,) = given
    return value if nodes_in([tail.args, tail.kwargs]).count(value) == 1 else None


def _as_chain(layout: Layout, region: Candidate, call: Call, step: Step, trial: Placement) -> bool:
    """Try (a): the dying nodes of ``call`` are modules in a row; the first convolution's slot gets the layer."""
    items = _items(region, call)
    if items is None:
        return False
    at = next((i for i, item in enumerate(items) if _has_conv(layout, region, item)), 0) if step.layer else -1
    source = step.source
    if step.layer and any(_makes(item, region.sized, i == at) for i, item in enumerate(items) if i >= at):
        return False  # whoever asks for that size would ask the layer
    for i, item in enumerate(items):
        last = i == len(items) - 1
        target = step.old if last else (item if isinstance(item, fx.Node) else item.output)
        if not isinstance(target, fx.Node) or (not last and not _only_feeds(layout, target, items[i + 1], call)):
            return False
        if isinstance(item, fx.Node):
            if item is not target or not _leaf_slot(layout, item, source, call, region.form, i == at, trial):
                return False
        elif item not in call_of(source).chain() and (item.kwargs or nodes_in(item.args).count(source) != 1):
            return False
        else:
            try:
                _substitute(layout, region, item, Step(target, source, i == at), trial)
            except RefusalError:
                return False
        source = target
    return True


def _makes(item: fx.Node | Call, nodes: frozenset[fx.Node], is_layer: bool) -> bool:
    """Whether this item makes one of these values; inside of what gets the layer, that is seen later."""
    if isinstance(item, fx.Node):
        return item in nodes
    if is_layer:
        return not nodes.isdisjoint(nodes_in(item.output))
    return any(item in call_of(node).chain() for node in nodes)


def _leaf_slot(
    layout: Layout, node: fx.Node, source: fx.Node, call: Call, form: Form, is_layer: bool, trial: Placement
) -> bool:
    """Put the layer or Identity into a leaf module's slot; a layer that does nothing in eval may stay."""
    alone = len(node.args) == 1 and not node.kwargs and nodes_in(node.args) == [source]
    if not alone and not (is_layer and node.args[:1] == (source,) and deformed(layout.flow, node, None) is not None):
        return False
    module, path = layout.flow.modules[node], str(node.target)
    if not is_layer and isinstance(module, (nn.Identity, _DropoutNd)):
        return True
    if not layout.replaceable(module, path, call):
        return False
    if id(module) in layout.flow.unit.asked and not (is_layer and type(module) in CONVS):
        return False
    if is_layer and (layout.reads_numbers(path) or layout.misled(module, form)):
        return False
    trial.slots[path] = is_layer
    return True


def _has_conv(layout: Layout, region: Candidate, item: fx.Node | Call) -> bool:
    nodes = [item] if isinstance(item, fx.Node) else [n for n in region.dying if item in call_of(n).chain()]
    kinds = (_ConvNd, nn.Linear)
    return any(isinstance(layout.flow.modules.get(n), kinds) or n in region.convs for n in nodes)


def _items(region: Candidate, call: Call) -> list[fx.Node | Call] | None:
    """What ``call`` itself runs of the region: leaf modules and child calls, in order; None if bare operations too."""
    items: dict[fx.Node | Call, None] = {}
    for node, below in region.by_call.get(call, ()):
        if below is None and node.op != "call_module":
            return None
        items[node if below is None else below] = None
    return list(items) or None


def _only_feeds(layout: Layout, node: fx.Node, item: fx.Node | Call, call: Call) -> bool:
    """Whether ``node`` goes into ``item`` and nowhere else, questions about its shape aside."""
    for user in node.users:
        inside = user is item if isinstance(item, fx.Node) else item in call_of(user).chain()
        if not inside and not layout.flow.shape_only(user):
            return False
    return node not in nodes_in(call.output)


def _is_whole(layout: Layout, region: Candidate, call: Call, old: fx.Node) -> bool:
    """Whether nothing of ``call`` is left once ``old`` is replaced (``old`` is all it returns)."""
    if call.output is not old:
        return False
    if any(call in other.chain() for other in layout.flow.unit.fixed):
        return False
    dying = {*region.dying, *region.constants}
    alive = [n for n in layout.inside(call) if n not in dying]
    return all(n.op in ("call_function", "call_method", "get_attr") and _stays_inside(n, call) for n in alive)


def _stays_inside(node: fx.Node, call: Call) -> bool:
    return all(call in call_of(user).chain() and user.op != "output" for user in node.users)


def nodes_in(value: Any) -> list[fx.Node]:
    """All nodes in a nested structure of arguments."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(value, note)
    return found
