"""A convolution whose kernel is computed in each forward."""

from __future__ import annotations

from torch import Tensor, nn

from passes.algebra.geometry import Geometry

__all__ = ["KernelConv"]


class KernelConv(nn.Module):
    """A convolution whose kernel is an expression of its parameters, see :meth:`kernel`."""

    bias: Tensor | None

    def __init__(self, geometry: Geometry, bias: Tensor | None = None) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_parameter("bias", bias)  # type: ignore[arg-type]  # a Parameter: torch annotates it as a Tensor

    def kernel(self) -> Tensor:
        """The kernel ``(out, in / groups, *kernel)``."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return self.geometry.convolve(input, self.kernel(), self.bias)

    def extra_repr(self) -> str:
        return str(self.geometry)
