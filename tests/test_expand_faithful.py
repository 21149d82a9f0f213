"""What is expanded is the module, not its trace: the kinds of Python around layers that change what a block may do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from small_networks import WIDTH, ConvBN, Net, images, maps, ready, snapshot, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from reparam import ReparamError

BLOCKS = ("acb", "dbb", "doconv", "orepa")


def exact(model: nn.Module) -> Any:
    """In float64, with batch norms that matter, in eval mode."""
    return ready(model).double().eval()


def double(**options: Any) -> Tensor:
    return maps(dtype=torch.float64, **options)


@torch.no_grad()
def computes(model: nn.Module, other: nn.Module, *inputs: Any, modes: tuple[bool, ...] = (False, True)) -> None:
    """Equal in evaluation and in training, to 1e-10, on copies that are put into these modes by their own train()."""
    for training in modes:
        wanted, got = (copy.deepcopy(m).train(training)(*inputs) for m in (model, other))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def blocks(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_block(module)]


# ------------------------------------------------------------------ attributes that other code reads


class Asks(nn.Module):
    """A convolution and its norm; ``also`` reads an attribute of one of them."""

    def __init__(self, also: Callable[[Any, Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv.scale, self.conv.kinds = 3, ("a", 1)  # type: ignore[assignment]
        self.bn = nn.BatchNorm2d(WIDTH, affine=affine)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self, self.bn(self.conv(x)))


ASKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "num_features": lambda m, y: y.view(y.shape[0], m.bn.num_features, -1),
    "eps": lambda m, y: y + m.bn.eps,
    "momentum and affine": lambda m, y: y * m.bn.momentum if m.bn.affine else y,
    "no weight": lambda m, y: y if m.bn.weight is None else y * 2,
    "no bias of the convolution": lambda m, y: y if m.conv.bias is None else y * 2,
    "geometry": lambda m, y: y * m.conv.out_channels * m.conv.stride[0] + m.conv.output_padding[0],
    "its owner's": lambda m, y: y * m.conv.scale * len(m.conv.kinds),
    "dtype of a weight": lambda m, y: y.to(m.bn.weight.dtype) if m.bn.affine else y,
    "statistics": lambda m, y: y + m.bn.running_mean[0],
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_attributes_that_other_code_reads(asked: str, affine: bool) -> None:
    """What stands in a layer's place answers for it; where it cannot, the layer stays."""
    model = exact(Asks(ASKED[asked], affine))
    for block in ("acb", "doconv"):
        expanded = reparam.expand(model, block)
        assert blocks(expanded) == ["conv"]
        computes(model, expanded, double())


# ------------------------------------------------------------------ test inputs, devices


@pytest.mark.parametrize("block", ["dbb", "orepa"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("groups", [1, WIDTH])
def test_maps_smaller_than_the_kernel(kernel: int, groups: int, block: str) -> None:
    """Torch's 3-d pooling refuses them, the convolution does not."""
    conv = nn.Conv3d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups, bias=False)
    model = exact(nn.Sequential(conv, nn.BatchNorm3d(WIDTH)))
    expanded = reparam.expand(model, block)
    assert blocks(expanded) == ["0"]
    computes(model, expanded, torch.randn(2, WIDTH, 2, 3, 4, dtype=torch.float64))


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "orepa", "ecb"])
def test_default_device(block: str) -> None:
    """Numbers of the compiler's own are made where the model is, not where the caller makes new tensors."""
    model = exact(nn.Sequential(ConvBN(), nn.ReLU()))
    with default_device("meta"):
        expanded = reparam.expand(model, block)
    assert blocks(expanded) == ["0.conv"]
    computes(model, expanded, double(), modes=(False,))


# ------------------------------------------------------------------ float networks that are made ready to be quantised


class SkipAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBN()
        self.skip = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip.add(x, self.body(x)))


