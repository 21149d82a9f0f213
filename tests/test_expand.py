"""Which convolutions get a block, which are left alone and why, what a plan says, and how mistakes are answered."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from small_networks import WIDTH, ConvBN, Net, Residual, images, maps, ready, snapshot, unchanged
from timm.layers import BatchNormAct2d, StdConv2d
from timm.layers.drop import DropBlock2d
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from passes.blocks.kit.registry import unregister
from reparam import Block, Plan, Reason, ReparamError


def conv3(bias: bool = False, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=bias, **options)


def same(a: nn.Module, b: nn.Module, *inputs: Tensor) -> None:
    """Equal to the last bit, in evaluation and in training, running statistics included."""
    a, b = copy.deepcopy(a), copy.deepcopy(b)
    for training in (False, True):
        a.train(training)
        b.train(training)
        torch.manual_seed(3)
        wanted = a(*inputs)
        torch.manual_seed(3)
        assert torch.equal(b(*inputs), wanted)


def row(plan: Plan, layer: str) -> Any:
    (found,) = (row for row in plan.rows if row.layer == layer)
    return found


def taken(model: nn.Module, layer: str, block: Any = "acb", x: Tensor | None = None) -> str | None:
    """Path of the norm that goes into the block; the expanded model computes the same."""
    ready(model)
    plan = reparam.plan(model, block)
    found = row(plan, layer)
    assert found.refusal is None, found.refusal
    expanded = plan.apply()
    assert is_block(expanded.get_submodule(layer))
    same(model, expanded, maps() if x is None else x)
    reparam.verify(model, reparam.collapse(expanded.eval()), maps() if x is None else x).raise_if_different()
    if found.found.norm is not None:
        assert not isinstance(expanded.get_submodule(found.found.norm.path), nn.modules.batchnorm._BatchNorm)
    return None if found.found.norm is None else str(found.found.norm.path)


def left(model: nn.Module, layer: str, reason: Reason, words: str, block: str = "acb") -> None:
    """The convolution is refused with the reason, and expansion leaves it as it is."""
    plan = reparam.plan(model, block)
    refusal = row(plan, layer).refusal
    assert refusal is not None, "it was not refused"
    assert refusal.reason is reason, refusal
    assert words in refusal.message
    assert layer in str(plan)
    assert type(plan.apply().get_submodule(layer)) is type(model.get_submodule(layer))


def norms_in(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


# ------------------------------------------------------------------ matching by dataflow


class Crossed(nn.Module):
    """Registered as (norm of b, b, norm of a, a), called the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(WIDTH)
        self.conv1 = conv3()
        self.norm2 = nn.BatchNorm2d(WIDTH)
        self.conv2 = conv3()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv2(F.relu(self.norm2(self.conv1(x)))))


def test_registration_order_says_nothing() -> None:
    assert taken(Crossed(), "conv1") == "norm2"
    assert taken(Crossed(), "conv2") == "norm1"


class Apart(nn.Module):
    """Convolutions in one container, norms in another, the last norm in front of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"second": nn.BatchNorm2d(WIDTH), "first": nn.BatchNorm2d(WIDTH)})
        self.convs = nn.ModuleDict({"first": conv3(), "second": conv3()})

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            x = F.relu(self.norms[name](self.convs[name](x)))
        return x


class TwoNames(nn.Module):
    """One module, called once, registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBN()
        self.again = nn.Sequential(self.body)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.again(x) + x)


@pytest.mark.parametrize("block", ["acb", "doconv"])
def test_a_module_with_two_names_is_one_module(block: str) -> None:
    model = ready(TwoNames())
    plan = reparam.plan(model, block, init="paper")
    assert row(plan, "body.conv").found.norm.path == "body.norm"
    expanded = ready(plan.apply())
    back: Any = reparam.collapse(expanded, like=model)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert back.again[0] is back.body
    reparam.verify(expanded, back, maps()).raise_if_different()


def test_norm_in_another_module() -> None:
    assert taken(Apart(), "convs.first") == "norms.first"
    assert taken(Apart(), "convs.second") == "norms.second"


def test_pre_activation() -> None:
    """A norm in front of a convolution does not belong to it."""
    model = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), conv3(), nn.ReLU(), nn.BatchNorm2d(WIDTH))
    assert taken(model, "2") is None


