"""A convolution whose kernel is computed in each forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.algebra.geometry import Geometry, flat_pads

__all__ = ["KernelConv"]


class KernelConv(nn.Module):
    """A convolution whose kernel is an expression of its parameters, see :meth:`kernel`."""

    def __init__(self, geometry: Geometry, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.geometry = geometry
        # TorchScript takes numbers and lists of them, and no Geometry.
        self.dims, self.groups, self.mode = geometry.n, geometry.groups, geometry.pad_mode
        self.stride, self.dilation = list(geometry.stride), list(geometry.dilation)
        self.pads = flat_pads(geometry.lead, geometry.trail) or [0, 0]
        self.transposed = geometry.transposed
        self.register_parameter("bias", bias)  # type: ignore[arg-type]  # a Parameter: torch annotates it as a Tensor

    def kernel(self) -> Tensor:
        """The kernel ``(out, in / groups, *kernel)``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.scripted(input)
        else:
            return self.geometry.convolve(input, self.kernel(), self.bias)

    def scripted(self, input: Tensor) -> Tensor:
        """The same in words that TorchScript takes."""
        assert not self.transposed, "TorchScript has no kernel of a transposed convolution: collapse first"
        if self.dims == 0:
            return F.linear(input, self.kernel(), self.bias)
        x, none = F.pad(input, self.pads, mode=self.mode), [0] * self.dims
        if self.dims == 1:
            return torch.conv1d(x, self.kernel(), self.bias, self.stride, none, self.dilation, self.groups)
        if self.dims == 2:
            return torch.conv2d(x, self.kernel(), self.bias, self.stride, none, self.dilation, self.groups)
        return torch.conv3d(x, self.kernel(), self.bias, self.stride, none, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return str(self.geometry)
