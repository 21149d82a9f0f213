"""Which layers a rewrite is for: as its block is meant, all, patterns on paths, a predicate, filters on geometry."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from passes.algebra.geometry import Geometry
from passes.blocks.kit.filters import GEOMETRIC, check_filters, fits
from passes.blocks.kit.registry import Block
from passes.blocks.kit.written import split_blocks
from passes.refusal import Reason, Refusal, ReparamError
from passes.training.forms import Form

__all__ = [
    "ALL",
    "AUTO",
    "Blocks",
    "Where",
    "alternatives",
    "block_chooser",
    "form_chooser",
    "is_auto",
    "named_blocks",
    "selector",
]

Where = None | str | Sequence[str] | Callable[[str, nn.Module], bool] | Mapping[str, Any]
Blocks = str | Block | Mapping[str, str | Block]
Forms = Form | Mapping[str, Form] | None

Choice = Callable[[str, nn.Module, Block], Refusal | None]

ALL = "all"
"""``where`` for every layer that can have the block at all."""

AUTO = "auto"
"""Stands before the names of blocks of which a budget chooses: ``auto:acb,dbb``."""

_FILTERS = ("name", *GEOMETRIC)


def selector(where: Where, paths: Sequence[str]) -> Choice:
    """A function that says why a layer is not selected for a block, or None if it is.

    ``paths`` are those of all layers. What says nothing on names or kernel sizes leaves these as the block is meant.
    Raises :class:`ReparamError` for a pattern that matches no layer and for a filter that does not exist.
    """
    if where is None:
        return _as_meant
    if isinstance(where, str) and where == ALL:
        return _possible
    if isinstance(where, Mapping):
        return _filters(where, paths)
    if callable(where):
        return _predicate(where)
    patterns = _patterns(where, paths)
    return lambda path, conv, block: None if any(matches(path, p) for p in patterns) else _NOT_SELECTED


def block_chooser(block: Blocks, paths: Sequence[str]) -> Callable[[str], Block | None]:
    """A function that gives the block for a layer: the first pattern that matches wins."""
    if not isinstance(block, Mapping):
        if not isinstance(block, (str, Block)):
            raise ReparamError(f"a block is a name, a reparam.Block or a mapping of patterns, got {block!r}")
        only = Block.of(block)
        return lambda path: only
    for pattern, chosen in block.items():
        if not isinstance(chosen, (str, Block)):
            raise ReparamError(f"the block for {pattern!r} is a name or a reparam.Block, got {chosen!r}")
    table = [(pattern, Block.of(chosen)) for pattern, chosen in block.items()]
    _patterns(block, paths)
    return lambda path: next((chosen for pattern, chosen in table if matches(path, pattern)), None)


def form_chooser(form: Forms, paths: Sequence[str]) -> Callable[[str, Block], Form]:
    """A function that gives the form of a layer's block; where no pattern matches, it is as the block says."""
    if not isinstance(form, Mapping):
        return lambda path, block: form or Form.meant(block)
    _patterns(form, paths)
    return lambda path, block: next((f for pattern, f in form.items() if matches(path, pattern)), Form.meant(block))


def alternatives(block: Blocks) -> list[Blocks]:
    """What ``auto:acb,dbb`` stands for: one after the other, also in a mapping; anything else stands for itself."""
    if not isinstance(block, Mapping):
        return [*_candidates(block)]
    table = {pattern: _candidates(chosen) for pattern, chosen in block.items()}
    most = max(map(len, table.values()), default=1)
    return [{pattern: each[min(i, len(each) - 1)] for pattern, each in table.items()} for i in range(most)]


def is_auto(block: Any) -> bool:
    """Whether this leaves the choice of the block open."""
    return isinstance(block, str) and block.partition(":")[0].strip() == AUTO


def _candidates(block: Any) -> list[Any]:
    if not is_auto(block):
        return [block]
    texts = split_blocks(block.partition(":")[2])
    if not texts:
        raise ReparamError("auto names the blocks that may be chosen: auto:acb,dbb,doconv")
    return [Block.of(text) for text in dict.fromkeys(texts)]


def named_blocks(block: Blocks) -> list[Block]:
    """The blocks that are named at all, in whatever form."""
    named = block.values() if isinstance(block, Mapping) else [block]
    return [Block.of(each) for each in named if isinstance(each, (str, Block))]


def matches(path: str, pattern: str) -> bool:
    """Whether a layer's path matches a shell-style pattern; a module's path stands for all layers inside."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern + ".*")


_NOT_SELECTED = Refusal(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)


def _as_meant(path: str, conv: Any, block: Block) -> Refusal | None:
    geometry = Geometry.of(conv)
    why = _possible(path, conv, block)
    if why is not None or block.info.suits(geometry):
        return why
    return Refusal(
        Reason.NOT_MEANT,
        f'{block.name} is meant for {block.info.meant_for}: name it, or pass where="{ALL}", to expand it',
    )


def _possible(path: str, conv: Any, block: Block) -> Refusal | None:
    geometry = Geometry.of(conv)
    if all(k == 1 for k in geometry.kernel) and not block.info.suits(geometry):
        return Refusal(Reason.KERNEL_OF_ONE, f"{Reason.KERNEL_OF_ONE.value}: name it to expand it all the same")
    return None


def _predicate(wanted: Callable[[str, nn.Module], bool]) -> Choice:
    def refuse(path: str, conv: nn.Module, block: Block) -> Refusal | None:
        try:
            return None if wanted(path, conv) else _NOT_SELECTED
        # The predicate is user code, which may fail in any way.
        except Exception as error:
            raise ReparamError(f"where= failed for {path}: {type(error).__name__}: {error}") from error

    return refuse


def _patterns(given: Any, paths: Sequence[str], what: str = "where") -> list[str]:
    """One pattern or several as a list, after a check that each matches a layer."""
    if not isinstance(given, Iterable):
        raise ReparamError(f"{what} is a pattern or several, a predicate or filters, got {given!r}")
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ReparamError(f"a pattern is a string, got {pattern!r}")
        if not any(matches(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, _prefixes(paths), 5, cutoff=0.4)
            have = f"near names: {', '.join(near)}" if near else f"convolutions: {', '.join(paths[:5]) or 'none'}"
            raise ReparamError(f"the pattern {pattern!r} matches no convolution; {have}")
    return patterns


def _prefixes(paths: Sequence[str]) -> list[str]:
    parts = (path.split(".") for path in paths)
    return list(dict.fromkeys(".".join(p[: i + 1]) for p in parts for i in range(len(p))))


def _filters(where: Mapping[str, Any], paths: Sequence[str]) -> Choice:
    check_filters(where, _FILTERS)
    names = _patterns(where["name"], paths, "the filter 'name'") if "name" in where else []
    geometric = {key: wanted for key, wanted in where.items() if key != "name"}

    def refuse(path: str, conv: Any, block: Block) -> Refusal | None:
        if ("name" in where and not any(matches(path, p) for p in names)) or not fits(geometric, Geometry.of(conv)):
            return _NOT_SELECTED
        return None if names or "kernel" in where else _as_meant(path, conv, block)

    return refuse
