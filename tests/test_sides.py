"""Sides of a forward that its graph does not show: sizes that cut, modes, lookups, state, options, other methods."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import enum
import functools
import itertools
import pickle
import random
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import reparam
from reparam import Reason, ReparamError


class Two(nn.Module):
    """Two convolutions that fold into one, and a norm behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.gain, self.state = 1.0, None


def both(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x)


def module(forward: Any, **attributes: Any) -> Any:
    made = lively(type("Module", (Two,), {"forward": forward})())
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), dtype=torch.float64)


def same(result: Any, model: Any, given: Tensor, **options: Any) -> bool:
    got, wanted = result(given, **options), model(given, **options)
    return bool(got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-9))


# ------------------------------------------------------------------ what depends on a size


def squeezed(m: Any, x: Tensor) -> Tensor:
    y = F.adaptive_avg_pool2d(both(m, x), 1).squeeze()
    return y.unsqueeze(0) if y.dim() == 1 else y


def is_wide(x: Tensor) -> bool:
    return int(x.shape[-1]) > 500


def pieces(x: Tensor) -> list[Tensor]:
    return [x[..., :500], x[..., 500:]] if int(x.shape[-1]) > 500 else [x]


BY_SIZE: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "pieces of a batch": (lambda m, x: torch.cat([F.relu(both(m, c)) for c in x.split(16)]), (33, 4, 5, 5)),
    "pieces of a row": (lambda m, x: both(m, x) + sum(z.mean() for z in x.split(500, -1)), (1, 4, 3, 1200)),
    "how many pieces": (lambda m, x: both(m, x) * len(x.split(8, 0)), (9, 4, 5, 5)),
    "a slice that may cut": (
        lambda m, x: F.relu(both(m, x)) * (1 if x[..., :500].shape[-1] == x.shape[-1] else 2),
        (1, 4, 3, 600),
    ),
    "a set of sizes": (lambda m, x: F.relu(both(m, x)) * (2 if x.shape[-1] in {12, 17} else 1), (1, 4, 12, 12)),
    "a table of sizes": (lambda m, x: F.relu(both(m, x)) * {12: 2.0}.get(x.shape[-1], 1.0), (1, 4, 12, 12)),
    "a rank behind squeeze": (squeezed, (1, 4, 5, 5)),
    "the size of a rank behind squeeze": (
        lambda m, x: (y := F.adaptive_avg_pool2d(both(m, x), 1).squeeze()) * (2 if len(y.shape) == 1 else 1),
        (1, 4, 5, 5),
    ),
    "asked by a function": (lambda m, x: F.relu(both(m, x)) * (2 if is_wide(x) else 1), (1, 4, 3, 600)),
    "pieces of a function": (lambda m, x: both(m, x) + sum(z.mean() for z in pieces(x)), (1, 4, 3, 600)),
    "pieces that are unsafe": (lambda m, x: torch.cat(torch.unsafe_split(both(m, x), 500, -1), -1), (1, 4, 3, 600)),
    "the same size": (lambda m, x: F.relu(both(m, x)) * (2 if x.is_same_size(x.mT) else 1), (1, 4, 3, 6)),
    "a comparison as a number": (lambda m, x: (m.a(x) + m.b(x) * (x.shape[2] != 12)).relu(), (1, 4, 12, 12)),
    "a comparison of several": (
        lambda m, x: (m.a(x) + m.b(x) * (1 + (x.shape[2:] == (12, 12)))).relu(),
        (1, 4, 12, 12),
    ),
    "a tensor of sizes": (lambda m, x: F.relu(both(m, x)) * torch.tensor(x.shape[-2:]).sum(), (1, 4, 3, 7)),
    "no samples": (lambda m, x: x[:, :1] if x.numel() == 0 else F.relu(both(m, x)), (0, 4, 5, 5)),
    "any samples": (lambda m, x: F.relu(both(m, x)) if x.shape[0] else x[:, :1], (0, 4, 5, 5)),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_an_answer_about_a_size_is_not_frozen(name: str) -> None:
    forward, shape = BY_SIZE[name]
    model = module(forward)
    result = reparam.collapse(model)
    assert same(result, model, x(*shape))
    assert same(result, model, x())


