"""The names that the authors of blocks gave to their tensors, and which of ours they are.

A grammar lists the parts of one block behind the block's path. In a part ``*`` stands for any tensor of a batch norm
and ``{i}`` for a number, which the name on our side repeats. Our names are those of the block that
:func:`reparam.expand` makes; ``norm`` is the batch norm behind a block that has none inside. A block that we have no
declaration of becomes a plain ``weight`` and ``bias`` by formula. What is frozen is checked against the constant that
it has to be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from passes.algebra.geometry import Geometry

__all__ = ["BATCH_NORM", "Grammar", "Options", "Tensors", "Unit", "normed", "translated"]

Tensors = Mapping[str, Tensor]
Options = Mapping[str, Any]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_TENSOR = f"({'|'.join(BATCH_NORM)})"


@dataclass(frozen=True)
class Unit:
    """A block in a file: its path there, its tensors by the names behind that, and whether it is deployed already."""

    grammar: Grammar
    path: str
    tensors: dict[str, Tensor]
    deployed: bool = False

    def key(self, part: str) -> str:
        """The name of a tensor in the file."""
        return f"{self.path}.{part}" if self.path else part


def _one(t: Tensors) -> int:
    return 1


def _none(t: Tensors) -> dict[str, Any]:
    return {}


def _no_tensors(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    return {}


def _any(t: Tensors) -> bool:
    return True


@dataclass(frozen=True)
class Grammar:
    """How one block is written.

    Args:
        name: what ``--block`` calls it.
        said: what people read.
        block: the block of :func:`reparam.blocks` that it is; empty if it only becomes a kernel and a bias.
        parts: their name and ours, which is empty for what ``convert`` takes or ``constants`` checks.
        main: the part without which it is no block.
        forward: the authors' own computation.
        generic: parts that others have as well; they belong to a block only beside another part.
        deployed: what the folded convolution is called, with ``weight`` and ``bias``, if it has a place of its own.
        groups: of the convolution, as far as the result depends on them.
        options: of our block.
        convert: our tensors that are not just renamed.
        becomes: the block of ours, where that depends on the tensors.
        constants: what frozen tensors have to be, by a pattern for their parts.
        identity: the norm that is the identity branch, where a block has one.
        shape: of the kernel, ``(out, in / groups, *size)``; by default the main part's.
        taps: ``(out, in / groups, taps)`` of a kernel whose size the tensors do not say.
        unsaid: an option of our block that changes what it computes and that no tensor shows.
        fits: whether tensors of these names are this block's, or may be where its main part is missing.
    """

    name: str
    said: str
    block: str
    parts: tuple[tuple[str, str], ...]
    main: str
    forward: Callable[[Tensors, Tensor, Geometry, Options], Tensor]
    generic: tuple[str, ...] = ()
    deployed: str = ""
    groups: Callable[[Tensors], int] = _one
    options: Callable[[Tensors], dict[str, Any]] = _none
    convert: Callable[[Tensors, Geometry, Options], dict[str, Tensor]] = _no_tensors
    becomes: Callable[[Tensors], str] | None = None
    constants: Mapping[str, Callable[[Tensors, re.Match[str]], Tensor]] = field(default_factory=dict)
    identity: str = ""
    shape: Callable[[Tensors], tuple[int, ...]] | None = None
    taps: Callable[[Tensors], tuple[int, int, int]] | None = None
    fits: Callable[[Tensors], bool] = _any
    unsaid: str = ""

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """For a whole key: the parts that only this block has, and all of its parts, behind the block's path."""
        deployed = [f"{self.deployed}.{name}" for name in ("weight", "bias") if self.deployed]
        every = [*(part for part, _ in self.parts), *deployed]
        own = [part for part in every if part not in self.generic]
        whole = (f"(?:(?P<path>.*?)\\.)?(?P<part>{'|'.join(map(_regex, parts))})" for parts in (own, every))
        first, second = map(re.compile, whole)
        return first, second

    @cached_property
    def words(self) -> tuple[str, ...]:
        """How names inside of this block alone begin: what begins like that and is no part is foreign to it."""
        own = (part for part, _ in self.parts if part not in self.generic and "." in part)
        return tuple(sorted({part.partition(".")[0].partition("{")[0] + "." for part in own}))

    def size(self, t: Tensors) -> tuple[int, ...]:
        """Shape of the kernel, ``(out, in / groups, *size)``."""
        return tuple(t[self.main].shape) if self.shape is None else self.shape(t)

    def ours(self, t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
        """The tensors under our names, for our block with these options."""
        return {**translated(self.parts, t), **self.convert(t, g, options)}


def _regex(part: str) -> str:
    escaped = re.sub(r"\\\{\w\\\}", r"(\\d+)", re.escape(part.removesuffix("*")))
    return escaped + (_TENSOR if part.endswith("*") else "")


def translated(parts: tuple[tuple[str, str], ...], t: Tensors) -> dict[str, Tensor]:
    """The tensors that a list of parts renames, under their new names."""
    found = {}
    for part, template in parts:
        numbered = re.sub(r"\{\w\}|\*", "{}", template)
        for name, tensor in t.items() if template else ():
            if match := re.fullmatch(_regex(part), name):
                found[numbered.format(*match.groups())] = tensor
    return found


def normed(*pairs: tuple[str, str, str, str]) -> tuple[tuple[str, str], ...]:
    """Parts of convolutions with their norms: their kernel and norm, our kernel and norm."""
    return tuple(
        part
        for conv, norm, ours, our_norm in pairs
        for part in ((f"{conv}.weight", f"{ours}.weight"), (f"{norm}.*", f"{our_norm}.*"))
    )