class Read(nn.Module):
    """A convolution and its norm; ``also`` is what else is done with the convolution's output."""

    def __init__(self, also: Callable[[Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.conv = conv3(bias)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.also(self.norm(y), y)


@pytest.mark.parametrize("bias", [False, True])
def test_read_twice(bias: bool) -> None:
    """A norm cannot go into a block whose sum is read elsewhere too; added norms need a bias to fold into."""
    model = Read(lambda normed, y: normed + y, bias)
    assert taken(model, "conv") is None
    block = reparam.expand(model, "acb").conv
    assert len(norms_in(block)) == (2 if bias else 0)
    assert len(list(block.children())) == 3


@pytest.mark.parametrize("also", [lambda normed, y: normed + F.relu(y), lambda normed, y: (normed, y)[0] * y.mean()])
def test_functional_read(also: Any) -> None:
    assert taken(Read(also), "conv") is None


def test_questions_about_a_shape_are_no_reads() -> None:
    assert taken(Read(lambda normed, y: normed.reshape(y.shape) * (y.size(1) + y.dim())), "conv") == "norm"


class NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(), conv3()
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(F.relu(self.norm(self.conv1(x)))))


def test_norm_called_twice() -> None:
    assert taken(NormTwice(), "conv1") is None
    assert taken(NormTwice(), "conv2") is None


def test_norm_that_shares_a_tensor() -> None:
    model = Crossed()
    model.norm1.weight = model.norm2.weight
    assert taken(model, "conv1") is None


def test_norm_with_a_hook() -> None:
    model = ConvBN()
    calls = []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    assert taken(model, "conv") is None
    assert calls


def test_norm_whose_tensors_other_code_reads() -> None:
    """They would no longer be where the code looks for them."""
    assert taken(Read(lambda normed, y: normed), "conv") == "norm"

    class Peeks(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.norm.weight.abs().mean()

    assert taken(Peeks(), "conv") is None


class Activating(nn.Module):
    """Timm's batch norm that drops and activates, behind a convolution."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = conv3()
        self.bn = BatchNormAct2d(WIDTH, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Softened(nn.Module):
    """An activation that is traced through, since torch does not know it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class DropOnce(nn.Module):
    """Gives its input back in evaluation, as dropout of a library's own does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.5)) if self.training else x


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["act"]),
        ({"act_layer": nn.SiLU, "drop_layer": DropOnce}, ["drop", "act"]),
        ({"act_layer": Softened}, ["act"]),
        ({"drop_layer": DropOnce, "apply_act": False}, ["drop"]),
        ({"apply_act": False}, []),
    ],
    ids=["relu", "drop and act", "own activation", "drop", "nothing"],
)
def test_norm_that_activates_is_split(options: dict[str, Any], names: list[str]) -> None:
    """The norm goes into the block, the activation stays under its name."""
    model = Activating(**options)
    assert taken(model, "conv") == "bn"
    expanded = reparam.expand(model.train(), "acb")
    assert [name for name, _ in expanded.bn.named_children()] == names
    assert type(expanded.conv.square.norm) is nn.BatchNorm2d
    assert all(m.training for m in expanded.modules())


def test_drop_block_in_training() -> None:
    """What cannot be read in training keeps the convolution as it is, rather than half of it."""
    model = Activating(drop_layer=lambda: DropBlock2d(0.1, 3))
    plan = reparam.plan(ready(model), "acb")
    same(model, plan.apply(), maps())


class Gain(nn.BatchNorm2d):
    """Stores the gain around zero: what torch's batch norm does with the same tensors is something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight + 1, self.bias, self.training, 0.1, self.eps
        )


class OtherEps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            input=x, running_mean=self.running_mean, running_var=self.running_var, weight=self.weight, bias=self.bias,
            training=self.training, momentum=self.momentum, eps=0.5,
        )  # fmt: skip


class Swapped(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.bias, self.weight, self.training, 0.1, self.eps
        )


class NeverTrains(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class Named(nn.BatchNorm2d):
    """Torch's own batch norm, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training, eps=self.eps,
            momentum=self.momentum,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "norm"), [(Gain, None), (Swapped, None), (OtherEps, None), (NeverTrains, None), (Named, "1")]
)
def test_norm_of_its_own_making(kind: type[nn.BatchNorm2d], norm: str | None) -> None:
    """Only what is torch's batch norm of the module's own tensors and options moves into the block."""
    assert taken(nn.Sequential(conv3(), kind(WIDTH)), "0") == norm


@pytest.mark.parametrize(
    "norm",
    [
        lambda: torchvision.ops.FrozenBatchNorm2d(WIDTH),
        lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
        lambda: nn.GroupNorm(2, WIDTH),
        lambda: nn.LayerNorm((WIDTH, 12, 12)),
        lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    ],
    ids=["frozen", "no running statistics", "group", "layer", "instance"],
)
def test_other_norms_stay(norm: Callable[[], nn.Module]) -> None:
    """The convolution gets a block without norms, for it has no bias that theirs could fold into."""
    model = nn.Sequential(conv3(), norm(), nn.ReLU())
    assert taken(model, "0") is None
    expanded = reparam.expand(model, "dbb")
    assert not norms_in(expanded[0])
    assert type(expanded[1]) is type(model[1])


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_norms_of_branches_are_like_the_original(kind: type[nn.Module]) -> None:
    model = nn.Sequential(conv3(), kind(WIDTH, eps=0.01, momentum=0.3))
    block = reparam.expand(model, "acb")[0]
    assert [(type(m), m.eps, m.momentum) for m in norms_in(block)] == [(kind, 0.01, 0.3)] * 3


def test_norm_without_affine() -> None:
    model = nn.Sequential(conv3(), nn.BatchNorm2d(WIDTH, affine=False))
    assert taken(model, "0") == "1"
    stock = reparam.collapse(reparam.expand(model, "acb"), like=model)
    model.load_state_dict(stock.state_dict(), strict=True)


# ------------------------------------------------------------------ what is left alone, and why


class Calls(nn.Module):
    """A module whose forward is a function of itself and x."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _tied() -> nn.Module:
    model = nn.Sequential(conv3(), conv3())
    model[1].weight = model[0].weight
    return model


def _patched() -> nn.Module:
    model = ConvBN()
    plain = model.conv.forward
    model.conv.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return model


def depends(m: Any, x: Tensor) -> Tensor:
    """Reads a number out of the input: torch.fx cannot follow."""
    return m.conv(x) if float(x.sum()) > 0 else m.conv(-x)


LEFT: dict[str, tuple[Callable[[], nn.Module], str, Reason, str]] = {
    "shared weight": (_tied, "0", Reason.SHARED, "its weight is that of another layer too"),
    "standardised weight": (
        lambda: nn.Sequential(StdConv2d(8, 8, 3, padding=1)), "0", Reason.ONE_KERNEL, "StdConv2d computes the kernel",
    ),
    "patched forward": (_patched, "conv", Reason.OWN_FORWARD, "Conv2d does more"),
    "nothing calls it": (
        lambda: Calls(lambda m, x: m.used(x), used=conv3(), idle=conv3()), "idle", Reason.NEVER_CALLED, "nothing calls",
    ),
    "another reader in training": (
        lambda: Calls(
            lambda m, x: m.one(m.conv(x)) if m.training else m.two(m.conv(x)),
            conv=conv3(), one=nn.BatchNorm2d(8), two=nn.BatchNorm2d(8),
        ), "conv", Reason.MODES, "in training another layer reads it",
    ),
    "weight read by other code": (
        lambda: Calls(lambda m, x: m.conv(x.to(m.conv.weight.dtype)), conv=conv3()),
        "conv", Reason.CODE, "reads its weight",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    make, layer, reason, words = LEFT[case]
    left(make(), layer, reason, words)


def test_expanding_twice() -> None:
    """What is inside a block is left alone, also a kernel of one tap; the other layers can get another block."""
    model = ready(Residual())
    once = reparam.expand(model, "dbb", where="conv1")
    plan = reparam.plan(once, "acb")
    inside = [r for r in plan.rows if r.layer.startswith("conv1.")]
    assert len(inside) == 4
    assert all(r.refusal is not None and "part of a block already" in r.refusal.message for r in inside)
    assert [r.layer for r in plan.expanded] == ["conv2"]
    same(model, plan.apply(), maps())


def test_a_branch_that_cannot_start_at_zero() -> None:
    @reparam.block("blurred")
    def blurred(conv: reparam.Site) -> Any:
        """The kernel + a mean that nothing scales."""
        yield "square", conv.main()
        yield "mean", conv.average(conv.out_channels, padded=True)

    try:
        model = ready(nn.Sequential(conv3(), nn.BatchNorm2d(WIDTH)))
        left(model, "0", Reason.BLOCK, "nothing to train", "blurred")
        assert is_block(reparam.expand(model, "blurred", init="paper")[0])
    finally:
        unregister("blurred")


def test_untraceable_outside() -> None:
    """Control flow that depends on numbers: the modules inside are expanded, norms and all."""
    model = ready(
        Calls(
            lambda m, x: m.even(x) if float(x.sum()) > 0 else m.odd(x),
            even=nn.Sequential(ConvBN(), nn.ReLU()),
            odd=Residual(),
        )
    )
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.expanded] == ["even.0.conv", "odd.conv1", "odd.conv2"]
    assert all(r.found.norm is not None for r in plan.expanded)
    expanded = plan.apply()
    same(model, expanded, maps().abs())
    same(model, expanded, -maps().abs())


def test_heads_that_only_train() -> None:
    """An auxiliary head runs in training alone; so does a convolution beside the model's own."""
    model = ready(
        Calls(
            lambda m, x: m.body(x) + (m.head(x) + m.side(x) if m.training else 0),
            body=ConvBN(), head=ConvBN(), side=conv3(),
        )
    )  # fmt: skip
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.expanded] == ["body.conv", "head.conv", "side"]
    assert row(plan, "head.conv").found.norm.path == "head.norm"
    same(model, plan.apply(), maps())


@pytest.mark.slow
def test_detection_network() -> None:
    """The outer forward cannot be traced; backbone, pyramid and the head that runs on each level are expanded."""
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = ready(build(weights=None, weights_backbone=None))
    plan = reparam.plan(model, "acb")
    layers = [r.layer for r in plan.expanded]
    assert {"backbone.body.0.0", "backbone.fpn.layer_blocks.0.0", "rpn.head.conv.0.0"} <= set(layers)
    assert len(layers) == 19
    assert not plan.refused
    expanded = plan.apply()
    x = [images(1, 64)[0]]
    for wanted, got in zip(model(x), expanded.eval()(x), strict=True):
        assert all(torch.equal(wanted[key], got[key]) for key in wanted)


# ------------------------------------------------------------------ plans


# Every pair of values: what a plan does with one option does not depend on the two others.
@pytest.mark.parametrize(
    ("block", "init", "inplace"),
    [
        (block, init, (init == "paper") is (number % 2 == 0))
        for number, block in enumerate(("acb", "dbb", "doconv", "orepa"))
        for init in ("preserve", "paper")
    ],
)
def test_a_plan_touches_nothing(block: str, init: str, inplace: bool) -> None:
    """Not the model, not the random state; neither do the forwards that count multiply-adds."""

    class Marks(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + torch.rand(1)

    model = ready(Marks())
    model.residual.train()
    before, state, python = snapshot(model), torch.get_rng_state(), random.getstate()
    assert str(reparam.plan(model, block, init=init, example_inputs=images(), inplace=inplace))
    assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_rows_are_convolutions() -> None:
    model = timm.create_model("mobilenetv3_small_050")
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.rows] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert all((r.block is None) == (r.refusal is not None) == (r.cost is None) for r in plan.rows)
    assert len(plan.expanded) == 12
    assert plan.refused == ()
    assert plan.reasons().total() == 41


def test_cost_of_one_layer_of_resnet18() -> None:
    """Counted by hand: 64 channels, 3x3, 56x56 positions; a 3x1 and a 1x3 beside it, a norm each, two sums."""
    layer = "layer1.0.conv1"
    found = row(reparam.plan(timm.create_model("resnet18"), "acb", where=layer, example_inputs=images(2, 224)), layer)
    kernel, lines, positions = 64 * 64 * 9, 2 * 64 * 64 * 3, 56 * 56
    assert found.cost.parameters == (kernel + 128, kernel + lines + 3 * 128, kernel + 64)
    work = (kernel + 64, kernel + lines + 5 * 64, kernel)
    assert found.cost.multiply_adds == tuple(w * positions for w in work)


def _multiply_adds(model: nn.Module, inputs: Tensor) -> float:
    """Counted with hooks on the real layers, per sample: kernels, windows, norms and sums of branches."""
    total = 0

    def note(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.AvgPool2d):
            total += output.numel() * module.kernel_size[0] ** 2
        elif isinstance(module, nn.BatchNorm2d):
            total += output.numel()
        elif is_block(module):
            total += output.numel() * (len(list(module.children())) - 1)

    hooks = [m.register_forward_hook(note) for m in model.modules()]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return total / len(inputs)


@pytest.mark.parametrize(("block", "slack"), [("acb", 0.0), (Block("dbb", sequence=False), 0.12)], ids=["acb", "dbb"])
def test_multiply_adds_of_the_real_network(block: Any, slack: float) -> None:
    """Against the networks themselves; a 1x1 in front of a kernel also computes the border, which a plan leaves out."""
    model, x = ready(Net()), images(2, 48)
    plan = reparam.plan(model, block, example_inputs=x)
    left_out = _multiply_adds(model, x) - sum(r.cost.multiply_adds[0] for r in plan.expanded if r.cost)
    expanded = plan.apply().eval()
    training = sum(r.cost.multiply_adds[1] for r in plan.expanded if r.cost)
    counted = _multiply_adds(expanded, x) - left_out
    assert training <= counted <= training * (1 + slack)
    parameters = sum(r.cost.parameters[1] - r.cost.parameters[0] for r in plan.expanded if r.cost)
    assert parameters == sum(p.numel() for p in expanded.parameters()) - sum(p.numel() for p in model.parameters())
    collapsed = _multiply_adds(reparam.collapse(reparam.expand(model, block)), x)
    assert collapsed == _multiply_adds(reparam.collapse(model), x)


def test_multiply_adds_per_sample() -> None:
    """Whatever the batch is folded with on the way, images of a list included; without a batch as well."""
    frames = Calls(lambda m, x: m.conv(x.flatten(0, 1)), conv=conv3())
    several = reparam.plan(frames, "acb", example_inputs=torch.zeros(2, 5, WIDTH, 6, 6)).rows[0]
    assert several.cost is not None
    assert several.cost.multiply_adds[0] == WIDTH * WIDTH * 9 * 36 * 5
    single = reparam.plan(nn.Sequential(conv3()), "acb", example_inputs=torch.zeros(WIDTH, 6, 6)).rows[0]
    listed = Calls(lambda m, x: m.conv(torch.stack(x)), conv=conv3())
    images_of = reparam.plan(listed, "acb", example_inputs=([torch.zeros(WIDTH, 6, 6)] * 3,)).rows[0]
    for found in (single, images_of):
        assert found.cost is not None
        assert found.cost.multiply_adds[0] == WIDTH * WIDTH * 9 * 36


def test_printed_plan() -> None:
    """A table: layer, geometry, block, costs; then what is left, under the reason that it shares."""
    model = nn.Sequential(ConvBN(3, stride=2), ConvBN(groups=8), *[nn.ConvTranspose2d(8, 8, 2, 2) for _ in range(2)])
    model.append(nn.Conv2d(8, 8, 1))
    text = str(reparam.plan(model, Block("acb", gamma=0.5)))
    assert text.splitlines() == [
        "2 of 5 convolutions get a block",
        "parameters and multiply-adds are those before -> in training -> after collapse",
        "",
        "layer   geometry            block           parameters         multiply-adds a position",
        "------  ------------------  --------------  -----------------  ------------------------",
        "0.conv  3->8 3x3 stride 2   acb(gamma=0.5)  232 -> 408 -> 224  224 -> 400 -> 216",
        "1.conv  8->8 3x3 depthwise  acb(gamma=0.5)   88 -> 168 ->  80   80 -> 160 ->  72",
        "total                                       320 -> 576 -> 304  304 -> 560 -> 288",
        "",
        "2 left alone: no two of its taps reach one output pixel: the lines of acb would be the same again",
        "  2  8->8 2x2 transposed stride 2",
        "  3  8->8 2x2 transposed stride 2",
        "",
        "1 not considered: a kernel of one tap: name it to expand it all the same",
        "",
        "tried: whole network, made-up input 2x3x32x32, float64: largest relative difference 0",
        "tried: whole network in training, made-up input 2x3x32x32, float64: largest relative difference 0",
    ]


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "mobilenetv3_small_050"])
def test_printed_plan_fits_a_terminal(name: str) -> None:
    model = timm.create_model(name)
    model.stem = nn.ModuleList([Calls(depends, conv=conv3())])
    for x in (None, images(1, 64)):
        lines = str(reparam.plan(model, "dbb", example_inputs=x)).splitlines()
        assert max(map(len, lines)) <= 120


