"""Copies of modules: full ones, and shadows that share their tensors until they are needed.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the computed weight as a plain attribute, and a forward may
cache what it computed. Such tensors carry a graph, and ``copy.deepcopy`` refuses them; in a copy they are values.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["deep_copy", "independent", "shadow"]

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module) -> Module:
    """A copy that shares nothing with ``module``."""
    return copy.deepcopy(module, _computed(module))


def shadow(module: Module) -> Module:
    """A copy that shares parameters and buffers with ``module``, to be edited but not written into."""
    return copy.deepcopy(module, {**_tensors(module), **_computed(module)})


def independent(edited: Module, source: nn.Module) -> Module:
    """A copy of a shadow that shares nothing with ``source``; tensors that are its own are moved, not copied."""
    theirs = _tensors(source)
    return copy.deepcopy(edited, {key: t for key, t in _tensors(edited).items() if key not in theirs})


def _tensors(module: nn.Module) -> dict[int, Any]:
    return {id(t): t for t in [*module.parameters(), *module.buffers()]}


def _computed(module: nn.Module) -> dict[int, Any]:
    held = tree_leaves([m.__dict__ for m in module.modules()])
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
