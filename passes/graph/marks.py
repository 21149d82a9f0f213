"""What running a forward leaves behind on modules, noted and taken away again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from passes.graph.contents import CONTAINERS, Row, copied, refill, same_items
from passes.graph.generators import kept_generators
from passes.graph.memos import Memo, filled_memos
from passes.graph.outside import Outside
from passes.graph.walk import modules_of

__all__ = ["Snapshot", "no_mark"]

_PLAIN = frozenset({bool, int, float, str, tuple, type(None)})
"""Classes of most attributes, looked up first."""


_TABLES = frozenset({dict, OrderedDict})


def _is_container(value: Any) -> bool:
    return type(value) not in _PLAIN and isinstance(value, CONTAINERS)


class Snapshot:
    """Every module's attributes as they are now, and what its forward can reach elsewhere (:attr:`outside`)."""

    def __init__(self, model: nn.Module) -> None:
        modules = modules_of(model)
        self.outside = Outside(modules)
        self.forgotten: list[Memo] = []
        self.saved: list[tuple[nn.Module, dict[str, Any], list[tuple[str, Any, Any]]]] = []
        for module in modules:
            attributes = dict(module.__dict__)
            tables = [(n, v) for n, v in attributes.items() if type(v) in _TABLES or _is_container(v)]
            # Most are empty tables of hooks; copying thousands of those costs more than the trace.
            self.saved.append((module, attributes, [(name, t, copied(t) if t else None) for name, t in tables]))
        self._dicts = [module.__dict__ for module in modules]
        plain, self._special = [*self._dicts], list[tuple[Any, Any]]()
        for _, _, containers in self.saved:
            for _, table, content in containers:
                if type(content) is not int and type(table) in Row.KINDS:  # the number is that of a large one
                    plain.append(table)
                else:
                    self._special.append((table, content))
        self._row = Row(plain)

    def _as_noted(self) -> bool:
        """Whether no module has changed, seen at a glance: this is asked after every trace of a part."""
        dicts = (module.__dict__ for module, _, _ in self.saved)
        special = all(same_items(table, content or ()) for table, content in self._special)
        return special and all(map(is_, dicts, self._dicts)) and self._row.same()

    def filled(self) -> Iterator[tuple[nn.Module, str]]:
        """Containers whose content is no longer what it was, by the module and attribute that hold them."""
        for module, _, containers in () if self._as_noted() else self.saved:
            for name, container, content in containers:
                if (container or content) and not same_items(container, content or ()):
                    yield module, name

    @contextmanager
    def forgetting(self, root: nn.Module) -> Iterator[None]:
        """Inside, :meth:`restore` gives what a network has before its first call: memos are empty."""
        self.forgotten = filled_memos(root, self.outside.containers)
        try:
            self._forget()
            yield
        finally:
            self.forgotten = []
            self.restore()

    def remember(self, memos: Container[Memo]) -> None:
        """Leave these filled."""
        self.forgotten = [memo for memo in self.forgotten if memo not in memos]
        self.restore()

    def _forget(self) -> None:
        for memo in self.forgotten:
            memo.empty()
        if self.forgotten:
            self.outside.note()

    def restore(self) -> None:
        """Give every module its attributes and contents back."""
        for module, attributes, containers in () if self._as_noted() else self.saved:
            now = module.__dict__
            same = len(now) == len(attributes) and all(map(is_, now, attributes))
            if not same or not all(map(is_, now.values(), attributes.values())):
                now.clear()
                now.update(attributes)
            for _, container, content in containers:
                if container or content:
                    refill(container, content or ())
        self.outside.restore()
        self._forget()


@contextmanager
def no_mark(model: nn.Module) -> Iterator[Snapshot]:
    """Restore every module's attributes and the states of all random generators afterwards."""
    snapshot = Snapshot(model)
    with torch.no_grad(), kept_generators():
        try:
            yield snapshot
        finally:
            snapshot.restore()
