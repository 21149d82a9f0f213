"""Small networks that between them run every part of the compiler; what planted defects are tried on.

Each is a function that gives a float64 network in eval mode, random statistics included, and the shapes of its inputs.
Sizes are odd and even on purpose: a size that a stride divides hides an output that is one too short.
"""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from blocks import (
    ACB,
    DBB,
    ECB,
    OREPA,
    DilatedReparam,
    DOConv,
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
    TwoHeads,
    WSConv2d,
    add,
    conv_bn,
    lively,
)
from small_networks import Activated, Branches, ConvBN, Parallel, Residual
from small_networks import Net as SmallNet
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BLOCKS", "FLAT", "NETWORKS", "PLAIN", "Shapes"]

Shapes = tuple[tuple[int, ...], ...]

FLAT = ((2, 4, 11, 13), (1, 4, 8, 9), (3, 4, 17, 10), (2, 4, 15, 15))
"""Maps of four channels."""

WIDE = ((2, 8, 11, 13), (1, 8, 8, 9), (3, 8, 17, 10))
ROWS = ((5, 6), (2, 6))

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Shapes]]] = {}
"""Name to network and input shapes."""


def network(shapes: Shapes) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers a network under the name of the function that makes it."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def ready() -> tuple[nn.Module, Shapes]:
            torch.manual_seed(0)
            return lively(make()), shapes

        NETWORKS[make.__name__] = ready
        return make

    return register


def simple(name: str, shapes: Shapes, make: Callable[[], nn.Module]) -> None:
    make.__name__ = name
    network(shapes)(make)


def conv(inp: int = 4, out: int = 4, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **{"padding": 1 if kernel == 3 else 0, **options})


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def norm(width: int = 4, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, **options)


# ------------------------------------------------------------------ norms behind what moves or averages


@network(FLAT)
class TwoAverages(nn.Module):
    """Two means of one value over its rows, of which the second is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.relu(self.n(y.mean(3) + F.adaptive_avg_pool2d(y, (None, 1)).squeeze(3).flip(2)))


@network(FLAT)
class ReadBetween(nn.Module):
    """The average is read by another as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mean((2, 3))
        return torch.relu(self.n(y)) + torch.tanh(y)


