"""Random networks, folded and compared: what no list of cases thinks of.

Each example is written as an ordinary ``nn.Module`` in Python source and then executed; a failure prints that source,
ready to paste. ``REPARAM_EXAMPLES=5000 pytest tests/test_random_graphs.py`` looks deeper.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from blocks import lively
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reparam

EXAMPLES = int(os.environ.get("REPARAM_EXAMPLES", "50"))
TOLERANCE = 1e-11
"""Relative to the largest output; deeper than one layer, so rounding adds up a little."""

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]

# ------------------------------------------------------------------ writing a network


class Writer:
    """Writes one class; every statement is run on a small tensor at once, and kept only if it runs."""

    def __init__(self, pick: Pick, name: str, channels: int, n: int, depth: int) -> None:
        self.pick, self.name, self.n, self.depth = pick, name, n, depth
        self.members: list[str] = []
        self.body: list[str] = []
        self.inner: list[Writer] = []
        self.reads: dict[str, int] = {}
        self.scope: dict[str, Any] = {"nn": nn, "F": F, "torch": torch, "self": nn.Module()}
        self.scope["x"] = torch.randn(2, channels, *(13, 12, 9)[:n])
        self.values = ["x"]
        if name == "Net":
            self.conv()  # something to fold
        for _ in range(pick(range(1, 8))):
            getattr(self, pick(KINDS))()
        self.result = self.values[-1] if pick((True, True, False)) else f"{self.values[-1]}, {pick(self.values)}"

    def source(self) -> str:
        init = "\n".join(f"        {line}" for line in ["super().__init__()", *self.members])
        body = "\n".join(f"        {line}" for line in [*self.needed(), f"return {self.result}"])
        own = f"class {self.name}(nn.Module):\n    def __init__(self):\n{init}\n\n    def forward(self, x):\n{body}\n"
        return "\n\n".join([*(w.source() for w in self.inner), own])

    def needed(self) -> list[str]:
        """The statements without those that nothing reads: a fold may drop them, and then more can fold."""
        kept: list[str] = []
        wanted = set(re.findall(r"\bv\d+\b", self.result))
        for line in reversed(self.body):
            name, _, code = line.partition(" = ")
            read = set(re.findall(r"\bv\d+\b", code))
            if name in wanted or (("_(" in code or "inplace=True" in code) and read & wanted):
                kept.append(line)
                wanted |= read
        return kept[::-1]

    # -------------------------------------------------------------- statements

    def member(self, code: str) -> str | None:
        """A new attribute of the module; its name, or None if torch does not make it."""
        name = f"m{len(self.members)}"
        try:
            setattr(self.scope["self"], name, eval(code, self.scope))
        except (ValueError, RuntimeError, IndexError):
            return None
        self.members.append(f"self.{name} = {code}")
        return f"self.{name}"

    def let(self, code: str) -> str | None:
        """A new value; its name, or None if it cannot be computed."""
        name = f"v{len(self.body)}"
        try:
            with torch.no_grad():
                value = eval(code, self.scope)
        except (ValueError, RuntimeError, IndexError):
            return None
        if not isinstance(value, Tensor) or value.dim() != self.n + 2 or 0 in value.shape or value.shape[1] > 64:
            return None
        self.scope[name] = value
        self.body.append(f"{name} = {code}")
        self.values.append(name)
        return name

    def apply(self, member: str | None, value: str | None) -> str | None:
        if member is None or value is None:
            return None
        self.reads.setdefault(member, self.channels(value))
        return self.let(f"{member}({value})")

    def value(self) -> str:
        return self.pick([*self.values[-3:], self.values[-1], *self.values])

    def channels(self, value: str) -> int:
        return int(self.scope[value].shape[1])

    def twin(self, value: str) -> str | None:
        """Another value of the same shape."""
        same = [v for v in self.values if v != value and self.scope[v].shape == self.scope[value].shape]
        return self.pick(same) if same else None

    def sizes(self, low: int, high: int) -> str:
        one = self.pick(range(low, high + 1))
        return str(one) if self.pick((True, True, False)) else str(tuple(self.pick((one, low)) for _ in range(self.n)))

    # -------------------------------------------------------------- kinds

    def conv(self, value: str | None = None, out: int | None = None, kernel: int | None = None) -> str | None:
        value = value or self.value()
        c = self.channels(value)
        groups = self.pick([1, 1] + [g for g in range(1, c + 1) if c % g == 0])
        out = out or groups * self.pick((1, 2, max(c // groups, 1)))
        groups = groups if out % groups == 0 else 1
        k = str(kernel) if kernel else self.sizes(1, 4)
        d = self.pick((1, 1, 1, 2)) if kernel is None else 1
        p = str(kernel // 2) if kernel else self.pick(("0", "1", "'same'", self.sizes(0, 2)))
        mode = self.pick(("zeros", "zeros", "zeros", "reflect", "replicate", "circular")) if p != "0" else "zeros"
        s = self.sizes(1, 2) if p != "'same'" and kernel is None else "1"
        bias = self.pick((True, False))
        options = f"stride={s}, padding={p}, dilation={d}, groups={groups}, bias={bias}, padding_mode={mode!r}"
        return self.apply(self.member(f"nn.Conv{self.n}d({c}, {out}, {k}, {options})"), value)

    def transposed(self) -> None:
        value = self.value()
        made = self.member(
            f"nn.ConvTranspose{self.n}d({self.channels(value)}, {self.pick((1, 2, 4))}, {self.sizes(1, 3)}, stride=2)"
        )
        made = self.apply(made, value)
        if made and self.pick((True, False)):
            self.norm(made)

    def norm(self, value: str | None = None) -> str | None:
        value = value or self.value()
        affine, eps = self.pick((True, True, False)), self.pick((1e-5, 1e-3, 0.3))
        return self.apply(
            self.member(f"nn.BatchNorm{self.n}d({self.channels(value)}, eps={eps}, affine={affine}).eval()"), value
        )

    def conv_norm(self) -> None:
        value = self.conv()
        if value:
            self.norm(value)

    def branches(self) -> None:
        """The sum that most published blocks are."""
        value = self.value()
        out = self.pick((self.channels(value), 4))
        total = None
        for kernel in (3, self.pick((1, 3)), self.pick((0, 1, 5, -1))):
            if kernel > 0:
                branch = self.conv(value, out, kernel)
                branch = self.norm(branch) if branch and self.pick((True, False)) else branch
            elif kernel == 0:
                branch = self.norm(value) if out == self.channels(value) else None
            else:
                branch = self.conv(value, out, 1)
                branch = self.apply(self.member(f"nn.AvgPool{self.n}d(3, 1, 1)"), branch) if branch else None
            if branch and total and self.scope[branch].shape == self.scope[total].shape:
                total = self.let(self.pick((f"{total} + {branch}", f"{branch} - {total}", f"{total}.add_({branch})")))
            elif branch:
                total = total or branch
        if total and self.pick((True, False)):
            self.norm(total)

    def activation(self) -> None:
        value = self.value()
        kinds = (f"F.relu({value})", f"torch.sigmoid({value})", f"F.relu({value}, inplace=True)", f"{value}.relu_()")
        self.let(self.pick(kinds))

    def activation_module(self) -> None:
        kinds = ("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Hardswish()", f"nn.MaxPool{self.n}d(2, 1)")
        self.apply(self.member(self.pick(kinds)), self.value())

    def nothing(self) -> None:
        self.apply(self.member(self.pick(("nn.Identity()", "nn.Dropout(0.5).eval()"))), self.value())

    def combine(self) -> None:
        a = self.value()
        b = self.twin(a)
        if b:
            forms = ("{a} + {b}", "{a} - {b}", "torch.add({a}, {b}, alpha=2)", "{b} * 2 + {a}", "{a}.add_({b})")
            self.let(self.pick(forms).format(a=a, b=b))

    def combine_gated(self) -> None:
        a = self.value()
        b = self.twin(a)
        if b:
            self.let(f"{a} * torch.sigmoid({b})")

    def scalar(self) -> None:
        value = self.value()
        forms = ("{} * 3", "2 - {}", "-{}", "{} / 4", "{} + 1", "{}.mul_(2)", "{}.sub(1)")
        self.let(self.pick(forms).format(value))

    def parameter(self) -> None:
        value = self.value()
        shape = self.pick(((self.channels(value), *(1,) * self.n), (1, self.channels(value), *(1,) * self.n), (1,)))
        made = self.member(f"nn.Parameter(torch.randn({shape}))")
        self.let(self.pick(("{} * {}", "{} + {}", "{} - {}")).format(value, made))

    def pool(self) -> None:
        options = self.pick(("", "", ", count_include_pad=False", ", ceil_mode=True"))
        geometry = f"{self.pick((2, 3))}, {self.pick((1, 2))}, {self.pick((0, 1))}"
        made = self.member(f"nn.AvgPool{self.n}d({geometry}{options})")
        self.apply(made, self.value())

    def pad(self) -> None:
        value = self.value()
        amounts = [self.pick((0, 1, 1, 2, -1)) for _ in range(2 * self.n)]
        mode = self.pick(("", "", ", value=0.5", ", mode='reflect'", ", mode='replicate'", ", mode='circular'"))
        if "mode" in mode:
            amounts = [abs(a) for a in amounts]
        self.let(f"F.pad({value}, {amounts}{mode})")

    def crop(self) -> None:
        self.let(f"{self.value()}[..., 1:-1]" if self.pick((True, False)) else f"{self.value()}[:, :, ::2]")

    def cat(self) -> None:
        a = self.value()
        near = [v for v in self.values if self.scope[v].shape[2:] == self.scope[a].shape[2:]]
        self.let(f"torch.cat([{a}, {self.pick(near)}], 1)")

    def part(self) -> None:
        value = self.value()
        c = self.channels(value)
        forms = ["{}[:, :1]", "{}[:, ::2]", "{}.flip(1)", "{}[:, [0, 0]]"]
        if c % 2 == 0:
            forms += ["{}.chunk(2, 1)[1]", "torch.split({}, %d, 1)[0]" % (c // 2), "F.channel_shuffle({}, 2)"]  # noqa: UP031
            forms += ["{0}.unflatten(1, (2, %d)).transpose(1, 2).flatten(1, 2)" % (c // 2)]  # noqa: UP031
        self.let(self.pick(forms).format(value))

    def reshape(self) -> None:
        value = self.value()
        there_and_back = ".transpose(1, 2).transpose(2, 1)"
        forms = ("{0}.flatten(2).reshape({0}.shape)", "{0}.flatten(2).view_as({0})", "{0}" + there_and_back)
        self.let(self.pick(forms).format(value))

    def functional(self) -> None:
        value = self.value()
        c, out = self.channels(value), self.pick((2, 4))
        made = self.member(f"nn.Parameter(torch.randn({(out, c, *(3,) * self.n)}))")
        weight = self.pick(("{}", "2 * {}", "{} - {}.mean(1, keepdim=True)")).replace("{}", str(made))
        self.let(f"F.conv{self.n}d({value}, {weight}, padding=1)")

    def block(self) -> None:
        """A module of its own, sometimes called twice."""
        if self.depth == 0:
            return
        value = self.value()
        name = f"{self.name}_{len(self.inner)}"
        inner = Writer(self.pick, name, self.channels(value), self.n, self.depth - 1)
        inner.result = inner.values[-1]
        exec(inner.source(), inner.scope)
        self.scope[name] = inner.scope[name]
        made = self.member(f"{name}()")
        self.inner.append(inner)
        once = self.apply(made, value)
        if once and self.pick((True, False, False)) and self.channels(once) == self.channels(value):
            self.apply(made, once)

    def again(self) -> None:
        """A layer that is called a second time."""
        value = self.value()
        layers = [m for m, channels in self.reads.items() if channels == self.channels(value)]
        if layers:
            self.apply(self.pick(layers), value)


KINDS = (
    "conv", "conv_norm", "conv_norm", "branches", "branches", "norm", "activation", "activation_module", "nothing",
    "combine", "combine", "combine_gated", "scalar", "parameter", "pool", "pad", "crop", "cat", "part", "reshape",
    "functional", "block", "block", "again", "transposed",
)  # fmt: skip


class Program:
    """A network as source text."""

    def __init__(self, source: str, channels: int, n: int) -> None:
        self.source, self.channels, self.n = source, channels, n

    def __repr__(self) -> str:
        size = (2, self.channels, *(13, 12, 9)[: self.n])
        head = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\nfrom blocks import lively\n"
        run = f"torch.manual_seed(0)\nmodel = lively(Net())\nx = torch.randn({size}, dtype=torch.float64)\n"
        return f"\n{head}\n\n{self.source}\n\n{run}"

    def build(self) -> tuple[nn.Module, Tensor]:
        scope: dict[str, Any] = {"nn": nn, "F": F, "torch": torch}
        exec(self.source, scope)
        torch.manual_seed(0)
        model = lively(scope["Net"]())
        return model, torch.randn(2, self.channels, *(13, 12, 9)[: self.n], dtype=torch.float64)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    def pick(options: Sequence[T]) -> T:
        return options[draw(st.integers(0, len(options) - 1))] if len(options) > 1 else options[0]

    n, channels = pick((2, 2, 2, 1, 3)), pick((2, 3, 4, 6))
    return Program(Writer(pick, "Net", channels, n, 2).source(), channels, n)


# ------------------------------------------------------------------ checking it


class Work(TorchDispatchMode):
    """Multiply-adds of a run, counted by what torch really executes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            weight = args[1]
            each = args[0].numel() if args[6] else out.numel()  # transposed: one window per input pixel
            self.total += each * weight[0].numel()
        elif name.startswith("avg_pool"):
            k = args[1] if len(args[1]) > 1 else args[1] * out.dim()
            self.total += out.numel() * int(torch.tensor(k[: out.dim() - 2]).prod())
        elif name in ("add", "sub", "mul", "div", "neg", "add_", "mul_", "sub_", "native_batch_norm", "rsub"):
            self.total += (out[0] if isinstance(out, tuple) else out).numel()
        return out