def test_a_pattern_that_matches_sizes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        match x.shape:
            case (_, _, 12, 12):
                return F.relu(both(m, x)) * 2
            case (_, _, _, _):
                return F.relu(both(m, x))
        return x

    model = module(forward)
    result = reparam.collapse(model)
    assert same(result, model, x(1, 4, 12, 12))
    assert same(result, model, x())


def quotient_and_rest(m: Any, x: Tensor) -> Tensor:
    quotient, rest = divmod(x.shape[-1], 4)
    return F.relu(both(m, x)) * (quotient + rest)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "rounded": lambda m, x: F.relu(both(m, x)) * round(x.shape[-1] / 5),
    "quotient and rest": quotient_and_rest,
    "a pool over all": lambda m, x: F.avg_pool2d(both(m, x), x.size()[2:]),
    "a pool over a size": lambda m, x: F.avg_pool2d(both(m, x), (x.shape[2], x.shape[3])),
    "zeros of a size": lambda m, x: F.relu(both(m, x)) + torch.zeros(x.size(0), 4, x.size(2), x.size(3), dtype=x.dtype),
    "ones of a shape": lambda m, x: F.relu(both(m, x)) * torch.ones(x.shape, dtype=x.dtype),
    "numbers of a size": lambda m, x: F.relu(both(m, x)) + torch.arange(x.shape[-1]),
    "limits of a dtype": lambda m, x: F.relu(both(m, x)) + torch.finfo(x.dtype).eps * torch.iinfo(torch.int8).max,
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_what_is_asked_is_no_hindrance(name: str) -> None:
    model = module(ARITHMETIC[name])
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert same(result, model, x())
    assert same(result, model, x(1, 4, 9, 11))
    assert isinstance(torch.finfo(torch.float32), torch.finfo)


# ------------------------------------------------------------------ the mode of a call


