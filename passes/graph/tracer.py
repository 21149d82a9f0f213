"""Tracing one unit: its forward runs once on proxies, and what it does beside its graph is noted or stops the trace.

A capture is believed only if running it is running the module. So a question about a value gets the answer that the
tensor would give (:mod:`passes.graph.answers`) or none; random functions are calls in the graph; and a forward that
writes attributes or enters a context is marked, since its code must stay. A module whose forward cannot be read
becomes one opaque call, and so does a function that cannot be read, as long as it is found by its global name.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import functools
import gc
import inspect
import math
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from passes.graph.answers import Answers, DependsError, UnknownError
from passes.graph.generators import states
from passes.graph.memory import shared_by, written_by
from passes.graph.methods import MethodCall, noting_methods
from passes.graph.nodes import LAYERS, is_constant, is_query, surely_tensor
from passes.graph.opset import Kind, base_operation, operation_of, operation_of_layer
from passes.graph.outside import Outside
from passes.graph.patches import active, intercept_function, intercept_type, intercepting
from passes.graph.proxies import Attribute, Held, Value, is_value
from passes.graph.structures import structure
from passes.refusal import Reason, Refusal

__all__ = [
    "Call",
    "NotCapturedError",
    "RejectedError",
    "Tracer",
    "has_hooks",
    "inherits_forward",
    "is_based_on_layer",
    "refusal_of",
]


@dataclass(eq=False)
class Call:
    """One call of a module that was traced through: who was called, with what, and what came back."""

    path: str
    module: nn.Module
    parent: Call | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    context: Any = None
    methods: list[MethodCall] = field(default_factory=list)
    after: fx.Node | None = None
    """The last node before it."""

    def chain(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class NotCapturedError(Exception):
    """Code does what a graph cannot say; the module around it becomes one opaque call."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RejectedError(Exception):
    """The forward raises an error of its own."""


