"""The proof fails when it should: planted defects, from one weight off by 1e-3 to a network wired wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_networks import WIDTH, Activated, Branches, ConvBN, Net, Parallel, Residual, images, maps, ready, snapshot
from small_networks import unchanged as is_unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import passes.collapse
import passes.compiler
import passes.fold.folds
import reparam
from passes.algebra.conv_form import ConvForm
from passes.fold.edits import edits_of
from reparam import EquivalenceError, ReparamError

Damage = Callable[[nn.Module], nn.Module | None]


def plant(monkeypatch: pytest.MonkeyPatch, damage: Damage, at: int = 0) -> None:
    """Let the compiler damage the layer of its ``at``-th fold."""
    emit, done = passes.fold.folds.emit, []

    def damaged(form: ConvForm, target: Any) -> nn.Module:
        layer = emit(form, target)
        done.append(layer)
        return damage(layer) or layer if len(done) == at + 1 else layer

    monkeypatch.setattr(passes.fold.folds, "emit", damaged)


# ------------------------------------------------------------------ planted in the emitted layer


def weight_off(index: int) -> Damage:
    def damage(layer: Any) -> None:
        layer.weight.data.flatten()[index] += 1e-3

    return damage


def bias_off(layer: Any) -> None:
    layer.bias.data[-1] += 1e-3


def not_a_number(layer: Any) -> None:
    layer.weight.data[0, 0, 0, 0] = float("nan")


def outputs_swapped(layer: Any) -> None:
    layer.weight.data[[0, 1]] = layer.weight.data[[1, 0]]


def inputs_swapped(layer: Any) -> None:
    layer.weight.data[:, [0, 1]] = layer.weight.data[:, [1, 0]]


def kernel_flipped(layer: Any) -> None:
    layer.weight.data = layer.weight.data.flip(-1)


def bias_lost(layer: Any) -> None:
    layer.bias = None


def stride_two(layer: Any) -> None:
    layer.stride = (2, 2)


def dilated(layer: Any) -> None:
    layer.dilation = layer.padding = (2, 2)


def unpadded(layer: Any) -> None:
    layer.padding = (0, 0)


def shifted(layer: Any) -> nn.Module:
    """One more pixel on the left, one less on the right: the output has the same size."""
    layer.padding = (0, 0)
    return Around(nn.ZeroPad2d((2, 0, 1, 1)), layer)


def one_border(layer: Any) -> nn.Module:
    """The padding repeats the border on one of four sides and is zero elsewhere."""
    layer.padding = (0, 0)
    return Around(nn.Sequential(nn.ReplicationPad2d((1, 0, 0, 0)), nn.ZeroPad2d((0, 1, 1, 1))), layer)


def one_pixel(layer: Any) -> nn.Module:
    """A single pixel, in a corner of the last channel, is off."""

    class Corner(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).clone()
            y[..., -1, -1, -1] += 1e-3
            return y

    layer.__class__ = Corner
    return layer


class Around(nn.Module):
    """A layer with something in front, under the layer's own parameter names."""

    def __init__(self, pad: nn.Module, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.pad, self._conv = pad, layer._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias)


