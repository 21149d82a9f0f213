"""Answers to what a forward asks about its values while it is traced.

A question about a value that depends on parameters only is answered by the value. One that depends on an input is put
to fake tensors (shapes, dtypes, devices, no numbers) of several sizes and batches, and the answer is taken only if it
is always the same. If sizes enter the question it is put once more with symbols for all sizes, and has to be answered
without a condition on them. Nothing is computed before something is asked.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves, tree_map

from passes.graph.inputs import likely_shapes
from passes.graph.leaf import inherits_forward
from passes.graph.nodes import LAYERS, may_draw
from passes.graph.opset import operation_of
from passes.graph.patches import suspended

__all__ = ["Answers", "DependsError", "UnknownError"]

Answer = TypeVar("Answer")

Example = tuple[Any, ...]
"""One value for each placeholder, as a caller might give them."""


class UnknownError(ValueError):
    """No answer: the value is not known, or the answer is not always the same."""


class DependsError(UnknownError):
    """The answer is not the same for every size; ``answer`` is that for the first one tried."""

    def __init__(self, answer: Any, message: str) -> None:
        super().__init__(message)
        self.answer = answer


class Answers:
    """What is known of the values of one graph.

    Args:
        attribute: what a ``get_attr`` node reads.
        root: the module that ``call_module`` nodes are relative to.
        inputs: what a caller gave as example inputs, or None: they are made up.
        numbers: whether the numbers of parameters may decide; not while training, which changes them.
    """

    def __init__(self, attribute: Callable[[str], Any], root: nn.Module, inputs: Example | None, numbers: bool) -> None:
        self.attribute, self.root, self.inputs, self.numbers = attribute, root, inputs, numbers
        self.placeholders: list[fx.Node] = []
        self.open: set[fx.Node] = set()
        """Placeholders of which nothing is known, not even that a tensor is given."""
        self._constants: dict[fx.Node, Any] = {}
        self._bases: list[list[_Run]] | None = None
        self._symbolic: _Run | None = None
        self._unsure: set[fx.Node] = set()
        self._brought: dict[fx.Node, frozenset[torch.device] | None] = {}

    def ask(self, node: fx.Node, question: Callable[[Any], Answer], *, of_type: bool = False) -> Answer:
        """What ``question`` gives for the value of ``node``. Raises :class:`UnknownError`.

        With ``of_type`` it is asked what kind of thing the value is: what an operation returns is of one type, so that
        the sizes that are tried are enough.
        """
        needed = _needed(node)
        if not self.open.isdisjoint(needed):
            raise UnknownError("it depends on an optional argument")
        with suspended(), torch.no_grad(), _unlogged():
            if self._is_constant(needed):
                return question(_evaluate(self._constants, needed, self.attribute, self.root))
            if told := _OF_THE_CALLER.intersection(map(_asked_for, needed)):
                raise DependsError("is_leaf" in told or "is_contiguous" in told, "the answer depends on the caller")
            device = self._device(needed)
            return self._agreed(needed, question, of_type) if device is None else question(device)

    def is_open(self, node: fx.Node) -> bool:
        """Whether a value depends on an argument of which nothing is known."""
        return bool(self.open) and not self.open.isdisjoint(_needed(node))

    def _device(self, needed: Sequence[fx.Node]) -> torch.device | None:
        """The device of a tensor, if that is asked for and nothing on the way could have taken it to another.

        Code that keeps something for each device asks in every layer, and to run all that lies before takes long.
        """
        *way, last = needed
        if last.target is not getattr or last.args[1] != "device":
            return None
        found = set(self._home)
        for node in way:
            if (brought := self._brings(node)) is None:
                return None
            found |= brought
        return found.pop() if len(found) == 1 else None

    @functools.cached_property
    def _home(self) -> frozenset[torch.device]:
        """The devices of the module's tensors and of the example inputs."""
        given = [v for v in tree_leaves(self.inputs) if isinstance(v, Tensor)]
        return frozenset(t.device for t in (*self.root.parameters(), *self.root.buffers(), *given))

    def _brings(self, node: fx.Node) -> frozenset[torch.device] | None:
        """Devices beside those of what a node reads that its value may be on; None where it might be any."""
        if node not in self._brought:
            self._brought[node] = self._devices_of(node)
        return self._brought[node]

    def _devices_of(self, node: fx.Node) -> frozenset[torch.device] | None:
        if node.op == "get_attr":
            return frozenset(v.device for v in tree_leaves(self.attribute(str(node.target))) if isinstance(v, Tensor))
        if node.op == "call_module":
            keeps = all(map(_stays_on_its_device, self.root.get_submodule(str(node.target)).modules()))
        elif node.op == "placeholder" or node.target is getattr:
            keeps = True
        else:
            named = any(isinstance(v, (torch.device, str)) for v in tree_leaves((node.args, node.kwargs)))
            known = operation_of(node) is not None or node.target is operator.getitem
            keeps = known and bool(node.all_input_nodes) and not named and node.target not in _MOVES
        return frozenset() if keeps else None

    def _is_constant(self, needed: Sequence[fx.Node]) -> bool:
        reads_numbers = self.numbers or all(n.op != "get_attr" for n in needed)
        return reads_numbers and all(
            n.op != "placeholder" and (n.op == "get_attr" or (n.args and not may_draw(n, operation_of(n))))
            for n in needed
        )

    def _agreed(self, needed: Sequence[fx.Node], question: Callable[[Any], Answer], of_type: bool) -> Answer:
        why, reached = "no input can be made up", False
        sizes = _asks_for_sizes(needed[-1])
        for runs in self._made_up():
            answers: list[Any] = []
            for run in runs if sizes else [*runs[:2], *([runs[0].under_autocast()] if _asks_for_dtype(needed) else ())]:
                at = False
                try:
                    value = run.value(needed)
                    at = True
                    answers.append(question(value))
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise UnknownError("the answer depends on the numbers of the input") from error
                # Whatever the network raises on this size means that it does not take it.
                except Exception as error:
                    if at or not reached:  # where the network takes the size, the answer itself is what fails
                        why, reached = f"{type(error).__name__}: {error}".splitlines()[0][:100], at
                    if not answers:
                        break  # not the size that the network is made for
            if len(answers) > 1:
                if any(type(a) is not type(answers[0]) or a != answers[0] for a in answers):
                    raise DependsError(answers[0], _DEPENDS)
                if sizes and not of_type:
                    try:
                        self._surely(runs[0].example, needed, question)
                    except UnknownError as error:
                        raise DependsError(answers[0], str(error)) from error
                return answers[0]  # type: ignore[no-any-return]
        raise UnknownError(why)

    def _surely(self, example: Example, needed: Sequence[fx.Node], question: Callable[[Any], Answer]) -> None:
        """Raise :class:`UnknownError` if the answer is not the same for every size that the operations take."""
        if _is_a_size(needed):  # nearly all questions of networks with windows; symbols take a while to make
            raise UnknownError(_DEPENDS)
        if self._symbolic is None or self._symbolic.example is not example:
            # Without the usual exceptions: a size of 0 or 1 is a size, and sizes that are equal here need not be.
            self._sizes = ShapeEnv(specialize_zero_one=False, duck_shape=False)
            mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._sizes)
            self._symbolic = _Run(self, mode, example)
        try:
            for node in needed:
                if node in self._unsure:
                    raise UnknownError(_DEPENDS)
                if node not in self._symbolic.values and (self._symbolic.reads_sizes(node) or _cuts(node)):
                    self._unconditionally(functools.partial(self._symbolic.value, [node]), node)
                value = self._symbolic.value([node])  # what operations on tensors ask is what they take
            self._unconditionally(functools.partial(question, value))
        except UnknownError:
            raise
        # An operation may refuse symbols, in any way.
        except Exception as error:
            raise UnknownError(f"{_DEPENDS}, as far as can be seen ({type(error).__name__})") from error

    def _unconditionally(self, compute: Callable[[], Any], node: fx.Node | None = None) -> None:
        """Raise :class:`UnknownError` if this sets a condition on sizes, which is no fact for what comes after."""
        before = {name: copy.copy(getattr(self._sizes, name)) for name in _FACTS}
        compute()
        if len(self._sizes.guards) == len(before["guards"]):
            return
        for name, value in before.items():
            setattr(self._sizes, name, value)
        self._sizes._update_version_counter()
        if node is not None:
            self._unsure.add(node)
        raise UnknownError(_DEPENDS)

    def _made_up(self) -> list[list[_Run]]:
        """For each base size its runs: the base itself, other batches and sizes, one sample and none."""
        if self._bases is None:
            first = next((p for p in self.root.parameters() if p.is_floating_point()), None)
            dtype = torch.float32 if first is None else first.dtype
            device = torch.device("cpu") if first is None else first.device
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            bases: Iterator[Example]
            if self.inputs is not None and len(self.inputs) == len(self.placeholders):
                bases = iter([tree_map(lambda v: _Shape.of(v) if isinstance(v, Tensor) else v, self.inputs)])
            else:
                shapes = (_Shape((2, *shape), dtype, device) for shape in likely_shapes(self.root))
                bases = ((shape,) * len(self.placeholders) for shape in shapes)
            self._bases = [[_Run(self, mode, example) for example in _varied(base)] for base in bases]
        return self._bases