def numbers(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    with torch.no_grad(), Work() as work:
        out = model(x.clone())
    return list(out) if isinstance(out, tuple) else [out], work.total


def check(program: Program) -> None:
    model, x = program.build()
    before, looks = copy.deepcopy(model.state_dict()), str(model)
    wanted, work = run(model, x)
    result, report = reparam.collapse_with_report(model)
    assert str(model) == looks, "the caller's model was changed"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the caller's weights were changed"
    got, work_after = run(result, x)
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape
        gap, scale = float((g - w).abs().max()), float(w.abs().max())
        assert gap <= TOLERANCE * max(scale, 1e-3), f"differs by {gap:.3g} of {scale:.3g}"
    for g, w in zip(run(model, x)[0], wanted, strict=True):
        assert torch.equal(g, w), "the caller's model computes something else"
    assert numbers(result) <= numbers(model), "more numbers than before"
    # Costs are compared per position; a border of a few pixels weighs more in a small picture.
    assert work_after <= 1.5 * work, f"{work_after} multiply-adds instead of {work}"
    for fold in report.folds:
        assert fold.numbers_after <= fold.numbers_before
        assert fold.multiply_adds_after <= fold.multiply_adds_before
    again, second = reparam.collapse_with_report(result)
    assert str(again) == str(result), f"a second run changed something:\n{second}"


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(programs())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_random_network(program: Program) -> None:
    check(program)


@pytest.mark.slow
@settings(max_examples=3 * EXAMPLES, suppress_health_check=list(HealthCheck))
@given(programs())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_more_random_networks(program: Program) -> None:
    check(program)


FOUND = {
    "a change in place between the entry and the late slot of the fold": (
        ("nn.Conv1d(6, 6, 3)", "nn.BatchNorm1d(6)", "nn.Conv1d(6, 3, 2, padding=1, padding_mode='circular')"),
        ("v0 = self.m0(x)", "v1 = self.m1(v0)", "v2 = v0.mul_(2)", "return self.m2(v1), torch.sigmoid(v2)"),
    ),
    "the proof must run operations in their original order": (
        ("nn.Conv1d(6, 2, 4)", "nn.BatchNorm1d(2)"),
        ("v0 = self.m0(x)", "v1 = self.m1(v0)", "v2 = v0 + v1", "v3 = v1.mul_(2)", "return v3 * 2 + v2"),
    ),
    "the network changes its own input": (
        ("nn.Conv1d(6, 1, 1, stride=2)", "nn.BatchNorm1d(1)"),
        ("v0 = x / 4", "v1 = x.mul_(2)", "return self.m1(self.m0(v1)) + v0.mean(), x"),
    ),
    "a convolution that loses one of two readers folds with the other": (
        ("nn.Conv1d(6, 6, 3)", "nn.Conv1d(6, 6, 1, groups=6)", "nn.BatchNorm1d(6)", "nn.Conv1d(6, 6, 3)"),
        ("v0 = self.m1(self.m0(x))", "return v0 / 4, self.m3(self.m2(v0))"),
    ),
    "a norm that is called twice, and folded away once": (
        ("nn.Conv1d(6, 4, 1, bias=False)", "nn.BatchNorm1d(4, affine=False)", "nn.Conv1d(4, 4, 4, groups=4)"),
        ("v0 = self.m1(self.m0(x))", "return self.m2(self.m1(v0)), v0"),
    ),
    "channels of an input that a fold made known": (
        ("nn.Conv1d(6, 2, 3)", "nn.BatchNorm1d(2)", "nn.Conv1d(2, 2, 2, stride=2)"),
        ("v0 = self.m1(self.m0(x))", "return self.m2(v0[:, ::2][:, [0, 0]])"),
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found_before(case: str) -> None:
    """Small forms of what the random networks have found."""
    members, body = FOUND[case]
    made = "".join(f"        self.m{i} = {code}\n" for i, code in enumerate(members))
    lines = "".join(f"        {line}\n" for line in body)
    head = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    check(Program(f"{head}{made}\n    def forward(self, x):\n{lines}", 6, 1))


def test_found_before_two_folds_in_a_block_that_vanishes() -> None:
    """The block is written out in the outer forward, and one of its two folded layers needs a module of its own."""
    source = (
        "class Block(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m1, self.m4 = nn.Parameter(torch.randn(2, 1)), nn.Conv1d(2, 4, 3, padding=1)\n"
        "        self.m4.padding_mode, self.m5 = 'zeros', nn.BatchNorm1d(4)\n"
        "        self.m9 = nn.Conv1d(4, 4, 2, padding='same', padding_mode='circular', bias=False)\n\n"
        "    def forward(self, x):\n        return self.m9(self.m5(self.m4(x) * self.m1.sum()))\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.m1 = Block()\n\n"
        "    def forward(self, x):\n        return self.m1(x)[:, :, ::2]\n"
    )
    check(Program(source, 2, 1))


def test_found_before_block_that_becomes_a_layer_and_is_called_twice() -> None:
    """Once the block is one convolution, its two calls are one convolution too."""
    source = (
        "class Block(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m0, self.m1 = nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4)\n\n"
        "    def forward(self, x):\n        v0 = self.m0(x)\n        return self.m1(v0) - v0\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.m5 = Block()\n\n"
        "    def forward(self, x):\n        return F.relu(self.m5(self.m5(F.relu(x))))\n"
    )
    check(Program(source, 4, 1))


def test_found_before_block_that_vanishes_around_a_child() -> None:
    """All weights of the block go elsewhere, and a child without weights is still called."""
    source = (
        "class Gate(nn.Module):\n    def forward(self, x):\n        return x * torch.sigmoid(x)\n\n"
        "class Block(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m0, self.m1 = Gate(), nn.ConvTranspose1d(2, 1, 2, stride=2)\n"
        "        self.m2, self.m3 = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)\n\n"
        "    def forward(self, x):\n        v0 = self.m1(self.m0(x)).sub(1)\n        return self.m3(self.m2(v0))\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.m1 = Block()\n\n"
        "    def forward(self, x):\n        return self.m1(x)[:, :, ::2]\n"
    )
    check(Program(source, 2, 1))


def test_found_before_value_inside_a_block() -> None:
    """The fold would read what the block keeps to itself, and the block loses nothing."""
    source = (
        "class Block(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m0 = nn.Conv1d(2, 1, 2, stride=2)\n\n"
        "    def forward(self, x):\n        return self.m0(x)[:, :, ::2]\n\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m1, self.m2 = Block(), nn.Conv1d(2, 2, 3, padding=1, padding_mode='reflect')\n"
        "        self.m5, self.m6 = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)\n\n"
        "    def forward(self, x):\n        v1 = self.m1(x)\n        v2 = torch.cat([v1, v1], 1)\n"
        "        return self.m2(v2), self.m6(self.m5(v2)) / 4\n"
    )
    check(Program(source, 2, 1))


def test_the_check_sees_a_planted_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight off by 1e-3 after folding: the comparison must not let it pass."""
    source = (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.m0 = nn.Conv2d(3, 4, 3)\n        self.m1 = nn.BatchNorm2d(4)\n\n"
        "    def forward(self, x):\n        return self.m1(self.m0(x))\n"
    )
    program = Program(source, 3, 2)
    check(program)
    honest = reparam.collapse_with_report

    def planted(model: nn.Module) -> Any:
        result, report = honest(model)
        with torch.no_grad():
            next(result.parameters()).view(-1)[0] += 1e-3
        return result, report

    monkeypatch.setattr(reparam, "collapse_with_report", planted)
    with pytest.raises(AssertionError, match="differs by"):
        check(program)
