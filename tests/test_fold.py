"""What must fold, from the graph alone: every case becomes one layer and computes what it computed before.

Where no batch norm is involved all weights are small whole numbers in float64 and the comparison is ``==``;
elsewhere the tolerance is 1e-12 of the largest output: a float64 fold of a float64 network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from blocks import (
    ACB,
    DBB,
    ECB,
    OREPA,
    AsksDevice,
    BNAndPad,
    DilatedReparam,
    DOConv,
    IdentityBased1x1,
    LinearNorm,
    MobileOne,
    Net,
    NormLinear,
    NumpyKernel,
    OddKernels,
    QARepVGG,
    RepGhost,
    RepMixer,
    RepVGG,
    RepViT,
    SeqConv3x3,
    TwoHeads,
    WSConv2d,
    add,
    conv_bn,
    lively,
    whole,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import reparam

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

TOLERANCE = 1e-12
"""Relative to the largest output: what a float64 fold of a float64 network may differ by."""

# ------------------------------------------------------------------ the oracle


def holders(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold numbers, by path; what is left of a norm only answers as one."""
    return {
        path: m
        for path, m in model.named_modules()
        if type(m) is not nn.Identity and any(t is not None for t in [*m._parameters.values(), *m._buffers.values()])
    }


def text(layer: nn.Module) -> str:
    """Briefly, what a layer is: the kind, channels, kernel, and what is not at its default."""
    if isinstance(layer, nn.Linear):
        return f"Linear {layer.in_features}->{layer.out_features}"
    if not hasattr(layer, "kernel_size"):
        return type(layer).__name__
    said = f"{type(layer).__name__} {layer.in_channels}->{layer.out_channels} {'x'.join(map(str, layer.kernel_size))}"
    for letter, value, default in (("s", layer.stride, 1), ("d", layer.dilation, 1)):
        if any(v != default for v in value):
            said += f" {letter}{'x'.join(map(str, value)) if len(set(value)) > 1 else value[0]}"
    said += f" g{layer.groups}" if layer.groups > 1 else ""
    return said + (f" {layer.padding_mode}" if layer.padding_mode != "zeros" else "")


def layers(model: nn.Module) -> list[str]:
    return [text(m) for m in holders(model).values()]


def random_like(shape: tuple[int, ...], exact: bool) -> Tensor:
    return torch.randint(-3, 4, shape).double() if exact else torch.randn(shape, dtype=torch.float64)


def assert_same(got: Any, wanted: Any, exact: bool) -> None:
    if isinstance(wanted, (tuple, list)):
        for g, w in zip(got, wanted, strict=True):
            assert_same(g, w, exact)
        return
    assert got.shape == wanted.shape
    gap, scale = float((got - wanted).detach().abs().max()), float(wanted.detach().abs().max())
    assert scale > 0, "an output of zeros would prove nothing"
    assert gap == 0 if exact else gap <= TOLERANCE * scale, f"differs by {gap:.3g} of {scale:.3g}"


