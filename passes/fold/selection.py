"""Single-entry single-exit regions: which of them are one convolution, and which of those to fold.

For every node r the dominators d1 = idom(r), d2 = idom(d1), ... are walked up while all nodes between are affine. Each
(d, r) is a region; its form is evaluated from d alone, on meta tensors while planning. A region is folded when the
single convolution holds no more numbers and needs no more multiply-adds than the nodes that would die with it. A node
that is used from outside stays, and so do all nodes it needs: none of them counts as saved.

Planning is linear in the size of the graph: the walk is bounded, and values are shared by all regions of an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from passes.algebra.conv_form import ConvForm
from passes.fold.regions import Region, Sweep, cost_message, origin
from passes.graph.dataflow import ENTRY, Flow
from passes.laws.layouts import is_conv, views
from passes.laws.values import Signal
from passes.refusal import Reason, Refusal, RefusalError

__all__ = ["find_regions", "plan_unit"]

MAX_CLIMB = 32
"""Most dominators walked up from one node; regions that matter are far smaller."""


def find_regions(flow: Flow, dead: set[fx.Node], changed: set[fx.Node] | None, refusals: list[Refusal]) -> list[Region]:
    """All regions worth folding, best first; with ``changed``, those that contain one of these nodes."""
    dominator = flow.dominators(dead)
    sweeps: dict[fx.Node, list[Sweep]] = {}
    found: list[Region] = []
    near = _reach(flow, changed) if changed is not None else None
    for result in flow.nodes:
        if result not in flow.affine or result not in dominator or (near is not None and result not in near):
            continue
        said: list[Refusal] = []
        for entry in _climb(flow, dominator, result):
            if entry not in sweeps:
                sweeps[entry] = [Sweep(flow, entry, v, c) for v, c in views(flow, entry)]
            values = [(sweep, sweep.value(result)) for sweep in sweeps[entry]]
            for sweep, value in values:
                if isinstance(value, Signal) and value.ids is None:
                    outcome = _weigh(flow, sweep, result, value.form, dead)
                    if isinstance(outcome, Region):
                        found.append(outcome)
                    elif outcome is not None:
                        said.append(outcome)
                elif isinstance(value, Refusal):
                    said.append(value)
            if values and all(_final(value) for _, value in values):
                break
        if said and not any(r.result is result for r in found[-MAX_CLIMB:]):
            refusals += said
    return sorted(found, key=lambda region: region.gain, reverse=True)


def plan_unit(
    flow: Flow,
    accept: Callable[[Region, set[fx.Node]], Refusal | None],
    banned: set[tuple[str, ...]],
    refusals: list[Refusal],
) -> list[Region]:
    """Regions to fold, chosen greedily by gain until nothing changes.

    ``accept`` is the driver's guard (sharing, in-place changes, surgery); its refusals are collected.
    ``banned`` are the keys of regions that failed with numbers.
    """
    chosen: list[Region] = []
    dead: set[fx.Node] = set()
    refused = set(banned)
    changed: set[fx.Node] | None = None
    while changed is None or changed:
        candidates = find_regions(flow, dead, changed, refusals)
        changed = set()
        for region in candidates:
            if region.key in refused or dead.intersection(region.dying):
                continue
            kept = [r.entry for r in chosen if r.node not in region.dying and r.entry is not region.result]
            if region.entry in dead or any(entry in region.dying for entry in kept):
                continue  # planned before its neighbour was folded; the next round sees what is left
            inner = [r for r in chosen if r.node in region.dying]
            region.inner = inner
            region.dying = sorted(
                {n for r in inner for n in r.dying} | {n for n in region.dying if "region" not in n.meta},
                key=lambda n: flow.order[n],
            )
            region.convs = region.convs.union(*(r.convs for r in inner))
            region.constants = list(dict.fromkeys([c for r in inner for c in r.constants] + region.constants))
            if region.key in banned:  # the same layers, reached by way of an inner fold
                continue
            refusal = _too_dense(region) or accept(region, dead)
            if refusal is None and not _gains(region):  # moved channels whose block structure did not come back
                refused.add(region.key)
                continue
            if refusal is not None:
                refusals.append(refusal.at(flow.unit.name(origin(region.result))))
                refused.add(region.key)
                continue
            chosen = [r for r in chosen if r not in inner] + [region]
            dead |= set(region.dying) | {r.node for r in inner if r.node is not None}
            node = _contract(flow, region)
            changed.add(node)
            # What stays but has lost a reader, or another call of its module, may now fold with what is left.
            near = {n for gone in region.dying for n in [*gone.all_input_nodes, *flow.sharers(gone)]}
            changed |= {n for n in near if n not in dead and n in flow.affine}
            for neighbour in chosen:
                if neighbour.entry is region.result:
                    neighbour.entry = node
    return chosen


def _too_dense(region: Region) -> Refusal | None:
    """Moved channels were planned in the hope of block structure; whether it is there, only numbers say."""
    if not region.form.widened:
        return None
    try:
        with torch.no_grad():
            form = region.numeric()
    except RefusalError as error:
        return error.refusal
    region.form = form.to("meta")
    return None


def _is_planned(dying: list[fx.Node], entry: fx.Node) -> bool:
    """Whether this is a fold that is planned already; from further up it may be another one."""
    region = dying[0].meta.get("region") if len(dying) == 1 else None
    return isinstance(region, Region) and region.entry is entry


def _gains(region: Region) -> bool:
    """Whether anything is saved: numbers, multiply-adds or a layer."""
    fewer = region.form.numbers < region.numbers_saved or region.form.multiply_adds < region.work_saved
    return fewer or len(region.convs) > 1


def _contract(flow: Flow, region: Region) -> fx.Node:
    graph = flow.unit.graph
    with graph.inserting_after(region.result):
        node = graph.create_node("call_function", _fold_marker, (region.entry,))
    node.meta.update(region=region, call=region.result.meta["call"])
    region.node = node
    region.result.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    flow.add(node, region.result)
    if not region.view.last:
        flow.rank[node], flow.channels[node] = region.view.n + 2, region.form.out_channels
    flow.nodes.sort(key=lambda n: flow.order[n])
    return node


def _fold_marker(x: Any) -> Any:
    raise AssertionError("stands for a folded region while planning; never runs")


def _climb(flow: Flow, dominator: dict[Any, Any], result: fx.Node) -> Iterator[fx.Node]:
    entry = dominator[result]
    for _ in range(MAX_CLIMB):
        if entry == ENTRY:
            return
        yield entry
        if entry not in flow.affine:
            return
        entry = dominator[entry]


def _final(value: Any) -> bool:
    """Whether climbing further cannot help: something between is not affine or comes from elsewhere."""
    return isinstance(value, Refusal) and value.reason in _FINAL


_FINAL = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.NOT_A_CONVOLUTION}


def _reach(flow: Flow, changed: set[fx.Node]) -> set[fx.Node]:
    """Affine nodes that lie behind a changed node with only affine nodes between."""
    reached, todo = set(changed), list(changed)
    while todo:
        for user in todo.pop().users:
            if user in flow.affine and user not in reached:
                reached.add(user)
                todo.append(user)
    return reached


def _weigh(flow: Flow, sweep: Sweep, result: fx.Node, form: ConvForm, dead: set[fx.Node]) -> Region | Refusal | None:
    """The region from the sweep's entry to ``result``, a refusal if it costs more, None if nothing would be gained."""
    between = _between(flow, sweep.entry, result)
    dying = _dying(flow, between, result, form, sweep, dead)
    signals = [s for n in dying if isinstance(s := sweep.value(n), Signal)]
    convs = {n for n in dying if isinstance(s := sweep.value(n), Signal) and s.conv}
    if not convs or _is_planned(dying, sweep.entry):
        return None
    constants = _dying_constants(flow, dying, dead)
    numbers = _numbers(flow, [*dying, *constants], dead)
    work = sum(s.work * s.form.rate for s in signals)
    best = form.numbers, form.multiply_adds
    if form.widened:  # zeros may turn out to be block structure; decided with numbers
        groups = form.most_groups // form.groups
        best = form.weight.numel() // groups + (form.numbers - form.weight.numel()), form.multiply_adds / groups
    if best[0] > numbers or best[1] > work:
        return Refusal(Reason.LARGER, cost_message(form, numbers, work), flow.unit.name(origin(result)))
    if best == (numbers, work) and len(convs) == 1:
        return None
    return Region(
        flow,
        sweep.entry,
        result,
        sweep.view,
        sweep.channels,
        form,
        between,
        dying,
        constants,
        numbers,
        work,
        biases=sum(s.bias for s in signals),
        conv_first=_begins_with_conv(sweep, between),
        after_conv=is_conv(flow, sweep.entry),
        convs=convs,
    )


