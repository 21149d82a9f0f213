"""What flows through a forward while it is traced: values that answer as the tensors that they stand for.

Python puts some questions to the object itself: its truth, its length, its members, an attribute that only some types
have. The tracer answers them where it can (:mod:`passes.graph.answers`) and stops the trace where it cannot.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Attribute", "Held", "Value", "is_value"]

_TENSOR_NAMES = frozenset(dir(Tensor))
_OWN = frozenset(("tracer", "node", "root", "attr", "_node", "tensor"))


class Value(fx.Proxy):
    """A value that depends on an input, or on what a forward must compute anew in each call."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name not in _TENSOR_NAMES and self.tracer.lacks(self, name)):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name == "grad_fn":  # it is compared with None, of which Python does not tell
            self.tracer.refuse("is asked for what made it")
        return Shape(self, name) if name == "shape" else Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            self.tracer.refuse_write(self, name)
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        count = _unpacked(sys._getframe(1))
        if count is None:
            count = self.tracer.length(self)
        return iter([self[i] for i in range(count)])  # type: ignore[index]

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def __index__(self) -> int:
        return int(self.tracer.number(self, int))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.number(self, float))

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, other), {})

    def __rdivmod__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (other, self), {})

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.contains(self, item))

    def __array__(self, *args: Any) -> Any:
        self.tracer.refuse("is turned into a NumPy array")

    def __deepcopy__(self, memo: Any) -> Value:
        return self

    def __repr__(self) -> str:  # never makes a node: an error's text is read after its nodes are gone
        return "a value of the forward"

    def __str__(self) -> str:
        return str(self.tracer.text(self, str))

    def __format__(self, spec: str) -> str:
        if _is_only_told(sys._getframe(1)):
            return repr(self)
        return str(self.tracer.text(self, lambda v: format(v, spec)))

    def __hash__(self) -> int:
        return int(self.tracer.hash_of(self))

    def keys(self) -> Any:
        return Attribute(self, "keys")()


class Attribute(Value):
    """An attribute that was asked for; a node only once it is used, since most are methods that are called."""

    def __init__(self, root: Value, attr: str) -> None:
        self.root, self.attr, self.tracer = root, attr, root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        assert isinstance(self._node, fx.Node)
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.call_method(self.attr, (self.root, *args), kwargs)


@Sequence.register
class Shape(Attribute):
    """The sizes of a value: what ``match`` takes for a sequence."""


class Held(Value):
    """A parameter or buffer; its shape is that of the tensor, as a number."""

    tensor: Tensor

    def __init__(self, tracer: Any, node: fx.Node, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.tensor.size() if dim is None else self.tensor.size(dim)

    def dim(self) -> int:
        return self.tensor.dim()

    def numel(self) -> int:
        return self.tensor.numel()

    nelement = numel

    def __len__(self) -> int:
        return len(self.tensor)


def is_value(value: Any) -> bool:
    """Whether this is a value of a trace."""
    return type(value) in _KINDS


_KINDS = frozenset((Value, Attribute, Shape, Held))


def _augmented(name: str) -> Any:
    target = getattr(operator, name)

    def change(self: Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return change


# ``y += 1`` changes the tensor that all of y's names stand for; without these Python would make y = y + 1 of it.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Value, f"__{_name}__", _augmented(_name))


def _unpacked(frame: Any) -> int | None:
    """How many names the code that iterates unpacks into, None if it does anything else."""
    code = frame.f_code.co_code
    at = frame.f_lasti
    return int(code[at + 1]) if dis.opname[code[at]] == "UNPACK_SEQUENCE" else None


@functools.cache
def _instructions(code: CodeType) -> tuple[dict[int, int], list[dis.Instruction]]:
    """The instructions of a function, and the place of each by its offset."""
    found = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL", "KW_NAMES")]
    return {instruction.offset: place for place, instruction in enumerate(found)}, found


def _is_only_told(frame: FrameType) -> bool:
    """Whether text that is being made is given to a call whose result nobody takes, as an assertion's message is.

    It then decides nothing of what is returned, and what such a call changes is seen by itself. The code is followed
    from the value to the end of its f-string, by how many values lie above it on the stack.
    """
    places, code = _instructions(frame.f_code)
    if frame.f_lasti not in places or not code[places[frame.f_lasti]].opname.startswith("FORMAT"):
        return False
    at, above = places[frame.f_lasti] + 1, 0
    while at + 1 < len(code):
        instruction = code[at]
        name, argument = instruction.opname, instruction.arg
        if name == "BUILD_STRING" and (argument or 0) > above:
            at, above = at + 1, 0
            break
        if above == 0 and name.startswith("CALL"):
            break
        if "JUMP" in name or name.startswith(("FOR_", "RETURN", "YIELD", "STORE", "COMPARE", "IS_", "CONTAINS")):
            return False
        above += dis.stack_effect(instruction.opcode, argument)
        if above < 0:
            return False
        at += 1
    if (
        at + 1 < len(code)
        and code[at].opname == "LOAD_CONST"
        and code[at + 1].opname in ("CALL_FUNCTION_KW", "CALL_KW")
    ):
        at += 1  # the names of keyword arguments
    return at + 1 < len(code) and code[at].opname.startswith("CALL") and code[at + 1].opname == "POP_TOP"
