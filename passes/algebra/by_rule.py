"""Convolutions whose padding is no number: a rule makes it of the input's size, or only a transposed one can have it.

ONNX has them (``auto_pad`` where sizes are open, the ``output_shape`` and one-sided pads of a transposed convolution),
torch has not. Such a layer is linear in its weight, whatever its rule, and is read as an :class:`OpaqueForm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

__all__ = ["BY_RULE", "ConvByRule", "Rule"]

Rule = Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""Leading and trailing pads of a feature map of these spatial sizes; of a transposed convolution, what is cropped."""


class ConvByRule(_ConvNd):
    """A convolution that pads with zeros by a rule.

    Args:
        weight: of the shape that torch gives the layer's; only that counts.
        rule: how much it pads.
        output_padding: pixels that a transposed convolution has more at the end.
    """

    def __init__(
        self, weight: Tensor, rule: Rule, stride: Sequence[int], dilation: Sequence[int], groups: int,
        transposed: bool = False, output_padding: Sequence[int] = (),
    ) -> None:  # fmt: skip
        first, second, *kernel = weight.shape
        ends = (first, second * groups) if transposed else (second * groups, first)
        more, none = tuple(output_padding) or (0,) * len(kernel), (0,) * len(kernel)
        shape = (tuple(kernel), tuple(stride), none, tuple(dilation))
        super().__init__(*ends, *shape, transposed, more, groups, False, "zeros", device="meta")
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in, *sizes)`` to ``(N, out, *sizes)``."""
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with other numbers, the weight in torch's layout."""
        n = len(self.kernel_size)
        lead, trail = self.rule(x.shape[2:])
        if not self.transposed:
            conv: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
            padded = F.pad(x, _flat(lead, trail))
            made: Tensor = conv(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
            return made
        back: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        whole = back(x, weight, None, self.stride, 0, 0, self.groups, self.dilation)
        more = [extra - crop for extra, crop in zip(self.output_padding, trail, strict=True)]
        made = F.pad(whole, _flat([-crop for crop in lead], more))
        return made if bias is None else made + bias.reshape(-1, *(1,) * n)


def _flat(lead: Sequence[int], trail: Sequence[int]) -> list[int]:
    """As ``torch.nn.functional.pad`` takes them: the last dimension first."""
    return [p for pair in zip(reversed(lead), reversed(trail), strict=True) for p in pair]


def _function() -> Callable[..., Tensor]:
    def conv_by_rule(x: Tensor, weight: Tensor, bias: Tensor | None, layer: ConvByRule, *, groups: int) -> Tensor:
        return layer.convolve(x, weight, bias)

    return conv_by_rule


BY_RULE = {(n, transposed): _function() for n in (1, 2, 3) for transposed in (False, True)}
"""The layer as a function of its numbers, by spatial dimensions and direction: each is an operation of its own."""