@network(FLAT)
class ShuffledPixels(nn.Module):
    """Four channels of the convolution are one of the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(4, 12), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(F.pixel_shuffle(self.a(x), 2)))


# ------------------------------------------------------------------ blocks of the literature

simple("repvgg", FLAT, lambda: seq(RepVGG(4, 4), nn.ReLU(), RepVGG(4, 6, stride=2), nn.ReLU(), RepVGG(6, 6, groups=2)))
simple("acb", FLAT, lambda: seq(ACB(4, 4, 3, padding=1), nn.ReLU(), ACB(4, 4, 3, padding=0)))
simple("acb_stride_dilation", FLAT, lambda: seq(ACB(4, 4, 3, 2, 1), nn.ReLU(), ACB(4, 4, 3, 1, 2, 2)))
simple("mobileone", FLAT, lambda: seq(MobileOne(4, 4), nn.ReLU(), MobileOne(4, 4, groups=4, stride=2)))
simple("repmixer", FLAT, lambda: RepMixer(4))
simple("repvit", FLAT, lambda: RepViT(4))
simple("qarepvgg", FLAT, lambda: QARepVGG(4))
simple("repghost", FLAT, lambda: RepGhost(4))
simple("dilated_reparam", FLAT, lambda: DilatedReparam(4))
simple("odd_kernels", FLAT, lambda: OddKernels(4))
simple("dbb", FLAT, lambda: seq(DBB(4, 4), nn.ReLU(), DBB(4, 6, stride=2)))
simple("dbb_groups", FLAT, lambda: seq(DBB(4, 4, groups=2), nn.ReLU(), DBB(4, 4, groups=4)))
simple("ecb", FLAT, lambda: ECB(4))
simple("doconv", FLAT, lambda: DOConv(4, 4, padding=1))
simple("orepa", FLAT, lambda: OREPA(4))
simple("weight_standardised", FLAT, lambda: seq(WSConv2d(4, 4, 3, padding=1), norm(), nn.ReLU()))
simple("numpy_kernel", FLAT, lambda: seq(NumpyKernel(4, 4), norm(), nn.ReLU()))
simple("linear_norm", ((2, 5, 6), (3, 4, 6)), lambda: seq(LinearNorm(6, 5), nn.GELU(), LinearNorm(5, 4)))
simple("norm_linear", ROWS, lambda: NormLinear(6, 3))
simple("two_heads", ROWS, lambda: TwoHeads(6, 3))

# ------------------------------------------------------------------ laws, one by one

simple("conv_norm", FLAT, lambda: seq(conv(bias=False), norm(eps=1e-2), nn.ReLU(), conv(), norm(affine=False)))
simple("point_square", FLAT, lambda: seq(conv(4, 8, 1, bias=False), norm(8), conv(8, 4, 3, padding=0)))
simple("square_point", FLAT, lambda: seq(conv(4, 6), norm(6), conv(6, 4, 1), norm()))
simple("point_square_padded", FLAT, lambda: seq(conv(4, 8, 1, bias=False), conv(8, 4, 3)))
simple("strides_composed", FLAT, lambda: seq(conv(4, 4, 1, stride=2), conv(4, 4, 2, stride=2), norm(), nn.ReLU()))
simple("strides_three", FLAT, lambda: seq(conv(4, 3, 2, stride=2), conv(3, 4, 1, stride=3), norm()))
simple(
    "lines_in_a_row",
    FLAT,
    lambda: seq(conv(4, 4, (3, 1), padding=(1, 0), bias=False), conv(4, 4, (3, 1), padding=(1, 0)), nn.ReLU()),
)
simple(
    "trailing_pad",
    FLAT,
    lambda: seq(conv(4, 4, (1, 3), padding=(0, 1), bias=False), nn.ZeroPad2d((0, 1, 0, 0)), conv(4, 4, (1, 2))),
)
simple(
    "zeros_behind_circular",
    FLAT,
    lambda: seq(
        conv(4, 4, (1, 3), padding=(0, 1), padding_mode="circular", bias=False),
        nn.ZeroPad2d((1, 0, 0, 0)),
        conv(4, 4, (1, 2)),
    ),
)
simple("pool_then_point", FLAT, lambda: seq(nn.AvgPool2d(2), conv(4, 4, 1), norm()))
simple("pool_padded", FLAT, lambda: add(conv(), nn.AvgPool2d(3, 1, 1), seq(nn.AvgPool2d(3, 1, 1), norm())))
simple("pool_ceil", FLAT, lambda: seq(conv(4, 4, 1), nn.AvgPool2d(2, ceil_mode=True), norm()))
simple("pool_uncounted", FLAT, lambda: seq(conv(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), norm()))
simple("pool_branch_strided", FLAT, lambda: add(conv(4, 4, 2, stride=2), seq(nn.AvgPool2d(2), conv(4, 4, 1))))
simple("even_kernels", FLAT, lambda: add(conv(4, 4, 4, padding="same"), conv(4, 4, 2, padding="same"), conv()))
simple("rectangles", FLAT, lambda: add(conv(4, 4, (1, 3), padding=(0, 1)), conv(4, 4, (3, 1), padding=(1, 0)), conv()))
simple("dilations", FLAT, lambda: add(conv(4, 4, 3, padding=2, dilation=2), conv(4, 4, 3, padding=1), conv(4, 4, 1)))
simple("depthwise_pointwise", FLAT, lambda: seq(conv(4, 4, 3, groups=4, bias=False), norm(), conv(4, 6, 1), norm(6)))
simple("groups_summed", FLAT, lambda: add(conv(groups=4), conv(groups=2), conv(4, 4, 1)))
simple(
    "one_dimension",
    ((2, 4, 17), (1, 4, 12)),
    lambda: seq(add(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.Identity()), nn.BatchNorm1d(4), nn.ReLU()),
)
simple(
    "three_dimensions",
    ((2, 2, 5, 6, 7), (1, 2, 4, 5, 5)),
    lambda: seq(add(nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 1)), nn.BatchNorm3d(2), nn.ReLU()),
)
simple("transposed_norm", FLAT, lambda: seq(nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), norm(3), nn.ReLU()))
simple("transposed_groups", FLAT, lambda: seq(nn.ConvTranspose2d(4, 4, 2, 2, groups=2), norm(), conv(4, 3, 1)))
simple("reflect", FLAT, lambda: add(conv(padding_mode="reflect"), conv(4, 4, 3, padding_mode="reflect")))
simple("circular_point", FLAT, lambda: seq(conv(padding_mode="circular"), conv(4, 6, 1), norm(6)))
simple("replicate_and_zero", FLAT, lambda: add(conv(padding_mode="replicate"), conv()))
simple("pad_module", FLAT, lambda: seq(nn.ZeroPad2d((1, 0, 2, 1)), conv(4, 4, 3, padding=0), norm()))
simple("pad_constant", FLAT, lambda: seq(conv(4, 4, 1), nn.ConstantPad2d(1, 0.5), conv(4, 4, 3, padding=0), norm()))
simple("pad_reflect", FLAT, lambda: seq(conv(4, 4, 1), nn.ReflectionPad2d(1), conv(4, 4, 3, padding=0), norm()))
simple(
    "crop",
    FLAT,
    lambda: Net(lambda m, x: torch.relu(m.a(x)[:, :, 1:-1, 1:-1] + m.b(x)), a=conv(), b=conv(4, 4, 3, padding=0)),
)
simple("step_slice", FLAT, lambda: Net(lambda m, x: m.n(m.a(x)[:, :, ::2, ::2]), a=conv(), n=norm()))
simple("linear_chain", ROWS, lambda: seq(nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(3), nn.ReLU()))
simple("linear_sum", ROWS, lambda: add(nn.Linear(6, 4), seq(nn.Linear(6, 3, bias=False), nn.Linear(3, 4))))
simple(
    "linear_tokens",
    ((2, 5, 6), (3, 4, 6)),
    lambda: Net(lambda m, x: m.n(m.a(x).transpose(1, 2)).transpose(1, 2), a=nn.Linear(6, 4), n=nn.BatchNorm1d(4)),
)
simple(
    "lora",
    ROWS,
    lambda: Net(
        lambda m, x: m.w(x) + 0.5 * m.up(m.down(x)),
        w=nn.Linear(6, 6),
        down=nn.Linear(6, 2, bias=False),
        up=nn.Linear(2, 6, bias=False),
    ),
)
simple(
    "channel_scale",
    FLAT,
    lambda: Net(lambda m, x: x + m.g * m.n(m.c(x)), g=nn.Parameter(torch.randn(4, 1, 1)), n=norm(), c=conv()),
)
simple(
    "arithmetic",
    FLAT,
    lambda: Net(
        lambda m, x: torch.relu(2 * m.a(x) - m.b(x) / 4 + (1 - m.c(x)) - 0.5), a=conv(), b=conv(4, 4, 1), c=conv()
    ),
)
simple(
    "spatial_scale",
    ((2, 4, 5, 5),),
    lambda: Net(lambda m, x: m.n(m.c(x) * m.mask), c=conv(), n=norm(), mask=nn.Parameter(torch.randn(1, 1, 5, 5))),
)
simple(
    "negated", FLAT, lambda: Net(lambda m, x: torch.relu(-m.a(x) + torch.sub(m.b(x), x, alpha=2)), a=conv(), b=conv())
)
simple("instance_norm", FLAT, lambda: seq(conv(), nn.InstanceNorm2d(4), conv(), nn.GroupNorm(2, 4)))
simple("norm_first", FLAT, lambda: seq(norm(), nn.ReLU(), conv(), norm(), conv(4, 4, 1)))
simple("norms_in_a_row", FLAT, lambda: seq(conv(), norm(), norm(), nn.Dropout(0.5), norm(), nn.ReLU()))
simple("identity_norm", FLAT, lambda: add(norm(), conv(4, 4, 1, bias=False)))
simple("no_statistics", FLAT, lambda: seq(conv(), norm(track_running_stats=False), nn.ReLU(), conv(), norm()))

simple(
    "zeros_behind_circular_lines",
    FLAT,
    lambda: Net(
        lambda m, x: F.pad(m.a(x) * m.g, (0, 0, 1, 0)),
        a=conv(4, 4, (1, 3), padding=(0, 1), padding_mode="circular", bias=False),
        g=nn.Parameter(torch.randn(4, 1, 1)),
    ),
)
simple(
    "reflect_behind_square",
    FLAT,
    lambda: Net(
        lambda m, x: F.pad(m.a(x) * m.g, (1, 1, 1, 1), mode="reflect"),
        a=conv(padding=0, bias=False),
        g=nn.Parameter(torch.randn(4, 1, 1)),
    ),
)
simple("broadcast_sum", ((2, 4, 3, 3),), lambda: Net(lambda m, x: m.a(x) + m.b(x), a=conv(padding=0), b=conv(4, 4, 1)))
simple("even_lines", FLAT, lambda: add(conv(4, 4, (1, 2), padding="same"), conv(4, 4, (2, 1), padding="same")))
simple("transposed_then_square", FLAT, lambda: seq(nn.ConvTranspose2d(4, 8, 2, 2, bias=False), conv(8, 2)))
simple(
    "padded_stride",
    FLAT,
    lambda: Net(lambda m, x: m.n(m.a(F.pad(x, (0, 1, 0, 1)))), a=conv(4, 4, 2, stride=2), n=norm()),
)
simple("pad_in_code", FLAT, lambda: Net(lambda m, x: m.n(m.a(F.pad(x, (1, 0, 2, 1)))), a=conv(padding=0), n=norm()))
simple(
    "reflect_in_code",
    FLAT,
    lambda: Net(lambda m, x: m.n(m.a(F.pad(x, (1, 0, 2, 1), mode="reflect"))), a=conv(padding=0), n=norm()),
)
simple(
    "pad_constant_unbiased",
    FLAT,
    lambda: seq(conv(4, 8, 1, bias=False), nn.ConstantPad2d(1, 0.5), conv(8, 4, 3, padding=0)),
)
simple("pools_ceil", FLAT, lambda: add(*(seq(nn.AvgPool2d(2, ceil_mode=True), conv(4, 4, 1)) for _ in range(4))))
simple("pool_uncounted_branch", FLAT, lambda: add(conv(stride=2), nn.AvgPool2d(3, 2, 1, count_include_pad=False)))
simple("pool_called", FLAT, lambda: Net(lambda m, x: m.a(x) + F.avg_pool2d(x, 2), a=conv(4, 4, 2, stride=2)))
simple(
    "fixed_slice",
    FLAT,
    lambda: Net(
        lambda m, x: m.a(x)[:, :, :7, :7] * m.g, a=conv(4, 4, 1, bias=False), g=nn.Parameter(torch.randn(4, 1, 1))
    ),
)
simple(
    "pools_called",
    FLAT,
    lambda: Net(
        lambda m, x: sum(point(F.avg_pool2d(x, 2)) for point in (m.a, m.b, m.c, m.d)),
        a=conv(4, 4, 1),
        b=conv(4, 4, 1),
        c=conv(4, 4, 1),
        d=conv(4, 4, 1),
    ),
)
simple("norm_over_tokens", ((2, 6, 6), (3, 6, 6)), lambda: seq(nn.Linear(6, 6), nn.BatchNorm1d(6)))
simple("dropout_always", FLAT, lambda: Net(lambda m, x: m.n(F.dropout(m.a(x))), a=conv(), n=norm()))
simple("reversed_difference", FLAT, lambda: Net(lambda m, x: torch.rsub(m.a(x), m.b(x)), a=conv(), b=conv(4, 4, 1)))
simple(
    "transposed_sum",
    ((2, 4, 9, 9), (1, 4, 12, 12)),
    lambda: Net(lambda m, x: m.b(x) + m.a(x).transpose(2, 3), a=conv(4, 4, 1), b=conv()),
)
simple(
    "width_scale",
    ((2, 4, 5, 4), (1, 4, 7, 4)),
    lambda: Net(lambda m, x: m.n(m.c(x) * m.mask), c=conv(), n=norm(), mask=nn.Parameter(torch.randn(1, 1, 1, 4))),
)
simple(
    "same_in_code",
    FLAT,
    lambda: Net(lambda m, x: m.n(F.conv2d(x, m.w, padding="same")), w=nn.Parameter(torch.randn(4, 4, 2, 2)), n=norm()),
)
simple("matrix", ROWS, lambda: Net(lambda m, x: m.l(x @ m.w), w=nn.Parameter(torch.randn(6, 6)), l=nn.Linear(6, 4)))
simple(
    "stacked_blocks",
    FLAT,
    lambda: Net(
        lambda m, x: torch.cat([m.a(x[:, :2]), m.b(x)], 1),
        a=seq(conv(2, 8, 1), conv(8, 2, 1)),
        b=seq(conv(4, 8, 1), conv(8, 2, 1)),
    ),
)

# ------------------------------------------------------------------ channels that move

simple(
    "concat_norm",
    FLAT,
    lambda: Net(lambda m, x: torch.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))), a=conv(4, 2), b=conv(4, 3), n=norm(5)),
)
simple(
    "concat_then_point", FLAT, lambda: Net(lambda m, x: m.p(torch.cat([m.a(x), x], 1)), a=conv(4, 2), p=conv(6, 3, 1))
)
simple(
    "halves", FLAT, lambda: Net(lambda m, x: torch.cat([m.a(x[:, :2]), m.b(x[:, 2:])], 1), a=conv(2, 2), b=conv(2, 3))
)
simple(
    "equal_halves",
    FLAT,
    lambda: Net(
        lambda m, x: (lambda y: m.n(torch.cat([m.a(y[:, :2]), m.b(y[:, 2:])], 1)))(torch.relu(m.c(x))),
        a=conv(2, 2),
        b=conv(2, 2),
        c=conv(4, 4, 1),
        n=norm(),
    ),
)
simple(
    "chunks",
    FLAT,
    lambda: Net(
        lambda m, x: torch.cat([m.a(x.chunk(2, 1)[1]), m.a2(x.chunk(2, 1)[0])], 1), a=conv(2, 2), a2=conv(2, 2)
    ),
)
simple(
    "partial_conv",
    FLAT,
    lambda: Net(
        lambda m, x: m.n(m.p(torch.cat([m.a(x[:, :1]), x[:, 1:]], 1))), a=conv(1, 1), p=conv(4, 4, 1), n=norm()
    ),
)
simple(
    "shuffled",
    WIDE,
    lambda: Net(
        lambda m, x: m.b(m.a(x).view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
        a=conv(8, 8, 1, groups=2),
        b=conv(8, 8, 1, groups=4),
    ),
)
simple("indexed", FLAT, lambda: Net(lambda m, x: m.n(m.a(x)[:, [2, 0, 3, 1]]), a=conv(), n=norm()))
simple("flipped", FLAT, lambda: Net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(4, 4, 1), b=conv(4, 4, 1)))
simple(
    "batch_to_channels",
    ((4, 4, 9, 9), (2, 4, 8, 7)),
    lambda: Net(
        lambda m, x: m.n(m.a(x).view(2, -1, 4, *x.shape[2:]).transpose(0, 1).reshape(x.shape)), a=conv(), n=norm()
    ),
)

# ------------------------------------------------------------------ weights that are computed

simple(
    "summed_weights",
    FLAT,
    lambda: Net(
        lambda m, x: F.conv2d(x, m.w + F.pad(m.v, (1, 1, 1, 1)), m.b, padding=1),
        w=nn.Parameter(torch.randn(4, 4, 3, 3)),
        v=nn.Parameter(torch.randn(4, 4, 1, 1)),
        b=nn.Parameter(torch.randn(4)),
    ),
)
simple(
    "functional_norm",
    FLAT,
    lambda: Net(
        lambda m, x: F.batch_norm(m.c(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, eps=0.1),
        c=conv(),
        n=norm(),
    ),
)
simple(
    "divided_by_buffer",
    FLAT,
    lambda: Net(lambda m, x: torch.relu(m.n(m.c(x)) / m.k), c=conv(), n=norm(), k=torch.tensor(3.0)),
)
simple(
    "weight_for_two",
    FLAT,
    lambda: Net(
        lambda m, x: (lambda w: m.n(F.conv2d(x, w, padding=1)) + F.conv2d(x.relu(), w, padding=1))(
            m.w + F.pad(m.v, (1, 1, 1, 1))
        ),
        w=nn.Parameter(torch.randn(4, 4, 3, 3)),
        v=nn.Parameter(torch.randn(4, 4, 1, 1)),
        n=norm(),
    ),
)
simple("tied", FLAT, lambda: tied())
simple(
    "condition_on_a_parameter",
    FLAT,
    lambda: Net(
        lambda m, x: m.n(m.c(x)) if m.gate.numel() else x, c=conv(), n=norm(), gate=nn.Parameter(torch.randn(1))
    ),
)


@torch.fx.wrap
def fluctuating(weight: Tensor) -> Tensor:
    """Code that a graph holds as one call, and that draws numbers."""
    return weight * random.random()


class Fluctuating(nn.Module):
    """A layer that cannot be traced, and draws numbers."""

    def forward(self, weight: Tensor) -> Tensor:
        return fluctuating(weight) if float(weight.detach().sum()) < 1e9 else weight


simple(
    "random_like_a_weight",
    FLAT,
    lambda: Net(
        lambda m, x: m.n(m.c(x) + torch.rand_like(m.g)), c=conv(), n=norm(), g=nn.Parameter(torch.ones(4, 1, 1))
    ),
)
simple(
    "dropout_of_a_weight",
    FLAT,
    lambda: Net(lambda m, x: m.n(m.c(x) * F.dropout(m.g)), c=conv(), n=norm(), g=nn.Parameter(torch.ones(4, 1, 1))),
)
simple(
    "wrapped_weight",
    FLAT,
    lambda: Net(lambda m, x: m.n(F.conv2d(x, fluctuating(m.w))), n=norm(), w=nn.Parameter(torch.randn(4, 4, 3, 3))),
)
simple(
    "untraceable_weight",
    FLAT,
    lambda: Net(
        lambda m, x: m.n(F.conv2d(x, m.f(m.w))), n=norm(), f=Fluctuating(), w=nn.Parameter(torch.randn(4, 4, 3, 3))
    ),
)


@network(FLAT)
def counted() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        m.k.add_(1)
        return m.n(m.c(x)) * m.k

    return Net(run, c=conv(), n=norm(), k=torch.tensor(3.0))


def tied() -> nn.Module:
    model = Net(lambda m, x: m.n(m.a(x)) + torch.relu(m.b(x)), a=conv(), b=conv(), n=norm())
    model.b.weight = model.a.weight
    return model


# ------------------------------------------------------------------ surgery

simple("small_net", ((2, 3, 12, 12), (1, 3, 15, 11)), SmallNet)
simple("residual", WIDE, lambda: seq(Residual(), Residual()))
simple("interleaved", WIDE, Branches)
simple("rewritten", WIDE, lambda: seq(Activated(), nn.ReLU(), Parallel(), nn.ReLU(), Activated()))
simple("nested", WIDE, lambda: seq(seq(ConvBN(), seq(nn.ReLU(inplace=True), ConvBN())), nn.Dropout(), seq(norm(8))))


@network(FLAT)
def read_outside() -> nn.Module:
    return Net(lambda m, x: (torch.relu(m.b(m.n(m.a(x)))), m.a(x)), a=conv(), n=norm(), b=conv(4, 4, 1))


@network(FLAT)
def middle_returned() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.n(m.a(x))
        return torch.relu(m.b(y) + m.c(y)), y

    return Net(run, a=conv(), n=norm(), b=conv(), c=conv(4, 4, 1))


@network(FLAT)
def shape_asked() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.n(y)
        return F.interpolate(z, size=y.shape[2:]) + y.size(1)

    return Net(run, a=conv(stride=2), n=norm())


@network(FLAT)
def mean_of_the_middle() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.n(y) * y.mean() + y.sum((2, 3), keepdim=True)

    return Net(run, a=conv(), n=norm())


@network(FLAT)
def in_place_relu() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.n(m.a(x))
        z = m.act(y)
        return m.b(z) + y

    return Net(run, a=conv(), n=norm(), act=nn.ReLU(inplace=True), b=conv(4, 4, 1))


@network(FLAT)
def in_place_between() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        w = y.clone()
        z = m.b(y)
        y.mul_(2)
        return m.n(z) + y + w

    return Net(run, a=conv(), b=conv(4, 4, 1), n=norm())


@network(FLAT)
def alias_added_to() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        kept = y
        y += m.b(x)
        return torch.relu(y) - kept

    return Net(run, a=conv(), b=conv(4, 4, 1))


@network(FLAT)
def item_assigned() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y[:, :, 0] = 0.5
        return m.n(y)

    return Net(run, a=conv(), n=norm())


@network(FLAT)
def in_place_layer_between() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x)
        z = m.b(y)
        m.act(y)
        return z + m.c(y)

    return Net(run, act=nn.ReLU(inplace=True), b=conv(), c=conv(4, 4, 1))


@network(FLAT)
def view_changed_between() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x)
        z = m.b(y)
        y[:, :2].mul_(2)
        return z + m.c(y)

    return Net(run, b=conv(), c=conv(4, 4, 1))


@network(FLAT)
def changed_before_the_sum() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x)
        p, q = m.b(y), m.c(y)
        y.mul_(2)
        return torch.relu(p + q) + y

    return Net(run, b=conv(), c=conv(4, 4, 1))


@network(FLAT)
def changed_before_the_slot() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.n(y)
        y.mul_(2)
        return m.b(z), torch.sigmoid(y)

    return Net(run, a=conv(), n=norm(), b=conv(4, 3, 2, padding=1, padding_mode="circular"))


@network(FLAT)
def older_name_read() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = y.mul_(2)
        return m.b(y) + z

    return Net(run, a=conv(), b=conv(4, 4, 1))


@network(FLAT)
def input_changed() -> nn.Module:
    return Net(lambda m, x: m.n(m.a(x.mul_(2))), a=conv(), n=norm())


@network(FLAT)
def alias_kept() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(x)
        z = y.add_(m.a(x))
        z.relu_()
        return z + y

    return Net(run, a=conv(), b=conv(4, 4, 1))


class ByParity(nn.Module):
    """One convolution on maps of even width and another on odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight)
        return y if len(range(int(x.shape[-1]))) % 2 else 2 * y