def _begins_with_conv(sweep: Sweep, between: list[fx.Node]) -> bool:
    signals = (s for n in between if isinstance(s := sweep.value(n), Signal))
    return next((s.conv for s in signals if s.work), False)


def _between(flow: Flow, entry: fx.Node, result: fx.Node) -> list[fx.Node]:
    """Nodes from ``entry`` (not included) to ``result``, in order."""
    seen, todo = {result}, [result]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is not entry and source not in seen and source not in flow.constant:
                seen.add(source)
                todo.append(source)
    return sorted(seen, key=lambda n: flow.order[n])


def _dying(
    flow: Flow, between: list[fx.Node], result: fx.Node, form: ConvForm, sweep: Sweep, dead: set[fx.Node]
) -> list[fx.Node]:
    dying = {result}
    for node in reversed(between):
        if node is result:
            continue
        if all(u in dying or u in dead or _harmless(flow, u, node, form, sweep) for u in node.users):
            dying.add(node)
    return [n for n in between if n in dying]


def _harmless(flow: Flow, user: fx.Node, node: fx.Node, form: ConvForm, sweep: Sweep) -> bool:
    """A question about the shape may be asked of the result instead, if it has the same shape."""
    if not flow.shape_only(user):
        return False
    value = sweep.value(node)
    if not isinstance(value, Signal):
        return True
    own = value.form
    same = (own.stride, own.extent, own.up, own.out_channels) == (form.stride, form.extent, form.up, form.out_channels)
    return same and value.ids is None


def _dying_constants(flow: Flow, dying: list[fx.Node], dead: set[fx.Node]) -> list[fx.Node]:
    """Weight expressions that only dying nodes read."""
    gone = set(dying)
    found: list[fx.Node] = []
    todo = [c for n in dying for c in n.all_input_nodes if c in flow.constant]
    while todo:
        node = todo.pop()
        if node in gone or not all(u in gone or u in dead for u in node.users):
            continue
        gone.add(node)
        found.append(node)
        todo += node.all_input_nodes
    return sorted(found, key=lambda n: flow.order[n])


def _numbers(flow: Flow, nodes: list[fx.Node], dead: set[fx.Node]) -> int:
    """Numbers held by weights that no other node and no other place of the model uses."""
    gone = set(nodes)
    unique = {id(t): t for n in nodes for t in flow.tensors.get(n, ())}
    alone = {key for key in unique if all(n in gone or n in dead for n in flow.holders[key])}
    own = [t for key, t in unique.items() if key in alone and flow.owners.get(key, 1) == 1]
    regions: list[Region] = [n.meta["region"] for n in nodes if "region" in n.meta]
    return sum(t.numel() for t in own) + sum(r.form.numbers for r in regions)
