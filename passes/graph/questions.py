"""What traced code asks about its values: answered as the tensor would, or the trace stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.nn.modules.conv import _ConvNd

from passes.graph.answers import Answers, DependsError, UnknownError
from passes.graph.call import Call, context
from passes.graph.errors import NotCapturedError
from passes.graph.memory import shared_by, written_by
from passes.graph.nodes import surely_tensor
from passes.graph.opset import is_torch, operation_of
from passes.graph.patches import active
from passes.graph.proxies import Held, Value, is_value
from passes.graph.walk import named_of
from passes.refusal import Reason, Refusal

__all__ = ["Asked", "Questions"]

_TENSOR = torch.empty(0)


@dataclass(frozen=True)
class Told:
    """The truth of an argument that a caller may give, who asked for it first, and how often it was used by then."""

    call: Call
    answer: bool
    users: int


@dataclass(frozen=True)
class Asked:
    """A question that not every size answers alike: the call that asked, the answer, and the function, if one asked."""

    call: Call
    answer: bool
    function: Any


class Questions(TracerBase):
    """The part of a tracer that answers.

    Args:
        root: the module that is traced.
        answers: what is known of the values.
        forks: whether a question that not every size answers alike is answered by the first size; ``either`` has them.
        forced: answers to the first of these questions.
    """

    def __init__(
        self, root: nn.Module, answers: Answers, *, forks: bool = False, forced: tuple[bool, ...] = ()
    ) -> None:
        super().__init__()
        self.answers, self.forks, self.forced = answers, forks, forced
        self.either: list[Asked] = []
        self.truths: dict[fx.Node, Told] = {}
        self.current = Call("", root, None, context=context())
        self.fixed: dict[Call, Refusal] = {}
        self.asked: set[int] = set()
        self._modules = dict(named_of(root))
        self._asked: set[fx.Node] = set()
        self._pending: Exception | None = None

    def own(self, value: Value) -> fx.Node:
        """The node of a value, which has to be one of this trace."""
        raise NotImplementedError

    def mark(self, reason: Reason, message: str) -> None:
        """The forward that runs now does something that no graph says: its code must stay."""
        self.fixed.setdefault(self.current, Refusal(reason, message))

    def stop(self, reason: Reason, message: str) -> Any:
        """Stop tracing the forward that runs now, also if it catches what is raised here."""
        self._pending = NotCapturedError(reason, message)
        raise self._pending

    def asking(self) -> Any:
        """The outermost function that the forward which runs now is in, and that can be made one call; else None."""
        raise NotImplementedError

    def refuse(self, what: str) -> Any:
        self.stop(Reason.QUESTION, f"a value {what}")

    def called(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def _is_tensor(self, node: fx.Node) -> bool:
        return surely_tensor(node, self.called)

    def _ask(self, value: Value, question: Callable[[Any], Any], what: str) -> Any:
        node = self.own(value)
        self._asked.add(node)
        if what in ("truth", "type") and self.forks and self.answers.is_open(node):
            if what != "truth" or node.op != "placeholder":
                return self._either(False)
            # An argument that nothing can have changed since has the truth that it had.
            told = self.truths.get(node)
            if told is None or (told.users != len(node.users) and not all(self._only_reads(u) for u in node.users)):
                told = self.truths[node] = Told(self.current, self._either(False), len(node.users))
            return told.answer
        if node.op == "placeholder" and what in ("type", "class"):
            self.stop(Reason.INPUT_TYPE, Reason.INPUT_TYPE.value)
        if isinstance(self.current.module, _ConvNd) and self.current.parent is not None:
            # A convolution that pads by a rule of its own is one layer, whatever answer would suit some sizes.
            self.stop(Reason.QUESTION, f"asks for the {what} of a value")
        try:
            answer = self.answers.ask(node, question, of_type=what in ("type", "class"))
        except DependsError as error:
            if type(error.answer) is not bool or what != "truth" or not self.forks:
                self.stop(Reason.QUESTION, f"asks for the {what} of a value: {error}")
            return self._either(error.answer)
        except UnknownError as error:
            self.stop(Reason.QUESTION, f"asks for the {what} of a value: {error}")
        # The question may run any code of the network on fake tensors.
        except Exception as error:
            self.stop(Reason.QUESTION, f"asks for the {what} of a value: {type(error).__name__}: {error}")
        return answer

    def _only_reads(self, node: fx.Node) -> bool:
        """Whether an operation is torch's, and neither changes what it is given nor hands that on to who might."""
        module = self.called(node)
        operation = operation_of(node, module)
        known = operation is not None or is_torch(node)
        return known and not written_by(node, operation, module) and not shared_by(node, operation)

    def _either(self, answer: bool) -> bool:
        """An answer that some sizes give; the forward is traced with the other one as well."""
        number = len(self.either)
        answer = self.forced[number] if number < len(self.forced) else answer
        self.either.append(Asked(self.current, answer, self.asking()))
        return answer

    def to_bool(self, obj: Any) -> bool:
        return bool(self._ask(obj, _truth, "truth"))

    def length(self, value: Value) -> int:
        return int(self._ask(value, len, "length"))

    def number(self, value: Value, kind: type) -> Any:
        return self._ask(value, lambda v: _number(v, kind), "number")

    def text(self, value: Value, question: Callable[[Any], str]) -> str:
        """A value as text: mostly the message of an assertion that holds; but a forward may decide by it."""
        tracing: object = active()
        if tracing is not self:
            return repr(value)
        try:
            return self.answers.ask(self.own(value), question)
        # The question may run any code of the network on fake tensors.
        except Exception:
            self.mark(Reason.QUESTION, "its forward makes text of a value")
            return repr(value)

    def hash_of(self, value: Value) -> int:
        """What sets and dictionaries look for: a tensor is only itself, a size or a dtype is its number."""
        given = value.node.op == "placeholder" and value.node not in self.answers.open
        if given or isinstance(value, Held) or self._is_tensor(self.own(value)):
            return object.__hash__(value)
        found = self._ask(value, lambda v: None if isinstance(v, Tensor) else hash(v), "hash")
        return object.__hash__(value) if found is None else int(found)

    def dtype(self, value: Value) -> torch.dtype:
        found: torch.dtype = self._ask(value, lambda v: v, "dtype")
        return found

    def mode(self, now: bool) -> bool:
        """Whether gradients, autocast or inference mode are on, which a caller decides anew for every call."""
        if not self.forks:
            self.stop(Reason.QUESTION, "asks for the mode that it is called in")
        return self._either(now)

    def contains(self, value: Value, item: Any) -> bool:
        if is_value(item):
            self.refuse("is looked for in another")
        return bool(self._ask(value, lambda v: item in v and not isinstance(v, Tensor), "members"))

    def lacks(self, value: Value, name: str) -> bool:
        """Whether a value is known to be a tensor, which has no such attribute."""
        if isinstance(value, Held) or self._is_tensor(value.node):
            return True
        if value.node.op == "placeholder":
            return False
        try:
            return not self.answers.ask(value.node, lambda v: hasattr(v, name))
        # Any code of the network may run, on fake tensors; where it fails nothing is known.
        except Exception:
            return False

    def is_value(self, value: Any) -> bool:
        return is_value(value)

    def is_instance(self, value: Any, kinds: Any) -> bool:
        if isinstance(value, Held) or self._is_tensor(value.node):
            return isinstance(_TENSOR, kinds)
        return bool(self._ask(value, lambda v: isinstance(v, kinds), "type"))

    def type_of(self, value: Any) -> type:
        if isinstance(value, Held):
            return type(value.tensor)
        if self._is_tensor(value.node):
            return Tensor
        kind: type = self._ask(value, lambda v: Tensor if isinstance(v, Tensor) else type(v), "class")
        return kind

    def note_class_asked(self, module: nn.Module) -> None:
        """The code looks at the class of a module, which another in its place would not have."""
        self.asked.add(id(module))

    def has_attribute(self, value: Any, name: str) -> bool:
        if isinstance(value, Held) or self._is_tensor(value.node):
            return hasattr(_TENSOR, name)
        return bool(self._ask(value, lambda v: hasattr(v, name), "type"))


def _truth(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UnknownError("a tensor of several elements")
    return bool(value)


def _number(value: Any, kind: type) -> Any:
    return kind(value)
