"""Numbers that are computed when they are asked for, so that a change of them would be lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from passes.refusal import ReparamError

__all__ = ["Told"]


class Told(Tensor):
    """A tensor to be read: what is made of it is a plain tensor, and a change in place, of a view too, is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if (changes and args and isinstance(args[0], Told)) or isinstance(kwargs.get("out"), Told):
            raise ReparamError(_LOST)
        with torch._C.DisableTorchFunctionSubclass():
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Told)]
            before = [_version(each) for each in given]
            made = func(*args, **kwargs)
            if [_version(each) for each in given] != before:  # relu(inplace=True), functions of lists
                raise ReparamError(_LOST)
            memory = {each.untyped_storage().data_ptr() for each in given}
            return tree_map(lambda each: _kept(each, given, memory), made)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _kept(made: Any, given: list[Told], memory: set[int]) -> Any:
    """What is made of such tensors: views, and arrays of numpy, are to be read as well."""
    if type(made).__module__ == "numpy" and hasattr(made, "setflags"):
        made.setflags(write=False)
    if not isinstance(made, Tensor) or any(made is each for each in given):
        return made
    return made.as_subclass(Told) if made.untyped_storage().data_ptr() in memory else made


_LOST = (
    "the weight and bias of a block are computed from its branches: a change in place would be lost. "
    "Collapse the network first, change the branches, or change a clone and assign it"
)
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_CHANGES = {"__setitem__", "__set__", *(f"__i{name}__" for name in _IN_PLACE)}
