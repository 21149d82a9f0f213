"""What a forward leaves behind on the modules: attributes, buffers and containers that it changed or added."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from passes.graph.inputs import copied

__all__ = ["Marks", "changes"]

_TABLES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has: its own tables and hooks."""

_SMALL = 1 << 14
"""Numbers in a tensor whose content is compared."""

_DEPTH = 4
"""How deep containers are looked into."""


class Marks:
    """How all attributes and tensors of a model were at one moment; what they hold is kept, so that ids stay theirs."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[Any] = []
        self.of = self.all(model)

    def all(self, model: nn.Module) -> dict[tuple[str, str], Any]:
        """The marks of all attributes and tensors, by path and name."""
        return {(path, name): (self.mark(value), _digest(value)) for path, name, value in _values(model)}

    def mark(self, value: Any, depth: int = _DEPTH) -> Any:
        """Equal for equal content: identity and version of tensors, the numbers themselves, parts of containers."""
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            return type(value), value
        self._kept.append(value)
        if isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            return id(value), version, value.data_ptr() if _dense(value) else 0, _numbers(value)
        if depth and isinstance(value, Mapping):
            return type(value), tuple((_key(k), self.mark(v, depth - 1)) for k, v in value.items())
        if depth and isinstance(value, (list, tuple, deque)):
            return type(value), tuple(self.mark(v, depth - 1) for v in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(map(_key, value))
        own = getattr(value, "__dict__", None)
        if depth and own and not isinstance(value, (nn.Module, type)) and not callable(value):
            return id(value), tuple((k, self.mark(v, depth - 2 if depth > 1 else 0)) for k, v in own.items())
        return id(value)


def changes(model: nn.Module, before: Marks) -> dict[tuple[str, str], Any]:
    """What differs from ``before``, copied as it is now; :data:`GONE` for what was deleted."""
    now = before.all(model)
    found = {
        (path, name): copied(value)
        for path, name, value in _values(model)
        if (path, name) not in before.of or before.of[path, name] != now[path, name]
    }
    return {**found, **dict.fromkeys(before.of.keys() - now.keys(), GONE)}


GONE = "(deleted)"


def _values(model: nn.Module) -> Any:
    for path, module in model.named_modules():
        computed = _computed(module)
        for name, value in module.__dict__.items():
            # A script's methods are kept on it when they are asked for first.
            if name not in _TABLES and name not in computed and not isinstance(value, torch._C.ScriptMethod):
                yield path, name, value
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                yield path, name, tensor


def _digest(value: Any) -> float | None:
    """The sum of a buffer: kernels write running statistics past the counter of changes."""
    if type(value) is not Tensor or not value.numel() or value.is_meta or not _dense(value):
        return None
    total = float(value.detach().sum(dtype=torch.float64).real) if not value.is_complex() else None
    return total if total == total else None


def _computed(module: nn.Module) -> set[str]:
    """Attributes that hooks of torch compute before each call: the weight of weight_norm, of a pruned layer."""
    hooks = module._forward_pre_hooks.values()
    return {str(name) for h in hooks for name in (getattr(h, "name", None), getattr(h, "_tensor_name", None)) if name}


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _numbers(tensor: Tensor) -> bytes:
    """The content of a small tensor that is no weight: a batch norm in training counts no version of its statistics."""
    if isinstance(tensor, nn.Parameter) or tensor.is_meta or not _dense(tensor) or tensor.numel() > _SMALL:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())


def _dense(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # sparse tensors and wrappers have no memory of their own
        return False
    return True
