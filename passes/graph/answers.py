"""Answers to what a forward asks about its values while it is traced.

A question about a value that depends on parameters only is answered by the value. One that depends on an input is put
to fake tensors (shapes, dtypes, devices, no numbers) of several sizes and batches, and the answer is taken only if it
is always the same; it is then a condition of the capture. Nothing is computed before something is asked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from passes.graph.inputs import likely_shapes
from passes.graph.patches import suspended

__all__ = ["Answers", "UnknownError"]

Answer = TypeVar("Answer")

Example = tuple[Any, ...]
"""One value for each placeholder, as a caller might give them."""


class UnknownError(ValueError):
    """No answer: the value is not known, or the answer is not always the same."""


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

    def ask(self, node: fx.Node, question: Callable[[Any], Answer]) -> Answer:
        """What ``question`` gives for the value of ``node``. Raises :class:`UnknownError`."""
        needed = _needed(node)
        if not self.open.isdisjoint(needed):
            raise UnknownError("it depends on an optional argument")
        with suspended(), torch.no_grad():
            if self._is_constant(needed):
                return question(_evaluate(self._constants, needed, self.attribute, self.root))
            return self._agreed(needed, question)

    def _is_constant(self, needed: Sequence[fx.Node]) -> bool:
        reads_numbers = self.numbers or all(n.op != "get_attr" for n in needed)
        return reads_numbers and all(n.op != "placeholder" and (n.op == "get_attr" or n.args) for n in needed)

    def _agreed(self, needed: Sequence[fx.Node], question: Callable[[Any], Answer]) -> Answer:
        why = "no input can be made up"
        for runs in self._made_up():
            answers: list[Any] = []
            for run in runs:
                try:
                    answers.append(question(run.value(needed)))
                # Whatever the network raises on this size means that it does not take it.
                except Exception as error:
                    why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                    if not answers:
                        break  # not the size that the network is made for
            if len(answers) > 1:
                if any(type(a) is not type(answers[0]) or a != answers[0] for a in answers):
                    raise UnknownError("the answer depends on the size of the input")
                return answers[0]  # type: ignore[no-any-return]
        raise UnknownError(why)

    def _made_up(self) -> list[list[_Run]]:
        """For each base size its runs: the base itself, another batch, other sizes."""
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


class _Run:
    """The values of one graph for one example, as fake tensors."""

    def __init__(self, answers: Answers, mode: FakeTensorMode, example: Example) -> None:
        self.answers, self.mode, self.example = answers, mode, example
        self.values: dict[fx.Node, Any] = {}

    def value(self, needed: Sequence[fx.Node]) -> Any:
        with self.mode:
            if not self.values:
                made = tree_map(lambda v: v.make() if isinstance(v, _Shape) else v, self.example)
                self.values.update(zip(self.answers.placeholders, made, strict=True))
            return _evaluate(self.values, needed, self._read, self.answers.root)

    def _read(self, target: str) -> Any:
        value = self.answers.attribute(target)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


class _Shape:
    """A tensor to be made."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes, self.dtype, self.device = tuple(sizes), dtype, device

    @staticmethod
    def of(tensor: Tensor) -> _Shape:
        return _Shape(tensor.shape, tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        return torch.empty(self.sizes, dtype=self.dtype, device=self.device)

    def batch(self, more: int) -> _Shape:
        return _Shape((self.sizes[0] + more, *self.sizes[1:]), self.dtype, self.device) if self.sizes else self

    def space(self, change: Callable[[int], int]) -> _Shape:
        return _Shape((*self.sizes[:2], *map(change, self.sizes[2:])), self.dtype, self.device)


def _varied(base: Example) -> list[Example]:
    def each(change: Callable[[_Shape], _Shape]) -> Example:
        return tuple(tree_map(lambda v: change(v) if isinstance(v, _Shape) else v, list(base)))

    varied = [base, each(lambda s: s.batch(1))]
    if any(isinstance(v, _Shape) and len(v.sizes) > 2 for v in tree_leaves(list(base))):
        # An odd size, one that every power of two divides that divides the base, and an oblong.
        varied += [each(lambda s: s.space(lambda n: n + 33)), each(lambda s: s.space(lambda n: 2 * n))]
    return varied


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
    values: dict[fx.Node, Any], needed: Sequence[fx.Node], attribute: Callable[[str], Any], root: nn.Module
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
            values[node] = root.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
            inputs = any(isinstance(a, fx.Node) and a.op == "placeholder" for a in node.args)
            if inputs and isinstance(values[node], bool) and node.target in (operator.eq, operator.ne):
                raise UnknownError("it depends on what kind of thing an input is")  # a tensor is equal to no text
    return values[needed[-1]]