@pytest.mark.parametrize(
    "asks",
    [
        lambda y: torch.is_grad_enabled(),
        lambda y: y.requires_grad,
        lambda y: torch.is_inference_mode_enabled(),
        lambda y: torch.is_autocast_enabled("cpu"),
        lambda y: y.dtype == torch.bfloat16,
        lambda y: y.is_contiguous(),
    ],
    ids=["gradients", "a value's", "inference mode", "autocast", "a dtype", "a layout"],
)
def test_a_mode_is_asked_in_every_call(asks: Callable[[Tensor], bool]) -> None:
    model = module(lambda m, x: F.relu((y := both(m, x)) * (2 if asks(y) else 1))).float()
    result, given = reparam.collapse(model), x().float()
    contexts: list[Any] = [contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()]
    for context in contexts:
        with context:
            assert torch.allclose(result(given), model(given), atol=1e-5)
    given = given.to(memory_format=torch.channels_last)
    assert torch.allclose(result(given), model(given), atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(result(given), model(given), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_where_gradients_are_asked_for_is_no_other_way(reentrant: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        inner = lambda x: m.n(both(m, x))  # noqa: E731
        return checkpoint(inner, x, use_reentrant=reentrant) if x.requires_grad else inner(x)

    model = module(forward)
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert same(result, model, x())
    assert same(result, model, x().requires_grad_())


def test_a_norm_that_a_mode_decides_about_stays_outside_of_a_block() -> None:
    model = module(lambda m, x: (m.n(y := m.a(x)) + y) if torch.is_grad_enabled() else m.n(m.a(x)))
    expanded = reparam.expand(model, "acb")
    assert same(expanded, model, x())
    with torch.no_grad():
        assert same(expanded, model, x())


# ------------------------------------------------------------------ state


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Counter:
    n: ClassVar[int] = 0

    @classmethod
    def tick(cls) -> int:
        cls.n += 1
        return cls.n


def up(container: Any, key: Any) -> float:
    container[key] += 1
    return float(container[key])


def slot_up(o: Any) -> float:
    o.n += 1
    return float(o.n)


def counted(value: float) -> float:
    counted.calls += 1  # type: ignore[attr-defined]
    return value * counted.calls  # type: ignore[attr-defined]


counted.calls = 0  # type: ignore[attr-defined]
NUMBER = contextvars.ContextVar("number", default=0)


def next_number() -> int:
    NUMBER.set(NUMBER.get() + 1)
    return NUMBER.get()


Namespace = types.SimpleNamespace
STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "an iterator": (lambda: itertools.cycle([1.0, 2.0, 3.0]), next),
    "an iterator of a list": (lambda: iter([1.0, 2.0] * 50), next),
    "a generator of Python's": (lambda: random.Random(0), lambda r: r.random()),
    "a generator of NumPy's": (lambda: np.random.default_rng(0), lambda r: float(r.uniform())),
    "a generator of torch's": (
        lambda: torch.Generator().manual_seed(0),
        lambda g: float(torch.rand((), generator=g)),
    ),
    "slots": (Slots, slot_up),
    "bytes": (lambda: bytearray(1), lambda b: up(b, 0)),
    "an array": (lambda: np.zeros(1), lambda a: up(a, 0)),
    "arguments of a partial": (lambda: functools.partial(up, {"n": 0}, "n"), lambda f: f()),
    "a user's dictionary": (lambda: collections.UserDict(n=0), lambda d: up(d, "n")),
    "an object in an object": (lambda: Namespace(n=Namespace(n=0)), lambda o: slot_up(o.n)),
    "a list in a tuple": (lambda: ([0],), lambda t: up(t[0], 0)),
    "a deque": (lambda: collections.deque([1.0, 2.0, 3.0]), lambda d: (d.rotate(1), d[0])[1]),
    "a plain tensor": (lambda: torch.zeros(1), lambda t: float(t.add_(1))),
    "a class": (lambda: Counter, lambda c: c.tick()),
    "a function": (lambda: 1.0, counted),
    "a variable of the context": (lambda: None, lambda _: next_number()),
}


def told(state: Any) -> str:
    return repr(vars(state) if hasattr(state, "__dict__") and not isinstance(state, type) else state)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", STATES)
def test_state_goes_on_as_it_did_and_no_verb_moves_it(name: str, inplace: bool) -> None:
    make, use = STATES[name]
    forward = lambda m, x: F.relu(both(m, x)) * use(m.state)  # noqa: E731
    model, other = module(forward, state=make()), module(forward, state=make())
    other.load_state_dict(model.state_dict())
    before = told(model.state), Counter.n, counted.calls, NUMBER.get()  # type: ignore[attr-defined]
    reparam.explain(model)
    reparam.plan(model, "acb")
    result = reparam.collapse(model, inplace=inplace)
    assert (told(model.state), Counter.n, counted.calls, NUMBER.get()) == before  # type: ignore[attr-defined]
    given = x()
    got = [result(given) for _ in range(3)]
    Counter.n, counted.calls = before[1:3]  # type: ignore[attr-defined]
    NUMBER.set(before[3])
    wanted = [other(given) for _ in range(3)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "verb", [lambda m: reparam.plan(m, "acb"), lambda m: reparam.expand(m, "acb"), reparam.collapse]
)
def test_statistics_that_a_function_holds_stay(verb: Callable[[Any], Any]) -> None:
    model = module(lambda m, x: m.b(m.stem(x)))
    conv, norm = model.a, model.n
    model.stem = lambda x: norm(conv(x)).relu()
    model.train()
    before = copy.deepcopy(model.state_dict())
    verb(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------ options and what code holds


def layers_up_to(m: Any, x: Tensor, up_to: int | None = None) -> Tensor:
    for i, layer in enumerate([m.b, F.relu, m.a, m.n]):
        x = layer(x)
        if i == up_to:
            return x
    return x


OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "up to a layer": (layers_up_to, {"up_to": 2}),
    "in a set": (lambda m, x, t=1: m.a(x) if t in {5, 6} else m.n(m.a(x)), {"t": 5}),
    "a class": (lambda m, x, t=None: m.a(x) if isinstance(t, str) else m.n(m.a(x)), {"t": "raw"}),
    "a table": (lambda m, x, t=None: m.a(x) if t and t.get("raw") else m.n(m.a(x)), {"t": {"raw": True}}),
    "three flags": (
        lambda m, x, a=False, b=False, c=False: m.a(x) if a and b and not c else m.n(m.a(x)),
        {"a": True, "b": True},
    ),
    "a range": (lambda m, x, t=0.0: m.a(x) if 0 < t < 0.5 else m.n(m.a(x)), {"t": 0.25}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_of_an_option_is_taken_for_all(name: str) -> None:
    forward, given = OPTIONS[name]
    model = module(forward)
    result, report = reparam.collapse_with_report(model)
    assert Reason.ARGUMENT in {refusal.reason for refusal in report.refusals}
    assert same(result, model, x(), **given)


class Kind(enum.Enum):
    ONE = 1


DEFAULTS: dict[str, Any] = {
    "a function": F.relu, "a class": nn.ReLU, "an object": Namespace(k=2.0), "not a number": float("nan"),
    "a tensor": torch.ones(1), "an array": np.ones(3), "a member": Kind.ONE, "a sentinel": object(),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_may_be_anything(name: str) -> None:
    def forward(m: Any, x: Tensor, given: Any = DEFAULTS[name]) -> Tensor:
        return F.relu(both(m, x))

    model = module(forward)
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert same(result, model, x())
    assert same(copy.deepcopy(result), model, x())


def named_self(this: Any, x: Tensor, *, self: Any = None) -> Tensor:
    return F.relu(both(this, x))


def not_ascii(m: Any, größe: Tensor) -> Tensor:
    return F.relu(both(m, größe))


@pytest.mark.parametrize(
    "forward", [named_self, not_ascii, lambda m, x: {Kind.ONE: F.relu(both(m, x))}], ids=["self", "letters", "keys"]
)
def test_code_that_cannot_be_written_anew_is_left_alone_by_all_verbs(forward: Any) -> None:
    model = module(forward)
    assert reparam.explain(model).folds == []
    report = reparam.collapse_with_report(model)[1]
    assert {refusal.reason for refusal in report.refusals} == {Reason.CODE}


def test_what_a_rewritten_forward_no_longer_reads_cannot_be_set() -> None:
    model = module(lambda m, x: F.relu(both(m, x)) * m.gain)
    result = reparam.collapse(model)
    result.gain, result.unheard = 1.0, 3
    with pytest.raises(ReparamError, match=r"gain of this Module was 1.0 when its forward was folded"):
        result.gain = 2.0


def test_other_methods_that_use_a_part_of_a_fold_are_told() -> None:
    class Parts(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.a(x)).relu()

        def before_the_norm(self, x: Tensor) -> Tensor:
            return self.a(x)

        def with_the_norm(self, x: Tensor) -> Tensor:
            return self.n(self.a(x))

    report = reparam.collapse_with_report(lively(Parts()))[1]
    assert report.notes == ["before_the_norm of the model uses a alone, which holds the fold now"]


def test_a_hook_that_says_what_a_forward_is_called_with() -> None:
    model = module(lambda m, x, k=1: F.relu(both(m, x)) * k)
    model.register_forward_pre_hook(lambda m, args, named: (args, {"k": 3}), with_kwargs=True)
    result, report = reparam.collapse_with_report(model)
    assert {refusal.reason for refusal in report.refusals} == {Reason.HOOK}
    assert same(result, model, x())


# ------------------------------------------------------------------ classes that look at themselves


class Registered(Two):
    names: ClassVar[set[str]] = set()

    def __init_subclass__(cls, *, key: str) -> None:
        assert cls.__name__ not in Registered.names
        Registered.names.add(cls.__name__)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(both(self, x))


class OfARegister(Registered, key="one"):
    pass


class Sealed(Two):
    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("sealed") and name != "training":
            raise AttributeError(f"sealed: {name}")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(both(self, x))


class Locked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            pass
        return F.relu(both(self, x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [OfARegister, Sealed])
def test_a_class_need_not_know_that_it_was_rewritten(kind: type[nn.Module], inplace: bool) -> None:
    model = lively(kind())
    vars(model)["sealed"] = True
    wanted = model(given := x())
    result, report = reparam.collapse_with_report(model, inplace=inplace)
    assert len(report.folds) == 1
    assert torch.allclose(result(given), wanted)


def test_a_class_says_what_is_copied_of_it() -> None:
    model = lively(Locked())
    result = reparam.collapse(model)
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert isinstance(again.lock, type(model.lock))
        assert same(again, model, x())


# ------------------------------------------------------------------ contexts that begin or end inside of a fold


def inside_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
    return m.n(x)  # type: ignore[no-any-return]


def behind_no_grad(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    with torch.set_grad_enabled(False):
        return m.n(x)  # type: ignore[no-any-return]


def without_autocast(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
        return m.n(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [inside_no_grad, behind_no_grad, without_autocast])
def test_no_fold_crosses_the_border_of_a_context(forward: Any) -> None:
    model = module(forward)
    result, report = reparam.collapse_with_report(model)
    assert not report.folds
    assert Reason.CONTEXT in {refusal.reason for refusal in report.refusals}
    if forward is not without_autocast:
        assert result(x()).requires_grad == model(x()).requires_grad
    row = next(row for row in reparam.plan(model, "acb").rows if row.layer == "a")
    assert row.norm_stays is not None
    assert row.norm_stays.reason is Reason.CONTEXT


def test_a_fold_inside_of_a_context_stays_in_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.n(m.a(x))
        return x

    result, report = reparam.collapse_with_report(module(forward))
    assert len(report.folds) == 1
    assert not result(x()).requires_grad


CALLERS: list[Callable[[Tensor], Any]] = [
    lambda x: x.storage_offset() == 0,
    lambda x: x.stride(1) == 1,
    lambda x: x.stride()[0] > 5,
    lambda x: x.data_ptr() % 64 == 0,
    lambda x: x.is_shared(),
    lambda x: x.is_contiguous(memory_format=torch.channels_last),
]


@pytest.mark.parametrize("question", CALLERS)
def test_what_an_input_says_of_its_caller_may_be_otherwise_in_the_next_call(question: Callable[[Tensor], Any]) -> None:
    def decides(m: Any, x: Tensor) -> Tensor:
        return m.n(m.a(x)) if question(x) else m.a(x)  # type: ignore[no-any-return]

    def agrees(m: Any, x: Tensor) -> Tensor:
        return m.n(m.a(x + 1 if question(x) else x))  # type: ignore[no-any-return]

    assert not reparam.collapse_with_report(module(decides))[1].folds
    assert len(reparam.collapse_with_report(module(agrees))[1].folds) == 1


def test_a_plan_tells_of_methods_that_use_a_convolution_without_its_norm() -> None:
    class Fuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))  # type: ignore[no-any-return]

        def raw(self, x: Tensor) -> Tensor:
            return self.conv(x)  # type: ignore[no-any-return]

    plan = reparam.plan(nn.Sequential(Fuses(), nn.ReLU(), Fuses()), "acb")
    (note,) = plan.notes
    assert "Fuses.raw" in note
    assert "0.conv and 1 more" in note
    assert note in " ".join(str(plan).split())
    assert not reparam.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "acb").notes
