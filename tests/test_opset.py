"""The table of operations: one entry and one look-up for everything that an operation is called by."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.graph.opset import (
    OPERATIONS,
    Kind,
    Operation,
    named,
    operation_of,
    operation_of_function,
    operation_of_layer,
    table,
)


def overloads(operation: Operation) -> list[Any]:
    """The aten overloads of an operation that this version of torch has."""
    found = []
    for name in operation.names:
        if isinstance(name, str) and name.startswith("aten."):
            _, packet, overload = name.split(".")
            found.append(getattr(getattr(torch.ops.aten, packet), overload))
    return found


def test_an_id_stands_once() -> None:
    with pytest.raises(ValueError, match="'twice' stands in the table twice"):
        table([Operation("twice", Kind.PAD), Operation("twice", Kind.POOL)])


@pytest.mark.parametrize("name", [nn.ReLU, torch.relu, "relu", "aten.relu.default"])
def test_a_name_stands_once(name: Any) -> None:
    with pytest.raises(ValueError, match="is a name of 'one' and of 'other'"):
        table([Operation("one", Kind.POINTWISE, (name,)), Operation("other", Kind.POINTWISE, in_place=(name,))])


def test_an_unknown_id_lists_the_known_ones() -> None:
    assert named("conv2d").n == 2
    with pytest.raises(ValueError, match="no operation 'conv4d'; known: conv1d, "):
        named("conv4d")


def test_every_name_finds_its_operation() -> None:
    """However it is called: as a layer, as a function, as a method, as an overload."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = {
        "conv2d": [F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default],
        "add": [operator.add, operator.iadd, torch.add, "add", "add_", torch.ops.aten.add.Tensor],
        "cat": [torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default],
        "view": ["view", torch.ops.aten.view.default],
        "aten_batch_norm": [torch.batch_norm, torch.ops.aten._native_batch_norm_legit_no_training.default],
        "batch_norm": [F.batch_norm],
    }
    for id, names in called.items():
        for name in names:
            node = graph.call_method(name, (x,)) if isinstance(name, str) else graph.call_function(name, (x,))
            assert operation_of(node) is named(id), name
    assert operation_of(graph.call_module("m", (x,)), nn.Conv2d(1, 1, 1)) is named("conv2d")
    assert operation_of(x) is None


def test_a_layer_counts_by_its_exact_class() -> None:
    """A subclass is its base only while its forward is the base's own."""

    class Renamed(nn.Conv2d):
        pass

    class Halved(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    class Padded(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)

    replaced = nn.Conv2d(1, 1, 1)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert operation_of_layer(Renamed(1, 1, 1)) is named("conv2d")
    for other in (Halved(1, 1, 1), Padded(1, 1, 1), replaced, nn.Sequential()):
        assert operation_of_layer(other) is None


def test_a_callable_without_a_hash_is_unknown() -> None:
    class Odd:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Tensor) -> Tensor:
            return x

    assert operation_of_function(Odd()) is None


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: op.id)
def test_the_table_agrees_with_torch(operation: Operation) -> None:
    """Torch's own schemas say what is changed in place, and what may be a view of what was given."""
    for overload in overloads(operation):
        schema = overload._schema
        assert not schema.is_mutable
        aliases = any(value.alias_info is not None for value in schema.returns)
        assert operation.view or not aliases
    for name in operation.in_place:
        text = name if isinstance(name, str) else name.__name__
        assert text.endswith("_") or text in vars(operator), text
    if operation.view and operation.kind is Kind.MOVEMENT:
        return
    for name in operation.names:
        text = name if isinstance(name, str) else getattr(name, "__name__", "")
        is_torchs = name is text or getattr(torch, text, None) is name
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{text}") if is_torchs else []
        fresh = all(value.alias_info is None for schema in schemas for value in schema.returns if not schema.is_mutable)
        assert operation.view or fresh, text
