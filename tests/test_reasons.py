"""Reasons are true: what a person is told of a norm that stays, of a layer that is left, of code that is not read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocks import Net, lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam import Reason


def conv(inp: int = 4, out: int = 4, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **options)  # type: ignore[arg-type]


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def told(model: nn.Module, example: Tensor | None = None) -> dict[str, reparam.Refusal]:
    """What explain and collapse say, which is the same."""
    model = lively(model)
    planned = reparam.explain(model, example)
    done = reparam.collapse_with_report(model, example_inputs=example)[1]
    assert planned.refusals == done.refusals
    return {refusal.layer: refusal for refusal in planned.refusals}


# ------------------------------------------------------------------ norms


def hooked() -> nn.Module:
    model = nn.Sequential(conv(), norm())
    model[0].register_forward_hook(lambda *_: None)
    return model


class Standardised(nn.Conv2d):
    """As StdConv2d: its weight is normalised by a function that norms use, too."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Tokens(nn.Module):
    """As an attention that looks at fewer keys: pooled tokens are normalised before two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.norm = nn.AvgPool1d(2), nn.BatchNorm1d(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        y = self.norm(self.pool(x.transpose(1, 2))).transpose(1, 2)
        return self.q(x) @ self.k(y).transpose(1, 2) @ self.v(y) + y.sum()


NORMS: list[tuple[str, Callable[[], nn.Module], str, Reason, str]] = [
    ("instance norm itself", lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True)), "1",
     Reason.BATCH_STATISTICS, "instance norm uses the statistics of each input"),
    ("instance norm first", lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ReLU(), conv()), "0",
     Reason.BATCH_STATISTICS, "instance norm uses the statistics of each input"),
    ("instance norm behind several", lambda: Net(lambda m, x: m.i(torch.cat([x, m.a(x)], 1)).relu(), a=conv(),
                                                 i=nn.InstanceNorm2d(8)), "i",
     Reason.BATCH_STATISTICS, "instance norm uses the statistics of each input"),
    ("behind instance norm", lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True), norm()), "2",
     Reason.BEHIND_NORM, "it follows 1 (InstanceNorm2d)"),
    ("behind group norm", lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4), norm()), "2",
     Reason.BEHIND_NORM, "it follows 1 (GroupNorm)"),
    ("behind a norm of batches", lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False), norm()),
     "2", Reason.BEHIND_NORM, "it follows 1 (BatchNorm2d)"),
    ("behind an activation", lambda: nn.Sequential(conv(), nn.ReLU(), norm()), "2",
     Reason.NO_CONVOLUTION, "it follows 1 (ReLU)"),
    ("first of all", lambda: nn.Sequential(norm(), nn.ReLU(), conv()), "0",
     Reason.NO_CONVOLUTION, "it follows the input"),
    ("before a convolution that pads", lambda: nn.Sequential(nn.ReLU(), norm(), conv(padding=1)), "1",
     Reason.NO_CONVOLUTION, "it follows 0 (ReLU); and 2 behind it: pad value is not the map's value"),
    ("of a value that others read", lambda: Net(lambda m, x: (lambda y: m.n(y) + y.relu())(m.c(x)), c=conv(), n=norm()),
     "n", Reason.SHARED, "the output of c is used by (model):relu as well"),
    ("of a convolution that others call", lambda: Net(lambda m, x: m.b(m.c(m.a(m.c(x)).relu())), c=conv(), a=norm(),
     b=norm()), "a", Reason.SHARED, "the weights of c are used in several places"),
    ("of a convolution with a hook", hooked, "1", Reason.HOOK, "it follows 0 (Conv2d): has a hook"),
    ("of every position", lambda: nn.Sequential(conv(), nn.Flatten(), nn.BatchNorm1d(4 * 36), nn.ReLU()), "2",
     Reason.CHANNELS, "of 144 channels, where dimension 1 no longer holds just the 4 channels"),
    ("behind a pad", lambda: nn.Sequential(conv(padding=1), nn.ZeroPad2d(1), norm()), "2",
     Reason.BORDER, "it follows 1 (ZeroPad2d): zero padding"),
    ("behind a cast", lambda: Net(lambda m, x: m.n(m.c(x).half().double()), c=conv(), n=norm()), "n",
     Reason.CAST, "a cast or a move between devices"),
    ("behind a cast to what the input has", lambda: Net(lambda m, x: m.n(m.c(x.to(m.c.weight.dtype)).to(x.dtype)),
     c=conv(), n=norm()), "n", Reason.CAST, "it follows (model):to: a cast or a move between devices"),
    ("behind dropout that is on", lambda: Net(lambda m, x: m.n(F.dropout(m.c(x), 0.5, True)), c=conv(), n=norm()), "n",
     Reason.NO_CONVOLUTION, "it follows (model):dropout"),
    ("behind a sum of two values", lambda: Net(lambda m, x: m.n(m.c(x).relu() + m.d(x).relu()), c=conv(), d=conv(),
     n=norm()), "n", Reason.NO_CONVOLUTION, "it follows (model):add of several values"),
    ("behind a product moved by sizes", lambda: Net(lambda m, x: m.n((lambda y: (y.sigmoid() * y.tanh()).reshape(
     y.shape[0], -1, y.shape[2], y.shape[3]))(m.c(x))), c=conv(), n=norm()), "n",
     Reason.NO_CONVOLUTION, "it follows (model):mul of several values"),
    ("behind maps of two sizes", lambda: Net(lambda m, x: m.n(torch.cat([F.avg_pool2d(m.a(x.relu()), 2), m.b(x)], 1)),
     a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 2, 2), n=nn.BatchNorm2d(8)), "n",
     Reason.NO_CONVOLUTION, "it follows (model):cat of several values"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "layer", "reason", "message"), [case[1:] for case in NORMS], ids=[case[0] for case in NORMS]
)
def test_why_a_norm_stays(build: Callable[[], nn.Module], layer: str, reason: Reason, message: str) -> None:
    found = told(build())
    assert message in found[layer].message
    assert found[layer].reason is reason


def test_a_reading_that_does_not_hold_is_no_reason() -> None:
    """Norms are tried in several layouts; what a law says of the wrong one is not true of the network."""
    found = told(Tokens(), torch.randn(2, 6, 8).double())
    why = "and behind it: the output of (model):transpose is used by (model):sum, which is no layer"
    assert found["norm"].message == f"{Reason.NO_CONVOLUTION.value}: it follows (model):relu; {why}"


def test_linear_layers_that_act_on_another_dimension_are_named() -> None:
    found = told(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5)), torch.randn(2, 5, 4).double())
    assert found["1"].message == "batch norm acts on dimension 1, which does not hold the channels here"


@pytest.mark.parametrize("middle", [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3, 3])])
def test_in_an_exported_program_too(middle: nn.Module) -> None:
    model = nn.Sequential(conv(), middle, norm()).eval()
    program = torch.export.export(model, (torch.randn(2, 4, 5, 5),))
    assert Reason.BEHIND_NORM in {refusal.reason for refusal in reparam.explain(program).refusals}


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        lambda: Net(lambda m, x: m.n(m.l(x).transpose(-1, -2)), l=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        lambda: Net(lambda m, x: m.n(m.l(x).flatten(0, 1)), l=nn.Linear(4, 4), n=nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)),
    ],
)
def test_an_unknown_rank_names_what_to_pass(build: Callable[[], nn.Module]) -> None:
    (refusal,) = told(build()).values()
    assert "example_inputs" in refusal.message
    assert refusal.reason is Reason.RANK_UNKNOWN


def test_a_weight_that_is_normalised_is_no_norm_that_stays() -> None:
    assert told(nn.Sequential(Standardised(4, 4, 3), nn.ReLU())) == {}


def test_many_readers_are_counted() -> None:
    model = Net(lambda m, x: (lambda y: [m.n(y), *(y.relu() + i for i in range(6))])(m.c(x)), c=conv(), n=norm())
    assert told(model)["n"].message.endswith("(model):relu as well")
    model = Net(
        lambda m, x: (lambda y: [m.n(y), y.relu(), y.tanh(), y.sin(), y.cos(), y.exp()])(m.c(x)), c=conv(), n=norm()
    )
    assert told(model)["n"].message == (
        "the output of c is used by (model):relu, (model):tanh, (model):sin and 2 more as well"
    )


# ------------------------------------------------------------------ nothing to fold, nothing lost


@pytest.mark.parametrize(
    "build",
    [
        lambda: Net(lambda m, x: m.c((m.c(x) * 0.1).relu()), c=conv()),
        lambda: Net(lambda m, x: m.c((-m.c(x) + 1.0).relu()), c=conv()),
        lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), conv()),
        lambda: nn.Sequential(conv(), nn.ReLU(), conv()),
        lambda: nn.Sequential(nn.ZeroPad2d(1), conv()),
        lambda: nn.Sequential(conv(), nn.Dropout(), nn.Identity()),
        lambda: nn.Sequential(conv(), nn.ChannelShuffle(2)),
    ],
)
def test_nothing_to_fold_is_no_refusal_and_no_fold(build: Callable[[], nn.Module]) -> None:
    model = lively(build())
    result, report = reparam.collapse_with_report(model)
    assert not report.refusals
    assert all(
        f.numbers_after <= f.numbers_before and f.multiply_adds_after < f.multiply_adds_before for f in report.folds
    )
    assert list(result.state_dict()) == list(model.state_dict())


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.c(x) * 0.1,
        lambda m, x: -m.c(x),
        lambda m, x: m.c(x) - 1.0,
        lambda m, x: m.c(x).mul(0.1) + x[..., 1:-1, 1:-1].relu(),
        lambda m, x: m.c(x)[..., 1:-1, 1:-1],
        lambda m, x: m.c(x).flip(1),
    ],
)
def test_a_layer_keeps_its_name_where_only_arithmetic_goes(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = lively(Net(run, c=Child()))
    result = reparam.collapse(model)
    assert list(result.state_dict()) == list(model.state_dict())


# ------------------------------------------------------------------ code that is not read


CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        if {condition}:
            y = y * 2
        return self.norm(y)
"""


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        ("y.sum() > 0", "the answer depends on the numbers of the input"),
        ("int(y.abs().max()) > 3", "the answer depends on the numbers of the input"),
        ("self.missing(y)", "has no attribute 'missing'"),
        ("torch.from_numpy(y.numpy())", "asks for"),
        ("(_ for _ in ()).throw(ValueError('x' * 500))", "xxxx"),
    ],
    ids=["truth", "number", "attribute", "numpy", "long message"],
)
@pytest.mark.parametrize("folder", ["project", "torch", "passes/graph"])
def test_code_that_cannot_be_read_is_named_by_file_and_line(
    condition: str, why: str, folder: str, tmp_path: Path
) -> None:
    file = tmp_path / folder / "my_network.py"
    file.parent.mkdir(parents=True)
    file.write_text(CODE.format(condition=condition))
    spec = importlib.util.spec_from_file_location("my_network", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (refusal,) = reparam.explain(module.Net().eval()).untraced
    assert refusal.message.endswith("(my_network.py:12)")
    assert why in refusal.message or why == "asks for"