class Tracer(TracerBase):
    """Records what one module's forward does.

    Args:
        root: the module; nothing of it is changed that the caller's snapshot does not restore.
        leaves: ids of modules to be called as they are, each with the reason.
        inputs: example inputs of the root, for questions.
        given: values of arguments by name, instead of placeholders and defaults; ``...`` asks for a placeholder.
        numbers: whether the numbers of parameters may decide which way the code goes.
        careful: whether to look after each call for numbers drawn from Python's and NumPy's generators.
        outside: what the forwards can change outside of the root.
        forks: whether a question that not every size answers alike is answered by the first size; ``either`` has the
            calls that asked, and the answers.
        forced: answers to the first of these questions.
    """

    def __init__(
        self,
        root: nn.Module,
        leaves: dict[int, Refusal],
        *,
        inputs: tuple[Any, ...] | None = None,
        given: dict[str, Any] | None = None,
        numbers: bool = True,
        careful: bool = False,
        outside: Outside | None = None,
        forks: bool = False,
        forced: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.forks, self.forced = forks, forced
        self.either: list[tuple[Call, bool]] = []
        self.outside = outside
        self.root, self.leaves, self.given, self.careful = root, leaves, given or {}, careful
        self.inputs = inputs
        self.leaf_types = tuple(t for t in _library_leaves("get_notrace_modules") if isinstance(t, type))
        self._buffers = {name for name, _ in root.named_buffers()}
        self._modules = dict(root.named_modules())
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.names = {id(t): name for name, t in [*root.named_buffers(), *root.named_parameters()]}
        self.graph = fx.Graph()
        self.current = Call("", root, None, context=_context())
        self.calls: list[Call] = [self.current]
        self.opaque: dict[str, Refusal] = {}
        self.read_names: set[str] = set()
        self.constants: dict[str, Any] = {}
        self.fixed: dict[Call, Refusal] = {}
        self.kept: list[fx.Node] = []
        self.functions: set[Any] = {*_MATH, *filter(callable, _library_leaves("get_notrace_functions"))}
        self._searched: set[int] = set()
        self.pinned: set[int] = set()
        self.asked: set[int] = set()
        self.answers = Answers(self._attribute, root, inputs, numbers)
        self._asked: set[fx.Node] = set()
        self._writes: list[tuple[nn.Module, str, Any]] = []
        self._alive: list[weakref.ref[Value]] = []
        self._pending: Exception | None = None
        self._constant_names: dict[int, str] = {}
        self._base: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}

    # ---------------------------------------------------------------- the run

    def trace(self) -> fx.Graph:
        """Run the root's forward. Raises whatever it raises, if no opaque function can be made of the culprit."""
        with intercepting(self), _Functions(self):
            while True:
                call = self._entry()
                args, kwargs = self._arguments(call)
                try:
                    out = self._run(call, args, kwargs)
                    output = self.create_arg(out)
                    break
                except RejectedError:
                    raise
                # Any exception at all may come out of user code that runs on proxies.
                except Exception as error:
                    self._reject(error)
                    self._roll_back(None, 1, "")
                    self._unwrite(0)
                    if not self._make_opaque(error):
                        raise
                    del error
        del out, args, kwargs
        escaped = self._escaped()
        end = self.graph.output(output if not escaped else (output, tuple(escaped)))
        end.meta["call"] = self.calls[0]
        self._forget_questions()
        return self.graph

    def _entry(self) -> Call:
        call = self.calls[0]
        call.args, call.kwargs = (), {}
        call.methods.clear()
        self.fixed.pop(call, None)
        self.answers.placeholders.clear()
        self.answers.open.clear()
        return call

    def _arguments(self, call: Call) -> tuple[list[Any], dict[str, Any]]:
        """Placeholders for the arguments that a caller must give; the others keep their defaults."""
        args, kwargs = [], {}
        for name, named in _wanted(self.root, self.given, self.inputs):
            value = self.given.get(name, ...)
            if value is ...:
                value = self.create_proxy("placeholder", name, (), {})
                self.answers.placeholders.append(value.node)
                if name in self.given:
                    self.answers.open.add(value.node)
            if named:
                kwargs[name] = value
            else:
                args.append(value)
        call.args, call.kwargs = self._plain(tuple(args)), self._plain(kwargs)
        return args, kwargs

    def _run(self, call: Call, args: Any, kwargs: Any) -> Any:
        drawn = states() if self.careful else None
        self._look_outside(call.parent)
        self._search(getattr(call.module.forward, "__globals__", None))
        with noting_methods(call.module, call.methods, lambda: self.graph):
            out = call.module.forward(*args, **kwargs)
        if self._pending is not None:  # what a forward catches itself has sent it another way
            raise self._pending
        if drawn is not None and states() != drawn:
            raise NotCapturedError(Reason.RANDOM, Reason.RANDOM.value)
        self._check_context()
        self._look_outside(call)
        call.output = self._plain(out)
        return out

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module: one node for a leaf, else what its forward does."""
        if id(module) not in self.paths:
            if next(iter(module.state_dict()), None) is None:  # made in the forward, for its function alone
                return module.forward(*args, **kwargs)
            self.stop(Reason.UNTRACEABLE, f"calls a {type(module).__name__} that is none of its modules")
        path = self.paths[id(module)]
        self._check_context()
        if (why := self._leaf(module)) is not None:
            if why.message:
                self.opaque[path] = why
            return self.create_proxy("call_module", path, args, kwargs)
        while True:
            last, count, writes = self._last(), len(self.calls), len(self._writes)
            call = Call(
                path, module, self.current, self._plain(args), self._plain(kwargs), None, _context(), after=last
            )
            self.calls.append(call)
            self.current = call
            try:
                return self._run(call, args, kwargs)
            except RejectedError:
                raise
            # Any exception at all may come out of user code that runs on proxies; the module becomes a leaf.
            except Exception as error:
                self._reject(error)
                self._roll_back(last, count, path)
                self._unwrite(writes)
                if self._make_opaque(error):
                    continue
                self.opaque[path] = refusal_of(error)
                del error
            finally:
                assert call.parent is not None
                self.current = call.parent
            return self.create_proxy("call_module", path, args, kwargs)

    def _leaf(self, module: nn.Module) -> Refusal | None:
        """Why a module is one call in the graph; without a message for layers that the laws know."""
        if id(module) in self.leaves:
            return self.leaves[id(module)]
        plain = type(module) in LAYERS or inherits_forward(module)
        if has_hooks(module):
            told = Reason.HOOK.value if plain else "compiled on its own: it has a hook"
            return Refusal(Reason.HOOK, told)
        if plain:
            return Refusal(Reason.UNTRACEABLE, "")
        if isinstance(module, torch.jit.ScriptModule):
            return Refusal(Reason.UNTRACEABLE, "compiled on its own: it is a script")
        if isinstance(module, self.leaf_types) and not is_based_on_layer(module):
            # A norm that activates or a conv that standardises its weight is read through.
            return Refusal(Reason.UNTRACEABLE, "compiled on its own: its library says that it cannot be traced")
        return None

    def _reject(self, error: Exception) -> None:
        """Whether the code itself raises where a question is answered the other way: it does not take such sizes."""
        if self.forced and len(self.either) >= len(self.forced) and _is_raised(error):
            raise RejectedError from error

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _roll_back(self, last: fx.Node | None, count: int, path: str) -> None:
        self._pending = None
        self.either = [(call, answer) for call, answer in self.either if call not in self.calls[count:]]
        while (node := self._last()) is not last and node is not None:
            self.graph.erase_node(node)
        for call in self.calls[count:]:
            self.fixed.pop(call, None)
        del self.calls[count:]
        self.kept = [node for node in self.kept if not node._erased]
        for inside in [p for p in self.opaque if not path or p.startswith(path + ".")]:
            del self.opaque[inside]

    # ---------------------------------------------------------------- functions that cannot be read

    def _make_opaque(self, error: Exception) -> bool:
        """Make one call of the outermost function that the error came out of; False if there is none to be found."""
        if isinstance(error, NotCapturedError) and error.reason in (Reason.STATE, Reason.RANDOM):
            return False
        if isinstance(self.current.module, _ConvNd):
            return False  # a convolution that pads by a rule of its own is one layer
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        start = max((i for i, f in enumerate(frames) if f.f_code is _RUN), default=-1)
        for caller, frame in zip(frames[start + 1 :], frames[start + 2 :], strict=False):
            found = _global_function(caller, frame)
            if found is not None and found[2] not in self.functions:
                namespace, name, function = found
                self.functions.add(function)
                intercept_function(namespace, name)
                return True
        return False

    def _search(self, namespace: dict[str, Any] | None) -> None:
        """Intercept the functions under their global names that take no proxies (``from math import ceil``)."""
        if namespace is None or id(namespace) in self._searched:
            return
        self._searched.add(id(namespace))
        intercept_type(namespace)
        for name, value in list(namespace.items()):
            if type(value) in _FUNCTION_TYPES and value in self.functions:
                intercept_function(namespace, name)

    def wraps(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of this function is one node."""
        return function in self.functions and any(map(self.is_value, _leaves((args, kwargs))))

    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a function's call; modules among its arguments are called by code that nobody reads."""
        for value in _leaves((args, kwargs)):
            if isinstance(value, nn.Module):
                self.pinned |= {id(m) for m in value.modules()}
        return self.create_proxy("call_function", function, args, kwargs)

    def call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_method", name, args, kwargs)

    # ---------------------------------------------------------------- nodes

    def proxy(self, node: fx.Node) -> Value:
        value = Value(node, self)
        self._alive.append(weakref.ref(value))
        return value

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs, *rest, **named)
        node.meta["call"] = self.current
        if _context() != self.current.context:
            self.mark(Reason.CONTEXT, "its forward enters a context")
        if self.outside is not None and self.outside.small:  # what is set back before the call ends
            self._look_outside(self.current)
        module = self._called(node)
        operation = operation_of(node, module)
        changed = written_by(node, operation, module)
        shared = changed or shared_by(node, operation)
        base = self._base[node] = self._base.get(shared[0], shared[0]) if shared else node
        own = isinstance(self.current.module, _NormBase) and self.current.module.training  # it counts its batches
        if changed and base.op == "get_attr" and not own:
            self.graph.erase_node(node)
            buffer = str(base.target) in self._buffers  # made to be kept from call to call
            self.stop(Reason.STATE if buffer else Reason.EFFECT, f"its forward writes into {base.target}")
        return node

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind in (Value, Attribute, Held):
            return self._own(a)
        if isinstance(a, Tensor):
            return self.create_node("get_attr", self._name(a), (), {})
        if isinstance(a, nn.Module):
            path = self.paths.get(id(a))
            if path is None:
                self.stop(Reason.UNTRACEABLE, f"passes on a {type(a).__name__} that is none of its modules")
            return self.create_node("get_attr", path, (), {})
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_node("call_function", kind, tuple(self.create_arg(v) for v in a), {})
        if isinstance(a, dict) and kind is not dict:
            return self._rebuilt(a)
        return super().create_arg(a)

    def _rebuilt(self, a: dict[Any, Any]) -> Any:
        """A dictionary of a class of its own, as a call of its class."""
        kind = type(a)
        if kind.__module__.startswith("torch.fx"):
            return {k: self.create_arg(v) for k, v in a.items()}
        if dataclasses.is_dataclass(a):  # a library's ModelOutput
            return self.create_node("call_function", kind, (), {k: self.create_arg(v) for k, v in a.items()})
        if kind is collections.OrderedDict:
            return self.create_node("call_function", kind, ([(k, self.create_arg(v)) for k, v in a.items()],), {})
        self.stop(Reason.UNTRACEABLE, f"gives a {kind.__name__}, which cannot be made again")

    def _own(self, value: Value) -> fx.Node:
        node = value.node
        if value.tracer is not self and value.tracer.root is self.root and is_constant(node) and not node._erased:
            return self._again(value.tracer, node)  # kept from an earlier call, and the same in each
        if value.tracer is not self or node._erased:
            self.stop(Reason.STATE, "reads what an earlier call has left behind")
        return node

    def _again(self, other: Tracer, node: fx.Node) -> fx.Node:
        """A node of an earlier trace that depends on parameters only, computed again in this one."""
        if node not in self._copies:
            if node.op == "get_attr":
                self._copies[node] = self.create_arg(other._attribute(str(node.target)))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._again(other, n))
                self._copies[node] = self.create_node(node.op, node.target, args, kwargs)
        return self._copies[node]

    def _name(self, tensor: Tensor) -> str:
        """Where a tensor is found: a parameter, a buffer, a plain attribute, or a constant of the capture."""
        if id(tensor) in self.names:
            self.read_names.add(self.names[id(tensor)])
            return self.names[id(tensor)]
        if not self._constant_names:
            for path, module in self.root.named_modules():
                for name, value in vars(module).items():
                    if isinstance(value, Tensor):
                        self._constant_names[id(value)] = f"{path}.{name}" if path else name
                        self.constants[self._constant_names[id(value)]] = value
        if id(tensor) not in self._constant_names:
            number = len(self._constant_names)
            while hasattr(self.root, name := f"_constant_{number}"):
                number += 1
            self._constant_names[id(tensor)] = name
            self.constants[name] = tensor
        return self._constant_names[id(tensor)]

    def _attribute(self, target: str) -> Any:
        if target in self.constants:
            return self.constants[target]
        return functools.reduce(getattr, target.split("."), self.root)

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """A parameter, buffer or child that a forward asks a module for."""
        if isinstance(value, Tensor) and id(value) in self.names:
            self.read_names.add(self.names[id(value)])
            held = Held(self, self.create_node("get_attr", self.names[id(value)], (), {}), value)
            self._alive.append(weakref.ref(held))
            return held
        return value

    def _plain(self, a: Any) -> Any:
        """Arguments or results with nodes for values; nothing is added to the graph for their containers."""
        return structure(a, lambda each: self._own(each) if is_value(each) else each)

    # ---------------------------------------------------------------- what a forward does beside its graph

    def mark(self, reason: Reason, message: str) -> None:
        """The forward that runs now does something that no graph says: its code must stay."""
        self.fixed.setdefault(self.current, Refusal(reason, message))

    def write(self, module: nn.Module, name: str, value: Any) -> None:
        """A forward sets an attribute of a module."""
        tables = (module.__dict__.get("_parameters", {}), module.__dict__.get("_buffers", {}))
        if any(name in table for table in tables):
            self.stop(Reason.STATE, f"its forward sets {self.paths.get(id(module), '')}.{name}".replace(" .", " "))
        if id(module) not in self.paths:
            return  # made in the forward
        self._writes.append((module, name, module.__dict__.get(name, ...)))
        self.mark(Reason.EFFECT, f"its forward sets the attribute {name}")
        self.kept += [v.node for v in _leaves(value) if is_value(v)]

    def _look_outside(self, call: Call | None) -> None:
        """Mark the call whose code has run since this was last asked, if it has changed something elsewhere."""
        if self.outside is not None and self.outside.changed() and call is not None:
            told = "its forward changes something outside of the model"
            self.fixed.setdefault(call, Refusal(Reason.EFFECT, told))

    def _unwrite(self, count: int) -> None:
        """Take back what a forward has set that is now one opaque call."""
        while len(self._writes) > count:
            module, name, before = self._writes.pop()
            if before is ...:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

    def refuse_write(self, value: Value, name: str) -> None:
        what = f"{value.node.target}.{name}" if isinstance(value, Held) else f".{name} of a tensor"
        self.stop(Reason.EFFECT, f"its forward sets {what}")

    def enter_context(self, what: str) -> None:
        self.mark(Reason.CONTEXT, f"its forward enters {what}")

    def _check_context(self) -> None:
        if _context() != self.current.context:
            self.mark(Reason.CONTEXT, "its forward enters a context")

    def _escaped(self) -> list[fx.Node]:
        """Values that somebody still holds when the forward is over, in an attribute, a list or a closure."""
        if self._held():
            gc.collect()  # what only a cycle of garbage holds (frames of an error that was caught) is left by nobody
        escaped = dict.fromkeys([*(n for n in self.kept if _is_computed(n)), *self._held()])
        for node in escaped:
            call = node.meta["call"]
            for around in call.chain():
                self.fixed.setdefault(around, Refusal(Reason.EFFECT, "its forward leaves a value behind"))
        return list(escaped)

    def _held(self) -> list[fx.Node]:
        """Nodes of values that somebody still holds."""
        alive = [value.node for ref in self._alive if (value := ref()) is not None]
        return [node for node in alive if not node._erased and _is_computed(node)]

    # ---------------------------------------------------------------- questions

    def stop(self, reason: Reason, message: str) -> Any:
        """Stop tracing the forward that runs now, also if it catches what is raised here."""
        self._pending = NotCapturedError(reason, message)
        raise self._pending

    def refuse(self, what: str) -> Any:
        self.stop(Reason.QUESTION, f"a value {what}")

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def _is_tensor(self, node: fx.Node) -> bool:
        return surely_tensor(node, self._called)

    def _ask(self, value: Value, question: Callable[[Any], Any], what: str) -> Any:
        node = self._own(value)
        self._asked.add(node)
        if node.op == "placeholder" and what == "type":
            self.stop(Reason.INPUT_TYPE, Reason.INPUT_TYPE.value)
        if isinstance(self.current.module, _ConvNd) and self.current.parent is not None:
            # A convolution that pads by a rule of its own is one layer, whatever answer would suit some sizes.
            self.stop(Reason.QUESTION, f"asks for the {what} of a value")
        try:
            answer = self.answers.ask(node, question)
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

    def _either(self, answer: bool) -> bool:
        """An answer that some sizes give; the forward is traced with the other one as well."""
        number = len(self.either)
        answer = self.forced[number] if number < len(self.forced) else answer
        self.either.append((self.current, answer))
        return answer

    def to_bool(self, obj: Any) -> bool:
        return bool(self._ask(obj, _truth, "truth"))

    def length(self, value: Value) -> int:
        return int(self._ask(value, len, "length"))

    def number(self, value: Value, kind: type) -> Any:
        return self._ask(value, lambda v: _number(v, kind), "number")

    def text(self, value: Value, question: Callable[[Any], str]) -> str:
        """A value as text: mostly the message of an assertion that holds; but a forward may decide by it."""
        if active() is not self:
            return repr(value)
        try:
            return self.answers.ask(self._own(value), question)
        # The question may run any code of the network on fake tensors.
        except Exception:
            self.mark(Reason.QUESTION, "its forward makes text of a value")
            return repr(value)

    def hash_of(self, value: Value) -> int:
        """A number of dimensions is looked up in dictionaries; anything else is only itself."""
        rank = value.attr == "ndim" if isinstance(value, Attribute) else value.node.target == "dim"
        return hash(self._ask(value, int, "number")) if rank else object.__hash__(value)

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
        kind: type = self._ask(value, lambda v: Tensor if isinstance(v, Tensor) else type(v), "type")
        return kind

    def note_class_asked(self, module: nn.Module) -> None:
        """The code looks at the class of a module, which another in its place would not have."""
        self.asked.add(id(module))

    def has_attribute(self, value: Any, name: str) -> bool:
        if isinstance(value, Held) or self._is_tensor(value.node):
            return hasattr(_TENSOR, name)
        return bool(self._ask(value, lambda v: hasattr(v, name), "type"))

    def _forget_questions(self) -> None:
        """Drop nodes that nothing reads but questions that have been answered, and weights that were only looked at."""
        for node in reversed(self.graph.nodes):
            pure = node in self._asked or node.op == "get_attr"
            if node.users or node.op in ("placeholder", "output", "call_module") or not pure:
                continue
            if node.op != "get_attr" and written_by(node, operation_of(node), None):
                continue
            self._asked |= {n for n in node.all_input_nodes if is_query(n)}
            self.graph.erase_node(node)


