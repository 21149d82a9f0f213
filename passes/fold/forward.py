"""The new forward of a module that held part of a region: its own operations, its children called as before."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import fx

from passes.fold.placement import Layout, Rewrite, nodes_in
from passes.fold.regions import Region, origin
from passes.graph.capture import Call, call_of
from passes.refusal import Reason, RefusalError

__all__ = ["new_forward", "unchanged"]


def new_forward(
    layout: Layout,
    call: Call,
    changes: list[tuple[Rewrite, Region]],
    names: dict[Region, str],
    dead: set[fx.Node],
) -> fx.Graph:
    """The graph of ``call``'s module after ``changes``, targets relative to that module.

    ``names`` are the paths of the folded layers, ``dead`` the traced nodes that vanish. Refuses with ``CODE`` if the
    forward uses a module or weight that stands elsewhere.
    """
    try:
        return _Local(layout, call, changes, names, dead).build()
    except KeyError as missing:
        where = call.path or type(call.module).__name__
        raise RefusalError(Reason.CODE, f"{missing} is not at hand in the forward of {where}") from missing


def unchanged(got: Any, wanted: Any, name: str) -> None:
    """Called by a rewritten forward for each optional argument that its caller left at a fixed value."""
    if got is not wanted and not (type(got) is type(wanted) and got == wanted):
        raise ValueError(f"this forward was collapsed for {name}={wanted!r} and cannot be called with another value")


class _Local:
    """Builds the new forward of one call: its own operations, and its child modules called as before."""

    def __init__(
        self,
        layout: Layout,
        call: Call,
        changes: list[tuple[Rewrite, Region]],
        names: dict[Region, str],
        dead: set[fx.Node],
    ) -> None:
        self.layout, self.call, self.names, self.dead = layout, call, names, dead
        self.touched = self._calls_with(dead)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.parts: list[fx.Node] = []
        self.given = {rewrite.old: rewrite.source for rewrite, _ in changes if not rewrite.layer}
        self.first = {}
        for rewrite, region in changes:
            if rewrite.layer:
                self.first[next(n for n in region.dying if call in call_of(n).chain())] = (rewrite.source, region)

    def build(self) -> fx.Graph:
        self._placeholders()
        self._copy(self.call)
        self.graph.output(self._map(self.call.output))
        for node in self.parts:
            if not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.graph

    def _placeholders(self) -> None:
        signature = inspect.signature(self.call.module.forward)
        for name, value in signature.bind(*self.call.args, **self.call.kwargs).arguments.items():
            parameter = signature.parameters[name]
            default = () if parameter.default is parameter.empty else (parameter.default,)
            node = self.graph.placeholder(name, None, *default)
            self._name(value, node)
            if default and not nodes_in(value):
                # The new forward holds for the option that was traced; any other must not be ignored in silence.
                self.graph.call_function(unchanged, (node, value, name))

    def _copy(self, call: Call) -> None:
        for item in self.layout.items[call]:
            if isinstance(item, fx.Node):
                self._node(item)
            elif item in self.touched:
                self._copy(item)
            else:
                self._call(item)

    def _node(self, node: fx.Node) -> None:
        if node in self.first:
            self._fold(*self.first[node])
        if node in self.given:
            self.env[node] = self._value(self.given[node])
        if node in self.dead:
            return
        try:
            new = self.graph.node_copy(node, self._value)
        except KeyError:
            return  # an assertion about a value that is gone
        if node.op in ("call_module", "get_attr"):
            new.target = self._relative(str(node.target))
        self.env[node] = new

    def _fold(self, source: fx.Node, region: Region) -> None:
        new = self.graph.call_module(self._relative(self.names[region]), (self._value(source),))
        for node in region.dying:  # whoever still asks for their shape asks the result
            self.env[node] = new

    def _call(self, call: Call) -> None:
        target = self._relative(call.path)
        try:
            new = self.graph.call_module(target, self._map(call.args), self._map(call.kwargs))
        except KeyError:
            return
        self._name(call.output, new)

    def _name(self, value: Any, new: fx.Node) -> None:
        """Let the traced nodes in ``value``, a node or nested tuples of them, be found as parts of ``new``."""
        if isinstance(value, fx.Node):
            self.env.setdefault(value, new)
            return
        for key, part in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
        ):
            if nodes_in(part):
                taken = self.graph.call_function(operator.getitem, (new, key))
                self.parts.append(taken)
                self._name(part, taken)

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        """The new node of a traced one; a fold made elsewhere is found under the result that it replaced."""
        return self.env[origin(node)]  # type: ignore[no-any-return]

    def _relative(self, target: str) -> str:
        if not self.call.path:
            return target
        if not target.startswith(self.call.path + "."):
            raise RefusalError(Reason.CODE, f"{self.call.path} uses {target}, which stands elsewhere in the model")
        return target[len(self.call.path) + 1 :]

    def _calls_with(self, dead: set[fx.Node]) -> set[Call]:
        return {c for n in dead for c in call_of(n).chain()}
