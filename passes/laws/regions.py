"""Regions, and the graph in which some of them count as one operation each.

A region lies between an entry and a result that the entry dominates, and acts as one convolution. Once it is chosen, it
is contracted: what lies around it sees one operation, the region's result, that reads the region's entry. Nothing is
written into the traced graph for it; a :class:`Contraction` answers for the graph as it then is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from passes.algebra.conv_form import Form
from passes.graph.dataflow import Flow
from passes.laws.values import View

__all__ = ["Contraction", "Region", "Spread", "form_device"]


def form_device(flow: Flow, dtype: torch.dtype | None) -> torch.device:
    """Where the numbers of a form are."""
    if dtype is None:
        return torch.device("meta")
    device = next((t.device for t in flow.unit.root.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device  # no float64 there


@dataclass(frozen=True, eq=False)
class Spread:
    """A map per channel that layers take over, each its part: those before it, or those behind it.

    Args:
        heads: the values of the layers; of those before it, first those that rather take the shift.
        views, channels: how each of them lies; of layers behind the map, what they read.
        source: what the map reads; it is made of the values of the layers before it by operations that stay.
        mapped: the map, operations that vanish; the last of them gave what the source gives from then on.
        before: maps on the way between the layers and it that others have taken over already.
        entries: of layers behind it, what each of them reads; it is made of the map's value by operations that stay.
        lies: of layers behind it, how the map's value lies, and its channels.
    """

    heads: tuple[fx.Node, ...]
    views: tuple[View, ...]
    channels: tuple[int, ...]
    source: fx.Node
    mapped: tuple[fx.Node, ...]
    before: tuple[Region, ...] = ()
    entries: tuple[fx.Node, ...] = ()
    lies: tuple[View, int] | None = None

    @property
    def ahead(self) -> bool:
        """Whether the layers stand behind the map."""
        return self.lies is not None

    @property
    def result(self) -> fx.Node:
        """The node that is the same as the source once the layers have their parts."""
        return self.mapped[-1]


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the graph that acts as one convolution.

    Args:
        entry, result: the traced nodes it reads and gives.
        view, channels: how the entry's tensor is read.
        form: the convolution; shapes only.
        inner: regions inside that count as one operation each.
        spread: of a layer, the map that it takes its part of; of the map's own region, itself.
        moved: what stays of it: operations that move the convolution's value to where the result lies, in order. The
            first of them reads :attr:`head`; without any, the convolution gives the result itself.
    """

    entry: fx.Node
    result: fx.Node
    view: View
    channels: int
    form: Form
    inner: tuple[Region, ...]
    moved: tuple[fx.Node, ...] = field(default=(), kw_only=True)
    head: fx.Node | None = field(default=None, kw_only=True)
    spread: Spread | None = field(default=None, kw_only=True)

    @property
    def is_alias(self) -> bool:
        """Whether the result is the entry: the layers before it have taken the map over that was between."""
        return self.spread is not None and self.result is self.spread.result

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """The maps that it, or what acts inside of it, has taken over or takes part of."""
        own = () if self.spread is None else (self.spread,)
        return (*own, *(spread for region in self.inner for spread in region.spreads))

    @property
    def last(self) -> fx.Node:
        """The node whose place the convolution takes."""
        return self.result if self.head is None else self.head


class Contraction:
    """A unit's dataflow with some regions contracted.

    Args:
        flow: of the traced graph.
        regions: those that count as one operation each; none lies inside another.
        gone: traced nodes that are no longer computed; a region's result among them stands for the region.
    """

    def __init__(self, flow: Flow, regions: Iterable[Region] = (), gone: frozenset[fx.Node] = frozenset()) -> None:
        self.flow = flow
        self.regions = {region.result: region for region in regions}
        self.gone = gone
        self._readers: dict[fx.Node, list[fx.Node]] = {}
        self._behind: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for region in self.regions.values():
            self._behind[region.entry].append(region.result)

    def is_alive(self, node: fx.Node) -> bool:
        """Whether the node is still computed, or stands for a region."""
        return node not in self.gone or node in self.regions

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, constants too."""
        region = self.regions.get(node)
        return self.flow.sources[node] if region is None else [region.entry]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read ``node``."""
        found = self._readers.get(node)
        if found is None:
            found = [user for user in node.users if user not in self.gone] + self._behind.get(node, [])
            self._readers[node] = found
        return found

    def rank(self, node: fx.Node) -> int | None:
        """Number of dimensions of a node's value, where it is known."""
        region = self.regions.get(node)
        plain = region is None or region.view.last or region.head is not None or region.is_alias
        return self.flow.rank.get(node) if region is None or plain else region.view.n + 2

    def channels(self, node: fx.Node) -> int | None:
        """Number of channels of a feature map, where it is known."""
        region = self.regions.get(node)
        plain = region is None or region.view.last or region.head is not None or region.is_alias
        return self.flow.channels.get(node) if region is None or plain else region.form.out_channels

    def dominators(self) -> dict[fx.Node, fx.Node | None]:
        """Immediate dominator of every live node that depends on an input; None stands in front of all inputs.

        Nodes come in order of execution, so the dominators of a node's sources are known when it is reached (Cooper,
        Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001; in a graph without loops one pass is enough).
        """
        found: dict[fx.Node, fx.Node | None] = {}
        depth: dict[fx.Node | None, int] = {None: 0}

        def common(a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
            while a is not b:
                if depth[a] < depth[b]:
                    a, b = b, a
                assert a is not None
                a = found[a]
            return a

        constant = self.flow.constant
        for node in self.flow.nodes:
            if node in constant or node.op == "output" or not self.is_alive(node):
                continue
            inputs = [source for source in self.sources(node) if source not in constant]
            known: list[fx.Node | None] = [source for source in inputs if source in found]
            if inputs and not known:  # it reads only what is gone
                continue
            at = known[0] if known else None
            for other in known[1:]:
                at = common(at, other)
            found[node], depth[node] = at, depth[at] + 1
        return found
