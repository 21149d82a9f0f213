"""Where the boxes of a drawing stand: layered from top to bottom, computed with networkx, as compact numbers.

A layout is ``[width, height, nodes, edges]``: a node is ``[x, y, width, height, kind]`` with ``x, y`` its centre, an
edge ``[x, y, x, y, ...]`` the points of a line from the lower side of a box to the upper side of another. Units are CSS
pixels. What is written in the boxes is no part of it, so graphs that differ by their channels alone share a layout.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import networkx as nx

__all__ = ["below", "common_prefix", "lay_out", "outline", "short_layer", "text_lines"]

TALL, LOW = 38, 24
"""Heights of a box with two lines of text, and with one."""
END_WIDTH = 74
"""Of what stands for the input and the output."""
ROW = 64
"""From the centre of one layer of boxes to the next."""
GAP = 14
"""Between two boxes of a layer."""
CHARACTER = 6.6
"""Width of one at the size of the drawing's text."""
SWEEPS = 4
"""Down and up again, to have fewer lines cross."""

_LAYER = re.compile(r"(\w+)\((.*)\)$")
_SQUARE_STRIDE = re.compile(r"stride (\d+)(?:x\1)+\b")


def outline(graph: Mapping[str, Any]) -> str:
    """All that a layout depends on; graphs of one outline are laid out alike.

    Raises:
        KeyError, TypeError: it is no graph (the format is in :mod:`zoo.outcome`).
    """
    lines = [text_lines(node["label"]) for node in graph["nodes"]]
    width = max((len(line) for pair in lines for line in pair), default=0) * CHARACTER + 16
    boxes = [[node["id"], node["kind"], bool(pair[1])] for node, pair in zip(graph["nodes"], lines, strict=True)]
    return json.dumps([math.ceil(width / 12) * 12, boxes, graph["edges"]])


