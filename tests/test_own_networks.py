"""The networks of the published experiments: the published sizes, and blocks go in and come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reparam
from reparam import sources

pytest.importorskip("torchvision")

from zoo.networks import NETWORKS, find_spec
from zoo.networks.cifar_resnet import Block

INPUTS = {"mnist_toy": (1, 28, 28), "plain18": (3, 64, 64)}
"""Where they are not the 3x32x32 of CIFAR; small for the ImageNet network, which takes any size."""
SMALL = ("cifar_quick", "mnist_toy")


def example(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *INPUTS.get(name, (3, 32, 32)))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions", "exact"),
    [
        ("resnet56", 0.85, 853_018),  # He et al., table 6
        ("wrn16_8", 11.0, 10_961_370),  # Zagoruyko and Komodakis, table 4
        ("cifar_vgg16", 14.7, 14_724_042),
    ],
)
def test_parameters_are_as_published(name: str, millions: float, exact: int) -> None:
    count = parameters(sources.create(f"zoo:{name}"))
    assert count == exact
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.005)


def test_cifar_quick_has_the_layers_of_its_description() -> None:
    convs = 25 * (3 * 32 + 32 * 32 + 32 * 64)
    assert parameters(sources.create("zoo:cifar_quick")) == convs + 2 * (32 + 32 + 64) + 65 * 10 + (9 * 64 + 1) * 64


def test_the_toy_has_the_layers_of_its_description() -> None:
    assert parameters(sources.create("zoo:mnist_toy")) == 9 * (16 + 16 * 16 + 16 * 10) + 16 + 16 + 10


def test_plain_18_is_resnet_18_without_its_projections() -> None:
    from torchvision.models import resnet18

    other = resnet18()
    projections = sum(parameters(m) for name, m in other.named_modules() if name.endswith("downsample"))
    plain = sources.create("zoo:plain18")
    assert parameters(plain) == parameters(other) - projections
    assert not any("add" in str(node.target) for node in torch.fx.symbolic_trace(plain).graph.nodes)


def test_vgg_16_has_the_convolutions_of_torchvisions() -> None:
    from torchvision.models import vgg16_bn

    with torch.device("meta"):
        models = sources.create("zoo:cifar_vgg16"), vgg16_bn()
    kernels = [[m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)] for model in models]
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize(("name", "depth"), [("resnet56", 56), ("wrn16_8", 17), ("plain18", 18), ("cifar_vgg16", 14)])
def test_depths_are_what_the_names_say(name: str, depth: int) -> None:
    """WRN's 16 are its convolutions, projections included; VGG's 16 had three linear layers."""
    layers = [m for m in sources.create(f"zoo:{name}").modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_and_channels_are_options(name: str) -> None:
    model = sources.create(f"zoo:{name},num_classes=7,in_chans=2").eval()
    shape = INPUTS.get(name, (3, 32, 32))
    with torch.no_grad():
        assert model(torch.randn(2, 2, *shape[1:])).shape == (2, 7)


def test_the_shortcut_of_resnet_56_is_every_other_pixel_and_zeros() -> None:
    block = Block(2, 4, stride=2)
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()


def test_pre_activation_blocks_project_the_activated_input() -> None:
    block = sources.create("zoo:wrn16_8").stages[1][0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 128, 4, 4)
    assert torch.equal(block(x), block.shortcut(torch.relu(block.bn1(x))))


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv"])
@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_blocks_go_in_and_come_out(name: str, block: str) -> None:
    stock = sources.create(f"zoo:{name}")
    plan = reparam.plan(stock, block, init="paper", where="all")
    assert len(plan.expanded) == sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in stock.modules())
    expanded = plan.apply().train()
    with torch.no_grad():
        expanded(example(name, batch=4))  # running statistics that are not those of the beginning
    collapsed = reparam.collapse(expanded, like=stock)
    again = sources.create(f"zoo:{name}").eval()
    again.load_state_dict(collapsed.state_dict(), strict=True)
    reparam.verify(expanded, again, example(name)).raise_if_different()
    deployed = reparam.Counts.of(reparam.collapse(again))
    assert deployed.parameters <= parameters(stock)


def test_a_wrong_projection_would_be_seen() -> None:
    stock = sources.create("zoo:cifar_quick")
    expanded = reparam.expand(stock, "acb", init="paper").eval()
    collapsed = reparam.collapse(expanded, like=stock)
    with torch.no_grad():
        next(collapsed.parameters())[0, 0, 0, 0] += 0.1
    assert not reparam.verify(expanded, collapsed, example("cifar_quick")).ok


def test_there_are_no_trained_weights() -> None:
    with pytest.raises(reparam.ReparamError, match=r"no trained weights.*reparam train --model resnet56"):
        sources.create("zoo:resnet56", pretrained=True)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet56", "zoo:resnet56"),
        ("resnet18", "timm:resnet18"),
        ("alexnet", "torchvision:alexnet"),
        ("wrn16_8,num_classes=100", "zoo:wrn16_8,num_classes=100"),
        ("torchvision:resnet18", "torchvision:resnet18"),
    ],
)
def test_a_bare_name_is_looked_up(name: str, spec: str) -> None:
    pytest.importorskip("timm")
    assert find_spec(name) == spec


def test_a_name_that_no_source_has_is_an_error_with_near_names() -> None:
    pytest.importorskip("timm")
    with pytest.raises(sources.UnknownNameError, match="did you mean cifar_quick"):
        find_spec("cifar_quik")