LAST = WIDTH * WIDTH * 9 - 1
DAMAGES: dict[str, Damage] = {
    "first weight": weight_off(0),
    "middle weight": weight_off(LAST // 2),
    "last weight": weight_off(LAST),
    "bias": bias_off,
    "NaN": not_a_number,
    "output channels": outputs_swapped,
    "input channels": inputs_swapped,
    "flipped": kernel_flipped,
    "no bias": bias_lost,
    "stride": stride_two,
    "dilation": dilated,
    "padding": unpadded,
    "shift": shifted,
    "border": one_border,
    "corner pixel": one_pixel,
}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_fold_is_found_without_inputs(
    name: str, dtype: torch.dtype, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every defect is found, the layer is named, and the caller's model is as it was."""
    model = ready(nn.Sequential(ConvBN(), nn.ReLU(), Parallel())).to(dtype)
    before = snapshot(model)
    plant(monkeypatch, DAMAGES[name])
    with pytest.raises(EquivalenceError, match=r"2\.(square|point)\.conv|0\.conv"):
        reparam.collapse(model, inplace=inplace, strict=True)
    assert is_unchanged(model, before)


def test_undamaged_fold_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself does no harm: the same model with a plant that changes nothing."""
    plant(monkeypatch, lambda layer: None)
    reparam.collapse(ready(nn.Sequential(ConvBN(), nn.ReLU(), Parallel())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["output channels", "flipped", "no bias", "stride", "shift", "border"])
def test_half_precision_hides_nothing(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer has a wide rounding error; a wrong one must still not fit into it."""
    plant(monkeypatch, DAMAGES[name])
    with pytest.raises(EquivalenceError, match=r"0\.conv"):
        reparam.collapse(ready(nn.Sequential(ConvBN(256, 32))).to(dtype), strict=True)


def test_half_precision_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight among thousands, off by more than its own rounding."""

    def damage(layer: Any) -> None:
        layer.weight.data[3, 17, 1, 1] *= 1.05

    plant(monkeypatch, damage)
    with pytest.raises(EquivalenceError, match=r"0\.conv"):
        reparam.collapse(ready(nn.Sequential(ConvBN(256, 32))).to(torch.bfloat16), strict=True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_linear_and_other_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of a linear layer, of 1-d and of 3-d convolutions finds one weight as well."""
    for parts in (
        (nn.Linear(6, 5), nn.Linear(5, 4)),
        (nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5)),
        (nn.Conv3d(6, 5, (1, 2, 3), stride=2, groups=1), nn.BatchNorm3d(5)),
        (nn.ConvTranspose2d(6, 5, 3, stride=2, output_padding=1), nn.BatchNorm2d(5)),
        (nn.Conv2d(6, 6, 3, groups=6, padding_mode="circular", padding=1), nn.BatchNorm2d(6)),
        (nn.Conv2d(6, 6, 4, padding="same"), nn.BatchNorm2d(6)),
    ):
        model = ready(nn.Sequential(*parts))
        assert len(reparam.collapse_with_report(model)[1].folds) == 1
        with monkeypatch.context() as context:
            plant(context, weight_off(7))
            with pytest.raises(EquivalenceError, match=r"^0, 1: "):
                reparam.collapse(model, strict=True)


def test_verify_false_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever turns the proof off gets what the compiler made, and no error in the report."""
    plant(monkeypatch, weight_off(0))
    _, report = reparam.collapse_with_report(ready(ConvBN()), verify=False)
    assert [fold.error for fold in report.folds] == [None]


# ------------------------------------------------------------------ planted in the algebra


def test_wrong_law_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    affine = ConvForm.affine

    def wrong(self: ConvForm, scale: Tensor | None, shift: Tensor | None) -> ConvForm:
        return affine(self, None if scale is None else scale * (1 + 1e-6), shift)

    monkeypatch.setattr(ConvForm, "affine", wrong)
    with pytest.raises(EquivalenceError, match="conv, norm"):
        reparam.collapse(ready(ConvBN()), strict=True)


class PointThenSquare(nn.Module):
    """DBB's 1x1-3x3 branch with a norm between and ordinary zero padding: inexact at the border."""

    def __init__(self) -> None:
        super().__init__()
        self.square = ConvBN()
        self.first = ConvBN(WIDTH, WIDTH, 1)
        self.second = ConvBN()

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.second(self.first(x))


def test_wrong_law_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard of zero padding taken away, only border pixels are wrong, and the proof sees them."""
    model = ready(PointThenSquare())
    assert reparam.Reason.PAD_VALUE in {r.reason for r in reparam.collapse_with_report(model)[1].refusals}
    monkeypatch.setattr(ConvForm, "_check_outside", lambda *args: None)
    with pytest.raises(EquivalenceError, match=r"second\.conv"):
        reparam.collapse(model, strict=True)


# ------------------------------------------------------------------ planted in the surgery


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_wrong_surgery(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that are right but end up in the wrong place are found with inputs, in float32 and in place too."""
    model = ready(Branches())
    before = snapshot(model)

    def swapped(layout: Any, folds: list[Any]) -> Any:
        return edits_of(layout, [replace(a, layer=b.layer) for a, b in zip(folds, folds[::-1], strict=True)])

    monkeypatch.setattr(passes.compiler, "edits_of", swapped)
    with pytest.raises(EquivalenceError, match=r"differ" if inplace else r"first at convs\.0"):
        reparam.collapse(model, example_inputs=maps(), inplace=inplace, strict=True)
    assert is_unchanged(model, before)


# ------------------------------------------------------------------ whole networks


def off_by(module: nn.Module, amount: float = 1e-3) -> None:
    """One output channel off: a single weight may read a channel that an activation keeps at zero."""
    next(module.parameters()).data[0] += amount


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["stem.conv", "whole", "rewritten.left", "residual.conv1", "residual.conv2", "head"])
def test_verify_names_the_damaged_module(name: str, dtype: torch.dtype) -> None:
    """Folded convolutions all differ from the originals of the same name; only the damaged one is named."""
    model = ready(Net()).to(dtype)
    plain = reparam.collapse(model)
    x = images(dtype=dtype)
    assert reparam.verify(model, plain, x).ok
    off_by(plain.get_submodule(name))
    found = reparam.verify(model, plain, x)
    assert not found.ok
    assert found.first_difference is not None
    # The original has no counterpart of a layer made for a rewritten forward; then the block around it is named.
    assert name == found.first_difference or name == f"{found.first_difference}.left"
    with pytest.raises(EquivalenceError, match=f"first at {found.first_difference}"):
        found.raise_if_different()