def test_apply_twice() -> None:
    """Two models that share nothing, and the one that expand gives with the same seed."""
    model = ready(Net())
    plan = reparam.plan(model, "dbb", init="paper")
    torch.manual_seed(1)
    one, two = plan.apply(), plan.apply()
    torch.manual_seed(1)
    again = reparam.expand(model, "dbb", init="paper")
    tensors = [t.data_ptr() for m in (model, one, two) for t in m.state_dict().values()]
    assert len(set(tensors)) == len(tensors)
    mine, theirs = one.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert any(not torch.equal(mine[key], t) for key, t in two.state_dict().items())


def test_plan_in_place() -> None:
    model = ready(Net())
    parameters = {id(p) for p in model.parameters()}
    plan = reparam.plan(model, "acb", inplace=True)
    assert plan.apply() is model
    assert parameters <= {id(p) for p in model.parameters()}
    with pytest.raises(ReparamError, match=r"stem\.conv is no longer the layer that was planned for: plan again"):
        plan.apply()


def test_failure_in_place_gives_the_model_back() -> None:
    """A block that breaks half-way, after the published initialisation has scaled norms."""
    built = []

    @reparam.block("breaks_later")
    def breaks_later(conv: reparam.Site) -> Any:
        """Add a branch, until it does not."""
        yield "main", conv.main(gamma=0.5)
        if conv.conv.weight.is_meta:
            return
        built.append(conv)
        if len(built) == 2:
            raise RuntimeError("out of ideas")

    model = ready(Net())
    before = snapshot(model)
    with pytest.raises(ReparamError, match=r"whole\.square\.conv: breaks_later cannot be built, .*out of ideas"):
        reparam.expand(model, "breaks_later", init="paper", inplace=True)
    assert unchanged(model, before)
    unregister("breaks_later")


