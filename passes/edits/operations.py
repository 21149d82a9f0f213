"""Operations that a written forward may name: an explicit list, so that a file can ask for nothing else.

Functions of ``torch``, ``torch.nn.functional`` and ``torch.special`` that compute on tensors, arithmetic of
``operator``, a few of ``builtins`` and ``math``, and the public methods of a tensor. Nothing is imported by a name that
stands in a file; what reaches the file system, the process or arbitrary attributes is left out.
"""

from __future__ import annotations

import builtins
import collections
import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ATTRIBUTES", "function_of", "is_method", "name_of"]

ATTRIBUTES = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "T", "mT", "H", "mH", "real", "imag", "requires_grad", "is_cuda")
)
"""What ``getattr`` may ask a tensor for."""

_NOT_TORCH = (
    "as_strided", "cudnn_", "empty_strided", "fbgemm_", "from_", "frombuffer", "miopen_", "mkldnn_", "quantized_",
    "resize_", "sparse_",
)  # fmt: skip
"""Beginnings of names: other memory than a tensor's own, and kernels that trust what they are given."""
_NOT_METHODS = {
    "apply_", "as_strided", "as_strided_", "backward", "data_ptr", "is_shared", "map2_", "map_", "module_load", "numpy",
    "pin_memory", "record_stream", "register_hook", "register_post_accumulate_grad_hook", "reinforce", "resize_",
    "resize_as_", "retain_grad", "set_", "share_memory_", "storage", "to_sparse", "tolist", "type", "untyped_storage",
}  # fmt: skip
_OPERATOR = (
    "abs", "add", "and_", "contains", "eq", "floordiv", "ge", "getitem", "gt", "iadd", "iand", "ifloordiv", "ilshift",
    "imatmul", "imod", "imul", "index", "inv", "invert", "ior", "ipow", "irshift", "is_", "is_not", "isub", "itruediv",
    "ixor", "le", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "setitem",
    "sub", "truediv", "truth", "xor",
)  # fmt: skip
_BUILTINS = ("abs", "bool", "dict", "divmod", "float", "getattr", "int", "len", "list", "max", "min", "round", "slice",
             "sum", "tuple")  # fmt: skip
_MATH = ("ceil", "exp", "floor", "isqrt", "log", "log2", "pow", "sqrt", "trunc")


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"torch._assert": torch._assert, "torch.is_tensor": torch.is_tensor}
    tables: dict[str, Any] = {"torch": torch._C._VariableFunctions, "torch.special": torch.special}
    for prefix, table in tables.items():
        for name in dir(table):
            function = getattr(torch if table is torch._C._VariableFunctions else table, name, None)
            if not name.startswith(("_", *_NOT_TORCH)) and inspect.isbuiltin(function):
                found[f"{prefix}.{name}"] = function
    for name in dir(torch.functional):
        function = getattr(torch.functional, name)
        if inspect.isfunction(function) and function.__module__ == "torch.functional" and not name.startswith("_"):
            found[f"torch.{name}"] = function
    for name in dir(F):
        function = getattr(F, name)
        plain = inspect.isfunction(function) and function.__module__ == F.__name__
        if not name.startswith("_") and (plain or inspect.isbuiltin(function)):
            found[f"torch.nn.functional.{name}"] = function
    for module, names in ((operator, _OPERATOR), (builtins, _BUILTINS), (math, _MATH)):
        found.update({f"{module.__name__}.{name}": getattr(module, name) for name in names})
    found["collections.OrderedDict"] = collections.OrderedDict
    return found


@functools.cache
def _names() -> dict[int, str]:
    """By identity; of several names the first."""
    names: dict[int, str] = {}
    for name, function in _functions().items():
        names.setdefault(id(function), name)
    return names


def function_of(name: str) -> Callable[..., Any] | None:
    """The function of that name, None if it is not on the list."""
    return _functions().get(name)


def name_of(function: Any) -> str | None:
    """The name of a function on the list, None for any other."""
    return _names().get(id(function))


def is_method(name: str) -> bool:
    """Whether a written forward may call this method of a tensor."""
    public = name.isidentifier() and not name.startswith("_") and name not in _NOT_METHODS
    return public and callable(getattr(Tensor, name, None))