@pytest.mark.parametrize("at", range(3))
def test_verify_names_the_damaged_branch(at: int) -> None:
    """Branches that run interleaved: neither the first nor the last is named unless it is the one."""
    model = ready(Branches())
    plain = reparam.collapse(model)
    off_by(plain.convs[at])
    assert reparam.verify(model, plain, maps()).first_difference == f"convs.{at}"


def test_verify_names_an_unfolded_norm() -> None:
    """Nothing is folded here: the norm itself is damaged, and its convolution is not blamed."""
    model = ready(nn.Sequential(Residual(), Residual()))
    other = copy.deepcopy(model)
    other[1].bn2.running_mean[0] += 1e-2
    assert reparam.verify(model, other, maps()).first_difference == "1.bn2"


def test_verify_names_the_first_of_two() -> None:
    model = ready(nn.Sequential(Residual(), Activated(), Residual()))
    plain = reparam.collapse(model)
    off_by(plain[2].conv1)
    off_by(plain[0].conv2)
    assert reparam.verify(model, plain, maps()).first_difference == "0.conv2"


def test_verify_difference_outside_modules() -> None:
    """A difference in the outermost forward itself belongs to no module."""

    class Shifted(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-3

    model = ready(ConvBN())
    other = Shifted()
    other.load_state_dict(model.state_dict())
    found = reparam.verify(model, other, maps())
    assert found.max_abs == pytest.approx(1e-3)
    assert found.first_difference == "(model)"


def test_verify_shape_and_nan() -> None:
    """Other shapes and NaN are infinite differences, never a pass."""
    model = ready(ConvBN())
    strided = copy.deepcopy(model)
    strided.conv.stride = (2, 2)
    broken = copy.deepcopy(model)
    broken.conv.weight.data[0, 0, 0, 0] = float("nan")
    for other in (strided, broken):
        found = reparam.verify(model, other, maps())
        assert not found.ok
        assert found.max_abs == found.max_rel == float("inf")
        assert found.first_difference == "conv"


def test_verify_other_number_of_outputs() -> None:
    class Twice(ConvBN):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y

    model, other = ready(ConvBN()), Twice()
    other.load_state_dict(model.state_dict())
    assert not reparam.verify(model, other, maps()).ok


def test_verify_nothing_to_compare() -> None:
    """A network that returns no numbers would pass whatever it does."""

    class Silent(ConvBN):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return {}

    with pytest.raises(ReparamError, match="nothing to compare"):
        reparam.verify(Silent(), Silent(), maps())
    with pytest.raises(ReparamError, match="nothing to compare"):
        reparam.collapse(Silent(), example_inputs=maps())


def test_verify_tolerance_follows_the_dtype() -> None:
    """What float32 cannot tell apart is a difference in float64."""
    model = ready(Net())
    nudged = copy.deepcopy(model)
    nudged.head.weight.data *= 1 + 2e-7
    assert reparam.verify(model, nudged, images()).ok
    double, nudged = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    nudged.head.weight.data *= 1 + 1e-8
    found = reparam.verify(double, nudged, images())
    assert not found.ok
    assert found.first_difference == "head"
    assert found.noise is None
    assert found.tolerance == 1e-10


def test_verify_across_dtypes() -> None:
    """A float32 copy of a float64 network passes as float32; a float64 candidate is held to float64."""
    model = ready(Net()).double()
    model.head.weight.data += 1e-9
    single = copy.deepcopy(model).float()
    found = reparam.verify(model, single, images())
    assert found.ok
    assert found.noise is not None
    assert reparam.verify(single, copy.deepcopy(single).double(), images()).tolerance == 1e-10
    assert not reparam.verify(single, model, images()).ok


def test_verify_guesses_inputs() -> None:
    """Without inputs a size that the network takes is tried, and defects are found with it."""
    for model in (ready(Net()), ready(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))):
        plain = reparam.collapse(model)
        assert reparam.verify(model, plain).ok
        off_by(next(m for m in reversed(list(plain.modules())) if isinstance(m, nn.Linear)), 1e-2)
        assert not reparam.verify(model, plain).ok
    assert reparam.guess_inputs(Net())[0].shape[:2] == (2, 3)


