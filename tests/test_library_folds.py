"""Libraries that fold a network once more: what collapse left in a place answers right, or raises."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import reparam
from passes.edits.carried import made_by
from passes.proof import settling

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    """As ultralytics': a function of the library folds it from outside, and changes its forward."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def fuse_outside(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Conv):
            conv, bn = module.conv, module.bn
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            del module.bn
            module.forward = module.forward_fuse
    return model


class Fused(nn.Module):
    """As LeViT's and RepViT's: a method of its own folds it into a new layer, and counts on no bias before the norm."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        made = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 3, padding=1)
        made.weight.copy_(self.conv.weight * scale[:, None, None, None])
        made.bias.copy_(self.bn.bias - self.bn.running_mean * scale)
        return made


class Branches(nn.Module):
    """As RepVGG's: a method that makes one layer of the branches and deletes these."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.square, self.point = Fused(a, b), nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b))
        self.one: nn.Conv2d | None = None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.one(x) if self.one is not None else self.square(x) + self.point(x))

    @staticmethod
    def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale

    def _whole(self) -> tuple[Tensor, Tensor]:
        kernel, bias = self._fold(self.square.conv, self.square.bn)
        point, shift = self._fold(*self.point)
        return kernel + nn.functional.pad(point, [1, 1, 1, 1]), bias + shift

    def reparameterize(self) -> None:
        kernel, bias = self._whole()
        self.one = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
        self.one.weight.data, self.one.bias.data = kernel, bias
        self.__delattr__("square")
        del self.point

    def drop_point(self) -> None:
        """Not a fold: a person wants the branch gone."""
        del self.point