def test_float_functional_is_no_quantised_layer() -> None:
    model = exact(SkipAdd())
    expanded = reparam.expand(model, "acb")
    assert blocks(expanded) == ["body.conv"]
    computes(model, expanded, double())
    collapsed, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    computes(model, collapsed, double(), modes=(False,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_made_to_be_quantised(name: str) -> None:
    model = exact(getattr(torchvision.models.quantization, name)(weights=None, quantize=False))
    x = images(2, 64, dtype=torch.float64)
    collapsed, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    computes(model, collapsed, x, modes=(False,))
    expanded = reparam.expand(model, "acb")
    assert len(blocks(expanded)) == {"resnet18": 17, "mobilenet_v2": 18}[name]
    computes(model, expanded, x, modes=(False,))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["functional", "layer"])
def test_quantised_layers_are_refused(kind: str) -> None:
    quantised = torch.ao.nn.quantized
    layer = quantised.QFunctional() if kind == "functional" else quantised.Dropout()
    model = nn.Sequential(ConvBN(), layer)
    for verb in (reparam.collapse, reparam.explain, lambda m: reparam.plan(m, "acb")):
        with pytest.raises(ReparamError, match="1 is quantised: rewrite the model first"):
            verb(model)


def test_a_package_of_the_callers_own_may_be_called_quantized() -> None:
    kind = type("Mine", (ConvBN,), {"__module__": "my.quantized.nets"})
    assert blocks(reparam.expand(exact(kind()), "acb")) == ["conv"]


# ------------------------------------------------------------------ models whose own train() and eval() compute


class Lora(nn.Conv2d):
    """loralib's: ``train(False)`` merges the adapter into the weight, in place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        taps = self.weight[0].numel() // self.weight.shape[1]
        self.A = nn.Parameter(torch.randn(2, self.weight.shape[1] * taps))
        self.B = nn.Parameter(torch.randn(self.weight.shape[0], 2))
        self.merged = False

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.B @ self.A).view(self.weight.shape)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        change = 0 if self.merged else (self.B @ self.A).view(self.weight.shape)
        return self._conv_forward(x, self.weight + change, self.bias)


def adapted() -> Any:
    return nn.Sequential(Lora(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), ConvBN())


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "collapse": reparam.collapse,
    "explain": reparam.explain,
    "plan": lambda m: reparam.plan(m, "acb"),
    "expand": lambda m: reparam.expand(m, "acb"),
    "like": lambda m: reparam.collapse(reparam.expand(m, "acb"), like=m),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_adapters_are_not_merged_into_the_callers_weights(verb: str, training: bool) -> None:
    model = exact(adapted()).train(training)
    before = snapshot(model)
    got = VERBS[verb](model)
    assert unchanged(model, before)
    if verb == "collapse":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in got.modules())
        torch.testing.assert_close(got(double()), copy.deepcopy(model).eval()(double()), rtol=1e-10, atol=1e-10)
    if verb == "expand":
        assert blocks(got) == ["3.conv"]
        computes(model, got, double())


@pytest.mark.parametrize("training", [False, True])
def test_adapters_in_place(training: bool) -> None:
    """The model itself is to be changed: it is merged then, and unmerged if the verb fails."""
    model = exact(adapted()).train(training)
    wanted = copy.deepcopy(model).eval()(double())
    before = snapshot(model)
    with pytest.raises(ReparamError):
        reparam.collapse(model, example_inputs=images(dtype=torch.float64), inplace=True)
    assert unchanged(model, before)
    collapsed = reparam.collapse(model, inplace=True)
    assert collapsed is model
    torch.testing.assert_close(model(double()), wanted, rtol=1e-10, atol=1e-10)


class Merges(Net):
    """Its eval() changes numbers and attributes."""

    def eval(self) -> Merges:
        super().eval()
        self.stem.conv.weight.data.mul_(2)
        self.merged = True
        return self


def test_failure_in_place_takes_the_models_own_eval_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(Net())
    model.__class__ = Merges
    model.train()
    before = snapshot(model)

    def fails(*args: Any) -> None:
        assert model.merged
        raise RuntimeError("half-way")

    monkeypatch.setattr("passes.collapse._compile", fails)
    with pytest.raises(RuntimeError, match="half-way"):
        reparam.collapse(model, inplace=True)
    assert unchanged(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_left_in_training_mode_is_not_folded(inplace: bool) -> None:
    """In a model that is being evaluated, it is in that mode on purpose; the others fold."""
    model = exact(nn.Sequential(ConvBN(), nn.ReLU(), ConvBN()))
    model[0].norm.train()
    wanted = copy.deepcopy(model)(double())
    said = {r.layer: r.message for r in reparam.explain(model).refusals}
    assert said == {"0.norm": "batch norm in training mode uses the batch's own statistics"}
    collapsed, report = reparam.collapse_with_report(model, inplace=inplace)
    assert {r.layer: r.message for r in report.refusals} == said
    assert [r.training for r in collapsed.modules() if isinstance(r, nn.BatchNorm2d)] == [True]
    torch.testing.assert_close(collapsed(double()), wanted, rtol=1e-10, atol=1e-10)
