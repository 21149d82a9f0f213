"""Hierarchical tracing: any model becomes a list of units, each a maximal part that torch.fx can read.

A unit is one flat graph whose nodes remember the module call they were made in, so that regions may cross module
boundaries and surgery can still edit the smallest module. When a module's forward cannot be traced, that module
becomes an opaque leaf, tracing goes on around it, and its children become units of their own. Modules that eval never
runs (auxiliary heads) are units too, so that no block is left behind.

Tracing leaves no mark: attributes that a forward sets (cached attention biases) and the random state are restored.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy

from passes.graph.methods import MethodCall, noting_methods
from passes.refusal import Reason, Refusal

__all__ = ["Call", "Unit", "call_of", "has_hooks", "inherits_forward", "join", "retrace", "trace_units"]


@dataclass(eq=False)
class Call:
    """One call of a module that was traced through: who was called, with what, and what came back."""

    path: str
    module: nn.Module
    parent: Call | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    methods: list[MethodCall] = field(default_factory=list)

    def chain(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(eq=False)
class Unit:
    """A traced part of a model: ``graph`` is flat, node targets are relative to ``root``."""

    path: str
    root: nn.Module
    graph: fx.Graph
    calls: list[Call]
    constants: dict[str, Any]
    opaque: dict[str, Refusal]
    pinned: set[int]
    """ids of modules that opaque code reaches as well: they must stay as they are."""
    read: set[str]
    """Tensors that the traced code reads itself, used or not; the modules that hold them must stay as they are."""

    def attribute(self, target: str) -> Any:
        """What a ``get_attr`` node reads."""
        if target in self.constants:
            return self.constants[target]
        value: Any = self.root
        for name in target.split("."):
            value = getattr(value, name)
        return value

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        return self.root.get_submodule(str(node.target))

    def name(self, node: fx.Node) -> str:
        """How a person finds this node: its layer's path in the model, and the operation where it is not a layer."""
        if node.op == "call_module":
            return join(self.path, str(node.target))
        if node.op == "get_attr":
            return join(self.path, str(node.target).rpartition(".")[0]) or "(model)"
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"{join(self.path, call_of(node).path) or '(model)'}:{target}"


def call_of(node: fx.Node) -> Call:
    """The module call whose forward made ``node``."""
    call = node.meta["call"]
    assert isinstance(call, Call)
    return call


def join(*parts: str) -> str:
    """Dotted path of the non-empty parts."""
    return ".".join(p for p in parts if p)