class ByValue(ByParity):
    """A convolution of all but very large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight)
        return y if float(x.detach().abs().max()) < 1e9 else 2 * y


class OwnConv(nn.Conv2d):
    """Pads by a rule of its own, and not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 0)) if len(range(int(x.shape[-1]))) % 2 else x
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


simple("by_parity", FLAT, lambda: seq(ByParity(), norm(), nn.ReLU()))
simple("by_value", FLAT, lambda: seq(ByValue(), norm(), nn.ReLU()))
simple("own_convolution", FLAT, lambda: seq(OwnConv(4, 4, 3), norm(), nn.ReLU()))


@network(FLAT)
def called_twice() -> nn.Module:
    return Net(lambda m, x: m.n(m.a(torch.relu(m.n(m.a(x))))), a=conv(), n=norm())


@network(FLAT)
def block_called_twice() -> nn.Module:
    return Net(lambda m, x: m.block(torch.relu(m.block(x))), block=Parallel(4))


@network(FLAT)
def conv_called_twice() -> nn.Module:
    return Net(lambda m, x: m.n(m.a(x)) + m.k(m.a(x.relu())), a=conv(), n=norm(), k=norm())


@network(FLAT)
def registered_twice() -> nn.Module:
    block = conv_bn(4, 4, 3, padding=1)
    model = Net(lambda m, x: torch.relu(m.one(x)) + m.other[1](m.third(x)), one=block, other=block)
    model.third = conv()
    return model


