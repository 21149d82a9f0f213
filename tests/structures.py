"""Re-parameterisable structures of other people, written from their publications, and what collapse makes of them.

None of them is known to the compiler: each is plain PyTorch that it reads from the graph.

    python tests/structures.py --out docs/structures.md
"""

# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blocks import (
    ACB,
    DBB,
    ECB,
    OREPA,
    BNAndPad,
    DilatedReparam,
    DOConv,
    LinearNorm,
    MobileOne,
    NormLinear,
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
)  # fmt: skip
from torch import Tensor, nn
from torch.nn import functional as F

import reparam

__all__ = ["STRUCTURES", "Measured", "Structure", "measure", "page"]

C = 8
"""Channels; networks of a few thousand numbers show all that is to be shown."""

# ------------------------------------------------------------------ sums


class WithIdentity(nn.Module):
    """A module and the input itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


class ScaledRepVGG(nn.Module):
    """PP-YOLOE's block: a trained number before the 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(C, C, 3, padding=1), conv_bn(C, C, 1)
        self.alpha = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(x) + self.alpha * self.conv2(x)
        return y


class LearnableRep(nn.Module):
    """PP-LCNetV3's layer: a MobileOne sum, then one scale and one shift for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = MobileOne(C, C, groups=C)
        self.scale, self.shift = nn.Parameter(torch.tensor([1.3])), nn.Parameter(torch.tensor([-0.2]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.sum(x) + self.shift
        return y


class RepNeXtMedium(nn.Module):
    """Kernels of several shapes, and lines after lines."""

    def __init__(self) -> None:
        super().__init__()
        for h, w in ((7, 7), (5, 3), (3, 5)):
            self.add_module(f"conv_{h}_{w}", nn.Conv2d(C, C, (h, w), padding=(h // 2, w // 2), groups=C))
        for k in (7, 5):
            self.add_module(f"conv_{k}_w", nn.Conv2d(C, C, (1, k), padding=(0, k // 2), groups=C, bias=False))
            self.add_module(f"conv_{k}_h", nn.Conv2d(C, C, (k, 1), padding=(k // 2, 0), groups=C, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        y: Tensor = m.conv_7_7(x) + m.conv_5_3(x) + m.conv_3_5(x)
        return y + m.conv_7_h(m.conv_7_w(x)) + m.conv_5_h(m.conv_5_w(x))


class RepNeXtSmall(nn.Module):
    """A strided 3x3, lines after lines, and a 2x2 spread over its corners."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(C, C, 3, 2, 1, groups=C)
        self.across = nn.Conv2d(C, C, (1, 3), (1, 2), (0, 1), groups=C, bias=False)
        self.down = nn.Conv2d(C, C, (3, 1), (2, 1), (1, 0), groups=C, bias=False)
        self.corners = nn.Conv2d(C, C, 2, 2, 1, 2, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square(x) + self.down(self.across(x)) + self.corners(x)
        return y


class DyRep(nn.Module):
    """The branches that DyRep grows and sums: those of DBB, lines and an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn(C, C, 3, padding=1),
                conv_bn(C, C, 1),
                nn.Sequential(nn.Conv2d(C, C, 1, bias=False), BNAndPad(1, C), nn.Conv2d(C, C, 3, bias=False), bn()),
                nn.Sequential(nn.Conv2d(C, C, 1, bias=False), BNAndPad(1, C), nn.AvgPool2d(3, 1), bn()),
                conv_bn(C, C, (1, 3), padding=(0, 1)),
                conv_bn(C, C, (3, 1), padding=(1, 0)),
                bn(),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


# ------------------------------------------------------------------ rows


class Conv3XC(nn.Module):
    """SPAN's three convolutions in a row on the padded input, beside a 1x1."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.sk = nn.Conv2d(C, C, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(C, C * gain, 1), nn.Conv2d(C * gain, C * gain, 3), nn.Conv2d(C * gain, C, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)
        return y


# ------------------------------------------------------------------ kernels that are computed


class DetailEnhanced(nn.Module):
    """DEA-Net: kernels of differences, added up in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(C, C, 3, 3))
        self.central = nn.Parameter(torch.randn(C, C, 9))
        self.angular = nn.Parameter(torch.randn(C, C, 9))
        self.vertical = nn.Parameter(torch.randn(C, C, 3))

    def forward(self, x: Tensor) -> Tensor:
        central = torch.zeros_like(self.central)
        central[:, :, :] = self.central
        central[:, :, 4] = self.central[:, :, 4] - self.central.sum(2)
        angular = self.angular - self.angular[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]
        vertical = torch.zeros(C, C, 9, dtype=self.vertical.dtype)
        vertical[:, :, [0, 1, 2]] = self.vertical
        vertical[:, :, [6, 7, 8]] = -self.vertical
        return F.conv2d(x, self.plain + (central + angular + vertical).view(C, C, 3, 3), padding=1)


class PixelDifference(nn.Module):
    """PiDiNet's central and angular differences, as it computes them while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.central = nn.Parameter(torch.randn(C, C, 3, 3))
        self.angular = nn.Parameter(torch.randn(C, C, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.central, padding=1) - F.conv2d(x, self.central.sum(dim=[2, 3], keepdim=True))
        flat = self.angular.view(C, C, -1)
        turned = (flat - flat[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]).view(C, C, 3, 3)
        return y + F.conv2d(x, turned, padding=1)


class Refocusing(nn.Module):
    """RefConv: a frozen kernel plus a convolution over it, its filters taken for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.randn(C, 1, 3, 3))
        self.map = nn.Conv2d(C, C, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        kernel = base + self.map(base.view(1, C, 3, 3)).view_as(base)
        return F.conv2d(x, kernel, padding=1, groups=C)


# ------------------------------------------------------------------ linear layers


class LowRank(nn.Module):
    """LoRA: two narrow layers beside one, times a number."""

    def __init__(self, layer: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up
        self.scaling = 16 / 4

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x)) * self.scaling
        return y


class Decomposed(nn.Module):
    """DoRA: direction and length of each row of an adapted weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.length = nn.Parameter(torch.randn(C, C)), nn.Parameter(torch.rand(C, 1))
        self.down, self.up = nn.Parameter(torch.randn(2, C)), nn.Parameter(torch.randn(C, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.up @ self.down
        return F.linear(x, self.length * weight / weight.norm(dim=1, keepdim=True))


class RepBN(nn.Module):
    """SLAB: batch norm plus a multiple of its input over tokens, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.alpha = nn.BatchNorm1d(C), nn.Parameter(torch.tensor([0.4]))
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2)
        tokens = self.norm(tokens) + self.alpha * tokens
        y: Tensor = self.linear(tokens.transpose(1, 2))
        return y


def bn() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(C)


def deep(k: int, **options: Any) -> nn.Module:
    """A depthwise convolution of odd size and its norm."""
    return conv_bn(C, C, k, padding=k // 2 * options.get("dilation", 1), groups=C, **options)


# ------------------------------------------------------------------ the list


@dataclass(frozen=True)
class Structure:
    """One structure: what it is called, where it is from, how it is built, and the shape of an input."""

    name: str
    source: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, C, 13, 11)


STRUCTURES = (
    Structure("ACB: 3x3, 3x1, 1x3", "ACNet, ICCV 2019", lambda: ACB(C, C, 3, padding=1)),
    Structure("DO-Conv: D o W", "DO-Conv, TIP 2022", lambda: DOConv(C, C, padding=1)),
    Structure("DBB: four branches, a border of its own value", "DBB, CVPR 2021", lambda: DBB(C, C)),
    Structure("RepVGG: 3x3, 1x1, identity", "RepVGG, CVPR 2021", lambda: RepVGG(C, C)),
    Structure(
        "RepConv without identity", "YOLOv7, CVPR 2023", lambda: add(conv_bn(C, C, 3, padding=1), conv_bn(C, C, 1))
    ),
    Structure("RepVGG, 1x1 times a number", "PP-YOLOE, 2022", ScaledRepVGG),
    Structure("QARepVGG: norm behind the sum", "QARepVGG, AAAI 2024", lambda: QARepVGG(C)),
    Structure(
        "QARepVGG with a mean",
        "YOLOv6 3.0, 2023",
        lambda: nn.Sequential(
            add(conv_bn(C, C, 3, padding=1), nn.Conv2d(C, C, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.Identity()), bn()
        ),
    ),
    Structure("MobileOne, depthwise", "MobileOne, CVPR 2023", lambda: MobileOne(C, C, groups=C)),
    Structure("MobileOne, pointwise", "MobileOne, CVPR 2023", lambda: MobileOne(C, C, 1)),
    Structure("learnable affine behind MobileOne's sum", "PP-LCNetV3, 2023", LearnableRep),
    Structure("sum over odd kernels", "PP-LCNetV2, 2022", lambda: OddKernels(C)),
    Structure("RepMixer: x + s (M(x) - N(x))", "FastViT, ICCV 2023", lambda: RepMixer(C)),
    Structure(
        "conditional position encoding, 7x7 + identity",
        "FastViT, ICCV 2023",
        lambda: WithIdentity(nn.Conv2d(C, C, 7, padding=3, groups=C)),
    ),
    Structure("RepViT: BN(3x3 + 1x1 + x)", "RepViT, CVPR 2024", lambda: RepViT(C)),
    Structure("RepGhost: 3x3 + a norm", "RepGhost, 2022", lambda: RepGhost(C)),
    Structure("RepLK: 13x13 + 5x5", "RepLKNet, CVPR 2022", lambda: add(deep(13), deep(5))),
    Structure("dilated re-param", "UniRepLKNet, CVPR 2024", lambda: DilatedReparam(C)),
    Structure(
        "dilated re-param with an identity",
        "OverLoCK, CVPR 2025",
        lambda: WithIdentity(DilatedReparam(C, 7, ((5, 1), (3, 1), (3, 2), (3, 3)))),
    ),
    Structure("RepVGGDW: 7x7 + 3x3", "YOLOv10, NeurIPS 2024", lambda: add(deep(7), deep(3))),
    Structure("RepNeXt, medium: lines after lines", "RepNeXt, 2024", RepNeXtMedium),
    Structure("RepNeXt, small and strided", "RepNeXt, 2024", RepNeXtSmall),
    Structure("DyRep: seven branches", "DyRep, CVPR 2022", DyRep),
    Structure("OREPA: kernel from branches", "OREPA, CVPR 2022", lambda: OREPA(C)),
    Structure("ECB: edges", "ECBSR, ACM MM 2021", lambda: ECB(C)),
    Structure("Conv3XC: 1x1, 3x3, 1x1 beside a 1x1", "SPAN, CVPRW 2024", Conv3XC),
    Structure(
        "collapsible linear block, residual",
        "SESR, MLSys 2022",
        lambda: WithIdentity(nn.Sequential(nn.Conv2d(C, 64, 5, padding=2, bias=False), nn.Conv2d(64, C, 1))),
    ),
    Structure(
        "ExpandNet: 1x1, 3x3, 1x1 in a row",
        "ExpandNets, NeurIPS 2020",
        lambda: nn.Sequential(nn.Conv2d(C, 32, 1, bias=False), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, C, 1)),
    ),
    Structure("detail-enhanced differences", "DEA-Net, TIP 2024", DetailEnhanced),
    Structure("pixel differences, central and angular", "PiDiNet, ICCV 2021", PixelDifference),
    Structure("refocusing of a frozen kernel", "RefConv, 2023", Refocusing),
    Structure("weight standardisation", "Qiao et al., 2019", lambda: nn.Sequential(WSConv2d(C, C, 3, padding=1), bn())),
    Structure(
        "asymmetric kernels and a mean",
        "ACNet and DBB, mixed",
        lambda: add(ACB(C, C, 3, padding=1), nn.Sequential(nn.AvgPool2d(3, 1, 1), bn())),
    ),
    Structure("linear, norm over tokens", "LeViT, ICCV 2021", lambda: LinearNorm(C, C), (2, 7, C)),
    Structure("norm, dropout, linear", "LeViT, ICCV 2021", lambda: NormLinear(C, 5), (2, C)),
    Structure("two heads, averaged", "DeiT, ICML 2021", lambda: TwoHeads(C, 5), (2, C)),
    Structure(
        "LoRA on a linear layer",
        "LoRA, ICLR 2022",
        lambda: LowRank(nn.Linear(C, C), nn.Linear(C, 4, bias=False), nn.Linear(4, C, bias=False)),
        (2, 7, C),
    ),
    Structure(
        "LoRA on a convolution",
        "LoRA, ICLR 2022",
        lambda: LowRank(
            nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, 4, 3, padding=1, bias=False), nn.Conv2d(4, C, 1, bias=False)
        ),
    ),
    Structure("DoRA: length and direction", "DoRA, ICML 2024", Decomposed, (2, 7, C)),
    Structure("RepBN before a linear layer", "SLAB, ICML 2024", RepBN, (2, 7, C)),
)


@dataclass(frozen=True)
class Measured:
    """What a structure was and is: layers and numbers, before and after, and the error against the largest output."""

    structure: Structure
    layers: tuple[int, int]
    numbers: tuple[int, int]
    becomes: str
    error: float
    left: tuple[str, ...]


def measure(structure: Structure) -> Measured:
    """Collapse a structure whose numbers are as after training, in float64."""
    torch.manual_seed(0)
    model = lively(structure.build())
    x = torch.randn(structure.shape, dtype=torch.float64)
    folded, report = reparam.collapse_with_report(nn.Sequential(model), example_inputs=x)
    with torch.no_grad():
        wanted, got = model(x), folded(x)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    left = [each for each in leaves(folded) if not isinstance(each, (nn.Identity, nn.Dropout))]
    becomes = " + ".join(type(each).__name__ for each in left)
    sizes = (numbers(model), numbers(folded))
    said = tuple(dict.fromkeys(refusal.message for refusal in report.refusals))
    return Measured(structure, (len(leaves(model)), len(left)), sizes, becomes, error, said)


def leaves(model: nn.Module) -> list[nn.Module]:
    """Modules without others inside."""
    return [module for module in model.modules() if not list(module.children())]


def numbers(model: nn.Module) -> int:
    """Floating-point numbers that a module keeps, once each."""
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())


def page() -> str:
    """The table as Markdown."""
    rows = [
        f"| {m.structure.name} | {m.structure.source} | {m.layers[0]} → {m.layers[1]} | "
        f"{m.numbers[0]:,} → {m.numbers[1]:,} | {m.becomes} | {m.error:.0e} |"
        for m in map(measure, STRUCTURES)
    ]
    return "\n".join(
        [
            "# Structures of other people\n",
            "Re-parameterisable structures from publications, written in plain PyTorch in `tests/structures.py` and",
            "`tests/blocks.py` and given to `reparam.collapse` with numbers as after training. The compiler knows none",
            "of them: each is read from its graph, or by its impulse response. Layers are modules without others",
            "inside; numbers include statistics. The error is the largest difference relative to the largest output,",
            "in float64.\n",
            "```sh\npython tests/structures.py --out docs/structures.md\n```\n",
            "| structure | source | layers | numbers | becomes | error |",
            "| --- | --- | ---: | ---: | --- | ---: |",
            *rows,
            f"\n{len(rows)} structures. `tests/test_structures.py` runs each.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the page here")
    text, out = page(), parser.parse_args().out
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
