"""Networks whose pickles are loaded where there is no compiler: nothing but torch is imported here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


class Branch(nn.Module):
    def __init__(self, kernel: int, bias: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=bias), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Net(nn.Module):
    """A stem, a block of two branches and a head: it is rewritten when it is collapsed."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.square, self.point = Branch(3), Branch(1)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.square(x) + self.point(x)).relu().mean((2, 3)))


class Chain(nn.Sequential):
    """Nothing of it has to be rewritten."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))


class Deployable(Net):
    """Folds itself, which is done already; keeps a constant of its own; a method does the work."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (self.square(x) + self.point(x)).relu() * torch.arange(4).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).mean((2, 3)))

    def fuse(self) -> None:
        for branch in (self.square, self.point):
            scale = branch.norm.weight / (branch.norm.running_var + branch.norm.eps).sqrt()  # type: ignore[operator]
            branch.conv.weight = nn.Parameter(branch.conv.weight * scale.view(-1, 1, 1, 1))
        del self.square, self.point


class Told(Net):
    """Options that the forward asks about: they are fixed once it is written anew."""

    def forward(self, x: Tensor, /, scales: Any = (1.0, 2.0), *, mode: str = "a") -> Any:  # type: ignore[override]
        x = self.stem(x) * (scales[0] if mode == "a" else scales[1])
        return {"out": self.head((self.square(x) + self.point(x)).relu().mean((2, 3)))}


class LeftOver(nn.Sequential):
    """A norm that no convolution takes."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))


def halved(x: Tensor) -> Tensor:
    """A function of the network's own code."""
    return x / 2 if bool(x.detach().isfinite().all()) else x


class Calling(Net):
    def forward(self, x: Tensor) -> Tensor:
        return halved(super().forward(x))


def graph() -> nn.Module:
    """Its code is made of a graph."""
    return fx.symbolic_trace(Net())
