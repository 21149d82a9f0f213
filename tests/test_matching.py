"""`like=` an architecture whose layers have other names: matched by the graph, compared as a whole."""

from __future__ import annotations

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.matching import renamed
from passes.proof.compare import Verdict
from reparam import ReparamError


class Trained(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x))


class Deployed(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.merged, self.act = nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.merged(x))


class Heads(nn.Module):
    """Two alike ways that run in another order; ``swapped`` is how the publisher wrote it."""

    def __init__(self, block: type[nn.Module], *, swapped: bool = False) -> None:
        super().__init__()
        self.swapped = swapped
        names = ("up", "upper", "down", "downer") if swapped else ("a", "b", "c", "d")
        for name in names:
            setattr(self, name, block())
        self.names = names
        self.tail = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c, d = (getattr(self, name) for name in self.names)
        if self.swapped:
            right = d(c(x))
            left = b(a(x))
        else:
            left, right = b(a(x)), d(c(x))
        return [self.tail(left + right), left.mean((2, 3))]


def same(result: nn.Module, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        got, wanted = result(x), model(x)
    pairs = zip(got, wanted, strict=True) if isinstance(got, list) else [(got, wanted)]
    return all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)


def test_a_deployed_class_with_other_names_is_filled() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Trained(), Trained()))
    like = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), Deployed(), Deployed()).double()
    result, report = reparam.collapse_with_report(model, like=like)
    assert type(result[2]) is Deployed
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert report.notes == ["like= names its layers otherwise: they were matched by the graph"]
    like.load_state_dict(result.state_dict(), strict=True)
    assert same(like.eval(), model, torch.randn(2, 3, 9, 9, dtype=torch.float64))


def test_alike_ways_are_told_apart_by_what_reads_them() -> None:
    model, like = lively(Heads(Trained)), Heads(Deployed, swapped=True).double()
    result = reparam.collapse(model, like=like)
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


class Twins(nn.Module):
    """Two ways that cannot be told apart: whichever is which, each way's layers must stay together."""

    def __init__(self, block: type[nn.Module], order: str) -> None:
        super().__init__()
        self.order = order
        for name in ("first", "second", "third", "fourth"):
            setattr(self, f"{block.__name__}_{name}", block())
        self.parts = [f"{block.__name__}_{name}" for name in ("first", "second", "third", "fourth")]

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (getattr(self, name) for name in self.parts)
        values = [x, x]
        for way in self.order:  # which of the two goes on next
            i = int(way)
            layer = ((a, b), (c, d))[i][0 if values[i] is x else 1]
            values[i] = layer(values[i])
        return values[0] + values[1]


@pytest.mark.parametrize("order", ["0011", "0101", "0110", "1001", "1100"])
def test_ways_that_are_interchangeable_stay_together(order: str) -> None:
    model, like = lively(Twins(Trained, "0011")), Twins(Deployed, order).double()
    result = reparam.collapse(model, like=like)
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


def test_without_a_check_they_are_matched_alike() -> None:
    model, like = lively(Twins(Trained, "0011")), Twins(Deployed, "0110").double()
    result, report = reparam.collapse_with_report(model, like=like, verify=False)
    assert report.checked is None
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    "like",
    [
        nn.Sequential(Deployed(), nn.Sigmoid(), Deployed()),
        nn.Sequential(Deployed()),
        nn.Sequential(Deployed(), nn.Conv2d(8, 8, 3, padding=2, dilation=2)),
    ],
    ids=["another function", "a layer less", "another geometry"],
)
def test_another_architecture_is_refused(like: nn.Module) -> None:
    model = lively(nn.Sequential(Trained(), Trained()))
    assert renamed(reparam.collapse(model), like.double()) is None
    with pytest.raises(ReparamError, match="does not match the architecture given as like=: it lacks"):
        reparam.collapse(model, like=like.double())


class Sloped(nn.Module):
    def __init__(self, block: nn.Module, slope: float) -> None:
        super().__init__()
        self.block, self.slope = block, slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.block(x) - 1.0, self.slope)