def folded(model: nn.Module, shape: tuple[int, ...], *, exact: bool, tokens: bool = False) -> nn.Module:
    """Collapse, and compare on random inputs of two sizes; the caller's model must stay as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    examples = (
        random_like(shape, exact) if tokens else None
    )  # how many dimensions a linear layer reads is not in the graph
    result = reparam.collapse(model, example_inputs=examples)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(result).__name__ == type(model).__name__
    larger = (shape[0] + 1, shape[1], *(s + 6 for s in shape[2:]))
    for size in (shape,) if tokens else (shape, larger):
        x = random_like(size, exact)
        with torch.no_grad():
            assert_same(result(x.clone()), model(x.clone()), exact)
    again = reparam.collapse(result, example_inputs=examples)
    assert str(again) == str(result), "a second run changed something"
    return result


def alone(model: nn.Module) -> nn.Module:
    """The only layer that holds numbers, with the pad that was made for it."""
    (path,) = holders(model)
    parent, _, name = path.rpartition(".")
    around = model.get_submodule(parent)
    return (
        around
        if name == "conv" and [n for n, _ in around.named_children()] == ["pad", "conv"]
        else model.get_submodule(path)
    )


@dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and the one layer that it becomes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    becomes: str
    norm: bool = field(default=False, kw_only=True)
    """Whether the result is rounded: there is a batch norm, a division or another kernel expression inside."""
    pads: bool = field(default=False, kw_only=True)
    """Whether a pad that stood in front stays there: it costs no number and no multiply-add."""


def check(case: Case) -> None:
    model = (lively if case.norm else whole)(case.build())
    result = folded(model, case.shape, exact=not case.norm, tokens=case.becomes.startswith("Linear"))
    assert layers(result) == [case.becomes]
    if case.pads:
        return
    x = random_like(case.shape, not case.norm)
    with torch.no_grad():
        assert_same(alone(result)(x), model(x.clone()), not case.norm)  # nothing else is left around it


def listed(*cases: Case) -> Any:
    assert len({c.name for c in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


IMAGE, LINE, BOX = (2, 4, 9, 8), (2, 4, 11), (2, 4, 6, 7, 5)

# ------------------------------------------------------------------ layers and their batch norms

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INPUTS = {1: LINE, 2: IMAGE, 3: BOX}


def frozen(dim: int) -> nn.Module:
    return pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(dim)


@listed(
    *(
        Case(
            f"conv{n}d{suffix}",
            lambda n=n, o=o: nn.Sequential(CONVS[n](4, 6, 3, **o), NORMS[n](6)),
            INPUTS[n],
            f"Conv{n}d 4->6 {'x'.join('3' * n)}{said}",
            norm=True,
        )
        for n in (1, 2, 3)
        for suffix, o, said in (("", {}, ""), ("-grouped", {"groups": 2, "stride": 2, "bias": False}, " s2 g2"))
    ),
    *(
        Case(
            f"transposed{n}d-{g}",
            lambda n=n, g=g: nn.Sequential(
                TRANSPOSED[n](4, 6, 3, stride=2, padding=1, output_padding=1, groups=g), NORMS[n](6)
            ),
            INPUTS[n],
            f"ConvTranspose{n}d 4->6 {'x'.join('3' * n)} s2" + (" g2" if g > 1 else ""),
            norm=True,
        )
        for n in (1, 2, 3)
        for g in (1, 2)
    ),
    Case(
        "transposed-dilated",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=3, output_padding=2, bias=False), nn.BatchNorm2d(6)
        ),
        IMAGE,
        "ConvTranspose2d 4->6 3x3 s2 d3",
        norm=True,
    ),
    Case("linear", lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4), "Linear 4->6", norm=True),
    Case("linear-tokens", lambda: LinearNorm(4, 6), (2, 5, 4), "Linear 4->6", norm=True),
    Case("norm-linear", lambda: NormLinear(4, 6), (5, 4), "Linear 4->6", norm=True),
    Case(
        "norm-conv", lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE, "Conv2d 4->6 3x3", norm=True
    ),
    Case(
        "sync-norm", lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE, "Conv2d 4->6 3x3", norm=True
    ),
    Case("frozen-norm", lambda: nn.Sequential(nn.Conv2d(4, 6, 3), frozen(6)), IMAGE, "Conv2d 4->6 3x3", norm=True),
    Case(
        "norm-without-affine",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "norm-odd-eps",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.37)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "two-norms",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, eps=0.1)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "depthwise-multiplier",
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
        IMAGE,
        "Conv2d 4->8 3x3 g4",
        norm=True,
    ),
    Case(
        "rectangular",
        lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 5), (1, 2), (1, 0), (3, 1)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 2x5 s1x2 d3x1",
        norm=True,
    ),
    Case(
        "same-even",
        lambda: nn.Sequential(nn.Conv2d(4, 6, (4, 2), padding="same"), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 4x2",
        norm=True,
    ),
    Case(
        "valid",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="valid"), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    *(
        Case(
            f"mode-{mode}",
            lambda mode=mode: nn.Sequential(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode), nn.BatchNorm2d(6)),
            IMAGE,
            f"Conv2d 4->6 3x3 {mode}",
            norm=True,
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    Case(
        "mode-same-even",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 4x4 circular",
        norm=True,
    ),
)
def test_layer_and_norm(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ functions with expressions as weights


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 1


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@listed(
    Case(
        "functional-batch-norm",
        lambda: Net(
            lambda m, x: F.batch_norm(
                F.conv2d(x, m.w, m.b, padding=1), m.running_mean, m.running_var, m.weight, m.bias
            ),
            w=param(6, 4, 3, 3),
            b=param(6),
            running_mean=torch.zeros(6),
            running_var=torch.ones(6),
            weight=param(6),
            bias=param(6),
        ),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "functional-1d",
        lambda: Net(lambda m, x: F.conv1d(x, 2 * m.w, m.b, stride=2) + 1, w=param(6, 4, 3), b=param(6)),
        LINE,
        "Conv1d 4->6 3 s2",
    ),
    Case(
        "functional-3d",
        lambda: Net(lambda m, x: F.conv3d(x, -m.w, groups=2) * 2, w=param(6, 2, 2, 2, 2)),
        BOX,
        "Conv3d 4->6 2x2x2 g2",
    ),
    Case(
        "functional-transposed",
        lambda: Net(lambda m, x: -F.conv_transpose2d(x, m.w + m.w, m.b, stride=3), w=param(4, 6, 3, 3), b=param(6)),
        IMAGE,
        "ConvTranspose2d 4->6 3x3 s3",
    ),
    Case(
        "functional-linear",
        lambda: Net(lambda m, x: F.linear(x, m.w - m.v, m.b), w=param(6, 4), v=param(6, 4), b=param(6)),
        (3, 5, 4),
        "Linear 4->6",
    ),
    Case(
        "matmul",
        lambda: Net(lambda m, x: F.linear(x, m.w) + x @ m.v, w=param(6, 4), v=param(4, 6)),
        (3, 4),
        "Linear 4->6",
    ),
    Case("do-conv", lambda: DOConv(4, 6, padding=1), IMAGE, "Conv2d 4->6 3x3"),
    Case("do-conv-grouped", lambda: DOConv(4, 6, groups=2, stride=2), IMAGE, "Conv2d 4->6 3x3 s2 g2"),
    Case("orepa", lambda: OREPA(4), IMAGE, "Conv2d 4->4 3x3", norm=True),
    Case("identity-plus-weight", lambda: IdentityBased1x1(4), IMAGE, "IdentityBased1x1 4->4 1x1"),
    Case("identity-plus-weight-grouped", lambda: IdentityBased1x1(4, groups=2), IMAGE, "IdentityBased1x1 4->4 1x1 g2"),
    Case(
        "standardised",
        lambda: nn.Sequential(WSConv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "parametrized",
        lambda: nn.Sequential(parametrized(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "parametrized-linear",
        lambda: nn.Sequential(parametrized(nn.Linear(4, 6)), nn.BatchNorm1d(6)),
        (5, 4),
        "Linear 4->6",
        norm=True,
    ),
    Case(
        "weight-norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "weight-norm-alone",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3))),
        LINE,
        "Conv1d 4->6 3",
        norm=True,
    ),
    Case(
        "spectral-norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "old-weight-norm",
        lambda: nn.Sequential(old_weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "old-spectral-norm",
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_expression(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ pools, pads and crops


def conv(inp: int = 4, out: int = 6, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **options)


@listed(
    Case(
        "pool-branch",
        lambda: add(conv(kernel=4, padding=1, stride=2), nn.Sequential(conv(kernel=1), nn.AvgPool2d(2, 2))),
        IMAGE,
        "Conv2d 4->6 4x4 s2",
    ),
    Case("padded-pool", lambda: add(conv(4, 4, padding=1), nn.AvgPool2d(3, 1, 1)), IMAGE, "Conv2d 4->4 3x3", norm=True),
    Case("pool1d", lambda: add(nn.Conv1d(4, 4, 4), nn.AvgPool1d(4, 1)), LINE, "Conv1d 4->4 4"),
    Case("pool3d", lambda: add(nn.Conv3d(4, 4, 2), nn.AvgPool3d(2, 1)), BOX, "Conv3d 4->4 2x2x2"),
    Case("pool-divisor", lambda: add(conv(4, 4), nn.AvgPool2d(3, 1, divisor_override=2)), IMAGE, "Conv2d 4->4 3x3"),
    Case(
        "pool-function",
        lambda: Net(lambda m, x: m.conv(x) - F.avg_pool2d(x, (2, 4), stride=1), conv=conv(4, 4, (2, 4))),
        IMAGE,
        "Conv2d 4->4 2x4",
    ),
    Case("zero-pad", lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), conv()), IMAGE, "Conv2d 4->6 3x3", pads=True),
    Case(
        "zero-pad-and-own",
        lambda: nn.Sequential(nn.ZeroPad2d(1), conv(padding=(0, 1)), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
        pads=True,
    ),
    Case(
        "constant-pad-zero",
        lambda: nn.Sequential(nn.ConstantPad1d((2, 1), 0.0), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
        LINE,
        "Conv1d 4->6 3",
        norm=True,
        pads=True,
    ),
    Case(
        "pad3d",
        lambda: nn.Sequential(nn.ZeroPad3d(1), nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)),
        BOX,
        "Conv3d 4->6 3x3x3",
        norm=True,
        pads=True,
    ),
    *(
        Case(
            f"pad-{mode}",
            lambda mode=mode: Net(
                lambda m, x: m.bn(m.conv(F.pad(x, (1, 2, 1, 1), mode=mode))), conv=conv(), bn=nn.BatchNorm2d(6)
            ),
            IMAGE,
            "Conv2d 4->6 3x3",
            norm=True,
            pads=True,
        )
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Case(
        "reflection-pad",
        lambda: nn.Sequential(nn.ReflectionPad2d(1), conv(), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
        pads=True,
    ),
    Case(
        "replication-pad",
        lambda: nn.Sequential(nn.ReplicationPad1d(1), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
        LINE,
        "Conv1d 4->6 3",
        norm=True,
        pads=True,
    ),
    Case(
        "circular-pad",
        lambda: nn.Sequential(nn.CircularPad3d(1), nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)),
        BOX,
        "Conv3d 4->6 3x3x3",
        norm=True,
        pads=True,
    ),
    Case(
        "same-mode-branches",
        lambda: add(
            conv(padding=1, padding_mode="reflect"),
            conv(kernel=1),
            conv(kernel=(1, 3), padding=(0, 1), padding_mode="reflect"),
        ),
        IMAGE,
        "Conv2d 4->6 3x3 reflect",
    ),
    Case(
        "1x1-then-reflect",
        lambda: nn.Sequential(conv(4, 4, 1), conv(4, 4, padding=1, padding_mode="reflect")),
        IMAGE,
        "Conv2d 4->4 3x3 reflect",
    ),
    Case(
        "1x1-without-bias-then-padded",
        lambda: nn.Sequential(conv(4, 4, 1, bias=False), conv(4, 4, padding=1)),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case(
        "norm-then-own-value",
        lambda: nn.Sequential(conv(4, 4, 1, bias=False), BNAndPad(1, 4), conv(4, 4)),
        IMAGE,
        "Conv2d 4->4 3x3",
        norm=True,
    ),
    Case(
        "pad-input-then-valid",
        lambda: nn.Sequential(nn.ZeroPad2d(1), conv(4, 4, 1), nn.BatchNorm2d(4), conv(4, 6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
        pads=True,
    ),
    Case(
        "crop-by-pad",
        lambda: Net(lambda m, x: m.a(x) + m.b(F.pad(x, (-1, -1, 0, 0))), a=conv(), b=conv(kernel=(3, 1))),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "crop-by-slice",
        lambda: Net(lambda m, x: m.a(x) + m.b(x[:, :, 1:-1, 1:-1]), a=conv(), b=conv(kernel=1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "crop-by-ellipsis",
        lambda: Net(lambda m, x: m.a(x) + m.b(x)[..., 1:-1], a=conv(padding=(1, 0)), b=conv(kernel=1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "crop-behind-padding",
        lambda: Net(lambda m, x: m.conv(x)[:, :, 1:, :-1] * 3, conv=conv(padding=1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "strided-slice",
        lambda: Net(lambda m, x: m.a(x) + m.b(x[:, :, ::2, ::2]), a=conv(stride=2, padding=1), b=conv(kernel=1)),
        IMAGE,
        "Conv2d 4->6 3x3 s2",
    ),
    Case(
        "crop1d",
        lambda: Net(lambda m, x: m.a(x) + m.b(x[:, :, 2:-2]), a=nn.Conv1d(4, 6, 5), b=nn.Conv1d(4, 6, 1)),
        LINE,
        "Conv1d 4->6 5",
    ),
)
def test_pool_pad_crop(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ channels: cat, split, index, shuffle


def shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def two(first: nn.Module | None = None, second: nn.Module | None = None) -> dict[str, nn.Module]:
    return {"a": first or conv(padding=1), "b": second or conv(kernel=1)}


@listed(
    Case(
        "cat",
        lambda: Net(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), **two(conv(kernel=1))),
        IMAGE,
        "Conv2d 4->12 1x1",
    ),
    Case(
        "cat-then-conv",
        lambda: Net(lambda m, x: m.c(torch.cat((m.a(x), m.b(x)), dim=1)), c=conv(12, 4, 1), **two()),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case(
        "cat-negative-axis",
        lambda: Net(lambda m, x: torch.cat([m.a(x), m.b(x)], -3), **two(conv(kernel=1))),
        IMAGE,
        "Conv2d 4->12 1x1",
    ),
    Case(
        "cat-tokens",
        lambda: Net(lambda m, x: torch.cat([m.a(x), m.b(x)], -1), a=nn.Linear(4, 6), b=nn.Linear(4, 2)),
        (3, 5, 4),
        "Linear 4->8",
    ),
    Case(
        "chunk-and-sum",
        lambda: Net(lambda m, x: (lambda p: p[0] + p[1])(m.a(x).chunk(2, 1)), a=conv()),
        IMAGE,
        "Conv2d 4->3 3x3",
    ),
    Case(
        "chunk-and-difference",
        lambda: Net(lambda m, x: (lambda p: p[0] - 2 * p[1])(m.a(x).chunk(2, dim=1)), a=conv()),
        IMAGE,
        "Conv2d 4->3 3x3",
    ),
    Case(
        "split",
        lambda: Net(lambda m, x: (lambda p: p[0] - p[1])(torch.split(m.a(x), 3, 1)), a=conv()),
        IMAGE,
        "Conv2d 4->3 3x3",
    ),
    Case(
        "split-sizes",
        lambda: Net(lambda m, x: (lambda p: m.b(p[0]) + p[1])(m.a(x).split([2, 4], dim=1)), a=conv(), b=conv(2, 4, 1)),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case(
        "split-after-conv",
        lambda: Net(
            lambda m, x: (lambda y: torch.cat([m.a(y[:, :2]), m.b(y[:, 2:])], 1))(m.c(x)),
            a=conv(2, 3, 1),
            b=conv(2, 3, 1),
            c=conv(4, 4, 1),
        ),
        IMAGE,
        "Conv2d 4->6 1x1",
    ),
    Case(
        "partial-conv",
        lambda: Net(
            lambda m, x: (lambda y: m.d(torch.cat([m.a(y[:, :2]), y[:, 2:]], 1)))(m.c(x)),
            a=conv(2, 2, 1),
            c=conv(4, 4),
            d=conv(4, 4, 1),
        ),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case("narrow", lambda: Net(lambda m, x: m.a(x).narrow(1, 2, 3) * 2, a=conv()), IMAGE, "Conv2d 4->3 3x3"),
    Case("index-slice", lambda: Net(lambda m, x: m.a(x)[:, 1:5:2], a=conv()), IMAGE, "Conv2d 4->2 3x3"),
    Case("index-list", lambda: Net(lambda m, x: m.a(x)[:, [5, 0, 3]], a=conv()), IMAGE, "Conv2d 4->3 3x3"),
    Case(
        "index-twice",
        lambda: Net(lambda m, x: (lambda y: y[:, :3] + y[:, 3:])(m.a(x)), a=conv()),
        IMAGE,
        "Conv2d 4->3 3x3",
    ),
    Case(
        "shuffle-module",
        lambda: nn.Sequential(conv(), nn.ChannelShuffle(3), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "shuffle-function",
        lambda: Net(lambda m, x: F.channel_shuffle(m.a(x), 2) * 2, a=conv()),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "shuffle-by-views",
        lambda: Net(lambda m, x: m.bn(shuffle(m.a(x), 3)), a=conv(), bn=nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "shuffle-between-groups",
        lambda: Net(lambda m, x: m.b(shuffle(m.a(x), 2)), a=conv(4, 4, 1, groups=2), b=conv(4, 4, 1, groups=2)),
        IMAGE,
        "Conv2d 4->4 1x1",
    ),
    Case(
        "flip-channels",
        lambda: Net(lambda m, x: m.bn(m.a(x).flip(1)), a=conv(), bn=nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case("roll-channels", lambda: Net(lambda m, x: torch.roll(m.a(x), 2, 1) * 2, a=conv()), IMAGE, "Conv2d 4->6 3x3"),
    Case(
        "to-tokens-and-back",
        lambda: Net(
            lambda m, x: (lambda y: m.bn(y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(y.shape)))(m.a(x)),
            a=conv(),
            bn=nn.BatchNorm2d(6),
        ),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "last-and-back",
        lambda: Net(lambda m, x: (m.a(x).permute(0, 2, 3, 1) * m.scale).permute(0, 3, 1, 2), a=conv(), scale=param(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "unflatten-and-sum",
        lambda: Net(lambda m, x: (lambda y: y[:, 0] + y[:, 1])(m.a(x).unflatten(1, (2, 3))), a=conv()),
        IMAGE,
        "Conv2d 4->3 3x3",
    ),
    Case(
        "stack-and-index",
        lambda: Net(lambda m, x: (lambda y: y[:, 1] - y[:, 0])(torch.stack([m.a(x), m.b(x)], 1)), **two()),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
)
def test_channels(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ arithmetic


def drop_path(**options: Any) -> nn.Module:
    return pytest.importorskip("torchvision.ops").StochasticDepth(0.5, "row", **options)


@listed(
    Case(
        "scale-and-shift",
        lambda: Net(lambda m, x: m.a(x) * m.scale + m.shift, a=conv(), scale=param(1, 6, 1, 1), shift=param(6, 1, 1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "scale-before",
        lambda: Net(lambda m, x: m.a(m.scale * x), a=conv(padding=1), scale=param(4, 1, 1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "shift-before",
        lambda: Net(lambda m, x: m.a(x - m.shift), a=conv(), shift=param(4, 1, 1)),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "layer-scale-tokens",
        lambda: Net(lambda m, x: m.a(x).mul_(m.scale), a=nn.Linear(4, 6), scale=param(6)),
        (2, 5, 4),
        "Linear 4->6",
    ),
    Case("one-number", lambda: Net(lambda m, x: m.a(x) * m.scale, a=conv(), scale=param(1)), IMAGE, "Conv2d 4->6 3x3"),
    Case(
        "no-dimension",
        lambda: Net(lambda m, x: m.a(x) + m.scale, a=conv(), scale=nn.Parameter(torch.tensor(2.0))),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case("scalars", lambda: Net(lambda m, x: -((3 - m.a(x)) * 2 + 1) / 4, a=conv()), IMAGE, "Conv2d 4->6 3x3"),
    Case(
        "functions",
        lambda: Net(
            lambda m, x: torch.sub(torch.mul(torch.neg(m.a(x)), 2), torch.add(x, 1, alpha=3), alpha=2),
            a=conv(4, 4, padding=1),
        ),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case(
        "methods",
        lambda: Net(lambda m, x: m.a(x).add(m.b(x), alpha=2).sub(5).mul(3).neg().div(2), **two(conv(kernel=1))),
        IMAGE,
        "Conv2d 4->6 1x1",
    ),
    Case(
        "reversed-difference",
        lambda: Net(lambda m, x: torch.rsub(m.a(x), 2) - (m.shift - m.b(x)), shift=param(6, 1, 1), **two()),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case("in-place", lambda: Net(lambda m, x: m.a(x).add_(m.b(x)).mul_(2).sub_(1), **two()), IMAGE, "Conv2d 4->6 3x3"),
    Case("minus-itself", lambda: Net(lambda m, x: (lambda y: 3 * y - y)(m.a(x)), a=conv()), IMAGE, "Conv2d 4->6 3x3"),
    Case(
        "divided-by-weights",
        lambda: Net(lambda m, x: m.a(x) / (m.scale * m.scale + 1), a=conv(), scale=param(6, 1, 1)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "addcmul",
        lambda: Net(lambda m, x: torch.addcmul(x, m.a(x), m.scale), a=conv(4, 4, padding=1), scale=param(4, 1, 1)),
        IMAGE,
        "Conv2d 4->4 3x3",
    ),
    Case(
        "identity-and-dropout",
        lambda: nn.Sequential(conv(), nn.Identity(), nn.Dropout2d(0.3), nn.Dropout(0.1), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "functional-dropout",
        lambda: Net(lambda m, x: m.bn(F.dropout(m.a(x), 0.5, m.training)), a=conv(), bn=nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case(
        "stochastic-depth",
        lambda: Net(
            lambda m, x: x + m.drop(m.bn(m.a(x))), a=conv(4, 4, padding=1), bn=nn.BatchNorm2d(4), drop=drop_path()
        ),
        IMAGE,
        "Conv2d 4->4 3x3",
        norm=True,
    ),
    Case("heads", lambda: TwoHeads(6, 5), (3, 6), "Linear 6->5", norm=True),
    Case(
        "average-of-heads",
        lambda: Net(lambda m, x: (m.a(x) + m.b(x)) / 2, a=nn.Linear(4, 6), b=nn.Linear(4, 6)),
        (3, 4),
        "Linear 4->6",
    ),
    Case(
        "nested-sums",
        lambda: add(add(conv(padding=1), conv(kernel=1)), add(conv(kernel=(1, 3), padding=(0, 1)))),
        IMAGE,
        "Conv2d 4->6 3x3",
    ),
    Case(
        "even-and-odd-kernels",
        lambda: add(conv(kernel=4, padding="same"), conv(kernel=3, padding=1), conv(kernel=2, padding="same")),
        IMAGE,
        "Conv2d 4->6 4x4",
    ),
    Case(
        "asymmetric-branches",
        lambda: add(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(kernel=2)), conv(kernel=1)),
        IMAGE,
        "Conv2d 4->6 2x2",
    ),
    Case("groups-and-dense", lambda: add(conv(padding=1), conv(groups=2, kernel=1)), IMAGE, "Conv2d 4->6 3x3"),
    Case(
        "two-groupings",
        lambda: add(conv(4, 12, groups=4, padding=1), conv(4, 12, groups=2, padding=1)),
        IMAGE,
        "Conv2d 4->12 3x3 g2",
    ),
    Case(
        "dilated-branch", lambda: add(conv(kernel=5, padding=2), conv(padding=2, dilation=2)), IMAGE, "Conv2d 4->6 5x5"
    ),
    Case("both-dilated", lambda: add(conv(padding=2, dilation=2), conv(kernel=1)), IMAGE, "Conv2d 4->6 3x3 d2"),
    Case(
        "strided-branches",
        lambda: add(conv(stride=(2, 3), padding=1), conv(kernel=1, stride=(2, 3))),
        IMAGE,
        "Conv2d 4->6 3x3 s2x3",
    ),
    Case(
        "strided-sequence",
        lambda: nn.Sequential(conv(4, 4, 1, stride=2, bias=False), conv(4, 4, padding=1, stride=2)),
        IMAGE,
        "Conv2d 4->4 3x3 s4 d2",
    ),
    Case(
        "conv-then-1x1",
        lambda: nn.Sequential(conv(4, 4, padding=1, stride=2), conv(4, 4, 1), conv(4, 4, 1)),
        IMAGE,
        "Conv2d 4->4 3x3 s2",
    ),
    Case("two-linears", lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 6)), (3, 4), "Linear 4->6"),
)
def test_arithmetic(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ published blocks


@listed(
    Case("acb", lambda: ACB(4, 6, 3, padding=1), IMAGE, "Conv2d 4->6 3x3", norm=True),
    Case("acb-cropped", lambda: ACB(4, 6, 5, padding=0, stride=2), IMAGE, "Conv2d 4->6 5x5 s2", norm=True),
    Case(
        "acb-dilated-grouped",
        lambda: ACB(4, 6, 3, padding=2, dilation=2, groups=2),
        IMAGE,
        "Conv2d 4->6 3x3 d2 g2",
        norm=True,
    ),
    Case("dbb", lambda: DBB(4, 6), IMAGE, "Conv2d 4->6 3x3", norm=True),
    Case("dbb-strided", lambda: DBB(4, 6, 5, stride=2), IMAGE, "Conv2d 4->6 5x5 s2", norm=True),
    Case("dbb-grouped", lambda: DBB(4, 6, groups=2), IMAGE, "Conv2d 4->6 3x3 g2", norm=True),
    Case("dbb-depthwise", lambda: DBB(4, 4, groups=4), IMAGE, "Conv2d 4->4 3x3 g4", norm=True),
    Case("repvgg", lambda: RepVGG(4, 4), IMAGE, "Conv2d 4->4 3x3", norm=True),
    Case("repvgg-strided", lambda: RepVGG(4, 6, stride=2, groups=2), IMAGE, "Conv2d 4->6 3x3 s2 g2", norm=True),
    Case("mobileone", lambda: MobileOne(4, 4, groups=4), IMAGE, "Conv2d 4->4 3x3 g4", norm=True),
    Case("mobileone-pointwise", lambda: MobileOne(4, 6, k=1), IMAGE, "Conv2d 4->6 1x1", norm=True),
    Case("repmixer", lambda: RepMixer(4), IMAGE, "Conv2d 4->4 3x3 g4", norm=True),
    Case("repvit", lambda: RepViT(4), IMAGE, "Conv2d 4->4 3x3 g4", norm=True),
    Case("repghost", lambda: RepGhost(4), IMAGE, "Conv2d 4->4 3x3 g4", norm=True),
    Case("qarepvgg", lambda: QARepVGG(4), IMAGE, "Conv2d 4->4 3x3", norm=True),
    Case("large-kernel", lambda: DilatedReparam(4), (2, 4, 13, 12), "Conv2d 4->4 7x7 g4", norm=True),
    Case("odd-kernels", lambda: OddKernels(4), IMAGE, "Conv2d 4->4 5x5 g4", norm=True),
    Case("ecb", lambda: ECB(4), IMAGE, "Conv2d 4->4 3x3"),
)
def test_published_block(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ what torch.fx cannot read


@listed(
    Case(
        "item-assignment",
        lambda: nn.Sequential(SeqConv3x3("conv1x1-conv3x3", 4, 6), nn.BatchNorm2d(6)),
        IMAGE,
        "Conv2d 4->6 3x3",
        norm=True,
    ),
    Case("asks-device", lambda: nn.Sequential(AsksDevice(4, 6)), IMAGE, "Conv2d 4->6 3x3", norm=True),
    Case(
        "numpy-kernel", lambda: nn.Sequential(NumpyKernel(4, 6), nn.BatchNorm2d(6)), IMAGE, "Conv2d 4->6 3x3", norm=True
    ),
    Case(
        "probed-branch",
        lambda: add(NumpyKernel(4, 4), nn.BatchNorm2d(4), conv(4, 4, 1)),
        IMAGE,
        "Conv2d 4->4 3x3",
        norm=True,
    ),
)
def test_probed(case: Case) -> None:
    check(case)


class Thresholded(nn.Module):
    """Control flow on data at the top: only the parts can be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.bn = conv_bn(4, 4, 3, padding=1), RepVGG(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.sum()) > 0:
            x = self.bn(x.relu())
        return self.body(x)


