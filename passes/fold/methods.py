"""What methods use of their own module and of others, read from their code.

A rewritten forward needs fewer children than before. One that ``forward_features`` or ``extract_feat`` calls itself has
to stay; one that only a method of re-parameterisation looks at (``switch_to_deploy``, ``get_equivalent_kernel``) has
nothing left to do there.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from passes.graph.looks import LOADS, used_by
from passes.graph.methods import methods_of
from passes.portable import plain_class

__all__ = [
    "asked_of_others", "classes_of", "deployed_as", "folded_from_outside", "folding_again", "making_again",
    "needed_elsewhere", "parts_used",
]  # fmt: skip


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


def parts_used(module: nn.Module, names: frozenset[str], *, handed: bool = False) -> list[tuple[str, frozenset[str]]]:
    """Methods that use some of these children and not the others: those that ``forward`` hands its work to, or not."""
    methods = methods_of(plain_class(module))
    reached = _reached(methods)
    wanted = (name for name in methods if (name in reached) is handed and name != "forward")
    used = ((name, used_by(methods[name]).own & names) for name in wanted)
    return [(name, some) for name, some in used if some and some != names]


def folding_again(kind: type[nn.Module], folded: set[str]) -> tuple[str, ...]:
    """Methods that fold children and delete them (``reparameterize``, ``switch_to_deploy``), where those are folded.

    They are known by what they do: the forward does not use them, they ask for nothing, they or what they call read
    running statistics, and they delete attributes of their own object that are among ``folded``, or hold what is.
    """
    methods = _all_methods(kind)
    besides = [name for name in methods.keys() - _reached(methods) - {"forward"} if _deleted(methods[name]) & folded]
    return tuple(sorted(name for name in besides if _reads_statistics(kind, methods, name)))


def making_again(kind: type[nn.Module], folded: set[str], inside: set[str]) -> dict[str, bool]:
    """Methods that may fold (``fuse``), which only running them tells, each with whether it names what is ``folded``.

    The forward does not use them, they take no arguments at all, and they or what they call read running statistics, or
    call a method of another module that is one of these (``inside``). They may return a module; one that names what is
    folded may also change the module itself, and return nothing or that.
    """
    methods, found = _all_methods(kind), {}
    for name in sorted(methods.keys() - _reached(methods) - {"forward"}):
        used = used_by(methods[name])
        if _returned(methods[name]) == {_DATA} or len(inspect.signature(inspect.unwrap(methods[name])).parameters) != 1:
            continue
        own = bool((used.own | _stored(methods[name])) & folded)
        if (own or _OTHER in _returned(methods[name])) and (
            used.others & inside or _reads_statistics(kind, methods, name)
        ):
            found[name] = own
    return found


_DATA, _NOTHING, _OTHER = "data", "nothing", "other"


@functools.lru_cache(maxsize=4096)
def _returned(function: FunctionType) -> frozenset[str]:
    """What a method may return: data (a tuple, a number), nothing or its own object, anything else."""
    code = inspect.unwrap(function).__code__
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP", "EXTENDED_ARG")]
    me = code.co_varnames[:1]
    wrapped = hasattr(function, "__wrapped__") and not str(function.__globals__.get("__name__")).startswith("torch.")
    if wrapped or any(s.opname.startswith("STORE_FAST") and me and me[0] in str(s.argval) for s in steps):
        return frozenset({_OTHER})
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        return frozenset({_OTHER})
    found = {_DATA if s.argval is not None else _NOTHING for s in steps if s.opname == "RETURN_CONST"}
    for before, step in itertools.pairwise(steps):
        if step.opname != "RETURN_VALUE":
            continue
        if step.is_jump_target:
            found.add(_OTHER)
        elif before.opname == "LOAD_CONST":
            found.add(_DATA if before.argval is not None else _NOTHING)
        elif before.opname.startswith("LOAD_FAST") and (before.argval,) == me:
            found.add(_NOTHING)
        else:
            found.add(_DATA if before.opname in _BUILDING else _OTHER)
    return frozenset(found)


_BUILDING = frozenset({"BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_SET", "BUILD_STRING"})


def deployed_as(kind: type[nn.Module], folded: set[str]) -> str:
    """The name under which a class keeps the one layer that its own method folds the children ``folded`` into, or "".

    That method (:func:`folding_again`) sets it and deletes all other children of these, and some method calls it.
    """
    methods = _all_methods(kind)
    called = {name for function in methods.values() for name in used_by(function).called}
    found = set()
    for method in folding_again(kind, folded):
        reached = [methods[name] for name in _reached(methods, method)]
        gone = {name for function in reached for name in _deleted(function)}
        made = {name for function in reached for name in _stored(function)} - gone
        found |= made & called if folded - gone <= made & called else {""}
    return found.pop() if len(found) == 1 else ""


def classes_of(modules: Iterable[nn.Module]) -> frozenset[type]:
    """The classes of these modules, as a person wrote them."""
    return frozenset(plain_class(module) for module in modules)


def folded_from_outside(model: nn.Module, path: str, running: frozenset[type]) -> bool:
    """Whether a library may know a norm by its owner's class, to fold it, and is right to take a bias before it.

    In torch's containers no one looks for it, and a module around it that folds it by a method of its own may count on
    a layer without a bias. A forward that computes with a norm's epsilon needs that as it is; ``running`` are the
    classes of all modules.
    """
    names = path.split(".")
    kinds = [plain_class(model.get_submodule(".".join(names[:i]))) for i in range(len(names))]
    own = any(_statistics(function) for kind in kinds for function in _versions(kind))
    if own or kinds[-1].__module__.startswith("torch.nn."):
        return False
    return not any("eps" in _asked_by_forward(kind) for kind in running)


@functools.lru_cache(maxsize=4096)
def _asked_by_forward(kind: Any) -> frozenset[str]:
    """Attributes that a forward, and what it calls, reads of anything but its own object."""
    methods = methods_of(kind)
    reached = [methods[name] for name in {"forward", *_reached(methods)} & methods.keys()]
    reached += [value.fget for base in _bases(kind) for value in vars(base).values() if _is_computed(value)]
    asked = {name for function in reached for name in used_by(function).others | _texts(function)}
    todo, seen = [named for function in reached for named in _functions_named(function)], set[FunctionType]()
    while todo:
        if (function := todo.pop()) not in seen:
            seen.add(function)
            asked |= used_by(function).own | used_by(function).others | _texts(function)
            todo += _functions_named(function)
    return frozenset(asked)


def _all_methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class, static ones included."""
    static = {name: value.__func__ for base in _bases(kind) for name, value in vars(base).items() if _is_static(value)}
    return {
        **{name: function for name, function in static.items() if isinstance(function, FunctionType)},
        **methods_of(kind),
    }