def _is_computed(node: fx.Node) -> bool:
    return node.op != "placeholder" and not is_constant(node)


_RUN = Tracer._run.__code__
_MATH = tuple(f for name, f in vars(math).items() if callable(f) and not name.startswith("_"))
_FUNCTION_TYPES = (FunctionType, BuiltinFunctionType)
_TENSOR = torch.empty(0)


class _Functions(TorchFunctionMode):
    """Torch's functions as the traced code calls them: random ones become calls of the graph."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if active() is not self.tracer:
            return func(*args, **kwargs)
        values = [v for v in _leaves((args, kwargs)) if is_value(v)]
        if values:
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        if func in _RANDOM:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        if not self.tracer.careful:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            self.tracer.stop(Reason.RANDOM, f"draws random numbers: {getattr(func, '__name__', func)}")
        return result


_RANDOM = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.normal, torch.bernoulli, torch.multinomial, torch.poisson,
}  # fmt: skip


_INHERITED = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR, Kind.NORM)


def inherits_forward(module: nn.Module) -> bool:
    """Whether a subclass of torch's convolutions, linear layers or norms computes just what its base computes."""
    operation = operation_of_layer(module)
    return operation is not None and operation.kind in _INHERITED


def is_based_on_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, linear layer or norm of torch, or of a class derived from one."""
    operation = base_operation(module)
    return operation is not None and operation.kind in _INHERITED


def has_hooks(module: nn.Module) -> bool:
    """Whether user code runs around this module's forward or backward; torch's own weight_norm is none."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name, {}).values()]
    return not all(hasattr(hook, "compute_weight") for hook in hooks)


