"""Channels that are picked, added and scaled, one position at a time: what joins the values of several layers.

    y[o] = shift[o] + sum_k  factor[k, o] x[source[k, o]]

A 1x1 convolution with few entries, and with their places known on the meta device too. Concatenation, splits and
shuffles pick, a sum adds terms, a map per channel scales. A crop changes no channel; every other law refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from passes.refusal import Reason, RefusalError

__all__ = ["SparseForm"]

NONE = -1
"""The source of a term that is not there."""


@dataclass(frozen=True, eq=False)
class SparseForm:
    """Such a map of feature maps with ``n`` spatial dimensions.

    Args:
        sources: ``(terms, out)`` whole numbers, on the CPU whatever the device of the others.
        factors: ``(terms, out)``, zero for terms that are not there.
        shift: ``(out,)``.
        n: number of spatial dimensions.
        example: the shape in which the value is followed by example, its channels aside, if it is a certain one.
    """

    sources: Tensor
    factors: Tensor
    shift: Tensor
    n: int
    example: tuple[int, ...] | None = None

    @staticmethod
    def identity(
        start: int, channels: int, n: int, *, like: Tensor, example: tuple[int, ...] | None = None
    ) -> SparseForm:
        """Some channels in a row, as they are."""
        sources = torch.arange(start, start + channels, device="cpu")[None]
        return SparseForm(sources, like.new_ones(1, channels), like.new_zeros(channels), n, example)

    @property
    def weight(self) -> Tensor:
        """What says dtype and device, as in other forms."""
        return self.factors

    @property
    def out_channels(self) -> int:
        return int(self.sources.shape[1])

    def out_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size stays, up to crops."""
        return tuple(size)

    # ---------------------------------------------------------------- laws

    def affine(self, scale: Tensor | None, shift: Tensor | None) -> SparseForm:
        """``scale * y + shift`` per output channel; both ``(out,)`` or None."""
        form = self if scale is None else replace(self, factors=self.factors * scale, shift=self.shift * scale)
        return form if shift is None else replace(form, shift=form.shift + shift)

    def __neg__(self) -> SparseForm:
        return replace(self, factors=-self.factors, shift=-self.shift)

    def __add__(self, other: Any) -> SparseForm:
        if not isinstance(other, SparseForm) or other.out_channels != self.out_channels:
            raise RefusalError(Reason.CHANNELS)
        sources, factors = (torch.cat(pair) for pair in ((self.sources, other.sources), (self.factors, other.factors)))
        return SparseForm(*_merged(sources, factors), self.shift + other.shift, self.n, self.example)

    def rows(self, index: Sequence[int]) -> SparseForm:
        """Some of the channels, in any order."""
        at = torch.tensor(index, dtype=torch.long, device="cpu")
        on = at.to(self.factors.device)
        return replace(self, sources=self.sources[:, at], factors=self.factors[:, on], shift=self.shift[on])

    @staticmethod
    def concat(forms: Sequence[Any]) -> SparseForm:
        """The channels of several, one after the other."""
        if not all(isinstance(form, SparseForm) for form in forms):
            raise RefusalError(Reason.CHANNELS)
        terms = max(len(form.sources) for form in forms)

        def padded(tensor: Tensor, value: int) -> Tensor:
            missing = tensor.new_full((terms - len(tensor), tensor.shape[1]), value)
            return torch.cat([tensor, missing])

        sources = torch.cat([padded(form.sources, NONE) for form in forms], 1)
        factors = torch.cat([padded(form.factors, 0) for form in forms], 1)
        return SparseForm(sources, factors, torch.cat([form.shift for form in forms]), forms[0].n, forms[0].example)

    def pad(self, lead: Sequence[int], trail: Sequence[int], value: float | Tensor = 0.0) -> SparseForm:
        """A crop takes whole positions away; what is padded with is no value of any channel."""
        return self if all(p <= 0 for p in (*lead, *trail)) else self.refuse()

    def refuse(self, *_: object) -> NoReturn:
        """What every other law answers."""
        raise RefusalError(Reason.LAYOUT, "only maps per channel act on what several layers give")

    then = pad_mode = refuse


def _merged(sources: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """One term for each source of a channel; x + f(x) would otherwise have twice as many behind each block of a row.

    A source whose factors cancel stays, with factor zero: what was added may be means of it, and so not be nothing.
    """
    order = sources.argsort(0)
    ranked, on = sources.gather(0, order), factors.device
    there = ranked >= 0
    first = there & torch.cat([there[:1], ranked[1:] != ranked[:-1]])
    terms = int(first.sum(0).max()) if first.numel() else 0
    if terms in (0, len(sources)):
        return sources, factors
    at = (first.cumsum(0) - 1).clamp(min=0)
    merged = sources.new_full((terms, sources.shape[1]), NONE).scatter_reduce(0, at, ranked, "amax")
    return merged, factors.new_zeros(merged.shape).scatter_add(0, at.to(on), factors.gather(0, order.to(on)))
