"""Small networks that the tests fold: plain layers, parallel branches, residual blocks, each folded in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.proof.compare import Verdict
from zoo.randomise import randomise_

WIDTH = 8


class ConvBN(nn.Module):
    """A convolution and its batch norm: both are slots, so the fold stays in the slot of the convolution."""

    def __init__(self, inner: int = WIDTH, outer: int = WIDTH, kernel: int = 3, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False, **options)
        self.norm = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Parallel(nn.Module):
    """RepVGG's block: 3x3, 1x1 and identity branches; the whole module becomes one convolution."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.square = ConvBN(width, width)
        self.point = ConvBN(width, width, 1)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.point(x) + self.identity(x)


class Activated(nn.Module):
    """Two branches and an activation in one forward, so that this forward has to be written anew."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.left = ConvBN(width, width)
        self.right = ConvBN(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.left(x) + self.right(x))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + x)


class Branches(nn.Module):
    """Branches whose parts run interleaved: all convolutions first, then all norms."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(x) for conv in self.convs]
        return torch.cat([torch.relu(norm(y)) for norm, y in zip(self.norms, maps, strict=True)], 1)


class Net(nn.Module):
    """All kinds of surgery in one network, with a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, WIDTH, stride=2)
        self.whole = Parallel()
        self.act = nn.ReLU()
        self.rewritten = Activated()
        self.residual = Residual()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.residual(self.rewritten(self.act(self.whole(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.features(x).mean((2, 3))))


def images(count: int = 2, size: int = 12, channels: int = 3, **options: Any) -> Tensor:
    """Random images, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator).to(**options)


def maps(**options: Any) -> Tensor:
    """Random feature maps of the common width."""
    return images(channels=WIDTH, **options)


def ready(model: nn.Module, seed: int = 0) -> Any:
    """Batch norms with statistics that matter; in eval mode."""
    return randomise_(model, seed)


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything a user can see of a model: classes, attributes, training flags, numbers bit for bit."""
    seen = []
    for name, module in model.named_modules():
        tables = ("_parameters", "_buffers", "_modules")
        plain = {k: v for k, v in module.__dict__.items() if k not in tables}
        tensors = {**module._parameters, **module._buffers}
        bits = {k: _bits(t) for k, t in tensors.items()}
        children = [(k, id(v)) for k, v in module._modules.items()]
        seen.append((name, id(module), type(module), plain, bits, children))
    return seen


def unchanged(model: nn.Module, before: list[tuple[Any, ...]]) -> bool:
    """Whether a model is as it was, the order of children and the identity of tensors included."""
    after = snapshot(model)
    return len(after) == len(before) and all(
        a[:3] == b[:3] and a[5] == b[5] and _same(a[3], b[3]) and _same(a[4], b[4])
        for a, b in zip(after, before, strict=True)
    )


def _bits(tensor: Tensor | None) -> Any:
    if tensor is None or isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
        return id(tensor)
    return id(tensor), tensor.dtype, tensor.stride(), tensor.detach().clone()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) or bool(a.isnan().any() and torch.equal(a.isnan(), b.isnan()))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b


def collapsed_as_planned(model: Any, given: tuple[Tensor, ...]) -> tuple[Any, reparam.Explanation]:
    """The network after collapse, which computes what it did; the plan says what was done."""
    example = given if len(given) > 1 else given[0]
    planned = reparam.explain(model, example)
    folded, report = reparam.collapse_with_report(model, example_inputs=example)
    assert report.checked is not None
    assert report.checked.verdict is not Verdict.DIFFERENT
    assert not report.taken_back
    assert [fold.layers for fold in planned.folds] == [fold.layers for fold in report.folds]
    torch.testing.assert_close(folded(*given), model(*given), rtol=1e-10, atol=1e-10)
    return folded, report


def norms_used(model: nn.Module, given: tuple[Tensor, ...]) -> set[str]:
    """The norms that a forward runs."""
    ran: set[str] = set()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    hooks = [m.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, m in norms.items()]
    model(*given)
    for hook in hooks:
        hook.remove()
    return ran