def lay_out(outlined: str) -> list[Any]:
    """The layout of a graph, from its outline.

    Raises:
        ValueError: an edge to an unknown node, a cycle, or no nodes.
    """
    width, boxes, edges = json.loads(outlined)
    layered = nx.DiGraph()
    layered.add_nodes_from(key for key, _, _ in boxes)
    layered.add_edges_from(edges)
    if not boxes or len(layered) != len(boxes) or not nx.is_directed_acyclic_graph(layered):
        raise ValueError("no nodes, an edge to an unknown node, or a cycle")
    routes = _break_long_edges(layered)
    layers = _order(layered)
    wide = {key: min(width, END_WIDTH) if kind in ("input", "output") else width for key, kind, _ in boxes}
    high = {key: TALL if tall else LOW for key, _, tall in boxes}
    place = _positions(layered, layers, wide)
    nodes = [[*place[key], wide[key], high[key], kind] for key, kind, _ in boxes]
    lines = [_line([(*place[stop], high.get(stop, TALL) // 2) for stop in route]) for route in routes]
    right = max(place[key][0] + wide.get(key, 0) / 2 for key in place) + 1
    bottom = max(y for _, y in place.values()) + TALL // 2 + 1
    return [math.ceil(right), bottom, nodes, lines]


def text_lines(label: str) -> tuple[str, str]:
    """A label on two lines, the class above its numbers."""
    head, _, rest = short_layer(label).partition(" ")
    return (head[:28], rest[:34])


def short_layer(text: str) -> str:
    """``Conv2d(8 -> 16, 3x3, stride 2x2, groups 8)`` as ``Conv2d 8→16 3x3 stride 2 groups 8``."""
    match = _LAYER.match(text)
    if match is None:
        return text
    rest = match[2].replace(" -> ", "→").replace(", ", " ")
    return f"{match[1]} " + _SQUARE_STRIDE.sub(r"stride \1", rest)


def common_prefix(paths: Sequence[str]) -> str:
    """The module that all ``paths`` (layers, or operations such as ``block:add``) are in; empty for the network."""
    shared: list[str] = []
    for names in zip(*(_module(path).split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def below(path: str, prefix: str) -> str:
    """``path`` without the module ``prefix``."""
    inside = prefix and path.startswith((f"{prefix}.", f"{prefix}:"))
    return path[len(prefix) :].removeprefix(".") if inside else path


def _module(path: str) -> str:
    return path.partition(":")[0] if ":" in path else path.rpartition(".")[0]


# ------------------------------------------------------------------------------------------------- layers


def _break_long_edges(layered: nx.DiGraph) -> list[list[Any]]:
    """Give each node its ``layer`` and each edge that skips layers a stop in each; returns the stops of every edge."""
    for number, names in enumerate(nx.topological_generations(layered)):
        for name in names:
            layered.nodes[name]["layer"] = number
    routes = []
    for a, b in list(layered.edges):
        first, last = layered.nodes[a]["layer"], layered.nodes[b]["layer"]
        stops = [("stop", a, b, number) for number in range(first + 1, last)]
        route = [a, *stops, b]
        if stops:
            layered.remove_edge(a, b)
            for number, stop in enumerate(stops, first + 1):
                layered.add_node(stop, layer=number)
            nx.add_path(layered, route)
        routes.append(route)
    return routes


def _order(layered: nx.DiGraph) -> dict[int, list[Any]]:
    """The nodes of each layer from left to right, each under the middle of its neighbours (Sugiyama et al. 1981)."""
    layers: dict[int, list[Any]] = {}
    for name, number in layered.nodes(data="layer"):
        layers.setdefault(number, []).append(name)
    numbers = sorted(layers)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        above = layered.predecessors if down else layered.successors
        for number in numbers if down else reversed(numbers):
            where = {name: i - len(names) / 2 for names in layers.values() for i, name in enumerate(names)}
            middle = {name: fmean([where[o] for o in above(name)] or [where[name]]) for name in layers[number]}
            layers[number].sort(key=middle.__getitem__)
    return layers


def _positions(
    layered: nx.DiGraph, layers: Mapping[int, Sequence[Any]], wide: Mapping[Any, int]
) -> dict[Any, tuple[int, int]]:
    """Centres in pixels: networkx's, whose columns are all alike, then each as near its neighbours as widths allow."""
    found = nx.multipartite_layout(layered, subset_key=dict(layers), align="horizontal")
    across = {name: float(place[0]) * 100 for name, place in found.items()}
    for sweep in range(2 * SWEEPS):
        for number in sorted(layers, reverse=sweep % 2 == 1):
            names = layers[number]
            wanted = [fmean([across[o] for o in nx.all_neighbors(layered, name)] or [across[name]]) for name in names]
            across.update(zip(names, _apart(wanted, [wide.get(name, 0) for name in names]), strict=True))
    left = min(across[name] - wide.get(name, 0) / 2 for name in across) - 1
    return {
        name: (round(across[name] - left), number * ROW + TALL // 2 + 1)
        for number, names in layers.items()
        for name in names
    }


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Places in the order given, no two boxes nearer than the gap, as near as possible to those wanted."""
    # Without the widths it is isotonic regression: neighbours that would meet form a block at their mean.
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + GAP)
    blocks: list[list[float]] = []
    for place, offset in zip(wanted, offsets, strict=True):
        blocks.append([place - offset])
        while len(blocks) > 1 and fmean(blocks[-2]) >= fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [fmean(block) for block in blocks for _ in block]
    return [place + offset for place, offset in zip(level, offsets, strict=True)]


def _line(stops: Sequence[tuple[int, int, int]]) -> list[int]:
    """From the lower side of the first box to the upper side of the last; stops are centres and half heights."""
    (x0, y0, half0), *between, (x1, y1, half1) = stops
    middle = [value for x, y, half in between for value in (x, y - half, x, y + half)]
    return [x0, y0 + half0, *middle, x1, y1 - half1]
