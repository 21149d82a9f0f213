"""What a forward does beside its graph is answered, kept or refused by its reason; the result computes what it did."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from blocks import lively
from defect_networks import NETWORKS
from python_oracle import describe, difference
from torch import Tensor, nn

import reparam
from passes.graph.answers import _stays_on_its_device
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


class Draws(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x))
        return y + self.b(x) if torch.rand(1) < 0.5 else y


@pytest.mark.parametrize("kind", [Asks, Noisy, Remembers, Stores, Throws, Draws])
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


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.shape[-1] > 500,
        lambda x: x.shape[-2:] == torch.Size([9, 11]),
        lambda x: x.size(0) == 1,
        lambda x: min(x.shape[2], x.shape[3], 10) > 8,
        lambda x: x.numel() > 10**6,
        lambda x: len(x) == 7,
        lambda x: x.flatten(1).shape[1] == 400,
        lambda x: f"{x.shape[2]}" == "9",
    ],
    ids=["large", "exactly", "batch of one", "smallest", "elements", "length", "of another value", "as text"],
)
def test_an_answer_holds_for_every_size_or_is_none(question: Callable[[Tensor], bool]) -> None:
    class Sized(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.n(self.a(x))
            return y if question(x) else y + self.b(x)

    model = lively(Sized()).double().eval()
    result, report = reparam.collapse_with_report(model)
    assert not any("add" in layer for fold in report.folds for layer in fold.layers)
    for shape in [(2, 4, 8, 8), (2, 4, 9, 11), (1, 4, 8, 8), (2, 4, 9, 512), (7, 4, 10, 10), (2, 4, 300, 600)]:
        x = torch.randn(shape, dtype=torch.float64)
        assert float((model(x) - result(x)).detach().abs().max()) < 1e-10


@pytest.mark.parametrize(
    "question",
    [
        lambda x, y: y.shape[1] == 4,
        lambda x, y: y.dim() == 4 and x.ndim == 4,
        lambda x, y: y.shape[2:] == x.shape[2:],
        lambda x, y: len(y.shape) > 3,
        lambda x, y: y.dtype.is_floating_point,
        lambda x, y: y.size(2) * y.size(3) == y[0, 0].numel(),
    ],
    ids=["channels", "rank", "the same size", "number of sizes", "dtype", "arithmetic"],
)
def test_what_is_so_for_every_size_is_answered(question: Callable[[Tensor, Tensor], bool]) -> None:
    class Sized(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.n(self.a(x))
            return y + self.b(x) if question(x, y) else y

    assert len(reparam.explain(lively(Sized()).eval()).folds) == 1


def test_a_question_in_training_counts_no_batch() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(x)
            return y * y.numel()  # type: ignore[no-any-return]

    model = lively(Sized()).train()
    before = int(model.block[1].num_batches_tracked)
    reparam.expand(model, "acb")
    assert int(model.block[1].num_batches_tracked) == before


def test_generators_are_where_they_were_after_a_run_on_examples() -> None:
    class Around(Throws):
        """What it draws keeps it from being read; the part inside is, and its input's rank is observed."""

        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(super().forward(x))  # type: ignore[no-any-return]

    model = lively(Around()).eval().float()
    before = random.getstate(), torch.get_rng_state()
    reparam.collapse(model, example_inputs=torch.zeros(1, 4, 8, 8))
    assert (random.getstate(), torch.equal(torch.get_rng_state(), before[1])) == (before[0], True)


def pad_and_call(x: Tensor, conv: nn.Conv2d) -> Tensor:
    pad = int(x.shape[-1]) % 2  # int() of a size: the function is one call
    return conv(nn.functional.pad(x, (pad, pad, pad, pad)))[:, :, : x.shape[2], : x.shape[3]]  # type: ignore[no-any-return]


def test_a_layer_given_to_a_function_stays_where_a_forward_is_rewritten() -> None:
    class Gives(Two):
        def __init__(self) -> None:
            super().__init__()
            self.given = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = pad_and_call(x, self.given)
            return self.a(x) + self.b(x)

    model = lively(Gives()).double().eval()
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert float((model(x) - result(x)).detach().abs().max()) < 1e-10


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


