"""Plain attributes of a layer that other code may ask for, carried over to what stands in its place.

``y.view(n, bn.num_features, -1)`` has to work when the norm has become part of a convolution. Tensors are no such
attributes: code that reads one keeps the layer where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import nn

__all__ = ["carry_attributes", "is_plain"]

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size, Enum)


def carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the plain public attributes of ``old`` that it does not have itself.

    Numbers, strings and such, tuples of them, and parameters that are None (``bias`` of a layer without one); no mark
    of a block, which answers for its own numbers.
    """
    absent = [name for table in (old._parameters, old._buffers) for name, tensor in table.items() if tensor is None]
    absent = [name for name in absent if name not in getattr(new, "reparam_numbers", ())]
    for name, value in [*vars(old).items(), *((name, None) for name in absent)]:
        if not name.startswith(("_", "reparam_")) and not hasattr(new, name) and is_plain(value):
            setattr(new, name, value)


def is_plain(value: Any) -> bool:
    """Whether this is a number, a string or such, or a tuple of them."""
    items: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return all(isinstance(item, _PLAIN) for item in items)