@network(FLAT)
def norms_of_domains() -> nn.Module:
    return Net(lambda m, x: m.n[1](m.a(x)), a=conv(), n=nn.ModuleList([norm(), norm()]))


@network(FLAT)
def hooked() -> nn.Module:
    model = seq(conv(), norm(), nn.ReLU(), conv(), norm())
    model[1].register_forward_hook(lambda m, a, y: y * 2)
    return model


def summed(m: Any, x: Tensor) -> Tensor:
    """A sum for which the forward is rewritten; what else is in it must be written out as it was."""
    return torch.relu(m.b(x) + m.c(x))


def with_sum(run: Callable[[Any, Tensor], Any], **parts: Any) -> nn.Module:
    return Net(run, b=conv(), c=conv(4, 4, 1), **parts)


class Scaled(nn.Module):
    """Has an option."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(x) * scale


class Several(nn.Module):
    """Returns a tuple with a dictionary."""

    def forward(self, x: Tensor) -> Any:
        return torch.relu(x), {"one": x.sigmoid(), "two": x.tanh()}


class CountingBlock(Parallel):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return super().forward(x)


@network(FLAT)
def augmented() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = x.sigmoid()
        kept = y
        y += 1
        return summed(m, y.tanh()) - kept

    return with_sum(run)


@network(FLAT)
def asked_of_a_value() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = x.sigmoid()
        return summed(m, y * 0.5 if isinstance(y, Tensor) else y)

    return with_sum(run)


@network(FLAT)
def made_in_the_forward() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        k = torch.tensor([[[[2.0]]]])
        k.mul_(2)
        return summed(m, x) * k

    return with_sum(run)


@network(FLAT)
def parts_of_a_child() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        first, rest = m.several(x)
        return summed(m, first) * rest["one"] + rest["two"]

    return with_sum(run, several=Several())


simple("child_called_by_name", FLAT, lambda: with_sum(lambda m, x: m.s(summed(m, x), scale=3.0), s=Scaled()))
simple("weight_read", FLAT, lambda: Net(lambda m, x: torch.relu(m.n(m.a(x))) * m.a.weight.mean(), a=conv(), n=norm()))
simple("block_that_counts", FLAT, lambda: Net(lambda m, x: m.block(x) * m.block.count, block=CountingBlock()))


simple("drawn_beside_a_sum", FLAT, lambda: with_sum(lambda m, x: summed(m, x) + torch.rand(1, 4, 1, 1)))
simple(
    "folded_is_taken",
    FLAT,
    lambda: Net(
        lambda m, x: F.conv2d(x, m.w + F.pad(m.v, (1, 1, 1, 1)), padding=1) + torch.sigmoid(m.folded(x)),
        w=nn.Parameter(torch.randn(4, 4, 3, 3)),
        v=nn.Parameter(torch.randn(4, 4, 1, 1)),
        folded=conv(),
    ),
)


@network(FLAT)
def sets_an_attribute() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        m.seen = summed(m, x)
        return m.seen

    return with_sum(run)


class Spied(Parallel):
    """A block that also calls a layer for what it does, not for its value."""

    def __init__(self) -> None:
        super().__init__(4)
        self.spy = Spy()

    def forward(self, x: Tensor) -> Tensor:
        self.spy(x)
        return super().forward(x)


class Spy(nn.Module):
    """Cannot be traced, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) < 1e12:
            self.count.add_(1)
        return x