def has_hooks(module: nn.Module) -> bool:
    """Whether user code runs around this module's forward or backward; torch's own weight_norm is none."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name, {}).values()]
    return not all(hasattr(hook, "compute_weight") for hook in hooks)


def trace_units(model: nn.Module) -> tuple[list[Unit], list[Refusal]]:
    """All units of ``model``, outermost first, and what could not be traced.

    The model must be in eval mode. Nothing about it is changed.
    """
    units: list[Unit] = []
    untraced: list[Refusal] = []
    seen: set[int] = set()
    queue: list[tuple[str, nn.Module]] = [("", model)]
    with _no_mark(model):
        while queue:
            path, module = queue.pop(0)
            if id(module) in seen or not _worth_tracing(module):
                continue
            seen.add(id(module))
            if not _has_forward(module):
                queue += _children(path, module)
                continue
            try:
                unit = _trace_unit(path, module)
            # Any exception at all may come out of user code that runs on proxies; it becomes a refusal.
            except Exception as error:
                untraced.append(Refusal(Reason.UNTRACEABLE, _why(error), path))
                queue += _children(path, module)
                continue
            units.append(unit)
            untraced += [refusal.at(join(path, at)) for at, refusal in unit.opaque.items()]
            queue += _remaining(unit)
    return units, untraced


def retrace(unit: Unit) -> Unit:
    """A fresh graph of the same unit."""
    with _no_mark(unit.root):
        return _trace_unit(unit.path, unit.root)


def _trace_unit(path: str, root: nn.Module) -> Unit:
    tracer = _Tracer(root, set())
    graph = tracer.trace(root)
    counts = Counter(id(call.module) for call in tracer.calls)
    shared = {
        id(c.module) for c in tracer.calls if counts[id(c.module)] > 1 and next(c.module.parameters(), None) is not None
    }
    if shared:
        # A container with weights that is called twice is compiled once, as a unit of its own.
        tracer = _Tracer(root, shared)
        graph = tracer.trace(root)
    own = set(tracer.names.values())
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    constants = {target: _resolve(root, target) for target in read - own}
    leaves = [root.get_submodule(at) for at in tracer.opaque]
    pinned = {id(inner) for leaf in leaves for inner in leaf.modules() if inner is not leaf}
    return Unit(path, root, graph, tracer.calls, constants, tracer.opaque, pinned, tracer.read)


class _Tracer(fx.Tracer):
    """Records module calls, survives failing modules, and reads parameters in constant time."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, leaves: set[int]) -> None:
        functions = _library_leaves("get_notrace_functions")
        super().__init__(autowrap_functions=tuple(f for f in functions if callable(f)), param_shapes_constant=True)
        self.leaves = leaves
        self.leaf_types = tuple(t for t in _library_leaves("get_notrace_modules") if isinstance(t, type))
        self.names = {id(t): name for name, t in [*root.named_buffers(), *root.named_parameters()]}
        self.current = Call("", root, None)
        self.calls: list[Call] = [self.current]
        self.opaque: dict[str, Refusal] = {}
        self.read: set[str] = set()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with noting_methods(root, self.current.methods, lambda: self.graph):
            graph = super().trace(root, concrete_args)
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:  # read only to ask whether it is there
                graph.erase_node(node)
        outer = self.calls[0]
        outer.output = next(iter(reversed(graph.nodes))).args[0]
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for the arguments a caller must give; the others keep their defaults."""
        if "forward" in self.root.__dict__:  # replaced on the instance
            forward = self.root.forward
            root_fn = lambda _, *args: forward(*args)  # noqa: E731
            parameters = list(inspect.signature(forward).parameters.values())
        else:
            parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wanted = [p for p in positional if p.default is p.empty] or positional[:1]
        proxies = [self.create_proxy("placeholder", p.name, (), {}) for p in wanted]
        self.current.args = tuple(p.node for p in proxies)
        return root_fn, [self.root, *proxies]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["call"] = self.current
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor) and id(attr_val) in self.names:
            self.read.add(self.names[id(attr_val)])
            node = self.create_node("get_attr", self.names[id(attr_val)], (), {})
            if isinstance(attr_val, nn.Parameter):
                return ParameterProxy(self, node, self.names[id(attr_val)], attr_val)
            return self.proxy(node)
        return attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.leaves or has_hooks(m) or isinstance(m, torch.jit.ScriptModule):
            return True
        if isinstance(m, self.leaf_types) and not isinstance(m, _BASES):
            return True  # a norm that activates or a conv that standardises its weight is read through
        return super().is_leaf_module(m, module_qualified_name) or inherits_forward(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            plain = super().is_leaf_module(m, path) or inherits_forward(m)
            if not plain or has_hooks(m):
                reason = Reason.HOOK if has_hooks(m) else Reason.SHARED if id(m) in self.leaves else Reason.UNTRACEABLE
                message = reason.value if plain else "compiled on its own: " + _LEAF[reason]
                self.opaque[path] = Refusal(reason, message)
            return self.create_proxy("call_module", path, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        count = len(self.calls)
        given: Any = self.create_arg(args), self.create_arg(kwargs)
        call = Call(path, m, self.current, *given)
        self.calls.append(call)
        self.current = call
        try:
            with noting_methods(m, call.methods, lambda: self.graph):
                out = m.forward(*args, **kwargs)
            call.output = self.create_arg(out)
            return out
        # Any exception at all may come out of user code that runs on proxies; the module becomes a leaf.
        except Exception as error:
            why = _why(error)  # a message that shows a proxy makes a node of it, to be rolled back too
            self._roll_back(last)
            del self.calls[count:]
            for inside in [p for p in self.opaque if p.startswith(path + ".")]:
                del self.opaque[inside]
            self.opaque[path] = Refusal(Reason.UNTRACEABLE, why)
        finally:
            assert call.parent is not None
            self.current = call.parent
        return self.create_proxy("call_module", path, args, kwargs)

    def _roll_back(self, last: fx.Node | None) -> None:
        while (node := next(iter(reversed(self.graph.nodes)), None)) is not last:
            assert node is not None
            self.graph.erase_node(node)


_LEAF = {
    Reason.HOOK: "it has a hook",
    Reason.SHARED: "it is called more than once",
    Reason.UNTRACEABLE: "its library says that it cannot be traced",
}

_BASES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)


def inherits_forward(module: nn.Module) -> bool:
    """Whether a subclass of a torch layer computes just what that layer computes."""
    for base in _BASES:
        if isinstance(module, base) and "forward" not in module.__dict__:
            same = type(module).forward is base.forward
            return same and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)
    return False


def _library_leaves(which: str) -> list[Any]:
    """Timm's own list of what FX must not enter, when timm is loaded; a timm model implies that it is."""
    fx_module = sys.modules.get("timm.layers._fx")
    return list(getattr(fx_module, which)()) if fx_module is not None else []


