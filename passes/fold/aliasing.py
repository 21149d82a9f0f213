"""The guard for tensors that are changed in place: a fold computes without them what was computed with them.

Each rule speaks of values that may share memory (:mod:`passes.graph.memory`) and of the order of the original
operations. They hold for every region, whatever its laws.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from passes.fold.candidates import Candidate, altered
from passes.graph.dataflow import Flow
from passes.refusal import Reason, Refusal

__all__ = ["Memory"]


class Memory:
    """The rules for the regions of one unit."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.reads = {node: [] if flow.shape_only(node) else list(node.all_input_nodes) for node in flow.nodes}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, values in self.reads.items():
            for value in values:
                self.readers[value].append(node)

    def refusal(self, region: Candidate) -> Refusal | None:
        """A refusal if the region's value, or a value that stays, depends on when something is changed in place."""
        memory, order = self.flow.memory, self.flow.order
        if not memory.written:
            return None
        # Of code that nobody has read, that which acts as a layer was seen not to change its input.
        beside = {head for spread in region.spreads for head in spread.heads}
        probed = memory.hidden.intersection({*region.between, *region.dying, *beside})
        if region.is_alias and region.spread is not None:
            # What stays between the layers and the map is given other numbers: it must be what it is taken for.
            spread, values = region.spread, altered(self.flow, region.spread)
            first, last = min(order[value] for value in values), order[region.result]
            if spread.ahead:  # what is made of the source instead may be in its memory: that must not change either
                first, last = order[region.entry], max(order[head] for head in spread.heads)
                for value in values:
                    for change in memory.changes(value):
                        if change not in probed and order[change] > last:
                            return self._say(change, "changes a tensor behind the map")
                values = [region.entry, *values]
            for value in values:
                for change in memory.changes(value):
                    if change not in probed and first < order[change] < last:
                        return self._say(change, f"changes a tensor {'behind' if spread.ahead else 'before'} the map")
        entry, result = region.entry, region.result
        inside = {*region.between, *region.dying}
        dying = set(region.dying)
        begins = min(order[node] for node in inside)
        # Rule 1: what the fold reads is what the algebra takes it for, not changed since it was computed. The entry is
        # as it is when the first of the region's operations runs; the fold may read it as late as the last one.
        for user in inside:
            for value in self.reads.get(user, ()):
                since = begins - 1 if value is entry else order[value]
                for change in memory.changes(value):
                    if since < order[change] < order[user] and change not in probed:
                        return self._say(change, "changes a tensor before the fold reads it")
        for change in memory.changes(entry):
            if change not in dying and change not in probed and begins <= order[change] < order[result]:
                return self._say(change, "changes a tensor before the fold reads it")
        # Rule 2: a change that vanishes must not be seen by anyone else.
        for change in dying.intersection(memory.written) - probed:
            for values in (memory.sharing(value) for value in memory.written[change]):
                if any(value.op in ("placeholder", "get_attr") for value in values):
                    return self._say(change, "changes a tensor that its caller holds")
                new = {result}  # what is made from the result is made from the fold's new tensor
                for value in sorted(values):
                    if order[value] > order[result] and new.intersection(value.all_input_nodes):
                        new.add(value)
                    seen = any(u not in dying and order[u] > order[change] for u in self.readers[value])
                    if seen and value not in new:
                        return self._say(change, "changes a tensor that is read again later")
        # Rule 3: the fold's result is a new tensor, so a later change no longer reaches the old one.
        older = [v for v in memory.sharing(result) if v not in dying and order[v] < order[result]]
        for change in memory.changes(result) if older else ():
            if order[change] > order[result] and change not in probed:
                return self._say(change, "changes two values at once")
        return None

    def _say(self, change: fx.Node, what: str) -> Refusal:
        return Refusal(Reason.IN_PLACE, f"{self.flow.unit.name(change)} {what}")
