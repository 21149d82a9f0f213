"""Copies of modules: full ones, and shadows that share their tensors until they are needed.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the computed weight as a plain attribute, and a forward may
cache what it computed. Such tensors carry a graph, and ``copy.deepcopy`` refuses them; in a copy they are values.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from passes.refusal import ReparamError

__all__ = ["deep_copy", "independent", "shadow"]

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module) -> Module:
    """A copy that shares nothing with ``module``. Raises :class:`ReparamError` if it cannot be copied."""
    return _copied(module, {})


def shadow(module: Module) -> Module:
    """A copy that shares parameters and buffers with ``module``, to be edited but not written into; raises as above."""
    return _copied(module, _tensors(module))


def _copied(module: Module, memo: dict[int, Any]) -> Module:
    held = _held(module)
    try:
        made = copy.deepcopy(module, {**memo, **_computed(held), **_described(held), **_empty(module)})
    # deepcopy runs user code, which may fail in any way.
    except Exception as error:
        name = type(module).__name__
        raise ReparamError(
            f"{name} cannot be copied ({error}); inplace=True, where it is offered, needs no copy"
        ) from error
    for script in (m for m in made.modules() if isinstance(m, torch.jit.ScriptModule)):
        for parameter in script.parameters(recurse=False):
            if not parameter.is_leaf:  # torch clones those of a script as an operation
                parameter.detach_().requires_grad_()
    return made


def independent(edited: Module, source: nn.Module) -> Module:
    """Make a shadow share nothing with ``source``: tensors that are its own stay, the others are copied."""
    theirs = _tensors(source)
    memo: dict[int, Any] = {}  # a tensor registered twice is copied once
    for module in edited.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if id(tensor) in theirs:
                    setattr(module, name, copy.deepcopy(tensor, memo))
    if any(id(t) in theirs for t in _attributes(edited)):  # also held by a plain attribute: copy as a whole
        return copy.deepcopy(edited, {key: t for key, t in _tensors(edited).items() if key not in theirs})
    return edited


def _tensors(module: nn.Module) -> dict[int, Any]:
    return {id(t): t for t in [*module.parameters(), *module.buffers()]}


def _attributes(module: nn.Module) -> list[Tensor]:
    """Tensors that modules hold outside of their tables of parameters and buffers."""
    return [leaf for leaf in _held(module) if isinstance(leaf, Tensor)]


def _held(module: nn.Module) -> list[Any]:
    """What modules hold as plain attributes, themselves or in containers."""
    tables = ("_parameters", "_buffers", "_modules")
    values = [
        value
        for m in module.modules()
        for name, value in m.__dict__.items()
        if name not in tables and (isinstance(value, Tensor) or (isinstance(value, (dict, list, tuple)) and value))
    ]
    return tree_leaves([value for value in values if type(value) is not tuple or set(map(type, value)) != {int}])


def _computed(held: list[Any]) -> dict[int, Any]:
    return {
        id(t): t.detach().clone()
        for t in held
        if isinstance(t, Tensor) and not t.is_leaf and not isinstance(t, FakeTensor)
    }


def _described(held: list[Any]) -> dict[int, Any]:
    """What only describes a graph, as modules that were unflattened from an export hold it: it stays the same."""
    return {id(leaf): leaf for leaf in held if isinstance(leaf, (fx.Node, FakeTensor))}


def _empty(module: nn.Module) -> dict[int, Any]:
    """New ones of the tables of hooks, a dozen per module, most of them empty; deepcopy takes long over each."""
    return {id(v): type(v)() for m in module.modules() for v in vars(m).values() if type(v) in _TABLES and not v}


_TABLES = frozenset({dict, OrderedDict})