def _stays_on_its_device(module: nn.Module) -> bool:
    """Whether a module computes where its tensors are: layers and rows of torch, and blocks of these."""
    known = type(module) in LAYERS or type(module) in _ROWS or inherits_forward(module)
    return known or type(module).__module__.partition(".")[0] == "passes"


_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MOVES = frozenset({"to", "cpu", "cuda", "xpu", "type", "type_as"})
"""Methods that may take a tensor to another device."""


class _Elsewhere(logging.Filter):
    """Lets through what other threads log."""

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._here


@contextmanager
def _unlogged() -> Iterator[None]:
    """A size that the network does not take is no error that a person should read.

    And a handler that keeps records keeps their tracebacks, and so the values of the forward that is traced.
    """
    mine, log = _Elsewhere(), logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(mine)
    try:
        yield
    finally:
        log.removeFilter(mine)


class _Run:
    """The values of one graph for one example, as fake tensors."""

    def __init__(self, answers: Answers, mode: FakeTensorMode, example: Example, autocast: bool = False) -> None:
        self.answers, self.mode, self.example, self.autocast = answers, mode, example, autocast
        self.values: dict[fx.Node, Any] = {}

    def under_autocast(self) -> _Run:
        """The same for a caller who lets torch choose dtypes."""
        return _Run(self.answers, self.mode, self.example, autocast=True)

    def value(self, needed: Sequence[fx.Node]) -> Any:
        if not self.values:
            made = tree_map(lambda v: v.make(self.mode) if isinstance(v, _Shape) else v, self.example)
            self.values.update(zip(self.answers.placeholders, made, strict=True))
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            symbols = self.mode.shape_env is not None
            return _evaluate(self.values, needed, self._read, self.answers.root, symbols)

    def reads_sizes(self, node: fx.Node) -> bool:
        """Whether a node is computed from numbers alone, not from tensors."""
        return not any(isinstance(v, Tensor) for v in tree_leaves([self.values[n] for n in node.all_input_nodes]))

    def _read(self, target: str) -> Any:
        value = self.answers.attribute(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


class _Shape:
    """A tensor to be made."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = tuple(sizes), dtype, device

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        return _Shape(tensor.shape, tensor.dtype, tensor.device)

    def make(self, mode: FakeTensorMode) -> Tensor:
        if mode.shape_env is None:
            with mode:
                return torch.empty(self.sizes, dtype=self.dtype, device=self.device)
        made = torch.empty(self.sizes, dtype=self.dtype, device=self.device)
        every: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC] * made.dim()
        )
        return mode.from_tensor(made, symbolic_context=every)

    def batch(self, more: int) -> _Shape:
        return _Shape((self.sizes[0] + more, *self.sizes[1:]), self.dtype, self.device)

    def space(self, change: Callable[[int], int]) -> _Shape:
        return _Shape((*self.sizes[:2], *map(change, self.sizes[2:])), self.dtype, self.device)


_FACTS = ("guards", "axioms", "replacements", "replacements_slocs", "var_to_range", "var_to_range_sloc", "divisible")
"""What torch's symbols learn from a condition."""
_DEPENDS = "the answer depends on the size of the input"


def _asks_for_sizes(node: fx.Node) -> bool:
    """Whether a value may say something of a size; one of a rank, dtype or device is the same for all of them."""
    seen, todo = {node}, [node]
    while todo:
        node = todo.pop()
        asked = _asked_for(node)
        if asked in _RANKS and any(map(_cuts, _needed(node))):
            return True
        if asked in _RANKS or asked in _OF_ALL_SIZES:
            continue
        if node.target is getattr or _tells_sizes(node):
            return True
        todo += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)
    return False