# ------------------------------------------------------------------ where


SELECTED: dict[str, tuple[Any, list[str]]] = {
    "default": (None, ["stem.conv", "body.0.conv", "body.1.conv", "wide"]),
    "pattern": ("body.*.conv", ["body.0.conv", "body.1.conv"]),
    "patterns": (["stem.*", "wide"], ["stem.conv", "wide"]),
    "generator": ((name for name in ("wide",)), ["wide"]),
    "module": ("body", ["body.0.conv", "body.1.conv"]),
    "question mark": ("body.[1-9]", ["body.1.conv"]),
    "one tap by name": ("point", ["point"]),
    "predicate": (lambda path, conv: conv.in_channels == 3, ["stem.conv"]),
    "predicate on one tap": (lambda path, conv: path == "point", ["point"]),
    "kernel": ({"kernel": 3}, ["stem.conv", "body.0.conv", "body.1.conv"]),
    "kernel of one": ({"kernel": 1}, ["point"]),
    "kernel shape": ({"kernel": (5, 3)}, ["wide"]),
    "kernels": ({"kernel": [1, (5, 3)]}, ["point", "wide"]),
    "set of kernels": ({"kernel": {3, 5}}, ["stem.conv", "body.0.conv", "body.1.conv"]),
    "depthwise": ({"depthwise": True}, ["body.1.conv"]),
    "not depthwise": ({"depthwise": False}, ["stem.conv", "body.0.conv", "wide"]),
    "groups": ({"groups": 2}, ["body.0.conv"]),
    "stride": ({"stride": 2}, ["stem.conv"]),
    "strides": ({"stride": [2, 3]}, ["stem.conv"]),
    "two filters": ({"kernel": 3, "stride": 1}, ["body.0.conv", "body.1.conv"]),
    "name filter": ({"name": "body", "depthwise": True}, ["body.1.conv"]),
    "name of one tap": ({"name": ["point"]}, ["point"]),
    "no filter": ({}, ["stem.conv", "body.0.conv", "body.1.conv", "wide"]),
    "nothing": ([], []),
}