simple("spied", FLAT, lambda: Net(lambda m, x: torch.relu(m.block(x)) * m.block.spy.count, block=Spied()))


class TwoSums(nn.Module):
    """A fold of its own, and another that goes on outside."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.d, self.e = conv(), conv(4, 4, 1), conv(), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = summed(self, x)
        return self.d(y) + self.e(y)


simple("opened_child", FLAT, lambda: Net(lambda m, x: x + torch.relu(m.n(m.child(x))), child=TwoSums(), n=norm()))


@network(FLAT)
def held_in_a_list() -> nn.Module:
    last = norm()
    return Net(lambda m, x: m.rest[0](m.a(x)), a=conv(), n=last, rest=[last])


@network(FLAT)
def hooked_block() -> nn.Module:
    model = seq(Parallel(4), nn.ReLU())
    model[0].register_forward_hook(lambda m, a, y: y * 2)
    return model


class TwoInputs(nn.Module):
    """Folds that read different inputs, one of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(4, 4, 1), conv(), conv(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor, *, z: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x)) - torch.relu(self.c(y) + self.d(y)) * torch.sigmoid(z)


@network(FLAT)
def inputs_by_name() -> nn.Module:
    return Net(
        lambda m, x: m.one(x, x.sigmoid(), z=x.neg()) + m.two(x.tanh(), y=x, z=x), one=TwoInputs(), two=TwoInputs()
    )


