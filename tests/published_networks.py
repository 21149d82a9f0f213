"""Networks as large as the published ones, with the names of their authors' code and random numbers.

Each entry of :data:`NETWORKS` is a checkpoint that someone published, or trains with published code: the network, and
the plain one that it is imported into.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.published_blocks import (
    ACB,
    DBB,
    ECB,
    OREPA,
    Dilated,
    DOConv,
    MobileOne,
    Orepa1x1,
    OrepaRepVGG,
    OrepaStem,
    RepVGG,
    conv_bn,
)  # fmt: skip

__all__ = ["NETWORKS", "Published"]

Make = Callable[..., nn.Module]


def relu(module: nn.Module, name: str = "") -> nn.Module:
    """A ReLU behind a block: a pair gets a third member, a block of a class of its own keeps its names."""
    if name:
        return nn.Sequential(OrderedDict([(name, module), ("relu", nn.ReLU())]))
    if isinstance(module, nn.Sequential):
        module.add_module("relu", nn.ReLU())
        return module
    return Activated(module)


class Activated(nn.Module):
    """A block and its ReLU, with the names of the block alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        for table in ("_parameters", "_buffers", "_modules"):
            setattr(self, table, getattr(block, table))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self._block(x))


class Residual(nn.Module):
    def __init__(self, shortcut: nn.Module | None, **convs: nn.Module) -> None:
        super().__init__()
        if shortcut is not None:
            self.shortcut = shortcut
        for name, conv in convs.items():
            self.add_module(name, conv)
        self.names = tuple(convs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.names:
            y = getattr(self, name)(y)
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet(nn.Module):
    """The code of DBB and OREPA: ``stage0.conv1``, ``stage1.0.conv1``, ..., ``linear``."""

    def __init__(
        self,
        layers: tuple[int, ...],
        block: Make,
        stem: Make = conv_bn,
        point: Make = conv_bn,
        *,
        bottleneck: bool = False,
        shortcut: Make = conv_bn,
    ) -> None:
        super().__init__()
        self.stage0 = nn.Sequential(OrderedDict(conv1=relu(stem(3, 64, 7, 2)), maxpool=nn.MaxPool2d(3, 2, 1)))
        width, factor = 64, 4 if bottleneck else 1
        for s, depth in enumerate(layers):
            planes, stage = 64 * 2**s, nn.Sequential()
            for i in range(depth):
                stride = 2 if s and not i else 1
                out = planes * factor
                first = shortcut(width, out, 1, stride) if stride > 1 or width != out else None
                if bottleneck:
                    convs = {
                        "conv1": relu(point(width, planes, 1)),
                        "conv2": relu(block(planes, planes, 3, stride)),
                        "conv3": point(planes, out, 1),
                    }
                else:
                    convs = {"conv1": relu(block(width, planes, 3, stride)), "conv2": block(planes, planes, 3)}
                stage.append(Residual(first, **convs))
                width = out
            self.add_module(f"stage{s + 1}", stage)
        self.linear = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(x.mean((2, 3)))


class SResNet18(nn.Module):
    """ACNet's: blocks with a ReLU are ``conv1.acb``, those without ``conv2``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = relu(ACB(3, 64, 7, 2), "acb")
        width = 64
        for s in range(4):
            planes, stage = 64 * 2**s, nn.Sequential()
            for i in range(2):
                stride = 2 if s and not i else 1
                first = conv_bn(width, planes, 1, stride) if stride > 1 else None
                stage.append(
                    Residual(first, conv1=relu(ACB(width, planes, 3, stride), "acb"), conv2=ACB(planes, planes, 3))
                )
                width = planes
            self.add_module(f"stage{s + 1}", stage)
        self.linear = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.linear(x.mean((2, 3)))


class Stage(nn.Module):
    """ACNet's stages: ``projection``, or ``conv1`` in the first one on CIFAR, and ``block0``, ``block1``, ..."""

    def __init__(self, blocks: list[nn.Module], **first: nn.Module) -> None:
        super().__init__()
        for name, module in first.items():
            self.add_module(name, module)
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)
        self.depth = len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv1"):
            x = F.relu(self.conv1(x))
        for i in range(self.depth):
            known = self.projection(x) if i == 0 and hasattr(self, "projection") else x
            x = F.relu(known + getattr(self, f"block{i}")(x))
        return x


class SResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = relu(ACB(3, 64, 7, 2), "acb")
        width = 64
        for s, depth in enumerate((3, 4, 6, 3)):
            planes, blocks, before = 64 * 2**s, [], width
            for i in range(depth):
                stride = 2 if s and not i else 1
                names = OrderedDict(
                    conv1=relu(conv_bn(width, planes, 1)),
                    conv2=relu(ACB(planes, planes, 3, stride), "acb"),
                    conv3=conv_bn(planes, 4 * planes, 1),
                )
                blocks.append(nn.Sequential(names))
                width = 4 * planes
            self.add_module(f"stage{s + 1}", Stage(blocks, projection=conv_bn(before, width, 1, 2 if s else 1)))
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.fc(x.mean((2, 3)))


class SRC56(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 16
        for s in range(3):
            planes, blocks, before = 16 * 2**s, [], width
            for i in range(9):
                first = relu(ACB(width, planes, 3, 2 if s and not i else 1), "acb")
                blocks.append(nn.Sequential(OrderedDict(conv1=first, conv2=ACB(planes, planes, 3))))
                width = planes
            begin: dict[str, nn.Module] = (
                {"projection": conv_bn(before, planes, 1, 2)} if s else {"conv1": ACB(3, 16, 3)}
            )
            self.add_module(f"stage{s + 1}", Stage(blocks, **begin))
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


class WideBlock(nn.Module):
    """ACNet's: norm, ReLU and convolution are one module; the projection has a norm of its own."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        if inp != out:
            self.proj = self._before(inp, conv=nn.Conv2d(inp, out, 1, stride, bias=False))
        self.conv1 = self._before(inp, acb=ACB(inp, out, 3, stride))
        self.conv2 = self._before(out, acb=ACB(out, out, 3))

    @staticmethod
    def _before(channels: int, **conv: nn.Module) -> nn.Module:
        return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU(), **conv))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + (self.proj(x) if hasattr(self, "proj") else x)


class WRNC16(nn.Module):
    """``conv1``, ``stage1.block0``, ..., ``last_bn``, ``linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, width = ACB(3, 16, 3), 16
        for s in range(3):
            planes, stage = 128 * 2**s, nn.Sequential()
            for i in range(2):
                stage.add_module(f"block{i}", WideBlock(width, planes, 2 if s and not i else 1))
                width = planes
            self.add_module(f"stage{s + 1}", stage)
        self.last_bn, self.linear = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last_bn(self.stage3(self.stage2(self.stage1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class VC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        width, number = 3, 0
        for s, (planes, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            for _ in range(depth):
                number += 1
                self.stem.add_module(f"conv{number}", relu(ACB(width, planes, 3), "acb"))
                width = planes
            self.stem.add_module(f"maxpool{s + 1}", nn.MaxPool2d(2))
        self.linear1, self.linear2 = nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(self.stem(x).flatten(1))))


class CFQKBNC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i, (inp, out) in enumerate(((3, 32), (32, 32), (32, 64))):
            self.add_module(f"conv{i + 1}", relu(ACB(inp, out, 5, line=3), "acb"))
        self.fc1, self.fc2 = nn.Linear(576, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2)
        x = F.avg_pool2d(self.conv2(x), 3, 2)
        x = F.avg_pool2d(self.conv3(x), 3, 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class MobileNet(nn.Module):
    CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = relu(DBB(3, 32, 3, 2))
        self.stem = nn.Sequential()
        for i, (inp, out) in enumerate(zip(self.CHANNELS, self.CHANNELS[1:], strict=False)):
            depthwise = relu(DBB(inp, inp, 3, 2 if i in (1, 3, 5, 11) else 1, groups=inp))
            self.stem.append(nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=relu(conv_bn(inp, out, 1)))))
        self.linear = nn.Linear(1024, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stem(self.conv1(x)).mean((2, 3)))


class RepVGGNet(nn.Module):
    """A0: ``stage0``, ``stage1.0``, ..., ``linear``."""

    def __init__(self, block: Make = RepVGG) -> None:
        super().__init__()
        self.stage0 = relu(block(3, 48, 3, 2))
        width = 48
        for s, (planes, depth) in enumerate(((48, 2), (96, 4), (192, 14), (1280, 1))):
            stage = nn.Sequential()
            for i in range(depth):
                stage.append(relu(block(width, planes, 3, 2 if i == 0 else 1)))
                width = planes
            self.add_module(f"stage{s + 1}", stage)
        self.linear = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(x.mean((2, 3)))


class Squeezed(nn.Module):
    """RepVGGplus: squeeze-and-excitation behind the activation, over a block or over what it is deployed as."""

    def __init__(self, make: Make, inp: int, out: int, stride: int = 1) -> None:
        super().__init__()
        block = make(inp, out, 3, stride)
        if isinstance(block, RepVGG):
            self.__dict__["_block"] = block
            self._modules |= block._modules
        else:
            self.rbr_reparam = block
        self.post_se = nn.Sequential(OrderedDict(down=nn.Conv2d(out, 4, 1), up=nn.Conv2d(4, out, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.rbr_reparam(x) if hasattr(self, "rbr_reparam") else self._block(x))
        return y * self.post_se.up(F.relu(self.post_se.down(y.mean((2, 3), keepdim=True)))).sigmoid()


class RepVGGPlus(nn.Module):
    """``stage0``, ``stage1.blocks.0``, ``stage3_first.blocks.0``, ``stage1_aux``, ``linear``; a few of its layers."""

    def __init__(self, make: Make = RepVGG) -> None:
        super().__init__()
        self.stage0, width = Squeezed(make, 3, 8, 2), 8
        self.names = ("stage1", "stage2", "stage3_first", "stage3_second", "stage4")
        for i, name in enumerate(self.names):
            planes = 8 * (1 + i)
            blocks = nn.ModuleList([Squeezed(make, width, planes, 2), Squeezed(make, planes, planes)])
            self.add_module(name, nn.Module())
            getattr(self, name).blocks = blocks
            if i < 3:
                down = conv_bn(planes, planes, 3, 2)
                self.add_module(f"{name}_aux", nn.Sequential(down, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
                getattr(self, f"{name}_aux").append(nn.Linear(planes, 10))
            width = planes
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, aux = self.stage0(x), 0
        for name in self.names:
            for block in getattr(self, name).blocks:
                x = block(x)
            aux = aux + getattr(self, f"{name}_aux")(x) if hasattr(self, f"{name}_aux") else aux
        return self.linear(x.mean((2, 3))) + aux


def deployed(inp: int, out: int, k: int, stride: int) -> nn.Module:
    """What RepVGG's own code leaves of a block."""
    return nn.Conv2d(inp, out, k, stride, k // 2)


class MobileOneS0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage0 = relu(MobileOne(3, 48, 3, 2, n=1))
        width = 48
        for s, (planes, depth) in enumerate(((48, 2), (128, 8), (256, 10), (1024, 1))):
            stage = nn.Sequential()
            for i in range(depth):
                stage.append(relu(MobileOne(width, width, 3, 2 if i == 0 else 1, width)))
                stage.append(relu(MobileOne(width, planes, 1)))
                width = planes
            self.add_module(f"stage{s + 1}", stage)
        self.linear = nn.Linear(1024, 1000)

    forward = RepVGGNet.forward


def do_resnet18() -> nn.Module:
    """The ResNet-18 of torchvision with DO-Conv in the place of every convolution, as its users put it there."""
    from torchvision.models import resnet18

    model = resnet18()
    for path, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d):
            made = DOConv(
                conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups
            )
            model.set_submodule(path, made)
    return model


class ConvAct(nn.Module):
    """The deployed form of ECBSR's code."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv3x3, self.act = nn.Conv2d(inp, out, 3, padding=1), nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv3x3(x))


class ECBSR(nn.Module):
    """Of M4C16's size, for three channels in place of one."""

    def __init__(self, block: Make = ECB) -> None:
        super().__init__()
        widths = (3, 16, 16, 16, 16, 16, 12)
        self.backbone = nn.Sequential(*(block(i, o) for i, o in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.backbone(x) + x.repeat_interleave(4, 1), 2)


def large(channels: int, k: int) -> nn.Module:
    """The convolution that UniRepLKNet's large kernel is once it is deployed."""
    return nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)


class UniRepBlock(nn.Module):
    def __init__(self, channels: int, k: int, block: Make) -> None:
        super().__init__()
        self.dwconv = block(channels, k) if k > 3 else nn.Conv2d(channels, channels, k, 1, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.pwconv1, self.pwconv2 = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))


class UniRepLKNet(nn.Module):
    """Depths, widths and kernels of the T size, without what is no convolution."""

    def __init__(self, block: Make = Dilated) -> None:
        super().__init__()
        kernels = ((3, 3, 3), (13, 13, 13), (13, 3, 3) * 6, (13, 13, 13))
        self.stages, self.downsample_layers, width = nn.ModuleList(), nn.ModuleList(), 3
        for planes, sizes in zip((80, 160, 320, 640), kernels, strict=True):
            self.downsample_layers.append(conv_bn(width, planes, 3, 2))
            self.stages.append(nn.Sequential(*(UniRepBlock(planes, k, block) for k in sizes)))
            width = planes
        self.head = nn.Linear(640, 1000)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Published:
    """A checkpoint: its grammar, the network that it is of, the plain one, and the size of an image.

    ``expands`` says whether the plain one can be expanded; a norm inside and one behind have no place in it.
    """

    grammar: str
    name: str
    make: Callable[[], nn.Module]
    like: str | Callable[[], nn.Module]
    size: int = 64
    expands: bool = True
    wrapped: Callable[[dict[str, Tensor]], Any] | None = None

    def plain(self) -> str | nn.Module:
        """What to import it into."""
        return self.like if isinstance(self.like, str) else self.like()

    def state(self, model: nn.Module) -> Any:
        """What its authors' code stores."""
        state = dict(model.state_dict())
        return state if self.wrapped is None else self.wrapped(state)


def _module(state: dict[str, Tensor]) -> Any:
    return {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


def _engine(state: dict[str, Tensor]) -> Any:
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "iteration": 1}


_R18, _R50 = (2, 2, 2, 2), (3, 4, 6, 3)
NETWORKS = (
    Published("ACNet", "sres18", SResNet18, "torchvision:resnet18", wrapped=_engine),
    Published("ACNet", "sres50", SResNet50, "torchvision:resnet50", wrapped=_engine),
    Published("ACNet", "src56", SRC56, "zoo:resnet56,projection=True", 32, wrapped=_engine),
    Published("ACNet", "wrnc16plain", WRNC16, "zoo:wrn16_8,projection=True", 32, expands=False, wrapped=_engine),
    Published("ACNet", "vc", VC, "zoo:cifar_vgg16,hidden=512", 32, wrapped=_engine),
    Published("ACNet", "cfqkbnc", CFQKBNC, "zoo:cifar_quick", 32, wrapped=_engine),
    Published("DBB", "ResNet-18", partial(ResNet, _R18, DBB), "torchvision:resnet18", wrapped=_module),
    Published("DBB", "ResNet-50", partial(ResNet, _R50, DBB, bottleneck=True), "timm:resnet50"),
    Published("DBB", "MobileNet", MobileNet, "timm:mobilenetv1_100", wrapped=_module),
    Published("DO-Conv", "ResNet-18", do_resnet18, "torchvision:resnet18"),
    Published("RepVGG", "A0", RepVGGNet, "timm:repvgg_a0"),
    Published("RepVGG", "plus, small", RepVGGPlus, partial(RepVGGPlus, deployed), 128, expands=False),
    Published("MobileOne", "S0", MobileOneS0, "timm:mobileone_s0", wrapped=lambda state: {"state_dict": state}),
    Published("OREPA", "ResNet-18", partial(ResNet, _R18, OREPA, OrepaStem), "torchvision:resnet18", wrapped=_module),
    Published(
        "OREPA",
        "ResNet-50",
        partial(
            ResNet,
            _R50,
            OREPA,
            OrepaStem,
            lambda i, o, k: Orepa1x1(i, o),
            bottleneck=True,
            shortcut=lambda i, o, k, s: Orepa1x1(i, o, s),
        ),
        "torchvision:resnet50",
    ),
    Published("OREPA", "RepVGG-A0", partial(RepVGGNet, OrepaRepVGG), "timm:repvgg_a0"),
    Published("UniRepLKNet", "T", UniRepLKNet, partial(UniRepLKNet, large), expands=False),
    Published("ECB", "ECBSR-M4C16", ECBSR, partial(ECBSR, ConvAct)),
)


def lively(model: nn.Module) -> nn.Module:
    """Norms as after training, in float64; the numbers stay in a range that a deep network keeps."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            last = name.rpartition(".")[2]
            if last == "running_var":
                tensor.uniform_(0.5, 2.0)
            elif last == "running_mean" or (last == "bias" and tensor.dim() == 1):
                tensor.normal_(std=0.1)
            elif last == "weight" and tensor.dim() == 1:
                tensor.uniform_(0.2, 0.6)
            elif last.endswith("avg_avg"):
                tensor.fill_(1 / tensor.numel())  # not what float32 makes of it
            elif last.endswith("idconv1") or (last == "weight" and "idconv1" in name):
                tensor.normal_(std=0.1)
    return model
