"""The edits that the compilers make to a model, as plain data; :mod:`passes.edits.apply` carries them out.

``collapse`` emits ``Replace``, ``Remove``, ``Add``, ``Delete``, ``Clear``, ``Rewrite`` and ``Settle``; with ``like=``,
``Replace`` for what goes back into the places of blocks; ``expand`` emits ``Block`` and ``Remove``. Numbers are no part
of an edit: new layers come with theirs, or are made without any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from passes.edits.layer import Layer
from passes.edits.program import Program, check_name

__all__ = [
    "Add", "Block", "Clear", "Delete", "Edit", "Fill", "Remove", "Replace", "Rewrite", "Settle",
    "Substitute",
]  # fmt: skip


@dataclass(frozen=True)
class Replace:
    """Put a stock layer in the place of the module at ``path``."""

    path: str
    layer: Layer

    def __str__(self) -> str:
        return f"replace {self.path} by {self.layer}"


@dataclass(frozen=True)
class Remove:
    """Leave the identity in the place of the module at ``path``, or the part of it that goes on.

    Args:
        path: of a module that is called in its place: its parent's code stays.
        leaving: names of its children that go on, in order.
        keeping: names of its tensors that other code reads.
        program: what goes on where that is no chain of children.
        answering: whether what stays answers as a batch norm that changes nothing: a library that folds this norm once
            more (``fuse()``) reads its statistics, and gets the layer before it back.
        into: path of the block that a batch norm is part of from now on, where what stays does not answer as one.
    """

    path: str
    leaving: tuple[str, ...] = ()
    keeping: tuple[str, ...] = ()
    program: Program | None = None
    answering: bool = False
    into: str = ""

    def __str__(self) -> str:
        names = self.leaving
        if self.program is not None:
            names = tuple(op.target.rpartition(".")[2] for op in self.program.operations if op.op != "get_attr")
        left = f", leaving {', '.join(names)}" if names else ""
        return f"remove {self.path}{left}" + (f", keeping its {', '.join(self.keeping)}" if self.keeping else "")


@dataclass(frozen=True)
class Add:
    """Give a module a new child, which its rewritten forward calls."""

    path: str
    layer: Layer

    def __str__(self) -> str:
        return f"add {self.path}: {self.layer}"


@dataclass(frozen=True)
class Fill:
    """Give a convolution of a class of its own the numbers and the geometry of a stock one, for a new forward."""

    path: str
    layer: Layer

    def __str__(self) -> str:
        return f"fill {self.path} with {self.layer}"


@dataclass(frozen=True)
class Delete:
    """Take a child that nothing calls any more away from its parent."""

    path: str

    def __str__(self) -> str:
        return f"delete {self.path}"


@dataclass(frozen=True)
class Clear:
    """Set a parameter or buffer that nothing reads any more to None."""

    path: str

    def __str__(self) -> str:
        return f"clear {self.path}"


@dataclass(frozen=True)
class Rewrite:
    """Give the module at ``path`` a new forward; an empty path is the model itself.

    Args:
        path: of the module.
        program: what it computes from now on.
        method: the method that does, where the forward hands its work on.
        folded: names of its children that are no longer what they were.
    """

    path: str
    program: Program
    method: str = "forward"
    folded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.method)

    def __str__(self) -> str:
        what = "the forward" if self.method == "forward" else self.method
        return f"rewrite {what} of {self.path or 'the model'}"


@dataclass(frozen=True)
class Settle:
    """Let methods of the module at ``path`` do nothing and return it: what they would fold and delete is folded.

    Args:
        path: of the module.
        methods: their names.
    """

    path: str
    methods: tuple[str, ...]

    def __post_init__(self) -> None:
        for method in self.methods:
            check_name(method)

    def __str__(self) -> str:
        return f"let {', '.join(self.methods)} of {self.path or 'the model'} return it as it is"


@dataclass(frozen=True)
class Block:
    """Put a training block in the place of a convolution.

    Args:
        path: of the convolution.
        block: the block's name.
        options: its options, by name.
        form: how it trains.
        preserve: whether it begins as the function that it replaces.
        norm: path of the batch norm behind the convolution, empty without one.
        rest: names of that norm's children that run after it.
        norms: whether added branches may have batch norms.
    """

    path: str
    block: str
    options: tuple[tuple[str, Any], ...] = ()
    form: str = "branches"
    preserve: bool = True
    norm: str = ""
    rest: tuple[str, ...] = ()
    norms: bool = True

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"replace {self.path} by the block {self.block}" + (f"({options})" if options else "")


@dataclass(frozen=True)
class Substitute:
    """In a graph of calls, compute one value from another by one layer.

    Args:
        path: name of the value, which it keeps.
        source: name of the value that it is computed from.
        layer: the layer.
        gone: names of the calls that are no longer made.
        weight, bias: names of the layer's numbers in the state dict; without bias: empty.
        moved: name of the value that the layer's becomes by operations that stay, if there are any between the layer
            and the end of what goes.
        end: name of the value that is this one from now on.
        ahead: whether that stood in front of the layer: the value that is read instead keeps its own name.
    """

    path: str
    source: str
    layer: Layer
    gone: tuple[str, ...]
    weight: str
    bias: str = ""
    moved: str = ""
    end: str = ""
    ahead: bool = False

    def __str__(self) -> str:
        return f"compute {self.path} from {self.source} by {self.layer}"


Edit = Replace | Remove | Add | Fill | Delete | Clear | Rewrite | Settle | Block | Substitute