def _asked_for(node: fx.Node) -> Any:
    """The attribute or method of a value that a node asks for."""
    return node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None


def _asks_for_dtype(needed: Sequence[fx.Node]) -> bool:
    """Whether it is asked for the dtype of something that is computed, which autocast may change."""
    return any(
        node.target is getattr and node.args[1] == "dtype" and node.all_input_nodes[0].op != "placeholder"
        for node in needed
    )


_OF_ALL_SIZES = ("dtype", "device", "requires_grad", "is_cuda", "grad_fn", "is_floating_point")
_OF_THE_CALLER = frozenset(
    ("requires_grad", "is_leaf", "grad_fn", "is_inference", "is_contiguous", "stride", "storage_offset", "data_ptr")
    + ("is_pinned", "is_shared", "untyped_storage", "_base", "_is_view")
)
"""What a tensor is asked for that says how the caller made and keeps it; another call may have it otherwise."""
_RANKS = ("dim", "ndim", "ndimension")


def _tells_sizes(node: fx.Node) -> bool:
    """Whether a value may be a size, or say something of one."""
    operation = operation_of(node)
    return operation is None or operation.id in ("size", "facts", "sym_size")


def _cuts(node: fx.Node) -> bool:
    """Whether an operation may take every size and give something else by it: its conditions are none on its input.

    So does code that nobody knows; a layer has conditions on what it takes.
    """
    operation = operation_of(node)
    if operation is None:
        return node.op in ("call_function", "call_method") and node.target is not getattr
    if operation.id == "getitem":
        return any(isinstance(v, slice) for v in tree_leaves(node.args[1:]))
    return operation.id in ("split", "chunk", "tensor_split", "squeeze")


