"""Real networks: the same outputs in float64, no batch norm left behind a convolution, never more parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import reparam
from zoo.randomise import randomise_

TOLERANCE = 1e-10


def call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def detector(model: Any, x: Tensor) -> Any:
    """Boxes are a selection; what is compared are the maps that they are read from."""
    features = list(model.backbone(x).values())
    return features, model.head(features)


@dataclass(frozen=True)
class Case:
    """One network, the smallest input it takes, and how many norms stay because nothing before them can take them."""

    name: str
    shape: tuple[int, ...] = (2, 3, 64, 64)
    norms: int = 0
    run: Callable[[nn.Module, Tensor], Any] = call
    options: Mapping[str, Any] = field(default_factory=dict)


TIMM = (
    Case("repvgg_a0"),
    Case("mobileone_s0"),
    Case("fastvit_t8"),
    Case("repvit_m0_9"),
    Case("levit_128s", (2, 3, 224, 224)),
    Case("repghostnet_050"),
    Case("ghostnetv3_050"),
    Case("tf_efficientnet_b0"),
    Case("mobilenetv3_small_050"),
    Case("resnet18d"),
)
BARE = {"weights": None, "weights_backbone": None}
TORCHVISION = (
    Case("resnet18"),
    Case("mobilenet_v2"),
    Case("googlenet", options={"init_weights": False}),
    Case("ssdlite320_mobilenet_v3_large", (1, 3, 96, 96), run=detector, options=BARE),
    Case("fcos_resnet50_fpn", (1, 3, 64, 64), run=detector, options={**BARE, "min_size": 64, "max_size": 128}),
    Case("lraspp_mobilenet_v3_large", options=BARE),
    Case("deeplabv3_mobilenet_v3_large", options=BARE),
    Case("r3d_18", (1, 3, 4, 32, 32)),
)


def create(case: Case, library: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        return pytest.importorskip("timm").create_model(case.name)
    return pytest.importorskip("torchvision").models.get_model(case.name, **case.options)


LONG = (
    *("ghostnetv3_050", "mobileone_s0", "resnet18", "r3d_18"),
    *("ssdlite320_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"),
)
"""Larger networks of a kind that another one here has: its blocks, its head, in two dimensions for three."""


def marked(case: Case, library: str) -> Any:
    label = case.name if library == "timm" else f"torchvision-{case.name}"
    return pytest.param(case, library, id=label, marks=[pytest.mark.slow] if case.name in LONG else [])


CASES = [marked(case, "timm") for case in TIMM] + [marked(case, "torchvision") for case in TORCHVISION]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("case", "library"), CASES)
@torch.no_grad()
def test_network(case: Case, library: str) -> None:
    """Collapse in float64, with its proofs."""
    model = create(case, library)
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    randomise_(model, 0, (x,) if case.run is call else None)
    model.double()
    x = x.double()
    plain, report = reparam.collapse_with_report(model)

    with FollowedNorms() as before:
        wanted = list(tensors(case.run(model, x)))
    with FollowedNorms() as after:
        got = list(tensors(case.run(plain, x)))
    assert before.pairs(), "the check sees nothing"
    assert after.pairs() == []
    assert [t.shape for t in got] == [t.shape for t in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())
    assert all(float(t.std()) > 0 for t in wanted), "constant outputs prove nothing"

    assert numbers(plain) <= numbers(model)
    assert numbers(plain, buffers=True) < numbers(model, buffers=True)
    assert norms(plain) == case.norms, "also in heads that eval never runs"
    assert report.folds
    assert not plain.training


def test_the_check_sees_what_is_left() -> None:
    """The norm behind a convolution is found; one that reads a shared output, and one behind an activation, are not."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.bn = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.a(x), self.b(x), self.c(x)
            assert a.shape[1] == 3
            return self.bn[0](a) + self.bn[1](b) * b + self.bn[2](c.relu())

    with FollowedNorms() as found:
        Some().eval()(torch.randn(1, 3, 4, 4))
    assert found.pairs() == [(3, 3, 1, 1)]


# ------------------------------------------------------------------ an independent look


class FollowedNorms(TorchFunctionMode):
    """Watches a run, whatever the modules: batch norms whose input is a convolution's output that nobody else reads."""

    CONVS = (
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        F.linear,
    )

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[int, ...]] = {}
        self.normed: list[int] = []
        self.uses: Counter[int] = Counter()
        self.alive: list[Tensor] = []

    def pairs(self) -> list[tuple[int, ...]]:
        """Weight shapes of the convolutions in question."""
        return [self.made[key] for key in self.normed if key in self.made and self.uses[key] == 1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result  # questions about shape, dtype and device
        for used in tensors((args, kwargs)):
            self.uses[id(used)] += 1
        if func in self.CONVS:
            self.made[id(result)] = tuple(args[1].shape)
        elif func is F.batch_norm:
            self.normed.append(id(args[0]))
        self.alive.append(result)  # identities must not be given away again
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def numbers(model: nn.Module, *, buffers: bool = False) -> int:
    """Those of its state dict, or of its parameters."""
    return sum(t.numel() for t in (model.state_dict().values() if buffers else model.parameters()))


def norms(model: nn.Module) -> int:
    return sum("BatchNorm" in type(m).__name__ for m in model.modules())
