"""Convolutions of classes that do more in their forward than convolve: the block stands where they convolve.

Every kind here is a class as people write it; none is known by its name.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from small_networks import ready
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers.std_conv import ScaledStdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.edits.apply import apply
from passes.edits.carried import made_by
from passes.edits.text import from_text, to_text
from passes.training.build import rebuilt
from passes.training.inside import kind_of
from reparam import Reason

# ------------------------------------------------------------------ kinds


class FixedSame(nn.Conv2d):
    """Pads by a layer that it holds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.border = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.border(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class AsLarge(nn.Conv2d):
    """Pads by what the size of its input asks for, in ordinary Python."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            more = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [more // 2, more - more // 2, *pads]
        x = F.pad(x, pads, value=0.5)
        return super().forward(x)


class Clamped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1, 1) * 2)


class Activating(nn.Conv2d):
    """Has a bias to give away only where it was built with one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.1)


class Adding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self._conv_forward(x, self.weight, self.bias)


class Normed(nn.Conv2d):
    """Holds its norm and activation, as the layers of detection libraries do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding)))


class Gained(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class OwnRule(nn.Conv2d):
    """Overrides what torch's own forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (1, 1, 1, 1), mode="reflect"), weight, bias)


class Standardised(nn.Conv2d):
    """Convolves with its weight standardised, by a sum that no library has."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / torch.sqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-4)
        return self._conv_forward(x, weight, self.bias)


class TwoRates(nn.Conv2d):
    """One weight at two dilations."""

    def forward(self, x: Tensor) -> Tensor:
        near = F.conv2d(x, self.weight, self.bias, padding=1)
        return near + F.conv2d(x, self.weight, padding=2, dilation=2).tanh()


COMPUTED: dict[str, Callable[[], nn.Conv2d | nn.Conv1d]] = {
    "standardises": lambda: Standardised(4, 8, 3, padding=1, bias=False),
    "timm's standardised": lambda: StdConv2d(4, 8, 3, 2, padding=1, bias=False),
    "timm's scaled": lambda: ScaledStdConv2d(4, 8, 3, padding=1),
    "timm's scaled same": lambda: ScaledStdConv2dSame(4, 4, 3, 2, groups=2),
    "two rates": lambda: TwoRates(4, 8, 3, bias=False),
}
"""Kinds that do more with their weight than convolve with it as it is."""

KINDS: dict[str, Callable[[], nn.Conv2d | nn.Conv1d]] = {
    "timm's same": lambda: Conv2dSame(4, 8, 3, 2, bias=False),
    "same, depthwise": lambda: Conv2dSame(4, 4, 5, 2, groups=4, bias=False),
    "same, dilated": lambda: AsLarge(4, 8, 3, 2, dilation=2),
    "same, even": lambda: AsLarge(4, 8, (4, 3), (3, 2), bias=False),
    "static padding": lambda: FixedSame(4, 8, 3, 2, bias=False),
    "static and own padding": lambda: FixedSame(4, 8, 3, padding=1),
    "clamps": lambda: Clamped(4, 8, 3, padding=1, bias=False),
    "activates": lambda: Activating(4, 8, 3, padding=1),
    "activates, no bias": lambda: Activating(4, 8, 3, padding=1, bias=False),
    "adds its input": lambda: Adding(4, 4, 3, padding=1, groups=2),
    "holds its norm": lambda: Normed(4, 8, 3, padding=1, bias=False),
    "scales": lambda: Gained(4, 8, 3, padding=1),
    "circular": lambda: Clamped(4, 8, 3, padding=(1, 2), padding_mode="circular"),
    "causal": lambda: Causal(4, 8, 3, dilation=2, bias=False),
    "reflects inside": lambda: OwnRule(4, 8, 3, bias=False),
}
TAKES_NORM = {"timm's same", "same, depthwise", "same, dilated", "same, even", "static padding", "causal"} | {
    "static and own padding", "clamps", "circular", "reflects inside",
}  # fmt: skip
"""Kinds with nothing between the convolution and what reads the layer."""


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    layer = (KINDS | COMPUTED)[kind]()
    n = len(layer.kernel_size)
    norm = nn.BatchNorm1d if n == 1 else nn.BatchNorm2d
    conv = nn.Conv1d if n == 1 else nn.Conv2d
    model = nn.Sequential(layer, norm(layer.out_channels), nn.ReLU(inplace=True), conv(layer.out_channels, 3, 1))
    return ready(model)


def given(model: nn.Module) -> list[Tensor]:
    one = isinstance(model[0], nn.Conv1d)  # type: ignore[index]
    shapes: list[tuple[int, ...]] = [(2, 4, 21), (1, 4, 34)] if one else [(2, 4, 13, 16), (1, 4, 22, 17)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def trained(model: nn.Module, xs: list[Tensor]) -> nn.Module:
    """Some steps, so that every branch has something to say."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in [*xs, *xs]:
        model(torch.cat([x, -x])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def close(got: Tensor, wanted: Tensor) -> bool:
    got, wanted = got.detach(), wanted.detach()
    return got.shape == wanted.shape and float((got - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


# ------------------------------------------------------------------ expand, train, collapse


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("block", ["acb", "dbb", "doconv"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_stands_where_the_layer_convolves(kind: str, block: str, online: bool) -> None:
    if block == "acb" and kind == "causal":
        block = "mobileone"  # a kernel in one dimension is a line itself
    goes_round(kind, block, online)


@pytest.mark.parametrize(("block", "online"), [("doconv", False), ("doconv", True), ("acb", True), ("dbb", True)])
@pytest.mark.parametrize("kind", COMPUTED)
def test_one_kernel_goes_through_what_a_class_does_with_its_weight(kind: str, block: str, online: bool) -> None:
    goes_round(kind, block, online)


def goes_round(kind: str, block: str, online: bool) -> None:
    model = net(kind).double()
    xs = given(model)
    plan = reparam.plan(model, block, where="0", form="online" if online else "branches")
    (first, _) = plan.rows
    assert first.refusal is None, first.refusal
    assert not plan.taken_back
    moved = kind in TAKES_NORM and block != "doconv" and not online
    assert (first.norm_stays is not None) == (kind not in TAKES_NORM)
    expanded = plan.apply()
    assert isinstance(expanded[1], nn.Identity) == moved  # type: ignore[index]
    for training in (False, True):
        a, b = copy.deepcopy(model).train(training), copy.deepcopy(expanded).train(training)
        assert all(torch.equal(b(x), a(x)) for x in xs)
    trained(expanded, xs)
    outputs = [expanded(x) for x in xs]

    for other in (copy.deepcopy(expanded), pickle.loads(pickle.dumps(expanded))):
        assert all(torch.equal(other(x), y) for x, y in zip(xs, outputs, strict=True))
    stock = net(kind).double()
    apply(stock, from_text(to_text(made_by(expanded))), build_block=rebuilt)
    stock.load_state_dict(expanded.state_dict(), strict=True)
    assert all(close(stock.eval()(x), y) for x, y in zip(xs, outputs, strict=True))

    collapsed = reparam.collapse(expanded)
    counts, plain = reparam.Counts.of(collapsed), reparam.Counts.of(reparam.collapse(model))
    assert counts.norms == plain.norms
    assert counts.convs <= plain.convs
    assert not any(isinstance(m, BranchSum) for m in collapsed.modules())
    if kind in TAKES_NORM:
        assert type(collapsed[0]) is type(model[0])  # type: ignore[index]
    assert all(close(collapsed(x), y) for x, y in zip(xs, outputs, strict=True))
    source = net(kind).double()
    apply(source, from_text(to_text(made_by(collapsed))), build_block=rebuilt)
    assert source.state_dict().keys() == collapsed.state_dict().keys()

    restored = reparam.collapse(expanded, like=net(kind).double())
    stock = net(kind).double().eval()
    stock.load_state_dict(restored.state_dict(), strict=True)
    assert all(close(stock(x), y) for x, y in zip(xs, outputs, strict=True))


# ------------------------------------------------------------------ what is left alone


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_sum_of_branches_goes_through_no_computed_kernel(kind: str) -> None:
    plan = reparam.plan(net(kind), "acb")
    refusal = plan.rows[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.ONE_KERNEL
    assert "doconv" in refusal.message


class Two(nn.Conv2d):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class Counting(nn.Conv2d):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class InPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


class Drifting(nn.Conv2d):
    """Changes its weight while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


class Merging(nn.Conv2d):
    """Changes its weight when it is put into another mode, as adapters do."""

    def train(self, mode: bool = True) -> Any:
        self.weight.data = self.weight.data * (0.5 if mode else 2.0)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Unused(nn.Conv2d):
    """Gives its own input back."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x


class Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.forward = lambda x: 2 * F.conv2d(x, conv.weight, padding=1)  # type: ignore[method-assign]
    return conv


LEFT: dict[str, tuple[Callable[[], nn.Conv2d], str]] = {
    "more than one input": (lambda: Two(4, 4, 3, padding=1), "more than one input"),
    "counts": (lambda: Counting(4, 4, 3, padding=1), "changes its input or itself"),
    "in place": (lambda: InPlace(4, 4, 3, padding=1), "changes its input or itself"),
    "changes its weight": (lambda: Drifting(4, 4, 3, padding=1), "calls mul_"),
    "own train()": (lambda: Merging(4, 4, 3, padding=1), "own train"),
    "returns its input": (lambda: Unused(4, 4, 3, padding=1), "made from its input|new tensor"),
    "patched on the instance": (patched, "replaced on this one layer"),
}


@pytest.mark.parametrize("block", ["acb", "doconv"])
@pytest.mark.parametrize("kind", LEFT)
def test_what_does_more_is_left_alone_with_its_reason(kind: str, block: str) -> None:
    make, words = LEFT[kind]
    model = nn.Sequential(make(), nn.BatchNorm2d(4)).eval()
    plan = reparam.plan(model, block)
    refusal = plan.rows[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.OWN_FORWARD
    assert re.search(words, refusal.message), refusal.message
    assert type(plan.apply()[0]) is type(model[0])  # type: ignore[index]


class OtherWhenLarge(nn.Conv2d):
    """Pads otherwise where nobody has looked."""

    def forward(self, x: Tensor) -> Tensor:
        stride = (2, 2) if x.shape[-1] > 100 else self.stride
        return F.conv2d(x, self.weight, self.bias, stride, self.padding)


def test_a_convolution_that_was_not_seen_raises() -> None:
    model = nn.Sequential(OtherWhenLarge(4, 4, 3, padding=1)).eval()
    expanded = reparam.expand(model, "acb")
    x = torch.randn(1, 4, 12, 12)
    assert torch.equal(expanded(x), model(x))
    with pytest.raises(RuntimeError, match="when it was read"):
        expanded(torch.randn(1, 4, 12, 101))


# ------------------------------------------------------------------ surroundings


def test_a_plan_without_numbers_says_the_same() -> None:
    for kind in [*KINDS, *COMPUTED, *LEFT]:
        make = (KINDS | COMPUTED).get(kind) or LEFT[kind][0]
        model = nn.Sequential(make())
        on_meta = nn.Sequential(make()).to("meta")
        for block in ("acb", "doconv"):
            real, bare = (reparam.plan(m, block, where="0", verify=False).rows[0] for m in (model, on_meta))
            assert (real.refusal, real.cost, real.found.inside) == (bare.refusal, bare.cost, bare.found.inside), kind


def test_the_shown_weight_moves_with_the_block() -> None:
    class Asks(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype))

    expanded = reparam.expand(nn.Sequential(Asks(4, 4, 3)).eval(), "acb").double()
    assert expanded(torch.randn(1, 4, 9, 9)).dtype is torch.float64


def test_a_block_inside_a_forward_compiles_and_exports() -> None:
    expanded = reparam.expand(net("timm's same"), "acb").eval()
    x = torch.randn(1, 4, 13, 16)
    wanted = expanded(x)
    assert torch.equal(torch.compile(expanded, fullgraph=True, backend="eager")(x), wanted)
    assert torch.allclose(torch.export.export(expanded, (x,)).module()(x), wanted)


def test_like_a_layer_whose_padding_is_a_word() -> None:
    def stock() -> nn.Module:
        return ready(nn.Sequential(nn.Conv2d(4, 8, 3, padding="valid", bias=False), nn.BatchNorm2d(8)))

    expanded = trained(reparam.expand(stock(), "acb"), [torch.randn(2, 4, 13, 16)])
    restored = reparam.collapse(expanded, like=stock())
    x = torch.randn(1, 4, 13, 16)
    assert torch.allclose(restored(x), expanded(x), atol=1e-5)


def test_like_another_rule_is_refused() -> None:
    """The numbers of a layer that pads by its own rule are not put into one that pads otherwise."""
    expanded = reparam.expand(nn.Sequential(Conv2dSame(4, 8, 3, 2), nn.ReLU()).eval(), "acb")
    with pytest.raises(reparam.ReparamError):
        reparam.collapse(expanded, like=nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.ReLU()))


def test_the_kernel_of_a_block_is_read() -> None:
    model = net("timm's same")
    weight, bias = reparam.equivalent_conv(reparam.expand(model, "acb", where="0", form="online")[0])  # type: ignore[index]
    assert bias is None
    assert torch.allclose(weight, model[0].weight)  # type: ignore[arg-type]


def test_inside_of_code_that_cannot_be_traced() -> None:
    """The block was put there while the code around could be read."""

    class Around(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body[0](x) if float(x.sum()) > 1e9 else F.relu(self.body[0](x))  # type: ignore[index]

    class Direct(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > 1e9 else F.relu(self.layer(x))

    body = trained(reparam.expand(net("timm's same"), "acb", where="0"), [torch.randn(2, 4, 13, 16)])
    x = torch.randn(1, 4, 13, 16)
    for model, path in ((Around(body).eval(), "body.0"), (Direct(body[0]).eval(), "layer")):  # type: ignore[index]
        collapsed = reparam.collapse(model)
        assert isinstance(collapsed.get_submodule(path), Conv2dSame)
        assert torch.allclose(collapsed(x), model(x), atol=1e-5)


def test_its_norm_moves_whatever_optional_arguments_there_are() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = FixedSame(4, 8, 3, 2, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            y: Tensor = self.norm(self.conv(x))
            return y if skip is None else y + skip

    (row,) = reparam.plan(ready(Part()), "acb").rows
    assert row.norm_stays is None
    assert row.found.norm is not None


def test_its_hook_goes_on_as_that_of_the_block() -> None:
    model, seen = net("timm's same"), list[Any]()
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    (row, _) = reparam.plan(model, "acb").rows
    assert row.refusal is None
    assert row.norm_stays is not None
    expanded = reparam.expand(model, "acb")
    seen.clear()
    expanded(torch.randn(1, 4, 13, 16))
    assert len(seen) == 1


def test_a_layer_around_a_block_that_stays_is_not_read_by_itself() -> None:
    """Without its weight, what it does means nothing: the block stays, since it is no convolution any more."""
    model = net("holds its norm").double()
    xs = given(model)
    expanded = trained(reparam.expand(model, "acb", where="0"), xs)
    block: Any = expanded[0]  # type: ignore[index]
    block.line0 = nn.Sequential(block.line0, nn.ReLU())
    collapsed = reparam.collapse(expanded)
    assert all(close(collapsed(x), expanded(x)) for x in xs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_mobilenetv3_small_075", "tf_mixnet_s"])
def test_whole_networks_come_back(name: str) -> None:
    model = ready(timm.create_model(name, num_classes=5))
    plan = reparam.plan(model, "acb")
    assert all(row.refusal.reason is not Reason.OWN_FORWARD for row in plan.rows if row.refusal is not None)
    expanded = trained(plan.apply(), [torch.randn(2, 3, 64, 64)])
    restored = reparam.collapse(expanded, like=timm.create_model(name, num_classes=5))
    stock = timm.create_model(name, num_classes=5).eval()
    stock.load_state_dict(restored.state_dict(), strict=True)
    x = torch.randn(1, 3, 70, 65)
    assert reparam.verify(expanded, stock, x).ok


class Decided(nn.Conv2d):
    """Convolves as its buffer or attribute says."""

    def __init__(self, *args: Any, flag: float = 0.0, kind: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("flag", torch.tensor([flag]))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.flag.item() > 0:
            return F.conv2d(x, self.weight * 2, self.weight.mean((1, 2, 3)), padding=1)
        return super().forward(x)


def test_layers_are_of_one_kind_only_if_a_forward_finds_the_same_in_them() -> None:
    def kind(*args: Any, **options: Any) -> Any:
        return kind_of(Decided(*(args or (4, 4, 3)), padding=1, **options))

    assert kind() == kind()  # other numbers in the weight
    others = [kind(flag=1.0), kind(kind=1), kind(kind=True), kind(kind=[1]), kind(kind=object()), kind(bias=False)]
    others += [kind(4, 8, 3), kind(stride=2), kind_of(nn.Conv2d(4, 4, 3, padding=1))]
    assert len({kind(), *others}) == 1 + len(others)
    assert kind_of(FixedSame(4, 4, 3)) is None  # it holds a layer, which may hold anything