def _is_a_size(needed: Sequence[fx.Node]) -> bool:
    """Whether the question is whether one size of an input is a certain number."""
    *way, last = needed
    if last.target not in (operator.eq, operator.ne) or len(way) not in (2, 3) or way[0].op != "placeholder":
        return False
    size, number = last.args
    read = way[1].target == "size" if len(way) == 2 else way[2].target is operator.getitem
    shape = len(way) == 2 or way[1].target == "size" or way[1].args[1:] == ("shape",)
    return read and shape and size is way[-1] and len(size.args) == 2 and type(number) is int and number >= 0


def _varied(base: Example) -> list[Example]:
    def each(change: Callable[[_Shape], _Shape]) -> Example:
        return tuple(tree_map(lambda v: change(v) if isinstance(v, _Shape) and v.sizes else v, list(base)))

    varied = [base, each(lambda s: s.batch(1))]
    if any(isinstance(v, _Shape) and len(v.sizes) > 2 for v in tree_leaves(list(base))):
        # An odd size, and one that every power of two divides that divides the base.
        varied += [each(lambda s: s.space(lambda n: n + 33)), each(lambda s: s.space(lambda n: 2 * n))]
    # Torch takes a size that is a symbol for another than one, and says nothing of it.
    return [*varied, each(lambda s: s.batch(1 - s.sizes[0])), each(lambda s: s.batch(-s.sizes[0]))]


def _needed(node: fx.Node) -> list[fx.Node]:
    """``node`` and what it depends on, in order of execution."""
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return sorted(found)


def _evaluate(
    values: dict[fx.Node, Any],
    needed: Sequence[fx.Node],
    attribute: Callable[[str], Any],
    root: nn.Module,
    symbols: bool = False,
) -> Any:
    """The value of the last of ``needed``; what was computed is kept in ``values``."""
    for node in needed:
        if node in values:
            continue
        if node.op == "get_attr":
            values[node] = attribute(str(node.target))
            continue
        args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if symbols or any(m.training for m in module.modules()):
                # On other tensors: a norm would count this call, and the sizes of a weight are no symbols.
                own = {name: attribute(f"{node.target}.{name}") for name in module.state_dict(keep_vars=True)}
                values[node] = functional_call(module, own, args, kwargs)
            else:
                values[node] = module(*args, **kwargs)
        elif node.op == "call_method":
            if node.target == "tolist" and isinstance(args[0], FakeTensor) and args[0].constant is None:
                raise UnknownError("it depends on the numbers in a tensor")  # torch would ask for one after the other
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
            inputs = any(isinstance(a, fx.Node) and a.op == "placeholder" for a in node.args)
            if inputs and isinstance(values[node], bool) and node.target in (operator.eq, operator.ne):
                raise UnknownError("it depends on what kind of thing an input is")  # a tensor is equal to no text
    return values[needed[-1]]
