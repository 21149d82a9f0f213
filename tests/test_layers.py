"""Blocks as layers: the same networks as expand makes, of the same classes after a copy, plain after deployment."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reparam
from passes.blocks.kit.layers import BranchSum
from reparam import ReparamError, Site, layers
from reparam.layers import BlockLayer, layer_class
from tests.blocks import lively

PAGE = (Path(__file__).parent.parent / "docs" / "layers.md").read_text(encoding="utf-8")


def geometry(name: str) -> dict[str, Any]:
    """A convolution that the block is for."""
    if name == "largekernel":
        return {"in_channels": 4, "out_channels": 4, "kernel_size": 7, "padding": 3, "groups": 4}
    return {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}


def pair(name: str, norm: bool) -> nn.Sequential:
    """The plain convolution of that geometry, with a norm."""
    behind = OrderedDict(norm=nn.BatchNorm2d(4)) if norm else OrderedDict()
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(**geometry(name), bias=not norm), **behind))


BLOCKS = [name for name, info in reparam.blocks().items() if info.declare.__module__.startswith("passes.")]


def made(name: str, **options: Any) -> Any:
    return layer_class(name)(**geometry(name), **options)


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_what_expand_puts_there(name: str) -> None:
    layer = made(name)
    norm = any(isinstance(m, nn.BatchNorm2d) for m in layer.modules())
    expanded = reparam.expand(pair(name, norm), name, where="*")
    behind = isinstance(layer, nn.Sequential)
    holder = layer if behind else nn.Sequential(OrderedDict(conv=layer))
    assert holder.state_dict().keys() == expanded.state_dict().keys()
    holder.load_state_dict(expanded.state_dict())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(holder.eval()(x), expanded.eval()(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_are_of_its_class(name: str) -> None:
    layer = lively(made(name))
    x = torch.randn(2, 4, 9, 9).double()
    kind = layer_class(name)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, kind)
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
    assert repr(layer).startswith(kind.__name__ + "(")
    assert pickle.loads(pickle.dumps(kind)) is kind


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_deployed_it_is_the_plain_layer(name: str, training: bool) -> None:
    layer = lively(made(name))
    x = torch.randn(2, 4, 9, 9).double()
    want, (weight, bias) = layer(x), layer.equivalent_conv()
    assert weight.requires_grad
    layer.train(training)
    holder = nn.Sequential(layer)
    assert layer.switch_to_deploy() is layer
    assert type(holder[0]) is nn.Conv2d
    assert list(holder.state_dict()) == ["0.weight", "0.bias"]
    assert holder[0].training is training
    assert torch.allclose(holder(x), want, rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.weight, weight)
    assert torch.allclose(layer.bias, bias)


@pytest.mark.parametrize("name", ["acb", "dbb", "doconv"])
def test_a_network_of_them_collapses(name: str) -> None:
    net = nn.Sequential(made(name), nn.ReLU(), made(name))
    folded = reparam.collapse(lively(net))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    layers.switch_to_deploy(net)
    x = torch.randn(1, 4, 8, 8).double()
    assert torch.allclose(net(x), folded(x), rtol=1e-10, atol=1e-10)


def test_arguments_are_those_of_a_convolution() -> None:
    layer = layers.DOConv2d(1, 16, kernel_size=3, stride=2, padding=1)  # type: ignore[operator]
    assert layer(torch.randn(2, 1, 28, 28)).shape == (2, 16, 14, 14)
    assert (layer.in_channels, layer.kernel_size, layer.stride, layer.padding) == (1, (3, 3), (2, 2), (1, 1))
    assert layer.bias is not None
    odd = layers.AsymConvBlock(4, 6, (3, 5), 1, "same", 2, 2, padding_mode="reflect", dtype=torch.float64)  # type: ignore[operator]
    x = torch.randn(1, 4, 11, 12).double()
    assert odd(x).shape == (1, 6, 11, 12)
    want = odd.eval()(x)
    assert torch.allclose(odd.switch_to_deploy()(x), want)
    assert str(inspect.signature(layers.DOConv2d)).endswith("online: 'bool | None' = None, depth=None)")


def test_dimensions() -> None:
    for dims, size in ((1, (9,)), (2, (9, 9)), (3, (9, 9, 9))):
        layer = layer_class("dbb", dims)(2, 4, 3, padding=1)
        assert layer(torch.randn(2, 2, *size)).shape == (2, 4, *size)
        assert type(layer.switch_to_deploy()) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]


def test_linear_layers() -> None:
    layer = layers.LoraLinear(6, 5, rank=2)  # type: ignore[operator]
    x = torch.randn(3, 7, 6)
    assert layer(x).shape == (3, 7, 5)
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    assert isinstance(other, layer_class("lora", 0))
    want = layer(x)
    assert type(layer.switch_to_deploy()) is nn.Linear
    assert torch.allclose(layer(x), want, atol=1e-6)
    assert not hasattr(layers, "DbbLinear")
    with pytest.raises(ReparamError, match="a layer of 'dbb' has 1, 2 or 3 dimensions, got 0"):
        layer_class("dbb", 0)


def test_norms() -> None:
    bare = made("dbb", norm=False)
    assert bare.square.bias is not None
    own = nn.BatchNorm2d(4, eps=1e-3)
    assert made("dbb", norm=own).square.norm is own
    assert isinstance(made("dbb", norm=nn.SyncBatchNorm).point.norm, nn.SyncBatchNorm)
    behind = made("doconv", norm=True)
    assert list(dict(behind.named_children())) == ["conv", "norm"]
    assert behind.conv.bias is None
    for maker in (partial(nn.BatchNorm2d, eps=1e-3), lambda features: nn.BatchNorm2d(features, eps=1e-3)):
        layer = made("dbb", norm=maker, dtype=torch.float64)
        assert {(m.eps, m.weight.dtype) for m in layer.modules() if isinstance(m, nn.BatchNorm2d)} == {
            (1e-3, torch.float64)
        }
    for odd in (nn.BatchNorm2d(5), nn.GroupNorm(2, 4), nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, "bn", 0):
        with pytest.raises(ReparamError, match="takes a batch norm of 4 features"):
            made("dbb", norm=odd)


def test_initialisation() -> None:
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm=nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 4, 8, 8)
    preserved = made("dbb", init="preserve").eval()
    plain.conv.weight.data.copy_(preserved.square.conv.weight)
    assert torch.equal(preserved(x), plain(x))
    assert not bool((made("dbb").point.norm.weight == 0).any())
    torch.manual_seed(0)
    first = nn.Conv2d(4, 4, 3, padding=1)
    torch.manual_seed(0)
    assert torch.equal(made("ecb").square.weight, first.weight)  # as the same seed gives the plain layer


def test_online() -> None:
    layer = made("acb", form="online", norm=False)
    assert "online" in repr(layer)
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(pickle.loads(pickle.dumps(layer))(x), layer(x))
    with_norm = made("dbb", form="online")
    assert list(dict(with_norm.named_children())) == ["conv", "norm"]


def test_names() -> None:
    assert layers.Doconv2d is layers.DOConv2d is layer_class("doconv")
    assert layers.AsymConvBlock is layers.ACBlock is layers.Acb2d
    assert layers.Acb3d is layer_class("acb", 3)
    assert {"DiverseBranchBlock", "Dbb1d", "DOConv2d", "OREPA"} <= set(dir(layers))
    assert isinstance(made("acb"), BranchSum)
    assert reparam.layers is layers
    with pytest.raises(AttributeError, match="there is no layer 'DBBBlock'; there are Acb2d, "):
        layers.DBBBlock  # noqa: B018
    with pytest.raises(AttributeError, match=r"did you mean DiverseBranchBlock, .*\?"):
        layers.DiverseBranchblock  # noqa: B018
    with pytest.raises(ReparamError, match="there is no block named 'dbbb'"):
        layer_class("dbbb")


def test_refusals_are_the_blocks_own() -> None:
    with pytest.raises(ReparamError, match="AsymConvBlock1d: its kernel is a line itself"):
        layers.Acb1d(4, 4, 3)  # type: ignore[operator]
    with pytest.raises(ReparamError, match="has no option 'depth'; it has: gamma"):
        layers.Acb2d(4, 4, 3, depth=3)  # type: ignore[operator]
    with pytest.raises(ReparamError, match="init is 'preserve' or 'paper', got 'zero'"):
        made("acb", init="zero")
    with pytest.raises(ReparamError, match="QARepVGGBlock2d: qarepvgg is for a kernel of more than one tap"):
        made("qarepvgg", norm=False)


@pytest.mark.usefixtures("registry")
def test_blocks_of_ones_own() -> None:
    @reparam.block("my_own block", published=("OwnBlock",))
    def mine(conv: Site, *, more: int = 1) -> Iterator[tuple[str, nn.Module]]:
        """A sum."""
        yield "main", conv.main()
        for i in range(more):
            yield f"more{i}", conv.parallel(1)

    layer = layers.MyOwnBlock2d(3, 4, 3, padding=1, more=2)  # type: ignore[operator]
    assert isinstance(layer, layers.OwnBlock)  # type: ignore[arg-type]
    assert list(dict(layer.named_children())) == ["main", "more0", "more1"]
    assert type(layer.switch_to_deploy()) is nn.Conv2d

    @reparam.block("clash")
    def clash(conv: Site, *, groups: int = 1) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()

    with pytest.raises(ReparamError, match="an option 'groups', which a layer has already"):
        layer_class("clash")

    @reparam.block("acb2", published=("DiverseBranchBlock",))
    def other(conv: Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()

    with pytest.raises(AttributeError, match="the layer of the blocks 'dbb' and 'acb2'"):
        layers.DiverseBranchBlock  # noqa: B018


class Own(layers.DOConv2d):  # type: ignore[name-defined,misc]
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_subclass_keeps_its_forward() -> None:
    layer = Own(3, 4, 3)
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    want = layer(x)
    weight, bias = layer.equivalent_conv()
    assert torch.allclose(torch.conv2d(x, weight, bias), want, atol=1e-6)


def test_fuse_and_load_leaves_a_network_alone_that_does_not_fit(tmp_path: Path) -> None:
    net = nn.Sequential(made("acb"))
    torch.save(nn.Sequential(made("dbb")).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ReparamError, match="does not fit the network"):
        layers.fuse_and_load(net, tmp_path / "x.pt")
    assert isinstance(net[0], BlockLayer)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 6
    names: dict[str, Any] = {"__name__": "page"}
    for code in examples:
        exec(compile(code, "layers.md", "exec"), names)