def test_what_the_graph_does_not_tell_is_compared() -> None:
    """The same operations with another option: only running them shows it, whatever ``verify`` says of folds."""
    model = lively(Sloped(Trained(), 0.1))
    assert reparam.collapse(model, like=Sloped(Deployed(), 0.1).double(), verify="folds")
    with pytest.raises(reparam.EquivalenceError):
        reparam.collapse(model, like=Sloped(Deployed(), 0.5).double(), verify="folds")


class Kept(nn.Module):
    """A deployed block that keeps what ours folds away: a norm, a layer scale, a sum, a shift."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.one = what, nn.Conv2d(8, 8, 3, padding=1, bias="norm" not in what)
        if "norm" in what:
            self.after = nn.BatchNorm2d(8, affine=what != "plain norm")
        elif what == "layer scale":
            self.gamma, self.beta = nn.Parameter(torch.zeros(8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))
        elif what == "scalar":
            self.gamma = nn.Parameter(torch.tensor(0.5))
        elif what in ("branch", "row"):
            self.two = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if "norm" in self.what:
            y = self.after(y)
        elif self.what == "layer scale":
            y = self.gamma * y + self.beta
        elif self.what == "scalar":
            y = y / self.gamma
        elif self.what == "sum":
            y = x + y
        elif self.what == "branch":
            y = y + self.two(x)
        elif self.what == "row":
            y = self.two(y)
        return F.relu(y)


KEPT = ["norm", "plain norm", "layer scale", "scalar", "sum", "branch", "row"]


@pytest.mark.parametrize("what", KEPT)
def test_what_a_deployed_class_keeps_is_filled_so_that_it_does_nothing(what: str) -> None:
    model = lively(nn.Sequential(Trained(), nn.Conv2d(8, 8, 1), Trained()))
    like = nn.Sequential(Kept(what), nn.Conv2d(8, 8, 1), Kept(what)).double()
    result, report = reparam.collapse_with_report(model, like=like)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    like.load_state_dict(result.state_dict(), strict=True)
    assert same(like.eval(), model, torch.randn(2, 8, 9, 9, dtype=torch.float64))
    assert any("hold zeros" in note for note in report.notes) == (what == "branch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", KEPT)
def test_in_other_precisions_from_the_meta_device(what: str, dtype: torch.dtype) -> None:
    model = lively(nn.Sequential(Trained(), nn.Conv2d(8, 8, 1), Trained())).to(dtype)
    with torch.device("meta"):
        like = nn.Sequential(Kept(what), nn.Conv2d(8, 8, 1), Kept(what)).to(dtype)
    result, report = reparam.collapse_with_report(model, like=like)
    assert report.checked is not None
    assert report.checked.error < 1e-10
    x = torch.randn(2, 8, 9, 9, dtype=dtype)
    with torch.no_grad():
        got, wanted = result(x), model(x)
    assert float((got - wanted).abs().max()) < 20 * torch.finfo(dtype).eps * float(wanted.abs().max())


class ConvNorm(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, *, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, padding=k // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(c2), nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class RepConv(nn.Module):
    """As YOLOv9's RepConvN; fused, it has one convolution of another name and runs ``forward_fuse``."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = ConvNorm(c, c, 3, act=False), ConvNorm(c, c, act=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Elan(nn.Module):
    """As YOLOv9's RepNCSPELAN4."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv4 = ConvNorm(c, c), ConvNorm(2 * c, c)
        self.cv2 = nn.Sequential(RepConv(c // 2), ConvNorm(c // 2, c // 2, 3))
        self.cv3 = nn.Sequential(RepConv(c // 2), ConvNorm(c // 2, c // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in [self.cv2, self.cv3])
        return self.cv4(torch.cat(y, 1))


def fused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, RepConv):
            module.conv = nn.Conv2d(module.conv1.conv.in_channels, module.conv1.conv.out_channels, 3, padding=1)
            del module.conv1, module.conv2
            module.forward = module.forward_fuse  # type: ignore[method-assign]
        elif isinstance(module, ConvNorm) and isinstance(module.act, nn.SiLU):
            module.conv = nn.Conv2d(
                module.conv.in_channels, module.conv.out_channels, module.conv.kernel_size, padding=module.conv.padding
            )
            del module.bn
            module.forward = module.forward_fuse  # type: ignore[method-assign]
    return model


def test_a_detector_of_fused_rep_convs_is_filled() -> None:
    model = lively(nn.Sequential(ConvNorm(3, 8, 3), Elan(8), Elan(8)))
    like = fused(nn.Sequential(ConvNorm(3, 8, 3), Elan(8), Elan(8))).double()
    result, report = reparam.collapse_with_report(model, like=like)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    like.load_state_dict(result.state_dict(), strict=True)
    assert same(like.eval(), model, torch.randn(2, 3, 9, 9, dtype=torch.float64))


class Distilled(nn.Module):
    """As the head of a distilled transformer: the mean of two layers."""

    def __init__(self, *, norms: bool) -> None:
        super().__init__()
        make = (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))) if norms else (lambda: nn.Linear(8, 4))
        self.first, self.other = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3))
        return (self.first(y) + self.other(y)) / 2


def test_of_two_layers_that_are_one_in_ours_one_holds_it_all_and_it_is_said() -> None:
    model = lively(nn.Sequential(Trained(), Distilled(norms=True)))
    result, report = reparam.collapse_with_report(
        model, like=nn.Sequential(Deployed(), Distilled(norms=False)).double()
    )
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))
    assert any("1.other.weight of like= hold zeros" in note for note in report.notes)


@pytest.mark.parametrize("verify", [True, False])
def test_a_number_without_a_place_is_an_error_that_names_the_layer(verify: bool) -> None:
    class Bare(Deployed):
        def __init__(self) -> None:
            super().__init__()
            self.merged = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    model = lively(nn.Sequential(Trained(), Trained()))
    with pytest.raises(ReparamError, match=r"0\.merged has a bias after folding, and like= has no layer to take it"):
        reparam.collapse(model, like=nn.Sequential(Bare(), Deployed()).double(), verify=verify)


def test_layers_that_cannot_carry_it_are_an_error_that_names_them() -> None:
    """A low rank where the trained network has a full one."""
    low = nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1))
    like = nn.Sequential(low, nn.ReLU(), nn.Conv2d(8, 8, 1)).double()
    model = lively(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))))
    with pytest.raises(
        ReparamError, match=r"0\.0, 0\.1 of like= become one layer in the collapsed network, and none of"
    ):
        reparam.collapse(model, like=like)


class Shared(nn.Module):
    """One layer scale, or one convolution, for two blocks."""

    def __init__(self, *, conv: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.gamma = self.one if conv else nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gamma * self.two(F.relu(self.gamma * self.one(x))))


def test_one_layer_scale_in_two_places_is_filled() -> None:
    model, x = lively(nn.Sequential(Trained(), Trained())), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert same(reparam.collapse(model, like=Shared(conv=False).double()), model, x)


def test_one_convolution_in_two_places_holds_no_two() -> None:
    model = lively(nn.Sequential(Trained(), Trained()))
    with pytest.raises(ReparamError, match="does not match the architecture"):
        reparam.collapse(model, like=Shared(conv=True).double())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m1", "repghostnet_050", "ghostnetv3_050", "levit_128s"]
)
def test_deployed_forms_of_timm_are_filled(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    model = timm.create_model(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    deployed = reparameterize_model(model.eval())
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.fill_(0.5)
    result, report = reparam.collapse_with_report(model, like=deployed)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert type(result) is type(model)
    deployed.load_state_dict(result.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted, got = model(x), deployed(x)
    assert float((wanted - got).abs().max()) < 1e-4 * float(wanted.abs().max())