class Pair(nn.Module):
    """Returns several values, folds among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(4, 4, 1), conv(), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return torch.relu(x), self.a(x) + self.b(x), {"third": self.c(x.relu()) + self.d(x.relu())}


@network(FLAT)
def several_outputs() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        first, second, rest = m.pair(x)
        return m.n(second) + first, rest["third"], m.last(second)

    return Net(run, pair=Pair(), n=norm(), last=conv(4, 4, 1))


@network(FLAT)
def parts_of_a_tuple() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return x.relu(), self.a(x) + self.b(x)

    return Net(lambda m, x: torch.relu(m.n(m.two(x)[1])) + m.two(x)[0], two=Two(), n=norm())


# ------------------------------------------------------------------ norms that the layers behind them take


@network(FLAT)
def norm_before_two_heads() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        h = m.n(x.relu()).mean((2, 3))
        return m.a(h), m.b(h).relu()

    return Net(run, n=norm(), a=nn.Linear(4, 3), b=nn.Linear(4, 5))


@network(FLAT)
def norm_before_a_head_and_an_activation() -> nn.Module:
    return Net(
        lambda m, x: (lambda h: m.a(h.mean((2, 3))).sum() + h.relu())(m.n(x.relu())), n=norm(), a=nn.Linear(4, 3)
    )


@network(FLAT)
def norm_before_something_changes() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        x = x.relu()
        h = m.n(x)
        return x.add_(1).sum() + m.a(h.mean((2, 3)))

    return Net(run, n=norm(), a=nn.Linear(4, 3))


@network(FLAT)
def norm_before_padding_that_counts() -> nn.Module:
    return Net(lambda m, x: m.a(nn.functional.avg_pool2d(m.n(x.relu()), 3, 2, 1)), n=norm(), a=conv(4, 3, 1))


@network(((2, 4, 6, 8), (1, 4, 8, 6), (3, 4, 12, 4)))
def norm_before_rows() -> nn.Module:
    return Net(lambda m, x: m.a(m.n(x.relu()).flatten(1)), n=norm(), a=nn.Linear(4 * 48, 3))


@network(((2, 4, 2, 13), (1, 4, 2, 13)))
def norm_before_turned_rows() -> nn.Module:
    return Net(lambda m, x: m.a(m.n(x.relu()).transpose(1, 2).flatten(1)), n=norm(), a=nn.Linear(4 * 26, 3))


@network(FLAT)
def norm_before_a_sum() -> nn.Module:
    return Net(lambda m, x: (lambda h: m.a((m.n(h) + h).mean((2, 3))))(x.relu()), n=norm(), a=nn.Linear(4, 3))


@network(FLAT)
def norm_before_a_mean_of_channels() -> nn.Module:
    return Net(lambda m, x: m.a(m.n(x[:, :3].relu()).mean(1, keepdim=True)), n=norm(3), a=conv(1, 3, 1))


class WithOption(nn.Module):
    """An option that the network uses both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 4, 1)

    def forward(self, x: Tensor, flip: bool = False, scale: float = 1.0) -> Tensor:
        y = self.a(x) - self.b(x) if flip else self.a(x) + self.b(x)
        return torch.relu(y) * scale