def test_untraceable_outer_forward_is_compiled_inside() -> None:
    result, report = reparam.collapse_with_report(lively(Thresholded()))
    assert layers(result) == ["Conv2d 4->4 3x3", "Conv2d 4->4 3x3", "BatchNorm2d"]
    assert [r.reason for r in report.untraced] == [reparam.Reason.QUESTION]
    folded(lively(Thresholded()), IMAGE, exact=False)


class Auxiliary(nn.Module):
    """A head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = RepVGG(4, 4), RepVGG(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        y = self.head(F.relu(x).mean((2, 3)))
        return (y, self.aux(x)) if self.training else y


def test_modules_that_eval_never_runs_fold_too() -> None:
    model = lively(Auxiliary())
    result = folded(model, IMAGE, exact=False)
    assert layers(result) == ["Conv2d 4->4 3x3", "Conv2d 4->4 3x3", "Linear 4->3"]
    x = random_like(IMAGE, exact=False)
    assert_same(result.aux(x), model.aux(x), exact=False)


# ------------------------------------------------------------------ sharing


def test_container_called_twice_is_compiled_once() -> None:
    model = lively(Net(lambda m, x: m.block(F.relu(m.block(x))), block=RepVGG(4, 4)))
    assert layers(folded(model, IMAGE, exact=False)) == ["Conv2d 4->4 3x3"]


def test_container_registered_twice_is_compiled_once() -> None:
    block = RepVGG(4, 4)
    result = folded(lively(nn.Sequential(block, nn.ReLU(), block)), IMAGE, exact=False)
    assert layers(result) == ["Conv2d 4->4 3x3"]
    assert result[0] is result[2]


def test_shared_weight_is_not_counted_as_saved() -> None:
    """Two norms on one convolution's weight: folding both would need two weights where there was one."""
    model = Net(lambda m, x: (m.n1(m.a(x)), m.n2(m.b(x))), a=conv(bias=False), b=conv(bias=False), n1=nn.BatchNorm2d(6),
                n2=nn.BatchNorm2d(6))  # fmt: skip
    model.b.weight = model.a.weight
    result = folded(lively(model), IMAGE, exact=False)
    numbers = [sum(p.numel() for p in m.parameters()) + sum(b.numel() for b in m.buffers()) for m in (model, result)]
    assert numbers[1] <= numbers[0]


