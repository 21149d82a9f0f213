"""Detail-enhanced convolution (Chen et al., "DEA-Net", IEEE TIP 2024, sec. III-B)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.kernel_conv import KernelConv
from passes.blocks.kit.registry import block

__all__ = ["DifferenceConv", "difference"]

_RING = (3, 0, 1, 6, 4, 2, 7, 8, 5)
"""The tap that each tap's weight is lessened by in the angular difference: its neighbour around the centre."""


@block("difference", published=("DEConv",), online=True, meant={"kernel": 3})
def difference(conv: Site, *, theta: float = 1.0) -> Iterator[tuple[str, nn.Module]]:
    """Detail-enhanced convolution: 3x3 + kernels that see central, angular, horizontal and vertical differences.

    Each is a linear map of trained weights, so all are one convolution in every step. ``theta`` times the neighbour is
    taken away in the angular one.
    """
    if conv.geometry.transposed:
        conv.refuse("a transposed convolution: differences of neighbours are not defined for it")
    if conv.kernel != (3, 3):
        conv.refuse("difference is for 3x3 kernels: its differences are those of a 3x3")
    yield "square", conv.main(norm=False)
    for name, matrix in _matrices(theta).items():
        yield name, DifferenceConv(conv, matrix)


class DifferenceConv(KernelConv):
    """``kernel[o, i] = weight[o, i] @ matrix`` over the nine taps, plus a bias.

    ``weight`` is ``(out, in / groups, taps)``, with three taps for differences along an axis and nine for the others.
    """

    def __init__(self, site: Site, matrix: Tensor) -> None:
        like = site.like
        bias = nn.Parameter(like.new_empty(site.out_channels)) if site.shift else None
        super().__init__(site.geometry, bias)
        self.matrix: Tensor
        self.sizes = list(site.kernel)
        self.weight = nn.Parameter(like.new_empty((*like.shape[:2], matrix.shape[0])))
        self.register_buffer("matrix", matrix.to(like))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if bias is not None:
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(bias, -bound, bound)

    def kernel(self) -> Tensor:
        taps: Tensor = self.weight @ self.matrix
        return taps.unflatten(-1, self.sizes)  # type: ignore[no-any-return]

    def silence(self) -> None:
        """Return zero, and take a gradient."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _matrices(theta: float) -> dict[str, Tensor]:
    """What the weights of each kind of difference become as a 3x3 kernel, row by row: ``(taps, 9)``."""
    taps = torch.eye(9, dtype=torch.float64, device="cpu")
    central, angular = taps.clone(), taps - theta * taps[list(_RING)].T
    central[:, 4] -= 1
    lines = taps.unflatten(0, (3, 3))
    return {
        "central": central,
        "angular": angular,
        "horizontal": lines[:, 0] - lines[:, 2],
        "vertical": lines[0] - lines[2],
    }