def test_verify_leaves_both_as_they_are() -> None:
    model = ready(Net()).train()
    plain = reparam.collapse(model)
    before, after, state = snapshot(model), snapshot(plain), torch.get_rng_state()
    off_by(copy.deepcopy(plain))
    reparam.verify(model, plain, images())
    assert is_unchanged(model, before)
    assert is_unchanged(plain, after)
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------ how exact


def fold_in_float32(model: nn.Sequential) -> nn.Sequential:
    """The usual fold of Conv-BN chains, in the weights' own float32, as published code does it."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(model).float():
        if isinstance(layer, nn.BatchNorm2d):
            conv: Any = layers[-1]
            scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            conv.weight = nn.Parameter(conv.weight * scale.reshape(-1, 1, 1, 1))
            conv.bias = nn.Parameter((conv.bias - layer.running_mean) * scale + layer.bias)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def chain(depth: int = 6) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(depth):
        parts += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*parts)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def test_float64_fold_is_exact() -> None:
    model = ready(Net()).double()
    x = images(dtype=torch.float64)
    assert error(reparam.collapse(model)(x), model(x)) < 1e-12


@torch.no_grad()
def test_float32_fold_is_no_worse_than_one_done_in_float32() -> None:
    """Weights are rounded once. Measured in float64, so that only the folds' own error is seen; over ten networks."""
    ours, theirs = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        model = ready(chain(), seed)
        x = maps(dtype=torch.float64)
        wanted = copy.deepcopy(model).double()(x)
        ours.append(error(reparam.collapse(model).double()(x), wanted))
        theirs.append(error(fold_in_float32(model).double()(x), wanted))
    assert sum(ours) <= sum(theirs)
    assert max(ours) <= max(theirs)


def test_error_in_the_report_is_the_rounding() -> None:
    """Each fold reports its own error: zero for float64 numbers that are not rounded, around eps for float32."""
    for dtype, low, high in ((torch.float32, 1e-9, 1e-6), (torch.float64, 0.0, 1e-13), (torch.bfloat16, 1e-4, 2e-2)):
        folds = reparam.collapse_with_report(ready(Net()).to(dtype))[1].folds
        assert folds
        assert all(fold.error is not None and low <= fold.error <= high for fold in folds)


def test_an_input_for_a_network_that_begins_with_a_block() -> None:
    """No plain convolution comes before the block that stands for the first one, and the next reads other channels."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    (x,) = reparam.guess_inputs(reparam.expand(model, "doconv"))
    assert x.shape[1] == 3