def _versions(kind: type[nn.Module], names: set[str] | None = None) -> Iterator[FunctionType]:
    """Every definition of methods in a class and its bases: one calls another by super()."""
    for base in _bases(kind):
        for name, value in vars(base).items():
            function = value.__func__ if _is_static(value) else value
            if isinstance(function, FunctionType) and (names is None or name in names):
                yield function


def _bases(kind: type[nn.Module]) -> list[type]:
    return [base for base in reversed(kind.__mro__) if not base.__module__.startswith("torch.nn.modules")]


def _is_computed(value: Any) -> bool:
    return isinstance(value, property) and isinstance(value.fget, FunctionType)


def _texts(function: FunctionType) -> set[str]:
    """Texts in the code of a function, which ``getattr`` may be given."""
    return {value for value in inspect.unwrap(function).__code__.co_consts if isinstance(value, str)}


def _is_static(value: Any) -> bool:
    return isinstance(value, staticmethod)


def _statistics(function: FunctionType) -> bool:
    used = used_by(function)
    return bool({"running_mean", "running_var"} & (used.own | used.others))


def _reads_statistics(kind: type[nn.Module], methods: Mapping[str, FunctionType], name: str) -> bool:
    """Whether a method, or what it calls of its own object or of its module, reads running statistics."""
    reached = list(_versions(kind, _reached(methods, name)))
    functions = {value for function in reached for value in _functions_named(function)}
    return any(_statistics(function) for function in [*reached, *functions])


def _functions_named(function: FunctionType) -> Iterator[FunctionType]:
    """The plain functions that a method names."""
    whole = inspect.unwrap(function)
    for name in whole.__code__.co_names:
        value = whole.__globals__.get(name)
        if isinstance(value, FunctionType):
            yield value


@functools.lru_cache(maxsize=4096)
def _stored(function: FunctionType) -> frozenset[str]:
    """Names of attributes that a method sets on its own object."""
    code = inspect.unwrap(function).__code__
    me, before, found = code.co_varnames[:1], None, set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_ATTR" and before is not None and me and me[0] == before:
            found.add(str(step.argval))
        before = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _deleted(function: FunctionType) -> frozenset[str]:
    """Names of attributes that a method without arguments deletes from its own object."""
    whole = inspect.unwrap(function)
    parameters = list(inspect.signature(whole).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return frozenset()
    code, called, named = whole.__code__, "", set()
    for step in dis.get_instructions(code):
        if step.opname in {*LOADS, "LOAD_GLOBAL"}:
            called = str(step.argval)
        elif called in ("delattr", "__delattr__") and step.opname == "LOAD_CONST" and isinstance(step.argval, str):
            named.add(step.argval)
    if not named and {"delattr", "__delattr__"} & set(code.co_names):  # by a name that is computed: any of these
        named = {value for value in code.co_consts if isinstance(value, str)}
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
    return {
        name
        for kind in classes_of(model.modules())
        for function in methods_of(kind).values()
        for name in used_by(function).others
    }