class Varied(nn.Module):
    """Convolutions that differ in what a filter can ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(3, stride=2)
        self.body = nn.Sequential(ConvBN(groups=2), ConvBN(groups=WIDTH))
        self.point = nn.Conv2d(WIDTH, WIDTH, 1)
        self.wide = nn.Conv2d(WIDTH, WIDTH, (5, 3), padding=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.point(self.body(self.stem(x))))


@pytest.mark.parametrize("case", SELECTED)
def test_where(case: str) -> None:
    where, layers = SELECTED[case]
    # One of the two is for pointwise layers, the other for every kernel of more than one tap.
    plan = reparam.plan(Varied(), Block("mobileone", n=2) if "point" in layers else "doconv", where=where)
    assert [r.layer for r in plan.expanded] == layers
    assert plan.refused == ()


def test_one_tap_only_when_named() -> None:
    reason = row(reparam.plan(Varied(), "doconv"), "point").refusal
    assert reason.reason is Reason.KERNEL_OF_ONE
    assert "name it to expand it" in reason.message


def test_mapping_of_blocks() -> None:
    """The first pattern that matches wins; what none matches is left alone."""
    plan = reparam.plan(Varied(), {"body.0": "dbb", "body": Block("acb", bn="after"), "wide": "doconv"})
    chosen = {r.layer: str(r.block) for r in plan.expanded}
    assert chosen == {"body.0.conv": "dbb", "body.1.conv": "acb(bn='after')", "wide": "doconv"}
    assert row(plan, "stem.conv").refusal.reason is Reason.NOT_SELECTED


def test_mapping_and_where() -> None:
    """Both must ask for a layer."""
    plan = reparam.plan(Varied(), {"body": "acb", "stem": "dbb"}, where={"stride": 1})
    assert [r.layer for r in plan.expanded] == ["body.0.conv", "body.1.conv"]


# ------------------------------------------------------------------ mistakes


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt init": ({"init": "perserve"}, "init is 'preserve' or 'paper', got 'perserve'"),
    "no init": ({"init": None}, "init is 'preserve' or 'paper', got None"),
    "no block": ({"block": None}, "a block is a name, a reparam.Block or a mapping .* got None"),
    "misspelt block": ({"block": "abc"}, "no block named 'abc' .did you mean 'acb'"),
    "block in a mapping": ({"block": {"stem": None}}, "the block for 'stem' is a name or a reparam.Block, got None"),
    "block in capitals": ({"block": "ACB"}, "no block named .ACB. .did you mean .acb"),
    "misspelt block in a mapping": ({"block": {"stem": "dbbb"}}, "did you mean 'dbb'"),
    "mapping that matches nothing": ({"block": {"steam": "acb"}}, r"'steam' matches no convolution; near names: stem"),
    "key of a mapping": ({"block": {3: "acb"}}, "a pattern is a string, got 3"),
    "type of an option": ({"block": Block("acb", gamma="1/3"), "init": "paper"}, "acb.gamma='1/3'. cannot be built"),
    "type of another option": (
        {"block": Block("mobileone", n=None), "where": "all"},
        r"stem\.conv: mobileone.n=None. cannot be built",
    ),
    "value of an option": ({"block": Block("acb", bn="before")}, "bn is 'branch' or 'after', got 'before'"),
    "form": ({"form": "yes"}, "no form .yes.; known: branches, online, sampled, frozen"),
    "pattern": ({"where": "stem.cnov"}, r"'stem\.cnov' matches no convolution; near names: stem\.conv"),
    "pattern far off": ({"where": "zzz"}, r"'zzz' matches no convolution; convolutions: stem\.conv, body\.0\.conv"),
    "one pattern of two": ({"where": ["stem", "head"]}, "'head' matches no convolution"),
    "number for where": ({"where": 3}, "where is a pattern or several, a predicate or filters, got 3"),
    "numbers for where": ({"where": [3]}, "a pattern is a string, got 3"),
    "filter": ({"where": {"kernal": 3}}, "no filter 'kernal'; known: name, kernel, depthwise, groups, stride"),
    "kernel as text": ({"where": {"kernel": "3x3"}}, "'kernel' is a number, a tuple .*, got '3x3'"),
    "tuple of tuples": ({"where": {"kernel": ((3, 3), (5, 5))}}, "'kernel' is a number, a tuple for one shape"),
    "no stride": ({"where": {"stride": None}}, "'stride' is a number"),
    "depthwise as text": ({"where": {"depthwise": "no"}}, "'depthwise' is True or False, got 'no'"),
    "name filter": ({"where": {"name": "zzz"}}, "'zzz' matches no convolution"),
    "type of the name filter": ({"where": {"name": 3}}, "the filter 'name' is a pattern or several"),
    "class as a predicate": ({"where": nn.Conv2d}, r"where= failed for stem\.conv: TypeError"),
    "predicate that fails": ({"where": lambda path, conv: conv.size > 3}, r"where= failed for stem\.conv: Attrib"),
    "inputs": ({"example_inputs": torch.zeros(1, 5, 8, 8)}, r"the model rejects example_inputs: .*5 channels.* \(in "),
    "kind of inputs": ({"example_inputs": "an image"}, r"the model rejects example_inputs: .* \(in "),
    "no sample": ({"example_inputs": torch.zeros(0, 3, 8, 8)}, "example_inputs 0x3x8x8 holds no sample"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    """Each says which argument or layer, and what would be right; both verbs; nothing is touched."""
    wrong, message = MISTAKES[case]
    options = {"block": "acb", **wrong}
    model = ready(Varied())
    before = snapshot(model)
    for verb in (reparam.expand, reparam.plan):
        with pytest.raises(ReparamError, match=message) as raised:
            verb(model, **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(ReparamError, match=message):
        reparam.expand(model, **options, inplace=True)
    assert unchanged(model, before)


def test_option_that_does_not_exist() -> None:
    with pytest.raises(ReparamError, match="block 'acb' has no option 'gama'; it has: gamma, bn, line"):
        Block("acb", gama=1)


def _scripted() -> nn.Module:
    return torch.jit.script(ConvBN())  # type: ignore[no-any-return]


def _broken() -> nn.Module:
    model = Net()
    model.stem.conv.weight.data[0, 0, 0, 0] = float("nan")
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "name of a model": (lambda: "resnet18", "expected a torch.nn.Module, got str"),
    "class": (lambda: ConvBN, "expected a torch.nn.Module, got type"),
    "state dict": (lambda: ConvBN().state_dict(), "expected a torch.nn.Module, got OrderedDict"),
    "scripted": (_scripted, "expand first, then torch.jit.script"),
    "compiled": (lambda: torch.compile(ConvBN()), "expand first, then torch.compile"),
    "data parallel": (lambda: nn.DataParallel(ConvBN()), "expand the model inside first, then wrap it in DataPar"),
    "no parameters": (nn.ReLU, "ReLU has no parameters"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), r"0\.weight is not initialised yet: run the model once"),
    "broken": (_broken, r"stem\.conv\.weight holds NaN"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_expanded(case: str) -> None:
    make, message = MODELS[case]
    model = make()
    for verb in (reparam.expand, reparam.plan):
        with pytest.raises(ReparamError, match=message):
            verb(model, "acb")


@torch.no_grad()
def test_compiled_inside() -> None:
    """Parts that are compiled are expanded like others, and run what they were given."""
    model = ready(nn.Sequential(ConvBN(), nn.ReLU(), ConvBN(), torch.compile(ConvBN(), backend="eager")))
    model[2].compile(backend="eager")
    model(maps())
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.expanded] == ["0.conv", "2.conv", "3._orig_mod.conv"]
    expanded = plan.apply()
    same(model, expanded, maps())
    expanded[3]._orig_mod.conv.line0.norm.bias.data.fill_(5.0)
    assert not torch.allclose(expanded(maps()), model(maps()))


def test_no_convolution(caplog: pytest.LogCaptureFixture) -> None:
    """A plan with no rows, and an equal copy: a script over many models goes on, and the log says so."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plan = reparam.plan(model, "acb")
    assert plan.rows == ()
    assert str(plan) == "0 of 0 convolutions get a block"
    with caplog.at_level(logging.WARNING, "reparam"):
        expanded = plan.apply()
    assert "0 of 0 convolutions get a block: there are none" in caplog.text
    assert expanded is not model
    same(model, expanded, torch.randn(3, 4))


