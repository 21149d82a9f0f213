"""Which candidates to fold: greedily by gain, until nothing changes.

A pure function of the dataflow, of a guard and of what must stay out. What was chosen is contracted, and may act inside
a larger candidate later; nothing is written anywhere for it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import torch
from torch import fx

from passes.fold.ahead import find_ahead
from passes.fold.candidates import Candidate, Key, find_candidates
from passes.fold.norms import left_over
from passes.fold.placement import Placement
from passes.fold.rules import DEFAULT, Rules
from passes.fold.spreads import find_spreads
from passes.fold.ties import find_ties
from passes.graph.dataflow import Flow
from passes.laws.interpreter import form_of
from passes.laws.regions import Contraction
from passes.refusal import Refusal, RefusalError

__all__ = ["Guard", "Selection", "select"]

Guard = Callable[[Candidate], Placement | Refusal]
"""Where a candidate's layer goes, or why it cannot go anywhere: sharing, changes in place, surgery."""


@dataclass(frozen=True)
class Selection:
    """Candidates to fold, each with its place, why others are not, and why norms that are left over stay norms."""

    chosen: tuple[tuple[Candidate, Placement], ...]
    refusals: tuple[Refusal, ...]
    norms: tuple[Refusal, ...] = ()


def select(
    flow: Flow,
    guard: Guard,
    banned: Set[Key] = frozenset(),
    staying: Set[fx.Node] = frozenset(),
    rules: Rules = DEFAULT,
) -> Selection:
    """Choose what to fold.

    Args:
        flow: the dataflow of one unit.
        guard: asked of each candidate that would be chosen.
        banned: candidates that failed.
        staying: nodes that must not vanish.
        rules: what may fold.
    """
    graph = Contraction(flow)
    placements: dict[Candidate, Placement] = {}
    refusals: list[Refusal] = []
    refused = set(banned)
    changed: set[fx.Node] | None = None
    while True:  # every round but the last chooses a region that grows: they come to an end
        if changed is not None and not changed:
            several, said = ({}, []) if rules.whole else _several(graph, guard, refused, staying)
            refusals = [*said, *refusals]  # of one of them alone, less was said
            if not several:
                break
            placements |= several
            graph, changed = _contracted(graph, [*several]), _around(graph, [*several])
            continue
        candidates, said = find_candidates(graph, changed, rules)
        refusals += said
        chosen: list[Candidate] = []
        gone: set[fx.Node] = set()
        entries: set[fx.Node] = set()
        for candidate in candidates:
            stale = _is_stale(candidate, entries, gone)
            if stale or candidate.key in refused or not staying.isdisjoint(candidate.dying):
                continue
            outcome = _decide(flow, candidate, guard)
            if isinstance(outcome, tuple):
                candidate, placements[outcome[0]] = outcome
                chosen.append(candidate)
                gone.update(candidate.dying, candidate.moved)
                entries.add(candidate.entry)
                continue
            refused.add(candidate.key)
            if outcome is not None:
                refusals.append(outcome.at(flow.unit.name(candidate.result)))
        graph = _contracted(graph, chosen)
        changed = _around(graph, chosen)
    kept = [region for region in graph.regions.values() if isinstance(region, Candidate)]
    norms, left = _scaled(flow, graph.gone | staying, guard, refused) if rules.affine else ({}, [])
    placed = [*((region, placements[region]) for region in kept), *norms.items()]
    return Selection(tuple(placed), tuple(refusals), tuple(left))


def _scaled(
    flow: Flow, gone: Set[fx.Node], guard: Guard, refused: Set[Key]
) -> tuple[dict[Candidate, Placement], list[Refusal]]:
    """The norms that become a scale and shift, each with its place, and why others do not."""
    placed, left = dict[Candidate, Placement](), list[Refusal]()
    for norm in left_over(flow, gone):
        if isinstance(norm, Refusal):
            left.append(norm)
        elif norm.key not in refused:
            outcome = guard(norm)
            if isinstance(outcome, Placement):
                placed[norm] = outcome
            else:
                left.append(outcome.at(flow.unit.name(norm.result)))
    return placed, left


def _several(
    graph: Contraction, guard: Guard, refused: set[Key], staying: Set[fx.Node]
) -> tuple[dict[Candidate, Placement], list[Refusal]]:
    """Candidates that are one decision, with their places; asked for only where no region of a single layer is left."""
    spreads, refusals = find_spreads(graph)
    ahead, told = find_ahead(graph)
    tied, said = find_ties(graph)
    refusals += [*said, *told]
    chosen: dict[Candidate, Placement] = {}
    used: set[fx.Node] = set()
    for group in [*tied, *((*spread.parts, spread) for spread in [*spreads, *ahead])]:
        key, nodes = group[-1].together, {node for candidate in group for node in candidate.touched}
        if key in refused or not staying.isdisjoint(nodes) or not used.isdisjoint(nodes):
            continue
        placed: dict[Candidate, Placement] = {}
        for candidate in group:
            outcome = guard(candidate)
            if isinstance(outcome, Refusal):
                refused.add(key)
                refusals.append(replace(outcome, layer=graph.flow.unit.name(group[-1].dying[-1])))
                break
            placed[candidate] = outcome
        else:
            chosen |= placed
            used |= nodes
    return chosen, refusals


def _is_stale(candidate: Candidate, entries: Set[fx.Node], gone: Set[fx.Node]) -> bool:
    """Whether something around it was chosen since it was found; the next round sees what is left."""
    if candidate.entry in gone or not gone.isdisjoint(candidate.dying):
        return True
    return any(node in entries and node is not candidate.result for node in candidate.dying)


def _decide(flow: Flow, candidate: Candidate, guard: Guard) -> tuple[Candidate, Placement] | Refusal | None:
    """The candidate with its place, why it has none, or None if nothing is gained after all."""
    if candidate.form.widened:
        # Moved channels were planned in the hope of block structure; whether it is there, only numbers say.
        try:
            with torch.no_grad():
                form = form_of(flow, candidate)
        except RefusalError as error:
            return error.refusal
        refusal = candidate.costs(form)
        if refusal is not None:
            return refusal
        candidate = replace(candidate, form=form.to("meta"))
    placement = guard(candidate)
    if isinstance(placement, Refusal):
        return placement
    return (candidate, placement) if _gains(candidate) else None


def _gains(candidate: Candidate) -> bool:
    """Whether anything is saved: numbers, multiply-adds, a layer, computing a weight, or what stands around a fold."""
    fewer = candidate.form.numbers < candidate.numbers or candidate.form.multiply_adds < candidate.work
    calls = candidate.factor > 1 or bool(candidate.swallowed) or len(candidate.convs) > 1
    return fewer or candidate.computed > 0 or calls


def _contracted(graph: Contraction, chosen: list[Candidate]) -> Contraction:
    swallowed = {region for candidate in chosen for region in candidate.swallowed}
    regions = [region for region in graph.regions.values() if region not in swallowed]
    return Contraction(graph.flow, [*regions, *chosen], graph.gone.union(*({*c.dying, *c.moved} for c in chosen)))


def _around(graph: Contraction, chosen: list[Candidate]) -> set[fx.Node]:
    """What may now fold with what is left: the folds, and what stays but has lost a reader or a call of its module."""
    flow = graph.flow
    near = {n for c in chosen for gone in c.dying for n in [*gone.all_input_nodes, *flow.sharers(gone)]}
    return {c.result for c in chosen} | {n for n in near if n in flow.affine and graph.is_alive(n)}
