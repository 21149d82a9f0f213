"""Online re-parameterisation: a block that trains as one convolution, its kernel computed in every forward.

The kernel comes from the algebra that collapse folds with, recorded once as straight-line code. A batch norm inside a
branch needs the statistics of a map that is never computed, so it becomes a factor per channel, and one batch norm
stands behind the sum (Hu et al., "OREPA", CVPR 2022, sec. 3.1). Nothing here knows a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry, Layer
from passes.blocks.kit.layers import BranchSum, ChannelScale
from passes.graph.within import Inside
from passes.training.equivalent import KernelProgram

__all__ = ["OnlineSum", "scales_for_norms"]


class OnlineSum(BranchSum):
    """A block that runs as one convolution; same branches, same names as :class:`BranchSum`."""

    def __init__(
        self,
        block: str,
        branches: dict[str, nn.Module],
        conv: Layer,
        layer: _ConvNd | None = None,
        inside: Inside | None = None,
    ) -> None:
        super().__init__(block, branches, conv, layer, inside)
        self.geometry = Geometry.of(conv)
        self._record()

    def inner(self, input: Tensor) -> Tensor:
        # An optimizer's small steps are lost in bfloat16: the kernel is computed in the parameters' own dtype.
        with torch.autocast(input.device.type if isinstance(input, Tensor) else "cpu", enabled=False):
            weight, bias = self._program(self._values())
        return self.geometry.convolve(input, weight, bias)

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self._program(self._values())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, online"

    def _record(self) -> None:
        first = next(self.parameters())
        plain = BranchSum(self.reparam_block, self.branches(), self)  # type: ignore[arg-type]
        program = KernelProgram.of(plain, first.dtype)
        self._program = program
        self._paths = [name.split(".") for name in program.names]

    def _values(self) -> list[Tensor]:
        # Attribute by attribute: torch.compile and torch.fx follow getattr, and no attrgetter or get_parameter.
        found = []
        for path in self._paths:
            value: Any = self
            for name in path:
                value = getattr(value, name)
            found.append(value)
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OnlineSum:
        """Move or cast; the recorded code holds constants of one dtype on one device."""
        first = next(self.parameters())
        before = first.dtype, first.device
        super()._apply(fn, recurse)
        first = next(self.parameters())
        if (first.dtype, first.device) != before:
            self._record()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlineSum:
        """A copy runs the same recorded code on its own tensors."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_program", "_paths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._record()


def scales_for_norms(module: nn.Module, n: int) -> nn.Module:
    """The module with a factor per channel in place of every batch norm, at the norm's own weight."""
    if isinstance(module, _BatchNorm):
        scale = ChannelScale(module.num_features, 1.0, n)
        if module.affine:
            scale.weight = nn.Parameter(module.weight.detach().reshape(scale.weight.shape), module.weight.requires_grad)
        return scale
    for name, child in list(module.named_children()):
        setattr(module, name, scales_for_norms(child, n))
    return module