class LooksAtClasses(nn.Module):
    """Walks over its layers and does more behind a norm."""

    def __init__(self, more: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = self.more(x)
        return x


@pytest.mark.parametrize("more", [torch.tanh, lambda x: 1.5 * x], ids=["bent", "scaled"])
def test_a_layer_whose_class_is_looked_at_is_not_replaced(more: Callable[[Tensor], Tensor]) -> None:
    """A block in the norm's place, or an identity, would answer otherwise; a forward that is rewritten asks no more."""
    model = lively(LooksAtClasses(more)).double().eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    result, report = reparam.collapse_with_report(model, verify="folds")  # nothing but the capture sees it
    assert float((model(x) - result(x)).detach().abs().max()) < 1e-10
    assert len(report.folds) == 1
    expanded = reparam.expand(model, "acb", verify="folds")
    assert isinstance(expanded.layers[1], nn.BatchNorm2d)
    assert float((model(x) - expanded(x)).detach().abs().max()) < 1e-10


def test_a_function_is_asked_for_the_type_of_a_value() -> None:
    class Types(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y + self.b(x) if type(y) is Tensor else y
            return y + 1 if type(self.n) is nn.BatchNorm2d and isinstance(type(y), type) else y

    model = lively(Types()).double().eval()
    result, report = reparam.collapse_with_report(model, verify="folds")
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert len(report.folds) == 1
    assert float((model(x) - result(x)).detach().abs().max()) < 1e-10


@pytest.mark.parametrize("case", range(3))
def test_layers_that_a_size_connects_otherwise_do_not_fold(case: int) -> None:
    """Nothing but the capture can see it: a small input, and no check of the whole."""

    class Sized(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if (x.shape[-1] > 500, x.shape[0] == 1, torch.rand(1) < 0.5)[case]:
                y = y.tanh()
            return self.n(y)

    model = lively(Sized()).double().eval()
    result = reparam.collapse(model, verify="folds")
    for shape in [(2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 3, 512)]:
        for seed in range(4):
            x = torch.randn(shape, dtype=torch.float64)
            torch.manual_seed(seed)
            wanted = model(x)
            torch.manual_seed(seed)
            assert float((wanted - result(x)).detach().abs().max()) < 1e-10


def test_a_size_that_the_code_rejects_is_no_other_way() -> None:
    class Rejects(Two):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 4:
                raise ValueError("four channels")
            return self.a(x) + self.b(x)

    assert len(reparam.explain(lively(Rejects()).eval()).folds) == 1


def test_what_only_garbage_holds_is_left_by_nobody() -> None:
    class Cycles(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            loop: list[object] = [y]
            loop.append(loop)
            return y

    assert len(reparam.collapse_with_report(lively(Cycles()).eval())[1].folds) == 1


def test_a_question_about_constants_counts_no_batch() -> None:
    class Asks(Two):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(torch.randn(2, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if self.n(self.point).sum() > 100 else self.b(x)

    model = lively(Asks()).eval()
    model.n.train()
    before = int(model.n.num_batches_tracked)
    reparam.explain(model)
    assert int(model.n.num_batches_tracked) == before


def test_an_input_that_is_a_list_is_made_up() -> None:
    class Listed(Two):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.n(self.a(xs[0] + xs[1]))  # type: ignore[no-any-return]

    checked = reparam.collapse_with_report(lively(Listed()).eval())[1].checked
    assert checked is not None
    assert checked.compared.startswith("whole network")


def test_a_weight_that_is_computed_anew_goes_with_its_layer() -> None:
    class Computes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.held = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            self.held.weight.data = self.one.weight.data + self.two.weight.data
            self.held.bias.data = self.one.bias.data + self.two.bias.data
            return self.held(x)  # type: ignore[no-any-return]

    model = lively(nn.Sequential(Computes(), nn.BatchNorm2d(4))).double().eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    wanted = model(x)
    result, report = reparam.collapse_with_report(model)
    assert report.after.convs == 1
    assert float((wanted - result(x)).detach().abs().max()) < 1e-10


def test_the_message_of_an_assertion_is_no_question() -> None:
    class Asserts(Two):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.dim() == 4, f"four dimensions are needed, not {x.dim()} ({x.shape[2]}x{x.shape[3]})")
            return self.a(x) + self.b(x)

    report = reparam.explain(lively(Asserts()).eval())
    assert len(report.folds) == 1


@pytest.mark.parametrize("name", ["counted", "measured"])
def test_a_call_that_makes_no_value_lives_on_where_all_around_it_folds(name: str) -> None:
    model, (shape, *_) = NETWORKS[name]()
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds[0].layers) == 3
    assert not report.taken_back
    left = []
    for network in (model, result):
        network(torch.ones(shape, dtype=torch.float64))
        left.append([number for m in network.modules() for key, number in vars(m).items() if key in ("calls", "level")])
    assert left[0] == left[1] != []


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Record:
    first: Tensor
    second: Any = None


class GivesTwo(Two):
    """Two values in a container."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        y = self.a(x) + self.b(x)
        return self.give(torch.relu(y), y)


class Takes(Two):
    """Takes them out again."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.take = GivesTwo(give), take

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y, self.a(self.take(y)) + self.b(self.take(y))


@pytest.mark.parametrize(
    ("give", "take"),
    [
        (Pair, lambda y: y.second),
        (Record, lambda y: y.second),
        (lambda a, b: Record(a, second=[b, (a,)]), lambda y: y.second[0]),
        (lambda a, b: OrderedDict(a=a, b=b), lambda y: y["b"]),
        (lambda a, b: {"a": Pair(a, [Record(b)]), "b": b}, lambda y: y["a"].second[0].first),
    ],
)
def test_a_rewritten_forward_returns_containers_of_the_same_class(
    give: Callable[[Tensor, Tensor], Any], take: Callable[[Any], Tensor]
) -> None:
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    for folds, model in enumerate((GivesTwo(give), Takes(give, take)), 1):
        model = lively(model).double().eval()
        wanted = model(x)
        result, report = reparam.collapse_with_report(model)
        assert (len(report.folds), report.taken_back) == (folds, [])
        assert difference(describe(wanted), describe(result(x)), "output") == ""


def test_a_device_is_that_of_the_model_unless_something_moves_the_value() -> None:
    class Asks(Two):
        def __init__(self, move: Callable[[Tensor], Tensor], device: str) -> None:
            super().__init__()
            self.move, self.device = move, device

        def forward(self, x: Tensor) -> Tensor:
            if str(self.move(self.a(x)).device) != self.device:
                raise ValueError("another device")
            return self.a(x) + self.b(x)

    moves: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (torch.relu, "cpu"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x.to(torch.device("meta")), "meta"),
        (lambda x: torch.zeros_like(x, device="meta"), "meta"),
        (lambda x: torch.empty(1, device="meta") * 2, "meta"),
    ]
    for move, device in moves:
        report = reparam.explain(lively(Asks(move, device)).eval())
        assert not report.untraced, (device, report)


def test_which_modules_leave_a_value_on_its_device() -> None:
    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to("meta")

    class Likewise(nn.Conv2d):
        pass

    block = reparam.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), "dbb", where="all")[0]
    staying = [nn.GELU(), Likewise(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), block]
    assert all(map(_stays_on_its_device, (m for each in staying for m in each.modules())))
    block.add_module("own", Moves())
    for moving in (Moves(), nn.Sequential(nn.ReLU(), Moves()), nn.DataParallel(nn.ReLU()), block):
        assert not all(map(_stays_on_its_device, moving.modules()))


class KeepsBias(Two):
    """A cache of what depends on parameters only, given to a function of torch (attention with relative positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.randn(16)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.bias[torch.arange(16).reshape(4, 4).flip(0)]
        y = self.n(self.a(x)).flatten(2)
        attended = nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.kept[str(x.device)])
        return attended.unflatten(2, x.shape[2:])


def test_what_a_cache_keeps_may_go_to_any_function() -> None:
    model = lively(KeepsBias())
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert not report.untraced
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        assert [difference(describe(result(x)), describe(model(x)), "y") for _ in range(2)] == ["", ""]