class Net(nn.Sequential):
    def __init__(self, first: type[nn.Module]) -> None:
        super().__init__(first(3, 4), nn.ReLU(), first(4, 4))


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> None:
    with torch.no_grad():
        assert torch.allclose(a.to(torch.float64)(X.double()), copy.deepcopy(b).double()(X.double()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_a_library_gets_the_folded_layer_back(dtype: torch.dtype) -> None:
    plain = lively(Net(Conv)).to(dtype)
    collapsed = reparam.collapse(plain)
    wanted = copy.deepcopy(collapsed)
    fused = fuse_outside(copy.deepcopy(collapsed))
    for a, b in zip(wanted.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)  # exactly the same numbers
    same(fused, plain)
    assert not [name for name in collapsed.state_dict() if ".bn." in name]
    assert [type(m.bn) for m in collapsed if isinstance(m, Conv)] == [nn.Identity] * 2


def test_the_same_after_an_expansion() -> None:
    plain = lively(Net(Conv))
    expanded = reparam.expand(plain, "acb")
    same(fuse_outside(copy.deepcopy(reparam.collapse(expanded))), plain)
    same(fuse_outside(copy.deepcopy(reparam.collapse(expanded, like=plain))), plain)


@pytest.mark.parametrize("form", ["branches", "online", "sampled"])
@pytest.mark.parametrize("block", sorted(reparam.blocks()))
def test_a_function_of_a_library_folds_an_expanded_network(block: str, form: str, tmp_path: Path) -> None:
    """The last validation of a training run does: block and norm answer as the convolution and norm that they are."""
    expanded = reparam.expand(lively(Net(Conv)), block, where="all", init="paper", form=form)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(expanded.eval(), tmp_path / "whole.pt")
    wanted = copy.deepcopy(expanded)
    for model in (expanded, torch.load(tmp_path / "whole.pt", weights_only=False)):
        fused = fuse_outside(copy.deepcopy(model))
        same(fused, wanted)
        assert not [name for name in fused.state_dict() if ".bn." in name]
        same(model, wanted)  # the one that was read is as it was


def test_a_weight_that_is_told_cannot_be_written_into() -> None:
    expanded = reparam.expand(lively(Net(Conv)), "dbb").eval()
    block = expanded[0].conv
    for change in (
        nn.init.zeros_,
        lambda w: w.data.normal_(),
        lambda w: w.detach().view(-1).mul_(2),
        lambda w: w.detach().unbind(0)[0].zero_(),
        lambda w: nn.functional.relu(w, inplace=True),
        lambda w: torch._foreach_mul_([w], 2.0),
    ):
        with pytest.raises(reparam.ReparamError, match="a change in place would be lost"), torch.no_grad():
            change(block.weight)
    with pytest.raises(ValueError, match="read-only"):
        block.weight.detach().numpy()[0] = 0
    block.weight.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.square.parameters() if parameter.dim() > 1)
    kernel, bias = reparam.equivalent_conv(block)
    assert torch.equal(block.weight, kernel)
    assert torch.equal(block.bias, bias)


def test_who_assigns_a_weight_makes_the_block_a_convolution() -> None:
    expanded = reparam.expand(lively(Net(Conv)), "acb").eval()
    wanted, seen, block = expanded(X), [], expanded[0].conv
    handle = block.register_forward_hook(lambda *_: seen.append(1))
    block.weight = nn.Parameter(block.weight)  # the bias stays what it was
    assert type(block) is nn.Conv2d
    assert type(block.weight) is nn.Parameter
    assert torch.allclose(expanded(X), wanted, atol=1e-5)
    handle.remove()
    expanded(X)
    assert seen == [1]


@pytest.mark.parametrize("kind", ["training", "method of its own", "file"])
def test_a_block_tells_no_weight_where_that_would_be_wrong(kind: str, tmp_path: Path) -> None:
    """In training there is no one kernel; a method of the library's own leaves out the bias that the block has."""
    build = (lambda: lively(Net(Conv))) if kind == "training" else (lambda: lively(Net(Fused)))
    model = reparam.expand(build(), "acb")
    if kind == "file":
        model = reparam.load(reparam.save(model, tmp_path / "net.pt"), build)
    model.train(kind == "training")
    assert model[0].conv.bias is None
    with pytest.raises(AttributeError, match=r"the block acb has .*reparam\.collapse\(model, like=plain\)"):
        model[0].conv.weight  # noqa: B018


@pytest.mark.parametrize("through", ["as it is", "copy", "pickle", "file"])
def test_a_norm_that_went_into_a_block_says_where_it_is(through: str, tmp_path: Path) -> None:
    """A method of the library's own reads the norm first; in the collapsed network nothing is left that tells."""
    model = {
        "as it is": lambda m: m,
        "copy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "file": lambda m: reparam.load(reparam.save(m, tmp_path / "net.pt"), lambda: Net(Fused)),
    }[through](reparam.expand(lively(Net(Fused)), "acb").eval())
    assert not hasattr(model[0].bn, "running_mean")
    with pytest.raises(AttributeError, match=r"part of the block at 0\.conv: .*reparam\.collapse\(model, like=plain\)"):
        model[0].fuse()
    some = reparam.collapse(model)
    assert [type(norm) for norm in (some[0].bn, some[2].bn)] == [nn.Identity, nn.Identity]
    same(some, model)


class Wrong(Fused):
    """Reads the same and returns a layer, which is not what the forward computes: the norm undone, not applied."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        made = super().fuse()
        made.weight.mul_(2)
        return made


class InPlace(Fused):
    """As EfficientViM's: folds into its own children and takes the norm away."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        self.conv, self.bn = super().fuse(), nn.Identity()
        return self


class Kept(nn.Module):
    """As ultralytics' RepVGGDW: its method folds into one of the branches, and another forward runs that alone."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv, self.conv1, self.act = Fused(a, b), Fused(a, b), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x) + self.conv1(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def _pair(self, branch: Fused) -> tuple[Tensor, Tensor]:
        scale = branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()
        return branch.conv.weight * scale[:, None, None, None], branch.bn.bias - branch.bn.running_mean * scale

    @torch.no_grad()
    def fuse(self) -> None:
        (weight, bias), (other, more) = self._pair(self.conv), self._pair(self.conv1)
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        conv.weight.copy_(weight + other)
        conv.bias.copy_(bias + more)
        self.conv = conv
        del self.conv1


class New(Kept):
    """As ultralytics' RepConv: its method makes a child of another name."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.conv2 = self.conv
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(x) + self.conv1(x))

    @torch.no_grad()
    def fuse(self) -> None:
        if hasattr(self, "conv"):
            return
        (weight, bias), (other, more) = self._pair(self.conv1), self._pair(self.conv2)
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        self.conv.weight.copy_(weight + other)
        self.conv.bias.copy_(bias + more)
        self.__delattr__("conv1")
        self.__delattr__("conv2")


def trained(plain: nn.Module, block: str = "acb") -> nn.Module:
    expanded = reparam.expand(plain, block, where="all", init="paper").eval()
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return expanded


@pytest.mark.parametrize("verb", [lambda m: m, trained, lambda m: pickle.loads(pickle.dumps(trained(m, "dbb")))])
@pytest.mark.parametrize("kind", [Fused, InPlace])
def test_a_method_that_folds_into_a_layer_returns_the_module(kind: type[nn.Module], verb: Any) -> None:
    """It counts on no bias before the norm: asked again, it would leave out the one that was folded."""
    model = verb(lively(Net(kind)))
    collapsed = reparam.collapse(model)
    assert collapsed[0].fuse() is collapsed[0]
    same(collapsed, model)


@pytest.mark.parametrize("verb", [lambda m: m, trained])
def test_a_method_that_does_not_return_the_same_raises(verb: Any) -> None:
    """A wrong network without a word is the worst of all."""
    collapsed = reparam.collapse(verb(lively(Net(Wrong))))
    with pytest.raises(AttributeError):
        collapsed[0].fuse()