def _why(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{Reason.UNTRACEABLE.value}: {type(error).__name__}: {text[0] if text else ''}"[:200]


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _worth_tracing(module: nn.Module) -> bool:
    """A single layer has nothing to fold with; a module without weights neither."""
    return next(module.parameters(), None) is not None and not (
        type(module).__module__.startswith("torch.nn.modules") and next(module.children(), None) is None
    )


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(join(path, name), child) for name, child in module.named_children()]


def _remaining(unit: Unit) -> list[tuple[str, nn.Module]]:
    """Inside of opaque leaves, and the outermost modules that this unit never called."""
    root, todo = unit.root, []
    called = {call.path for call in unit.calls}
    leaves = {str(n.target) for n in unit.graph.nodes if n.op == "call_module"}
    for at, refusal in unit.opaque.items():
        leaf = root.get_submodule(at)
        failed = refusal.reason is Reason.UNTRACEABLE and not refusal.message.startswith("compiled")
        todo += _children(join(unit.path, at), leaf) if failed else [(join(unit.path, at), leaf)]
    entered = {id(call.module) for call in unit.calls} | {id(root.get_submodule(at)) for at in leaves}
    above = {p.rsplit(".", i)[0] for p in called | leaves for i in range(1, p.count(".") + 1)}

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            at = join(path, name)
            if at in leaves and (at in unit.opaque or isinstance(child, _BASES)):
                continue
            if at in leaves:  # a container of torch, such as DataParallel
                todo.extend(_children(join(unit.path, at), child))
            elif at in called or at in above:
                visit(at, child)
            elif id(child) not in entered and not any(name.startswith(at + ".") for name in unit.read):
                # Not the same module under another name, nor one whose weights are used without it.
                todo.append((join(unit.path, at), child))

    visit("", root)
    return todo


def _resolve(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


@contextmanager
def _no_mark(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes and the random state; containers that a forward may fill included."""
    saved: list[tuple[nn.Module, dict[str, Any], list[tuple[Any, Any]]]] = []
    for module in model.modules():
        attributes = dict(module.__dict__)
        tables = [v for v in attributes.values() if isinstance(v, (dict, list, set))]
        # Most are empty tables of hooks; copying thousands of those costs more than the trace.
        saved.append((module, attributes, [(t, copy.copy(t) if t else None) for t in tables]))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, attributes, containers in saved:
            now = module.__dict__
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                now.clear()
                now.update(attributes)
            for container, content in containers:
                if container or content:
                    _refill(container, content or ())


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
