"""What a forward does beside its graph is answered, kept or refused by its reason; the result computes what it did."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from blocks import lively
from torch import Tensor, nn

import reparam
from passes.graph.capture import trace_units
from reparam import Reason


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


class Asks(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        assert y.dim() == 4
        y = y + self.b(x) if isinstance(y, Tensor) and not hasattr(y, "tensors") else y
        return self.n(torch.cat([*y.chunk(2, 1)], 1)).relu()


class Noisy(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x) + self.b(x)) * torch.rand(1, 4, 1, 1, dtype=x.dtype)


class Remembers(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x) + self.b(x))
        y = y + self.last if hasattr(self, "last") else y
        self.last = y.mean()
        return y


class Stores(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        self.feature = y
        return self.n(y)


class Throws(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        return y + self.b(x) if random.random() < 0.5 else y


@pytest.mark.parametrize("kind", [Asks, Noisy, Remembers, Stores, Throws])
def test_three_calls_compute_what_the_module_computes(kind: type[Two]) -> None:
    model = lively(kind()).double().eval()
    result = reparam.collapse(model)
    for call in range(3):
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        outcomes = []
        for network in (model, result):
            torch.manual_seed(call)
            random.seed(call)
            outcomes.append(network(x))
        assert float((outcomes[0] - outcomes[1]).detach().abs().max()) < 1e-10
    if kind is Stores:
        assert torch.allclose(model.feature, result.feature)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Remembers, Reason.STATE), (Throws, Reason.RANDOM)], ids=["state", "python's generator"]
)
def test_what_no_graph_can_say_is_left_alone(kind: type[Two], reason: Reason) -> None:
    _, untraced = trace_units(lively(kind()).eval())
    assert [refusal.reason for refusal in untraced] == [reason]


def test_questions_do_not_stop_a_fold() -> None:
    assert reparam.explain(lively(Asks()).eval()).folds


def test_another_thread_runs_its_modules_while_one_traces() -> None:
    model, other = lively(Asks()).eval(), nn.Linear(3, 3)
    stop, wrong = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            if type(other(torch.zeros(1, 3))) is not Tensor:
                wrong.append(1)

    worker = threading.Thread(target=serve)
    worker.start()
    for _ in range(5):
        trace_units(model)
    stop.set()
    worker.join()
    assert not wrong
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"
