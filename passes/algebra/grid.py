"""The taps on which several branches can be written, so that their kernels can be added or stacked (F2, F8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from passes.algebra.changed import replace
from passes.algebra.kernels import spread
from passes.refusal import Reason, RefusalError

if TYPE_CHECKING:
    from passes.algebra.conv_form import ConvForm, Ints

__all__ = ["Grid", "common_grid"]


@dataclass(frozen=True)
class Grid:
    """The taps on which several branches can be written, so that weights can be added or stacked (F2, F8)."""

    offset: Ints
    dilation: Ints
    kernel: Ints
    groups: int
    mode: str

    def place(self, form: ConvForm) -> tuple[slice, ...]:
        """Where the form's taps lie in a weight of this grid."""
        place = [slice(None), slice(None)]
        for i in range(form.n):
            start = (form.offset[i] - self.offset[i]) // self.dilation[i]
            step = form.dilation[i] // self.dilation[i] if form.kernel[i] > 1 else 1
            place.append(slice(start, start + step * (form.kernel[i] - 1) + 1, step))
        return tuple(place)

    def embed(self, form: ConvForm) -> ConvForm:
        """The form written on this grid, zeros at the taps it does not have."""
        wide = form.widen(self.groups)
        weight = wide.weight
        if form.kernel != self.kernel:  # a kernel of the same size has the same taps
            taps = self.place(form)[2:]
            for axis, at in enumerate(taps, start=2):
                weight = spread(weight, axis, at.step)
            ends = [(at.start, k - at.stop) for at, k in zip(taps, self.kernel, strict=True)]
            weight = F.pad(weight, [p for pair in reversed(ends) for p in pair])
        return self.written(wide, weight)

    def written(self, form: ConvForm, weight: Tensor) -> ConvForm:
        """The form with a weight that has this grid's taps and groups."""
        offset, dilation, mode = self.offset, self.dilation, self.mode
        return replace(form, weight=weight, groups=self.groups, offset=offset, dilation=dilation, mode=mode)


def common_grid(forms: Sequence[ConvForm]) -> Grid:
    """The coarsest grid with all taps of all forms. Raises :class:`RefusalError` if their outputs differ in size."""
    first = forms[0]
    for other in forms[1:]:
        if (other.stride, other.extent, other.up) != (first.stride, first.extent, first.up):
            raise RefusalError(
                Reason.GEOMETRY,
                f"stride {first.stride}, extent {first.extent} and stride {other.stride}, extent {other.extent} "
                "give outputs of different sizes",
            )
    modes = {f.mode for f in forms if f.reads_outside}
    if len(modes) > 1:
        raise RefusalError(Reason.PAD_MODE, f"branches pad in the modes {', '.join(sorted(modes))}")
    offset = tuple(min(f.offset[i] for f in forms) for i in range(first.n))
    dilation, kernel = [], []
    for i in range(first.n):
        gaps = [f.offset[i] - offset[i] for f in forms] + [f.dilation[i] for f in forms if f.kernel[i] > 1]
        step = math.gcd(*gaps) or first.dilation[i]
        far = max(f.offset[i] - offset[i] + f.dilation[i] * (f.kernel[i] - 1) for f in forms)
        dilation.append(step)
        kernel.append(far // step + 1)
    groups = math.gcd(*(f.groups for f in forms))
    return Grid(offset, tuple(dilation), tuple(kernel), groups, modes.pop() if modes else first.mode)
