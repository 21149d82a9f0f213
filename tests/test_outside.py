"""What a forward changes outside of its modules is left as it was by every verb, and is still done by the result."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blocks import lively
from torch import Tensor, nn

import reparam

COUNT = 0
NAMES = types.SimpleNamespace(count=0)
LAST: deque[int] = deque(maxlen=500)
NESTED: dict[str, list[int]] = {"calls": []}


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def hit(self) -> None:
        self.count += 1


COUNTER = Counter()


def closure() -> tuple[Callable[[], None], Callable[[], int]]:
    count = 0

    def hit() -> None:
        nonlocal count
        count += 1

    return hit, lambda: count


HIT, SO_FAR = closure()


def log(held: list[int]) -> None:
    held.append(1)


class Counts(nn.Module):
    """A sum of two convolutions, and a call counted somewhere."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.counter, self.table = Counter(), {"calls": [0]}

    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006 - the mistake that people make
        self.count(seen)
        return self.a(x) + self.b(x)

    def count(self, seen: list[int]) -> None: ...

    def counted(self) -> int:
        raise NotImplementedError


class GlobalName(Counts):
    def count(self, seen: list[int]) -> None:
        global COUNT
        COUNT += 1

    def counted(self) -> int:
        return COUNT


class Late(Counts):
    """After all that a graph has."""

    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        y = super().forward(x)
        NESTED["calls"].append(1)
        return y

    def counted(self) -> int:
        return len(NESTED["calls"])


class ClassAttribute(Counts):
    def count(self, seen: list[int]) -> None:
        type(self).calls += 1

    def counted(self) -> int:
        return type(self).calls


class Default(Counts):
    def count(self, seen: list[int]) -> None:
        seen.append(1)

    def counted(self) -> int:
        defaults: Any = Counts.forward.__defaults__
        return len(defaults[0])


class Namespace(Counts):
    def count(self, seen: list[int]) -> None:
        NAMES.count += 1

    def counted(self) -> int:
        return int(NAMES.count)


class Helper(Counts):
    def count(self, seen: list[int]) -> None:
        log(NESTED["calls"])

    def counted(self) -> int:
        return len(NESTED["calls"])


class Deque(Counts):
    def count(self, seen: list[int]) -> None:
        LAST.append(1)

    def counted(self) -> int:
        return len(LAST)


class Closure(Counts):
    def count(self, seen: list[int]) -> None:
        HIT()

    def counted(self) -> int:
        return SO_FAR()


@contextmanager
def logging() -> Iterator[None]:
    yield
    log(NESTED["calls"])


class Context(Counts):
    def count(self, seen: list[int]) -> None:
        with logging():
            pass

    def counted(self) -> int:
        return len(NESTED["calls"])


class GlobalObject(Counts):
    def count(self, seen: list[int]) -> None:
        COUNTER.hit()

    def counted(self) -> int:
        return COUNTER.count


class OwnObject(Counts):
    def count(self, seen: list[int]) -> None:
        self.counter.hit()

    def counted(self) -> int:
        return self.counter.count


class OwnTable(Counts):
    def count(self, seen: list[int]) -> None:
        self.table["calls"][0] += 1

    def counted(self) -> int:
        return self.table["calls"][0]


KINDS = [
    GlobalName, Late, ClassAttribute, Default, Namespace, Helper, Deque, Closure, Context, GlobalObject,
    OwnObject, OwnTable,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_verb_counts_a_call_and_the_result_does(kind: type[Counts]) -> None:
    model = lively(kind()).eval().float()
    before = model.counted()
    result, report = reparam.collapse_with_report(model)
    assert any("outside of the model" in str(refusal) for refusal in report.refusals)
    expanded = reparam.expand(model, "acb", example_inputs=torch.zeros(1, 4, 8, 8))
    reparam.explain(model)
    reparam.verify(model, result)
    assert (model.counted(), result.counted(), expanded.counted()) == (before, before, before)
    for network in (result, expanded):
        then = network.counted()
        network(torch.zeros(1, 4, 8, 8))
        assert network.counted() == then + 1


def test_a_forward_that_changes_nothing_is_folded() -> None:
    assert reparam.explain(lively(Counts()).eval()).folds


class Child(nn.Module):
    """Its own forward counts; the sequence within does not."""

    def __init__(self) -> None:
        super().__init__()
        self.within = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        NESTED["calls"].append(1)
        return self.within(x)  # type: ignore[no-any-return]


def test_only_the_forward_that_counts_keeps_its_code() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.other = Child(), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.child(x).relu()
            return self.other(x) + x

    before = len(NESTED["calls"])
    result, report = reparam.collapse_with_report(lively(Around()).eval().float())
    assert len(report.folds) == 2  # the norm within the child, and the identity around the other
    assert len(NESTED["calls"]) == before
    result(torch.zeros(1, 4, 8, 8))
    assert len(NESTED["calls"]) == before + 1
