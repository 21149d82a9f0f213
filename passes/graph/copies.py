"""Copies of modules: full ones, and shadows that share their tensors until they are needed.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the computed weight as a plain attribute, and a forward may
cache what it computed. Such tensors carry a graph, and ``copy.deepcopy`` refuses them; in a copy they are values.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from passes.graph.walk import modules_of
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
        memo = {**memo, **_computed(held), **_described(held), **_empty(module)}
        _enter_plain(module, memo)
        return copy.deepcopy(module, memo)
    # deepcopy runs user code, which may fail in any way.
    except Exception as error:
        name = type(module).__name__
        raise ReparamError(
            f"{name} cannot be copied ({error}); inplace=True, where it is offered, needs no copy"
        ) from error


def _enter_plain(module: nn.Module, memo: dict[int, Any]) -> None:
    """Enter copies of all modules that are copied attribute by attribute, as deepcopy does, which takes long over each.

    Most attributes are numbers, and tables whose entries are known by then.
    """
    inside = modules_of(module)
    kinds = {kind for kind in set(map(type, inside)) if _is_plain(kind)}
    plain = [m for m in inside if type(m) in kinds and id(m) not in memo and "__deepcopy__" not in vars(m)]
    memo.update((id(each), object.__new__(type(each))) for each in plain)
    for each in reversed(plain):  # the inner ones first: their parents may look into them
        given: Any = each.__getstate__() if hasattr(each, "__getstate__") else vars(each)
        state = {name: _value(value, memo) for name, value in given.items()}
        made: Any = memo[id(each)]
        made.__setstate__(state)


def _value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict and all(type(name) is str for name in value):
        made: dict[str, Any] = {}
        memo[id(value)] = made
        made.update((name, _value(held, memo)) for name, held in value.items())
        return made
    return copy.deepcopy(value, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether deepcopy makes an object of this class without its constructor and gives it copies of its attributes."""
    own = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    usual = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _USUAL)
    usual = usual and kind not in copyreg.dispatch_table and not any(hasattr(kind, name) for name in own)
    return usual and not any(vars(base).get("__slots__") for base in kind.__mro__)


_USUAL = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
_ATOMS = frozenset({bool, int, float, str, type(None)})


def independent(edited: Module, source: nn.Module) -> Module:
    """Make a shadow share nothing with ``source``: tensors that are its own stay, the others are copied."""
    theirs = _tensors(source)
    memo: dict[int, Any] = {}  # a tensor registered twice is copied once
    for module in modules_of(edited):
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
        for m in modules_of(module)
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
    return {id(v): type(v)() for m in modules_of(module) for v in vars(m).values() if type(v) in _TABLES and not v}


_TABLES = frozenset({dict, OrderedDict})
