"""A forward as plain data: parameters, operations in order, and what is returned.

Operations name what they call: a function by its public name, a method or a child module by its own. A program made
from a graph and the graph made from the program generate the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter as Kind
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from passes.edits.errors import EditError
from passes.edits.operations import function_of, name_of
from passes.portable import Unchanged, unchanged

__all__ = ["Argument", "Operation", "Program", "Value", "check_name", "mapped"]

REQUIRED = "required"
KINDS = {kind.name: kind for kind in (Kind.POSITIONAL_ONLY, Kind.POSITIONAL_OR_KEYWORD, Kind.KEYWORD_ONLY)}
CALLS = ("call_function", "call_method", "call_module", "get_attr")


@dataclass(frozen=True)
class Value:
    """Stands for the result of an operation, or for an argument."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True)
class Argument:
    """One parameter of the forward.

    Args:
        name: as in the original signature.
        kind: as :mod:`inspect` calls it.
        default: its value where the caller gives none.
        optional: whether there is a default.
        fixed: whether the program only holds for one value.
        value: which one that is.
    """

    name: str
    kind: str = Kind.POSITIONAL_OR_KEYWORD.name
    default: Any = None
    optional: bool = False
    fixed: bool = False
    value: Any = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.kind not in KINDS:
            raise EditError(f"{self.name} is no ordinary parameter")
        if self.name == "self":
            raise EditError("a parameter is named self, as the module itself is in generated code")


@dataclass(frozen=True)
class Operation:
    """One call, ``op`` as in ``torch.fx``; ``target`` is torch's public name, a method's, or a path in the module."""

    name: str
    op: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.op not in CALLS:
            raise EditError(f"{self.op!r} is no operation")
        for name, _ in self.kwargs:
            check_name(name)
        for name in self.target.split("."):
            if self.op == "call_method":
                check_name(name)