@network(FLAT)
def options() -> nn.Module:
    return Net(
        lambda m, x: m.p(x) + m.q(x, flip=True) + m.r(x, scale=3.0), p=WithOption(), q=WithOption(), r=WithOption()
    )


@network(FLAT)
def options_of_one() -> nn.Module:
    return Net(lambda m, x: m.p(x) + m.p(x, flip=True), p=WithOption())


class Kept(nn.Module):
    """A norm that also activates, known by its own attribute."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.LeakyReLU(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = conv(), Kept.NormAct(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(x))


simple("norm_that_activates", FLAT, Kept)


class Named(nn.Module):
    """Names that surgery might take, and a weight that the forward reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.folded, self.conv, self.fused = conv(), conv(4, 4, 1), nn.Identity()
        self.scale = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.folded(x) + self.conv(x)) * self.scale + self.conv.weight.sum()


simple("names_taken", FLAT, Named)


class Untraceable(nn.Module):
    """Looks at values, and holds what folds."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.tail = Activated(4), conv_bn(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if float(y.detach().sum()) > 1e9:
            y = -y
        return self.tail(y)


simple("untraceable", FLAT, lambda: seq(Untraceable(), nn.ReLU(), conv_bn(4, 4, 1)))


class Reaching(nn.Module):
    """Untraceable code that calls a grandchild past the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return self.block[0](x) + self.block(x)


