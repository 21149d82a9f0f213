"""Tracing one unit: its forward runs once on proxies, and what it does beside its graph is noted or stops the trace.

A capture is believed only if running it is running the module. So a question about a value gets the answer that the
tensor would give (:mod:`passes.graph.answers`) or none; random functions are calls in the graph; and a forward that
writes attributes or enters a context is marked, since its code must stay. A module whose forward cannot be read
becomes one opaque call, and so does a function that cannot be read, as long as it is found by its global name.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import inspect
import itertools
import math
import sys
import traceback
import weakref
from collections.abc import Iterable
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.graph.answers import Answers
from passes.graph.call import Call, context
from passes.graph.errors import NotCapturedError, RejectedError, is_raised, refusal_of
from passes.graph.generators import states
from passes.graph.leaf import leaf_refusal, library_leaves
from passes.graph.looks import attributes_asked
from passes.graph.memory import shared_by, written_by
from passes.graph.methods import noting_methods
from passes.graph.nodes import is_constant, is_query
from passes.graph.opset import operation_of
from passes.graph.outside import Outside
from passes.graph.patches import INTERCEPTED, intercept_function, intercept_type, intercepting
from passes.graph.proxies import Held, Value, is_value
from passes.graph.questions import Questions
from passes.graph.structures import leaves, structure
from passes.graph.torch_calls import TorchCalls
from passes.refusal import Reason, Refusal

__all__ = ["Tracer"]


class Tracer(Questions):
    """Records what one module's forward does.

    Args:
        root: the module; nothing of it is changed that the caller's snapshot does not restore.
        leaves: ids of modules to be called as they are, each with the reason.
        inputs: example inputs of the root, for questions.
        given: values of arguments by name, instead of placeholders and defaults; ``...`` asks for a placeholder.
        numbers: whether the numbers of parameters may decide which way the code goes.
        careful: whether to look after each call for numbers drawn from Python's and NumPy's generators.
        outside: what the forwards can change outside of the root.
        forks: whether a question that not every size answers alike is answered by the first size; ``either`` has them.
        forced: answers to the first of these questions.
        known: functions that an earlier trace could not read.
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
        known: Iterable[Any] = (),
    ) -> None:
        super().__init__(root, Answers(self._attribute, root, inputs, numbers), forks=forks, forced=forced)
        self.outside = outside
        self.root, self.leaves, self.given, self.careful = root, leaves, given or {}, careful
        self.inputs = inputs
        self.leaf_types = tuple(t for t in library_leaves("get_notrace_modules") if isinstance(t, type))
        self.paths = {id(module): path for path, module in self._modules.items()}
        buffers, parameters = (_tensors(self._modules, table) for table in ("_buffers", "_parameters"))
        self._buffers = set(buffers.values())
        self.names = buffers | parameters
        self.graph = fx.Graph()
        self.calls: list[Call] = [self.current]
        self.opaque: dict[str, Refusal] = {}
        self.read_names: set[str] = set()
        self.constants: dict[str, Any] = {}
        self.kept: list[fx.Node] = []
        self.functions: set[Any] = {*_MATH, *filter(callable, library_leaves("get_notrace_functions")), *known}
        self._searched: set[int] = set()
        self.pinned: set[int] = set()
        self.handed: dict[str, Refusal] = {}
        self.looked: set[str] = set()
        """Plain attributes of layers that functions which are one call ask for."""
        self.written: set[tuple[int, str]] = set()
        """ids of modules and attributes that forwards set, or would."""
        self.left: list[fx.Node] = []
        """What somebody still holds when the forward is over, constants as well."""
        self._writes: list[tuple[nn.Module, str, Any]] = []
        self._alive: list[weakref.ref[Value]] = []
        self._constant_names: dict[int, str] = {}
        self._base: dict[fx.Node, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}

    # ---------------------------------------------------------------- the run

    def trace(self) -> fx.Graph:
        """Run the root's forward. Raises whatever it raises, if no opaque function can be made of the culprit."""
        # A forward that turns gradients off is seen to, whoever calls the verb.
        with torch.enable_grad(), intercepting(self), TorchCalls(self):
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
        self.left = [n for n in self._alive_nodes() if n.op not in ("placeholder", "get_attr")]
        end = self.graph.output(output if not escaped else (output, tuple(escaped)))
        end.meta["call"] = self.calls[0]
        self._forget_questions()
        return self.graph

    def _entry(self) -> Call:
        call = self.calls[0]
        call.args, call.kwargs, call.context = (), {}, context()
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
            call = Call(path, module, self.current, self._plain(args), self._plain(kwargs), None, context(), after=last)
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
        return self.leaves.get(id(module)) or leaf_refusal(module, self.leaf_types)

    def _reject(self, error: Exception) -> None:
        """Whether the code itself raises where a question is answered the other way: it does not take such sizes."""
        if self.forced and len(self.either) >= len(self.forced) and is_raised(error):
            raise RejectedError from error

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def _roll_back(self, last: fx.Node | None, count: int, path: str) -> None:
        self._pending = None
        self.either = [asked for asked in self.either if asked.call not in self.calls[count:]]
        self.truths = {node: told for node, told in self.truths.items() if told.call not in self.calls[count:]}
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
        found = self._function([frame for frame, _ in traceback.walk_tb(error.__traceback__)])
        if found is None:
            return False
        namespace, name, function, _ = found
        self.functions.add(function)
        intercept_function(namespace, name)
        return True

    def asking(self) -> Any:
        found = self._function([frame for frame, _ in traceback.walk_stack(sys._getframe())][::-1])
        if found is None:
            return None
        _, name, function, frame = found
        if function in self.functions:  # an earlier trace has made it one call
            self.stop(Reason.QUESTION, f"{name} asks for the truth of a value")
        held = [(local, v) for local, value in frame.f_locals.items() for v in leaves(value)]
        calls = any(isinstance(v, nn.Module) and attributes_asked(function, local, v) is None for local, v in held)
        return None if calls else function  # around layers that it may call, more is seen by the calls of a run

    def _function(self, frames: list[FrameType]) -> tuple[dict[str, Any], str, Any, FrameType] | None:
        """The outermost function in the running forward that is no call of its own yet, with its place and frame."""
        if isinstance(self.current.module, _ConvNd):
            return None  # a convolution that pads by a rule of its own is one layer
        start = max((i for i, f in enumerate(frames) if f.f_code is _RUN), default=-1)
        # What stands in a function's place may be there for another tracer, and is passed through.
        frames = [f for f in frames[start + 1 :] if f.f_code is not INTERCEPTED]
        for caller, frame in itertools.pairwise(frames):
            found = _global_function(caller, frame)
            if found is not None:
                namespace, name, function = found
                if function not in self.functions or not hasattr(namespace[name], "_reparam_original"):
                    return *found, frame
        return None

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
        return function in self.functions and any(map(self.is_value, leaves((args, kwargs))))

    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a function's call; modules among its arguments are called by code that nobody reads.

        A function that only asks one for plain attributes does not call it.
        """
        asked: dict[int, frozenset[str]] = {}
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if isinstance(value, nn.Module) and (names := attributes_asked(function, place, value)) is not None:
                asked[id(value)] = names
        for value in leaves((args, kwargs)):
            if isinstance(value, nn.Module) and id(value) not in asked:
                self.pinned |= {id(m) for m in value.modules()}
                if (path := self.paths.get(id(value))) is not None:
                    told = f"{getattr(function, '__name__', function)} is given it, and cannot be traced"
                    self.handed[path] = Refusal(Reason.UNTRACEABLE, told)
        made = self.create_proxy("call_function", function, args, kwargs)
        self.looked.update(*asked.values())
        for node in made.node.all_input_nodes:
            if node.op == "get_attr" and id(self._attribute(str(node.target))) in asked:
                node.meta["looked"] = True
        return made

    def call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_method", name, args, kwargs)

    # ---------------------------------------------------------------- nodes

    def proxy(self, node: fx.Node) -> Value:
        value = Value(node, self)
        self._alive.append(weakref.ref(value))
        return value

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        args, kwargs = self._by_place(kind, target, args, kwargs)
        node = self.graph.create_node(kind, target, args, kwargs, *rest, **named)
        node.meta["call"], node.meta["context"] = self.current, context()
        if node.meta["context"] != self.current.context:
            self.mark(Reason.CONTEXT, "its forward enters a context")
        if self.outside is not None and self.outside.small:  # what is set back before the call ends
            self._look_outside(self.current)
        module = self.called(node)
        operation = operation_of(node, module)
        changed = written_by(node, operation, module)
        shared = changed or shared_by(node, operation)
        base = self._base[node] = self._base.get(shared[0], shared[0]) if shared else node
        if changed and base.op == "get_attr" and not self._counts_batches():
            self.graph.erase_node(node)
            buffer = str(base.target) in self._buffers  # made to be kept from call to call
            self.stop(Reason.STATE if buffer else Reason.EFFECT, f"its forward writes into {base.target}")
        return node

    def _counts_batches(self) -> bool:
        return isinstance(self.current.module, _NormBase) and self.current.module.training

    def _by_place(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call with the tensors that it works on in their places, as everybody else writes them."""
        if not kwargs or kind not in ("call_function", "call_module"):
            return args, kwargs
        args, kwargs = tuple(args), dict(kwargs)
        if kind == "call_module":
            names = tuple(inspect.signature(self.root.get_submodule(target).forward).parameters)[:1]
        else:
            names = ("input", "tensors") if str(getattr(target, "__module__", "")).startswith("torch") else ()
        for name in names:
            if not args and name in kwargs:
                args = (kwargs.pop(name),)
        if len(args) == 1 and kind == "call_function" and names and "input" not in kwargs and "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        return args, kwargs

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if is_value(a):
            return self.own(a)
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

    def own(self, value: Value) -> fx.Node:
        node = value.node
        if value.tracer is not self and value.tracer.root is self.root and is_constant(node) and not node._erased:
            return self._again(value.tracer, node)  # kept from an earlier call, and the same in each
        if value.tracer is not self or node._erased:
            self.stop(Reason.STATE, "reads what an earlier call has left behind")
        return node

    def taken_over(self, value: Value) -> Value:
        """A value as one of this trace."""
        return value if value.tracer is self else Value(self.own(value), self)

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
        return structure(a, lambda each: self.own(each) if is_value(each) else each)

    # ---------------------------------------------------------------- what a forward does beside its graph

    def write(self, module: nn.Module, name: str, value: Any) -> None:
        """A forward sets an attribute of a module."""
        self.written.add((id(module), name))
        tables = (module.__dict__.get("_parameters", {}), module.__dict__.get("_buffers", {}))
        if any(name in table for table in tables):
            self.stop(Reason.STATE, f"its forward sets {self.paths.get(id(module), '')}.{name}".replace(" .", " "))
        if id(module) not in self.paths:
            return  # made in the forward
        self._writes.append((module, name, module.__dict__.get(name, ...)))
        self.mark(Reason.EFFECT, f"its forward sets the attribute {name}")
        self.kept += [v.node for v in leaves(value) if is_value(v)]

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
        if context() != self.current.context:
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
        return [node for node in self._alive_nodes() if _is_computed(node)]

    def _alive_nodes(self) -> list[fx.Node]:
        alive = [value.node for ref in self._alive if (value := ref()) is not None]
        return [node for node in alive if not node._erased]

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


def _tensors(modules: dict[str, nn.Module], table: str) -> dict[int, str]:
    """Names of the parameters or buffers of these modules by id: the first of each, as torch tells them."""
    found: dict[int, str] = {}
    for path, module in modules.items():
        for name, tensor in getattr(module, table).items():
            if tensor is not None:
                found.setdefault(id(tensor), f"{path}.{name}" if path else name)
    return found


def _wanted(root: nn.Module, given: dict[str, Any], inputs: Any) -> list[tuple[str, bool]]:
    """Name, and whether it goes by name, of the arguments that get a value."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty] or [p.name for p in positional[:1]]
    wanted = [p for p in positional if p.name in needed or p.name in given]
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