# ------------------------------------------------------------------ library layers


def test_norm_that_activates_keeps_its_activation() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = lively(nn.Sequential(conv(bias=False), timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU)))
    result = folded(model, IMAGE, exact=False)
    assert layers(result) == ["Conv2d 4->6 3x3"]
    assert any(isinstance(m, nn.SiLU) for m in result.modules())


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_that_pads_by_size_takes_its_norm(stride: int) -> None:
    """TensorFlow's ``same``: the padding depends on the input's size, so only per-channel maps go in."""
    timm_layers = pytest.importorskip("timm.layers")
    convolution = timm_layers.Conv2dSame(4, 6, 3, stride=stride, bias=False)
    model = lively(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU()))
    assert layers(folded(model, IMAGE, exact=False)) == [f"Conv2dSame 4->6 3x3{' s2' if stride > 1 else ''}"]


# ------------------------------------------------------------------ the checks above can fail


def test_planted_defect_is_seen() -> None:
    model = whole(add(conv(padding=1), conv(kernel=1)))
    result = copy.deepcopy(reparam.collapse(model))
    with torch.no_grad():
        next(result.parameters())[0, 0, 0, 0] += 1
    x = random_like(IMAGE, exact=True)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(result(x), model(x), exact=True)


def test_planted_leftover_is_seen() -> None:
    with pytest.raises(AssertionError):
        check(
            Case("", lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, "Conv2d 4->6 3x3", norm=True)
        )