def test_nothing_expanded_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "reparam"):
        reparam.expand(nn.Sequential(conv3()), "acb")
        assert not caplog.records
        reparam.expand(nn.Sequential(nn.Conv1d(8, 8, 3)), "acb")
    assert "0 of 1 convolutions get a block: its kernel is a line itself: acb has nothing to add" in caplog.text


@pytest.mark.usefixtures("registry")
def test_online_where_it_cannot_be() -> None:
    """A block that is not one convolution is refused, online or not, with the reason."""

    @reparam.block("bent")
    def bent(conv: reparam.Site) -> Any:
        """Not linear."""
        yield "main", conv.main()
        yield "bent", conv.row(conv=conv.parallel(1), act=nn.ReLU())

    for form in ("branches", "online"):
        found = row(reparam.plan(ConvBN(), "bent", form=form), "conv")
        assert found.refusal.reason is Reason.NOT_AFFINE, found.refusal


@pytest.mark.parametrize("inside", [False, True], ids=["made there", "called there"])
def test_inference_mode(inside: bool) -> None:
    """Whether the model was made in inference mode or expand is called in it, the result can be trained."""
    with torch.inference_mode():
        model = ready(ConvBN())
    if inside:
        model = ready(ConvBN())
        with torch.inference_mode():
            expanded = reparam.expand(model, "dbb")
    else:
        expanded = reparam.expand(model, "dbb")
        with pytest.raises(ReparamError, match=r"conv\.weight was made under torch.inference_mode.*leave out inplace"):
            reparam.expand(model, "dbb", inplace=True)
    expanded.train()(maps()).square().sum().backward()
    assert all(p.grad is not None for p in expanded.parameters())