@dataclass(frozen=True)
class Program:
    """See the module's text.

    Args:
        arguments: the parameters behind ``self``.
        operations: in order.
        output: what is returned, :class:`Value` in plain structures.
        constants: tensors that the original forward made without its arguments; a fresh copy in each call.
        functions: those without a public name in torch, by the name that operations use.
    """

    arguments: tuple[Argument, ...]
    operations: tuple[Operation, ...]
    output: Any
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @staticmethod
    def of(graph: fx.Graph, arguments: tuple[Argument, ...], constants: Mapping[str, Tensor]) -> Program:
        """The program that ``graph`` computes; its placeholders are the ``arguments``, in order."""
        operations: list[Operation] = []
        functions: dict[str, Callable[..., Any]] = {}
        named: dict[fx.Node, str] = {}
        taken = {argument.name for argument in arguments} | {node.name for node in graph.nodes}
        places = iter(arguments)
        output: Any = None

        def value(node: Any) -> Any:
            return Value(named[node]) if isinstance(node, fx.Node) else node

        for node in graph.nodes:
            if node.op == "placeholder":
                named[node] = next(places).name
                continue
            if node.op == "output":
                output = mapped(node.args[0], value)
                continue
            named[node] = node.name if node.name not in {a.name for a in arguments} else _free(node.name, taken)
            target = node.target
            if node.op == "call_function":
                target = name_of(node.target) or _own_name(node.target)
                if name_of(node.target) is None:
                    while functions.get(target, node.target) is not node.target:
                        target += "_"
                    functions[target] = node.target
            args = tuple(mapped(arg, value) for arg in node.args)
            kwargs = tuple((key, mapped(arg, value)) for key, arg in node.kwargs.items())
            operations.append(Operation(named[node], node.op, str(target), args, kwargs))
        used = {op.target for op in operations if op.op == "get_attr"}
        held = {name: tensor for name, tensor in constants.items() if name in used}
        return Program(arguments, tuple(operations), output, held, functions)

    def graph(self) -> fx.Graph:
        """The graph, with code that has the original signature."""
        graph = fx.Graph()
        graph.set_codegen(_Signature(self.arguments))
        env: dict[str, fx.Node] = {}

        def node_of(value: Any) -> Any:
            if not isinstance(value, Value):
                return value
            if value.name not in env:
                raise EditError(f"{value.name} is used before it is made")
            return env[value.name]

        for argument in self.arguments:
            if argument.name in env:
                raise EditError(f"two parameters are named {argument.name}")
            env[argument.name] = graph.placeholder(argument.name)
        for argument in self.arguments:
            if argument.fixed:
                if type(argument.value) in _LITERAL:
                    graph.call_function(unchanged, (env[argument.name], argument.value, argument.name))
                else:  # what has no text that means the same again
                    graph.call_function(Unchanged(argument.value, argument.name), (env[argument.name],))
        for op in self.operations:
            if op.name in env:
                raise EditError(f"{op.name} is made twice")
            target: Any = op.target
            if op.op == "call_function":
                target = self.functions.get(op.target) or function_of(op.target)
                if target is None:
                    raise EditError(f"{op.target} is no operation of torch")
            args = tuple(mapped(arg, node_of) for arg in op.args)
            kwargs = {key: mapped(arg, node_of) for key, arg in op.kwargs}
            node = graph.create_node(op.op, target, args, kwargs, name=op.name)
            # The original made it anew in each call, and whoever got it may write into it.
            env[op.name] = graph.call_method("clone", (node,)) if op.target in self.constants else node
        graph.output(mapped(self.output, node_of))
        return graph

    def constants_of_code(self) -> Iterator[Any]:
        """Everything that stands in the code itself: arguments of operations and the structure that is returned."""
        todo: list[Any] = [self.output, *((op.args, dict(op.kwargs)) for op in self.operations)]
        while todo:
            value = todo.pop()
            if isinstance(value, (tuple, list)):
                todo += value
            elif isinstance(value, dict):
                todo += [*value.keys(), *value.values()]
            elif isinstance(value, slice):
                todo += [value.start, value.stop, value.step]
            elif not isinstance(value, Value):
                yield value

    def defaults(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the positional parameters, and of the keyword-only ones."""
        optional = [argument for argument in self.arguments if argument.optional]
        named = {a.name: a.default for a in optional if a.kind == Kind.KEYWORD_ONLY.name}
        return tuple(a.default for a in optional if a.name not in named), named


class _Signature(CodeGen):
    """Generates a forward whose parameters are of the original kinds."""

    def __init__(self, arguments: tuple[Argument, ...]) -> None:
        super().__init__()
        self.arguments = arguments

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        parameters = ["self"]
        kinds = [argument.kind for argument in self.arguments]
        for i, argument in enumerate(self.arguments):
            if argument.kind == Kind.KEYWORD_ONLY.name and Kind.KEYWORD_ONLY.name not in kinds[:i]:
                parameters.append("*")
            parameters.append(argument.name)
            if argument.kind == Kind.POSITIONAL_ONLY.name and Kind.POSITIONAL_ONLY.name not in kinds[i + 1 :]:
                parameters.append("/")
        return super().gen_fn_def(parameters, *args, **kwargs)


_LITERAL = frozenset({bool, int, str, type(None), torch.dtype, torch.device})


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with ``leaf`` applied to everything that is no tuple, list, dict or slice."""
    if isinstance(value, tuple):
        items = [mapped(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [mapped(item, leaf) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, leaf) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(item, leaf) for item in (value.start, value.stop, value.step)))
    return leaf(value)


def _own_name(function: Any) -> str:
    return f"{getattr(function, '__module__', None) or 'function'}.{getattr(function, '__qualname__', 'call')}"


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def check_name(name: Any) -> None:
    """Raise unless a text can be a name in generated code."""
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or iskeyword(name):
        raise EditError(f"{name!r:.60} is not a name")
    if name.startswith("__"):
        raise EditError(f"{name!r:.60} is a name of Python's own")