class LongBranch(nn.Module):
    """A sum whose one branch is a chain of more affine steps than Python would recurse through."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.branch = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        for _ in range(400):
            y = y * 1.001
        return self.main(x) + y


def test_a_long_branch_folds() -> None:
    folded, explanation = reparam.collapse_with_report(LongBranch().double().eval())
    assert reparam.Counts.of(folded).convs == 1
    assert len(explanation.folds) == 1


class PositionedAffine(nn.Module):
    """A scale and a shift of shape (1, 1, C) before a linear layer, as in ResMLP, on maps of unknown rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.full((1, 1, 4), 2.0)), nn.Parameter(torch.ones(1, 1, 4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.addcmul(self.shift, self.scale, x))


def test_a_parameter_for_three_dimensions_is_proven_on_three() -> None:
    model = PositionedAffine().double().eval()
    folded, explanation = reparam.collapse_with_report(model)
    assert len(explanation.folds) == 1
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.allclose(folded(x), model(x), rtol=0, atol=TOLERANCE)


def test_an_activation_that_all_layers_share_does_not_keep_them_from_folding() -> None:
    """One stateless module under many names, in code that is traced and in a part of what is not."""
    act = nn.SiLU()

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 1), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.a(x) + self.b(x))

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Shared(), Shared())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) < 1e9 else x

    model = lively(nn.Sequential(Shared(), Untraceable(), Shared()))
    result = reparam.collapse(model)
    assert layers(result).count("Conv2d 4->4 3x3") == 4
    assert not any("1x1" in layer or "Norm" in layer for layer in layers(result))
    assert {id(m) for m in result.modules() if isinstance(m, nn.SiLU)} == {id(result[0].act)}
    x = random_like(IMAGE, exact=False)
    with torch.no_grad():
        assert_same(result(x), model(x), exact=False)


def test_planning_on_meta_asks_no_numbers_of_parameters_outside_of_layers() -> None:
    model = lively(
        Net(
            lambda m, x: m.n(m.a(x)) * m.scale,
            a=nn.Conv2d(4, 4, 3),
            n=nn.BatchNorm2d(4),
            scale=nn.Parameter(torch.ones(4, 1, 1)),
        )
    )
    assert len(reparam.explain(model.to("meta")).folds) == 1


def test_explain_reads_what_folds_once_more() -> None:
    """A block that is called twice is one layer when it is folded; then the norm behind each call folds too."""
    model = lively(Net(lambda m, x: m.n(m.a(m.n(m.a(x)).relu())), a=Both(), n=nn.BatchNorm2d(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = repr(model)
    told = reparam.explain(model)
    _, report = reparam.collapse_with_report(model)
    assert [fold.layers for fold in told.folds] == [fold.layers for fold in report.folds]
    assert told.folds[-1].layers == ("a", "n")
    assert (told.refusals, told.untraced) == (report.refusals, report.untraced)
    assert repr(model) == layout
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Both(nn.Module):
    """Two layers of one input, added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.point(x)