def test_a_method_is_tried_once_for_modules_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for one that its own attributes, or its layers, make another."""

    class Choosing(Fused):
        factor = 1.0

        def fuse(self) -> nn.Module:
            made = super().fuse()
            with torch.no_grad():
                made.weight.mul_(self.factor)
            return made

    rows = [Choosing(4, 4) for _ in range(4)]
    rows[2].factor = 2.0
    rows[3].conv.dilation, rows[3].conv.padding = (2, 2), (2, 2)
    tried, real = [], settling._folds
    monkeypatch.setattr(settling, "_folds", lambda *given: tried.append(given[0]) or real(*given))
    collapsed = reparam.collapse(lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *rows)))
    settles = [edit.path for edit in made_by(collapsed) or () if type(edit).__name__ == "Settle"]
    assert sorted(settles) == ["2", "3"]
    assert len(tried) == 3


@pytest.mark.parametrize("verb", [lambda m: m, trained])
@pytest.mark.parametrize("kind", [Kept, New])
def test_a_class_finds_its_folded_layer_in_its_own_place(kind: type[nn.Module], verb: Any, tmp_path: Path) -> None:
    plain = verb(lively(Net(kind)))
    collapsed = reparam.collapse(plain)
    for model in (collapsed, reparam.load(reparam.save(collapsed, tmp_path / "net.pt"), lambda: Net(kind))):
        own = lively(Net(kind))
        for block, theirs in ((model[0], own[0]), (model[2], own[2])):
            theirs.fuse()
            block.fuse()
            assert block.state_dict().keys() == theirs.state_dict().keys()
            block.forward = block.forward_fuse
        same(copy.deepcopy(model), plain)
        own.load_state_dict(model.state_dict())  # theirs takes our numbers


@pytest.mark.parametrize("through", ["as it is", "copy", "pickle", "file"])
def test_a_method_whose_work_is_done_returns_the_module(through: str, tmp_path: Path) -> None:
    plain = lively(Net(Branches))
    collapsed = reparam.collapse(plain)
    model = {
        "as it is": lambda m: m,
        "copy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "file": lambda m: reparam.load(reparam.save(m, tmp_path / "net.pt"), lambda: Net(Branches)),
    }[through](collapsed)
    for block in (model[0], model[2]):
        assert block.reparameterize() is block
        assert isinstance(block, Branches)
    same(model, plain)
    assert any(type(edit).__name__ == "Settle" for edit in made_by(collapsed) or ())


def test_a_method_that_only_deletes_is_left_alone() -> None:
    plain = lively(Net(Branches))
    collapsed = reparam.collapse(plain)
    with pytest.raises(AttributeError):
        collapsed[0].drop_point()  # the branch is folded: not to be passed over in silence
    plain[0].reparameterize()
    same(plain, collapsed)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s1", "fastvit_t8", "repghostnet_050", "test_resnet"])
def test_timm_folds_a_collapsed_network_into_itself(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    plain = lively(timm.create_model(name, num_classes=3))
    x = torch.randn(1, 3, 64, 64)
    for model in (plain, reparam.expand(plain, "acb", verify=False).eval()):
        collapsed = reparam.collapse(model, verify=False)
        with torch.no_grad():
            assert torch.equal(reparameterize_model(collapsed)(x), collapsed(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvit_m0_9", "levit_128s", "shvit_s1", "efficientvit_m0", "tiny_vit_5m_224"])
def test_timm_finds_nothing_to_fold_in_classes_that_return_layers(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    plain = lively(timm.create_model(name, num_classes=3))
    x = torch.randn(1, *plain.default_cfg["input_size"])
    collapsed = reparam.collapse(plain, verify=False)
    with torch.no_grad():
        assert torch.equal(reparameterize_model(collapsed)(x), collapsed(x))


@pytest.mark.parametrize("kind", ["RepConv", "RepVGGDW"])
def test_ultralytics_fuses_a_collapsed_block(kind: str) -> None:
    modules = pytest.importorskip("ultralytics.nn.modules")
    block = pytest.importorskip("ultralytics.nn.modules.block")
    made = modules.RepConv(8, 8, bn=True) if kind == "RepConv" else block.RepVGGDW(8)
    collapsed, x = reparam.collapse(lively(made)), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        wanted = collapsed(x)
        collapsed.fuse_convs() if kind == "RepConv" else collapsed.fuse()
        assert torch.equal(collapsed.forward_fuse(x), wanted)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_ultralytics_fuses_a_collapsed_network(name: str) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    plain = lively(tasks.DetectionModel(name, verbose=False))
    expanded, x = reparam.expand(plain, "acb", verify=False).eval(), torch.rand(1, 3, 64, 64)
    like = reparam.collapse(expanded, like=plain, verify=False)
    for model in (expanded, reparam.collapse(expanded, verify=False), like):
        with torch.no_grad():
            wanted = model(x)[0]
            got = copy.deepcopy(model).fuse(verbose=False)(x)[0]
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)
