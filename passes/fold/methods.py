"""What methods use of their own module and of others, read from their code.

A rewritten forward needs fewer children than before. One that ``forward_features`` or ``extract_feat`` calls itself has
to stay; one that only a method of re-parameterisation looks at (``switch_to_deploy``, ``get_equivalent_kernel``) has
nothing left to do there.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import nn

from passes.edits.rewritten import plain_class
from passes.graph.looks import used_by
from passes.graph.methods import methods_of

__all__ = ["asked_of_others", "folded_from_outside", "folding_again", "needed_elsewhere", "parts_used"]


def needed_elsewhere(module: nn.Module, called: set[str], read: set[str], rewritten: str) -> dict[str, set[str]]:
    """What other methods than the ``rewritten`` one need of the children ``called`` and the tensors ``read``.

    A method needs the children that it calls itself, and one to which ``forward`` hands its work on all that it uses;
    with them the tensors that it reads.
    """
    methods = methods_of(plain_class(module))
    reached = _reached(methods)
    found = {}
    for name, function in methods.items():
        used = used_by(function)
        needed = called & (used.own if name in reached else used.called)
        if needed and name not in ("forward", rewritten):
            found[name] = needed | (read & used.own)
    return found


def parts_used(module: nn.Module, names: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """Methods that ``forward`` does not hand its work to, and that use some of these children and not the others."""
    methods = methods_of(plain_class(module))
    besides = methods.keys() - _reached(methods) - {"forward"}
    used = ((name, used_by(methods[name]).own & names) for name in methods if name in besides)
    return [(name, some) for name, some in used if some and some != names]


def folding_again(kind: type[nn.Module], folded: set[str]) -> tuple[str, ...]:
    """Methods that fold children and delete them (``reparameterize``, ``switch_to_deploy``), where those are folded.

    They are known by what they do: the forward does not use them, they ask for nothing, they or what they call read
    running statistics, and they delete attributes of their own object that are among ``folded``, or hold what is.
    """
    methods = _all_methods(kind)
    besides = [name for name in methods.keys() - _reached(methods) - {"forward"} if _deleted(methods[name]) & folded]
    return tuple(sorted(name for name in besides if any(_statistics(methods[m]) for m in _reached(methods, name))))


def folded_from_outside(model: nn.Module, path: str) -> bool:
    """Whether a library may know a norm by its owner's class, to fold it, and is right to take a bias before it.

    In torch's containers no one looks for it, and a module around it that folds it by a method of its own may count on
    a layer without a bias.
    """
    names = path.split(".")
    kinds = [plain_class(model.get_submodule(".".join(names[:i]))) for i in range(len(names))]
    own = any(_statistics(function) for kind in kinds for function in _all_methods(kind).values())
    return not own and not kinds[-1].__module__.startswith("torch.nn.")


def _all_methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class, static ones included."""
    bases = [base for base in reversed(kind.__mro__) if not base.__module__.startswith("torch.nn.modules")]
    static = [(name, value.__func__) for base in bases for name, value in vars(base).items() if _is_static(value)]
    return {**{name: function for name, function in static if isinstance(function, FunctionType)}, **methods_of(kind)}


def _is_static(value: Any) -> bool:
    return isinstance(value, staticmethod)


def _statistics(function: FunctionType) -> bool:
    used = used_by(function)
    return bool({"running_mean", "running_var"} & (used.own | used.others))


@functools.lru_cache(maxsize=4096)
def _deleted(function: FunctionType) -> frozenset[str]:
    """Names of attributes that a method without arguments deletes from its own object."""
    whole = inspect.unwrap(function)
    parameters = list(inspect.signature(whole).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return frozenset()
    code = whole.__code__
    by_name = {"delattr", "__delattr__"} & set(code.co_names)
    named = {value for value in code.co_consts if isinstance(value, str)} if by_name else set()
    straight = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "DELETE_ATTR"}
    return frozenset(named | straight)


def _reached(methods: Mapping[str, FunctionType], first: str = "forward") -> set[str]:
    """The methods that ``forward``, or another one, calls, and those that they call; another one itself as well."""
    reached: set[str] = set() if first == "forward" else {first}
    todo = [first] if first in methods else []
    while todo:
        for name in (used_by(methods[todo.pop()]).own & methods.keys()) - reached:
            reached.add(name)
            todo.append(name)
    return reached


def asked_of_others(model: nn.Module) -> set[str]:
    """Names of attributes that the methods of a model's classes read of anything but their own object."""
    kinds = {plain_class(module) for module in model.modules()}
    return {name for kind in kinds for function in methods_of(kind).values() for name in used_by(function).others}
