"""Whether code looks at the values of its input, and not only at its shape.

A module that branches on data may act as a convolution on everything that it is tried on, and differently on the next
input. Every tensor computed from the input is followed by its storage; turning one of them into a Python number, a list
or an array is the look that raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeekError", "watched"]

_LOOKS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "bincount"}
_LEAVES = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"}


class PeekError(RuntimeError):
    """Code asked for the value of something that depends on the input."""


class _Followed:
    """Storages that hold something computed from the input; kept alive, so that none is given away twice."""

    def __init__(self, x: Tensor) -> None:
        self._alive: dict[int, Any] = {}
        self.add(x)

    def add(self, value: Any) -> None:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = storage

    def has(self, value: Any) -> bool:
        return any(t.untyped_storage()._cdata in self._alive for t in _tensors(value))


class _Follow(TorchDispatchMode):
    def __init__(self, followed: _Followed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.followed = followed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.followed.has((args, kwargs)):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _LOOKS:
            raise PeekError(f"its code looks at the values of its input ({name})")
        out = func(*args, **kwargs)
        self.followed.add(out)
        if func._schema.is_mutable:
            changed = zip(func._schema.arguments, args, strict=False)
            self.followed.add([v for a, v in changed if a.alias_info is not None and a.alias_info.is_write])
        return out


class _Guard(TorchFunctionMode):
    def __init__(self, followed: _Followed) -> None:
        super().__init__()
        self.followed = followed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES and self.followed.has(args[:1]):
            raise PeekError(f"its code looks at the values of its input ({name})")
        return func(*args, **(kwargs or {}))


def watched(module: torch.nn.Module, x: Tensor) -> Any:
    """``module(x)``; raises :class:`PeekError` if its code looks at values, or gives something not made from ``x``."""
    followed = _Followed(x)
    with _Follow(followed), _Guard(followed):
        out = module(x)
    if not followed.has(out):
        raise PeekError("its output was not made from its input by torch")
    return out


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]
