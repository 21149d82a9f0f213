"""Which refusals are worth saying: one per layer that stays, and for every batch norm why it is still there."""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from passes.fold.selection import Selection
from passes.graph.dataflow import Flow
from passes.refusal import Reason, Refusal

__all__ = ["worth_saying"]

_QUIET = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.RANK_UNKNOWN, Reason.CHANNELS, Reason.LAYOUT, Reason.CAST}
"""Reasons that only say where a region ends; they explain a batch norm that stays, and nothing else."""


_OWN = {Reason.RANK_UNKNOWN, Reason.BATCH_STATISTICS}
"""Reasons of a norm itself, whatever stands before it."""


FAR = 8
"""Operations that are looked through for what makes a norm's place unknown."""


def worth_saying(flow: Flow, selection: Selection) -> list[Refusal]:
    """One refusal per layer that stays: those of the laws, and for every batch norm why it is still there."""
    dead = {n for candidate, _ in selection.chosen for n in candidate.dying}
    # Two operations of one module may have one name: it is gone when both are.
    gone = {flow.unit.name(n) for n in dead} - {flow.unit.name(n) for n in flow.nodes if n not in dead}
    said: dict[str, Refusal] = {}
    for refusal in selection.refusals:
        if refusal.reason not in _QUIET and refusal.layer not in gone:
            said.setdefault(refusal.layer, refusal)
    for node in flow.nodes:
        if node not in dead and _is_norm(flow, node):
            name = flow.unit.name(node)
            own = (r for r in selection.refusals if r.layer == name and r.reason in _OWN)
            before = {flow.unit.name(n) for n in _affine_before(flow, node)}
            unknown = (r for r in selection.refusals if r.layer in before and r.reason is Reason.RANK_UNKNOWN)
            why = next(own, None) or next(unknown, None) or _why_norm_stays(flow, node)
            said.setdefault(name, replace(why, layer=name))
    return list(said.values())


def _affine_before(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The affine operations through which a norm is reached, one after the other."""
    found: list[fx.Node] = []
    while len(found) < FAR:
        sources = [source for source in node.all_input_nodes if source not in flow.constant]
        if len(sources) != 1 or sources[0] not in flow.affine:
            break
        node = sources[0]
        found.append(node)
    return found


def _is_norm(flow: Flow, node: fx.Node) -> bool:
    return node.target is F.batch_norm or isinstance(flow.modules.get(node), _NormBase)


def _why_norm_stays(flow: Flow, node: fx.Node) -> Refusal:
    source = node.all_input_nodes[0]
    name = flow.unit.name(source) if source.op != "placeholder" else "the input"
    readers = [user for user in source.users if not flow.shape_only(user)]
    if len(readers) > 1 and source in flow.affine:
        others = ", ".join(flow.unit.name(u) for u in readers if u is not node and u.op != "output") or "the output"
        return Refusal(Reason.SHARED, f"the output of {name} is used by {others} as well")
    return Refusal(Reason.NO_CONVOLUTION, f"{Reason.NO_CONVOLUTION.value}: it follows {name}")
