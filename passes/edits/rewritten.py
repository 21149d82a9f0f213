"""Give one module a new forward, or another method, generated from a program, and leave all else about it alone.

The module keeps its attributes, hooks, other methods and state-dict names; ``isinstance`` with its class still holds,
as with ``torch.nn.utils.parametrize``, which also swaps the class. Copies and pickles keep the new forward, and need
nothing of this package (:mod:`passes.portable`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from passes.edits.program import Program
from passes.portable import Again, Rewritten, plain_class, source_of

__all__ = ["rewrite", "settle"]


def rewrite(module: nn.Module, program: Program, method: str = "forward", folded: Iterable[str] = ()) -> None:
    """Replace a method by what ``program`` computes; its paths are relative to the module.

    ``folded`` are names of children that are no longer what they were.
    """
    _change(module, program, method, folded)
    module.__dict__.pop(method, None)  # one replaced on the instance would go first


def settle(module: nn.Module, methods: Iterable[str]) -> None:
    """Let methods do nothing and return the module: what they would fold and delete is folded already."""
    _change(module, settled=methods)


def _change(
    module: nn.Module,
    program: Program | None = None,
    method: str = "",
    folded: Iterable[str] = (),
    settled: Iterable[str] = (),
) -> None:
    """Beside what was changed before."""
    was = module if isinstance(module, Rewritten) else Rewritten
    sources, constants = dict(was._sources), dict(was._constants)
    if program is not None:
        sources[method] = source_of(program.graph(), program.defaults())
        constants |= program.constants
    idle = dict.fromkeys(name for name in (*was._settled, *settled) if name != method)
    Again.swap(module, plain_class(module), sources, constants, was._folded | frozenset(folded), tuple(idle))
