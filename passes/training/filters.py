"""Which layers a rewrite is for: patterns on their paths, a predicate, or filters on kernel size and depth."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry
from passes.blocks.kit.registry import Block
from passes.refusal import Reason, Refusal, ReparamError

__all__ = ["Blocks", "Where", "block_chooser", "selector"]

Where = None | str | Sequence[str] | Callable[[str, nn.Module], bool] | Mapping[str, Any]
Blocks = str | Block | Mapping[str, str | Block]

_FILTERS = ("name", "kernel", "depthwise", "groups", "stride")


def selector(where: Where, paths: Sequence[str]) -> Callable[[str, _ConvNd], Refusal | None]:
    """A function that says why a layer is not selected, or None if it is. ``paths`` are those of all layers.

    Raises :class:`ReparamError` for a pattern that matches no layer and for a filter that does not exist.
    """
    if where is None:
        return _more_than_one_tap
    if isinstance(where, Mapping):
        return _filters(where, paths)
    if callable(where):
        return _predicate(where)
    patterns = _patterns(where, paths)
    return lambda path, conv: None if any(matches(path, p) for p in patterns) else _NOT_SELECTED


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


def matches(path: str, pattern: str) -> bool:
    """Whether a layer's path matches a shell-style pattern; a module's path stands for all layers inside."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern + ".*")


_NOT_SELECTED = Refusal(Reason.NOT_SELECTED, Reason.NOT_SELECTED.value)


def _more_than_one_tap(path: str, conv: _ConvNd) -> Refusal | None:
    if all(k == 1 for k in conv.kernel_size):
        return Refusal(Reason.KERNEL_OF_ONE, f"{Reason.KERNEL_OF_ONE.value}: name it to expand it all the same")
    return None


def _predicate(wanted: Callable[[str, nn.Module], bool]) -> Callable[[str, _ConvNd], Refusal | None]:
    def refuse(path: str, conv: _ConvNd) -> Refusal | None:
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


def _filters(where: Mapping[str, Any], paths: Sequence[str]) -> Callable[[str, _ConvNd], Refusal | None]:
    for key, wanted in where.items():
        if key not in _FILTERS:
            raise ReparamError(f"there is no filter {key!r}; known: {', '.join(_FILTERS)}")
        if key == "depthwise" and not isinstance(wanted, bool):
            raise ReparamError(f"the filter 'depthwise' is True or False, got {wanted!r}")
        if key in ("kernel", "stride", "groups") and not _is_sizes(wanted):
            raise ReparamError(
                f"the filter {key!r} is a number, a tuple for one shape, or a list of these, got {wanted!r}"
            )
    names = _patterns(where["name"], paths, "the filter 'name'") if "name" in where else []

    def refuse(path: str, conv: _ConvNd) -> Refusal | None:
        if "name" in where and not any(matches(path, p) for p in names):
            return _NOT_SELECTED
        geometry = Geometry.of(conv)
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        if "depthwise" in where and depthwise is not where["depthwise"]:
            return _NOT_SELECTED
        facts = {"kernel": geometry.kernel, "stride": geometry.stride, "groups": (conv.groups,)}
        if all(_allowed(where[key], value) for key, value in facts.items() if key in where):
            return None if names or "kernel" in where else _more_than_one_tap(path, conv)
        return _NOT_SELECTED

    return refuse


def _is_sizes(value: Any) -> bool:
    if isinstance(value, (list, set, frozenset)):
        return all(_is_sizes(each) for each in value)
    if isinstance(value, tuple):
        return all(isinstance(each, int) for each in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _allowed(wanted: Any, value: tuple[int, ...]) -> bool:
    """A number stands for all dimensions, a tuple for one shape; a list or set holds several of either."""
    if isinstance(wanted, (list, set, frozenset)):
        return any(_allowed(each, value) for each in wanted)
    return value == (wanted if isinstance(wanted, tuple) else (wanted,) * len(value))
