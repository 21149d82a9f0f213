"""The kernel that a block stands for, as a differentiable value: for penalties and quantisation-aware training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import WIDTH, ConvBN, Parallel, Residual, images, maps, ready
from test_round_trip import every_block, every_form
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from reparam import ReparamError


class Small(nn.Module):
    """A convolution and norm to expand, small enough for numerical gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def expanded(block: Any, online: bool, make: Any = Small) -> Any:
    """Statistics and factors random, so that no branch is silent."""
    return ready(reparam.expand(ready(make()).double(), block, online=online, init="paper"), seed=1)


def only_conv(collapsed: nn.Module) -> Any:
    (conv,) = (m for m in collapsed.modules() if isinstance(m, nn.Conv2d))
    return conv


@every_form
@every_block
def test_gradients_are_those_of_the_kernel(block: Any, online: bool) -> None:
    """Numerical against analytic gradients of kernel and bias, for every trained parameter."""
    module = expanded(block, online).conv
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    has_bias = reparam.equivalent_conv(module)[1] is not None

    def kernel(*values: Tensor) -> Any:
        with torch.nn.utils.stateless._reparametrize_module(module, dict(zip(trained, values, strict=True))):
            weight, bias = reparam.equivalent_conv(module)
        assert (bias is not None) is has_bias
        return weight if bias is None else (weight, bias)

    values = [p.detach().clone().requires_grad_() for p in trained.values()]
    assert torch.autograd.gradcheck(kernel, values, fast_mode=True)
    outputs = kernel(*values)
    total = sum(t.square().sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))
    reached = torch.autograd.grad(total, values, allow_unused=True)
    assert all(g is not None for g in reached)


@every_form
@every_block
def test_it_is_the_kernel_that_collapse_ships(block: Any, online: bool) -> None:
    """Of the block alone, and in what it computes."""
    module = expanded(block, online).conv
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        weight, bias = reparam.equivalent_conv(module)
        shipped = only_conv(reparam.collapse(nn.Sequential(copy.deepcopy(module))))
        assert torch.allclose(F.conv2d(x, weight, bias, padding=1), module(x), atol=1e-12)
    assert torch.allclose(shipped.weight, weight, atol=1e-12)
    assert (shipped.bias is None) is (bias is None)
    assert bias is None or torch.allclose(shipped.bias, bias, atol=1e-12)


@every_form
@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "repvgg", "orepa", "ecb"])
def test_a_penalty_on_the_kernel_trains_the_block(block: str, online: bool) -> None:
    """Steps on the penalty alone shrink the kernel that is deployed."""
    model = expanded(block, online).float()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    before = {name: p.detach().clone() for name, p in model.conv.named_parameters()}
    penalties = []
    for _ in range(4):
        weight, _ = reparam.equivalent_conv(model.conv)
        assert weight.dtype == torch.float32
        penalty = weight.square().sum()
        penalties.append(penalty.detach())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert penalties[-1] < 0.9 * penalties[0]
    assert any(not torch.equal(p, before[name]) for name, p in model.conv.named_parameters())
    shipped = only_conv(reparam.collapse(nn.Sequential(model.conv))).weight
    assert shipped.square().sum() < penalties[-1]


def test_quantisation_aware_training() -> None:
    """A rounded kernel in the forward, its gradient passed straight through to every branch."""
    module = expanded("acb", False).conv
    weight, bias = reparam.equivalent_conv(module)
    step = weight.detach().abs().max() / 127
    rounded = weight + ((weight / step).round() * step - weight).detach()
    F.conv2d(images(channels=2, dtype=torch.float64), rounded, bias, padding=1).square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert all(g is not None and bool(g.any()) for g in grads.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_is_the_eval_kernel_and_leaves_no_mark(training: bool) -> None:
    module = ready(Parallel()).train(training)
    module.point.norm.train(not training)
    before, flags = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    weight, bias = reparam.equivalent_conv(module)
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    wanted = module.eval()(maps())
    assert torch.allclose(F.conv2d(maps(), weight, bias, padding=1), wanted, atol=1e-5)


def test_modules_that_are_no_blocks() -> None:
    """Conv and norm, one layer, a linear layer, a module of the caller's own."""
    pair = ready(nn.Sequential(nn.Conv2d(3, WIDTH, 3, stride=2, bias=False), nn.BatchNorm2d(WIDTH)))
    weight, bias = reparam.equivalent_conv(pair)
    assert torch.allclose(F.conv2d(images(), weight, bias, stride=2), pair(images()), atol=1e-5)
    weight.sum().backward()
    assert pair[0].weight.grad is not None
    assert pair[1].weight.grad is not None

    conv = nn.Conv2d(3, WIDTH, 3, bias=False)
    weight, bias = reparam.equivalent_conv(conv)
    assert bias is None
    assert torch.equal(weight, conv.weight)

    linear = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    weight, bias = reparam.equivalent_conv(linear)
    x = torch.randn(4, 3)
    assert torch.allclose(F.linear(x, weight.flatten(1), bias), linear(x), atol=1e-6)

    block = ready(ConvBN(WIDTH, WIDTH, groups=4))
    weight, bias = reparam.equivalent_conv(block)
    assert weight.shape == (WIDTH, 2, 3, 3)
    assert torch.allclose(F.conv2d(maps(), weight, bias, padding=1, groups=4), block(maps()), atol=1e-5)


@pytest.mark.parametrize("online", [False, True])
def test_no_bias_where_there_is_none(online: bool) -> None:
    """A convolution without bias and norm: acb gives it lines without norms, and the kernel no bias."""
    model = reparam.expand(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()), "acb", online=online)
    assert is_block(model[0])
    weight, bias = reparam.equivalent_conv(model[0])
    assert bias is None
    assert weight.shape == (4, 3, 3, 3)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.ReLU(), "no parameters"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), "Sequential"),
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)), "Sequential"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)), "Sequential"),
        (Residual(), "Residual"),
        (nn.ConvTranspose2d(3, 3, 3, stride=2), "transposed"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d"),
        (nn.LSTM(3, 3), "LSTM"),
    ],
    ids=["nothing", "activation", "two", "padding", "residual", "transposed", "norm", "batch norm", "lstm"],
)
def test_modules_that_are_not_one_convolution(module: nn.Module, why: str) -> None:
    with pytest.raises(ReparamError, match=why):
        reparam.equivalent_conv(module)


# ------------------------------------------------------------------ recorded programs


def test_layers_of_one_structure_run_one_program() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)), nn.Conv2d(4, 4, 3, padding=0))
    first, second, third, other = (block._program for block in reparam.expand(model, "dbb", online=True))
    assert first is second is third
    assert other is not first


def test_a_program_is_of_one_dtype() -> None:
    model = reparam.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), "acb", online=True)
    before: Any = model[0]
    program = before._program
    model.double()
    assert before._program is not program
    assert model(torch.randn(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64