def test_model_that_cannot_be_copied() -> None:
    class Stuck(ConvBN):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("holds a lock")

    model = ready(Stuck())
    before = snapshot(model)
    plan = reparam.plan(model, "acb", example_inputs=maps())
    with pytest.raises(ReparamError, match=r"cannot be copied \(holds a lock\); inplace=True"):
        plan.apply()
    assert unchanged(model, before)
    assert reparam.expand(model, "acb", inplace=True) is model


# ------------------------------------------------------------------ what stays


# Both starts of three kinds of layers (convolutions and norms, sequences, an own kernel); of others, the random one.
@pytest.mark.parametrize(
    ("init", "block"),
    [(init, block) for init in ("preserve", "paper") for block in ("acb", "dbb", "doconv")]
    + [("paper", "mobileone"), ("paper", "repvgg")],
)
def test_same_seed_same_weights(block: str, init: str) -> None:
    """Names too: a state dict goes from one process to another."""
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(reparam.expand(ready(Net()), block, init=init).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_everything_else_stays() -> None:
    """Class, methods, attributes, hooks, names of other layers; training flags and requires_grad module by module."""
    model = ready(Net()).train()
    model.residual.eval()
    model.stem.requires_grad_(False)
    model.version = {"trained": [1, 2]}
    calls: list[str] = []
    model.residual.register_forward_hook(lambda *_: calls.append("hook"))
    expanded = reparam.expand(model, "dbb")
    calls.clear()
    assert type(expanded) is Net
    assert expanded.version == model.version
    modes = {name: m.training for name, m in model.named_modules()}
    for name, module in expanded.named_modules():
        if name in modes:
            assert module.training is modes[name], name
    assert not any(m.training for m in expanded.residual.conv1.modules())
    assert all(m.training for m in expanded.whole.square.conv.modules())
    assert not any(p.requires_grad for p in expanded.stem.parameters())
    assert all(p.requires_grad for p in expanded.whole.parameters())
    with torch.no_grad():  # with gradients a frozen stem would run as one convolution, and round in another way
        assert torch.equal(expanded.eval().features(images()), model.eval().features(images()))
    assert calls == ["hook"] * 2
    kept = {k for k in model.state_dict() if k.startswith(("head", "whole.point"))}
    assert kept <= expanded.state_dict().keys()


def test_frozen_norm_stays_frozen() -> None:
    """Fine-tuning with batch norms in eval mode: those of the branches are in eval mode as well, and only they."""
    model = ready(ConvBN()).train()
    model.norm.eval()
    expanded = reparam.expand(model, "acb")
    assert expanded.training
    assert not any(m.training for m in norms_in(expanded))
    assert expanded.conv.training
    assert expanded.conv.square.conv.training
    torch.testing.assert_close(expanded(maps()), model(maps()))  # as one convolution, which rounds in another way


def test_memory_format_dtype_and_copy() -> None:
    model = ready(Net()).double().to(memory_format=torch.channels_last)
    before = snapshot(model)
    expanded = reparam.expand(model, "dbb")
    assert unchanged(model, before)
    assert {p.dtype for p in expanded.parameters()} == {torch.float64}
    weights = [p for p in expanded.residual.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


# ------------------------------------------------------------------ a sweep over libraries


FAMILIES = [
    "resnet18", "resnetv2_50", "seresnet18", "densenet121", "vgg11_bn", "regnetx_002", "convnext_atto", "dla34",
    "res2net50_14w_8s", "tf_efficientnet_b0", "mixnet_s", "ghostnet_050", "nfnet_f0", "inception_v4", "xception41",
    "cspresnet50", "fastvit_t8", "levit_128s", "mobilevit_xxs", "pvt_v2_b0", "resnest14d", "visformer_tiny",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_convolution_is_accounted_for(name: str) -> None:
    """Each has a row; each with more taps than one gets a block or is left for one of the reasons known here."""
    model = timm.create_model(name)
    convs = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plan = reparam.plan(model, "acb", where="all")
    assert [r.layer for r in plan.rows] == list(convs)
    known = {Reason.ONE_KERNEL, Reason.BLOCK, Reason.UNTRACEABLE, Reason.QUESTION}
    for found in plan.rows:
        if found.refusal is not None:
            one_tap = max(convs[found.layer].kernel_size) == 1
            assert (found.refusal.reason is Reason.KERNEL_OF_ONE) if one_tap else found.refusal.reason in known, found
    expanded = plan.apply()
    blocks = [path for path, m in expanded.named_modules() if is_block(m)]
    assert sorted(blocks) == sorted(r.layer for r in plan.expanded)