def _wanted(root: nn.Module, given: dict[str, Any], inputs: Any) -> list[tuple[str, bool]]:
    """Name, and whether it goes by name, of the arguments that get a value."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = [p for p in positional if p.default is p.empty or p.name in given] or positional[:1]
    found = [(p.name, positional[i] is not p) for i, p in enumerate(wanted)]  # behind one that keeps its default
    if not positional and (rest := next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)):
        found = [(f"{rest}_{i}" if i else rest, False) for i in range(1 if inputs is None else len(inputs))]
    named = (p for p in parameters if p.kind is p.KEYWORD_ONLY)
    return found + [(p.name, True) for p in named if p.default is p.empty or p.name in given]


def _global_function(caller: FrameType, frame: FrameType) -> tuple[dict[str, Any], str, Any] | None:
    """Where the function that runs in ``frame`` is found by a global name of the code that called it."""
    names = caller.f_code.co_names
    spaces = [caller.f_globals, *(vars(v) for n in names if isinstance(v := caller.f_globals.get(n), type(sys)))]
    for space in spaces:
        for name in names:
            value = space.get(name)
            function = getattr(value, "_reparam_original", value)
            if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                return space, name, function
    return None


def refusal_of(error: Exception) -> Refusal:
    """Why a module is not read, with the place in its code."""
    text = str(error).strip().splitlines()
    reason = error.reason if isinstance(error, NotCapturedError) else Reason.UNTRACEABLE
    at = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if _is_theirs(f.filename)), None)
    where = f" ({at.filename.rpartition('/')[2]}:{at.lineno})" if at is not None else ""
    if isinstance(error, NotCapturedError):
        return Refusal(reason, f"{text[0] if text else reason.value}{where}"[:240])
    return Refusal(reason, f"{reason.value}: {type(error).__name__}: {text[0] if text else ''}"[:200] + where)


def _is_raised(error: Exception) -> bool:
    """Whether code of a person raises this, or asserts what does not hold."""
    if isinstance(error, NotCapturedError) or error.__traceback__ is None:
        return False
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    frame = at.tb_frame
    if frame.f_code is torch._assert.__code__:
        return True
    return _is_theirs(frame.f_code.co_filename) and dis.opname[frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"


def _is_theirs(filename: str) -> bool:
    return "/torch/" not in filename and "/passes/graph/" not in filename and not filename.startswith("<frozen")


def _context() -> tuple[Any, ...]:
    """What a context manager of torch may have changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )


def _library_leaves(which: str) -> list[Any]:
    """Timm's own list of what FX must not enter, when timm is loaded; a timm model implies that it is."""
    fx_module = sys.modules.get("timm.layers._fx")
    return list(getattr(fx_module, which)()) if fx_module is not None else []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list, set)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step))
    else:
        yield value


def _truth(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UnknownError("a tensor of several elements")
    return bool(value)


def _number(value: Any, kind: type) -> Any:
    return kind(value)
