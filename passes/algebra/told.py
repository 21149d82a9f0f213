"""Numbers that are computed when they are asked for, so that a change of them would be lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes.refusal import ReparamError

__all__ = ["Told"]


class Told(Tensor):
    """A tensor to be read: what is made of it is a plain tensor, and a change in place, of a view too, is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if (changes and args and isinstance(args[0], Told)) or isinstance(kwargs.get("out"), Told):
            raise ReparamError(
                "the weight and bias of a block are computed from its branches: a change in place would be lost. "
                "Collapse the network first, change the branches, or change a clone and assign it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            source = args[0] if args and isinstance(args[0], Told) else None
            if source is None or made is source or not isinstance(made, Tensor):
                return made
            view = made.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        return made.as_subclass(Told) if view else made


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_CHANGES = {"__setitem__", "__set__", *(f"__i{name}__" for name in _IN_PLACE)}