simple("reaching_inside", FLAT, Reaching)


class Auxiliary(nn.Module):
    """A head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = conv_bn(4, 4, 3, padding=1), Parallel(4)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (y, self.aux(y)) if self.training else y


simple("auxiliary", FLAT, Auxiliary)

Result = namedtuple("Result", "first second")


@network(FLAT)
def named_tuple() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.a(x) + m.b(x))
        return Result(y, m.n(m.c(y)))

    return Net(run, a=conv(), b=conv(4, 4, 1), c=conv(), n=norm())


class Counting(nn.Module):
    """Leaves a feature and a count behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.seen = conv(), conv(4, 4, 1), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.a(x) + self.b(x)
        return torch.relu(self.seen) * self.calls


simple("attributes_written", FLAT, lambda: seq(Counting(), conv_bn(4, 4, 3, padding=1)))


class Counter(nn.Module):
    """Only counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> None:
        self.calls += 1


class Meter(nn.Module):
    """Keeps a number of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 0.0

    def forward(self, x: Tensor) -> None:
        self.level = float(x.mean())


class Watched(nn.Module):
    """Nothing of it lives on but what watches its input."""

    def __init__(self, watch: nn.Module) -> None:
        super().__init__()
        self.a, self.n, self.watch = conv(), norm(), watch

    def forward(self, x: Tensor) -> Tensor:
        self.watch(x)
        return self.n(self.a(x)) * 2


simple("counted", FLAT, lambda: seq(Watched(Counter()), nn.ReLU()))
simple("measured", FLAT, lambda: seq(Watched(Meter()), nn.ReLU()))


class HalfDone(nn.Module):
    """A fold of its own, and the beginning of one that its parent ends."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x) * 3 + 1)) * 2


simple("half_done", FLAT, lambda: Net(lambda m, x: m.n(m.begin(x) + 1), begin=HalfDone(), n=norm()))


class Asking(nn.Module):
    """Questions about the input's type and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x * 0.5
        if x.dim() != 4 or x.shape[1] != 4:
            raise ValueError("maps of four channels")
        return torch.relu(self.a(x) + self.b(x))


simple("questions", FLAT, Asking)


class Noisy(nn.Module):
    """Draws numbers in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x) + torch.rand(1, 4, 1, 1))


simple("noise", FLAT, Noisy)


@network(FLAT)
def batch_mode_left_on() -> nn.Module:
    return BatchMode()


class BatchMode(nn.Module):
    """Its norm stays in training mode whatever is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n(self.a(x)))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.n.train(True)
        return self


@network(FLAT)
def geometry_changed() -> nn.Module:
    model = seq(conv(stride=2), norm(), nn.ReLU(), conv(padding_mode="circular"), norm())
    model[0].stride, model[0].dilation, model[0].padding = (1, 1), (2, 2), (2, 2)
    return model


@network(FLAT)
def same_by_itself() -> nn.Module:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            right = -x.shape[-1] % 2
            return F.conv2d(F.pad(x, (1, right, 1, 0)), self.weight, self.bias, self.stride)

    return seq(Same(4, 4, 3, stride=2, padding=0), norm(), nn.ReLU())


# ------------------------------------------------------------------ networks to expand, and to come back to


class Plain(nn.Module):
    """A stem, a depthwise layer, a bare convolution, a pointwise one with its norm, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=True)
        self.depth_norm = nn.BatchNorm2d(6, eps=1e-2)
        self.bare = nn.Conv2d(6, 6, (3, 5), padding=(1, 2))
        self.point = nn.Conv2d(6, 6, 1, bias=False)
        self.point_norm = nn.BatchNorm2d(6)
        self.block = Residual(6)
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.depth_norm(self.depth(x)) + self.bare(x) * self.scale)
        x = self.block(torch.relu(self.point_norm(self.point(x))))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Convolutions of other geometries: dilated, grouped, even, without a norm, with a norm shared by reading."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.n = nn.BatchNorm2d(8, affine=False)
        self.b = nn.Conv2d(8, 4, 2, bias=False)
        self.m = nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, 4, 5, padding=1, padding_mode="reflect")
        self.d = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n(self.a(x)))
        x = torch.relu(self.m(self.b(x)))
        return self.d(x) + self.c(x)


BLOCKS = ("acb", "dbb", "doconv", "repvgg", "orepa", "acb online")
"""Blocks that they are expanded with."""

PLAIN: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "dense": Dense}
"""Networks that are expanded, trained a step, and collapsed into themselves; their inputs are :data:`FLAT`."""
