"""Asymmetric convolution block (Ding et al., "ACNet", ICCV 2019, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["acb"]


@block("acb", published=("AsymConvBlock", "ACBlock"), meant={"kernel": range(2, 7)})
def acb(
    conv: Site, *, gamma: float = 1.0, bn: str = "branch", line: int | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Asymmetric convolution block: the kernel plus one line-shaped kernel per axis (kx1 and 1xk).

    Options: ``gamma``, initial weight of the batch norms for ``init="paper"`` (1/3 on CIFAR); ``bn``, ``"branch"`` or
    ``"after"`` the sum; ``line``, length of the lines, the kernel's by default (3 on 5x5 kernels in Cifar-quick).
    """
    if bn not in ("branch", "after"):
        raise ReparamError(f"block 'acb': bn is 'branch' or 'after', got {bn!r}")
    lines = [tuple((line or k) if i == axis else 1 for i, k in enumerate(conv.kernel)) for axis in range(conv.n)]
    if conv.taps > 1:
        conv.needs_window("the lines of acb would be the same again")
    if conv.n == 1 or conv.kernel in map(conv.span, lines):
        conv.refuse("its kernel is a line itself: acb has nothing to add")
    if line is not None and line > min(conv.kernel):
        conv.refuse(f"lines of {line} are longer than its kernel")
    yield "square", conv.main(norm=bn == "branch", gamma=gamma)
    for axis, kernel in enumerate(lines):
        yield f"line{axis}", conv.parallel(kernel, norm=bn == "branch", gamma=gamma)
