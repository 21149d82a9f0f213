"""Checkpoints in the grammars of the authors' code: found, placed, folded and compared with what that computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import reparam
from reparam import files, layers
from reparam.cli import app
from reparam.published import formulas
from reparam.published.names import Side, placed
from reparam.published.units import find_units
from tests.published_blocks import (
    ACB,
    DBB,
    ECB,
    OREPA,
    Dilated,
    DOConv,
    MobileOne,
    Orepa1x1,
    OrepaRepVGG,
    OrepaStem,
    RepVGG,
)
from tests.published_networks import NETWORKS, Published, lively

EXACT = 1e-12


class Two(nn.Module):
    """Two convolutions with what is behind them, and a linear layer."""

    def __init__(self, first: nn.Module, second: nn.Module, norms: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.norms = first, second, norms
        if norms:
            self.first_norm, self.second_norm = (nn.BatchNorm2d(_channels(m)) for m in (first, second))
        self.head = nn.Linear(_channels(second), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(F.relu(self.first_norm(x) if self.norms else x))
        return self.head(F.relu(self.second_norm(x) if self.norms else x).mean((2, 3)))


def _channels(module: nn.Module) -> int:
    if hasattr(module, "shape"):
        return int(module.shape[0])
    return (
        next(m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d))
        if not isinstance(module, (nn.Conv2d, ECB))
        else (module if isinstance(module, nn.Conv2d) else module.conv3x3).out_channels
    )


@dataclass(frozen=True)
class Case:
    """One grammar: its two blocks, the same convolutions plain, whether the file has the norms by other names."""

    make: Callable[[], tuple[nn.Module, nn.Module]]
    plain: tuple[tuple[int, ...], tuple[int, ...]]
    norms: bool = False
    block: str | None = None

    def official(self) -> Two:
        return lively(Two(*self.make(), norms=self.norms))

    def stock(self, *, norms: bool) -> Two:
        made = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=not norms) for i, o, k, s, g in self.plain]
        return Two(*made, norms=norms)


DENSE = ((4, 8, 3, 2, 1), (8, 8, 3, 1, 1))
CASES = {
    "acb": Case(lambda: (ACB(4, 8, 3, 2), ACB(8, 8, 3)), DENSE),
    "acb, lines of 3": Case(
        lambda: (ACB(4, 8, 5, 2, line=3), ACB(8, 8, 5, line=3)), ((4, 8, 5, 2, 1), (8, 8, 5, 1, 1))
    ),
    "dbb": Case(lambda: (DBB(4, 8, 3, 2), DBB(8, 8, 5)), ((4, 8, 3, 2, 1), (8, 8, 5, 1, 1))),
    "dbb, groups and depthwise": Case(
        lambda: (DBB(4, 8, 3, 2, 2), DBB(8, 8, 3, 1, 8)), ((4, 8, 3, 2, 2), (8, 8, 3, 1, 8))
    ),
    "dbb, other inner widths": Case(
        lambda: (DBB(4, 8, 3, 2, inner=12), DBB(8, 8, 3, inner=3)), ((4, 8, 3, 2, 1), (8, 8, 3, 1, 1))
    ),
    "dbb, other inner widths of groups": Case(
        lambda: (DBB(4, 8, 3, 2, 2, inner=6), DBB(8, 8, 3, 1, 8, inner=8)), ((4, 8, 3, 2, 2), (8, 8, 3, 1, 8))
    ),
    "doconv": Case(
        lambda: (DOConv(4, 8, 3, 2, 1), DOConv(8, 8, 3, 1, 1, 8, diag="d_diag")),
        ((4, 8, 3, 2, 1), (8, 8, 3, 1, 8)),
        norms=True,
    ),
    "doconv, groups and one tap": Case(
        lambda: (DOConv(4, 8, 3, 2, 1, 2), DOConv(8, 8, 1)), ((4, 8, 3, 2, 2), (8, 8, 1, 1, 1)), norms=True
    ),
    "repvgg": Case(lambda: (RepVGG(4, 8, 3, 2), RepVGG(8, 8)), DENSE),
    "repvgg, groups": Case(lambda: (RepVGG(4, 8, 3, 2, 2), RepVGG(8, 8, 3, 1, 4)), ((4, 8, 3, 2, 2), (8, 8, 3, 1, 4))),
    "mobileone": Case(lambda: (MobileOne(4, 4, 3, 2, 4), MobileOne(4, 4, 1, n=2)), ((4, 4, 3, 2, 4), (4, 4, 1, 1, 1))),
    "orepa": Case(lambda: (OREPA(4, 8, 3, 2), OREPA(8, 8, 3)), DENSE),
    "orepa, groups": Case(lambda: (OREPA(8, 4, 3, 2, 2), OREPA(4, 8, 3, 1, 4)), ((8, 4, 3, 2, 2), (4, 8, 3, 1, 4))),
    "orepa, many groups": Case(
        lambda: (OREPA(16, 8, 3, 2, 8), OREPA(8, 8, 3, 1, 4)), ((16, 8, 3, 2, 8), (8, 8, 3, 1, 4))
    ),
    "orepa, stem and 1x1": Case(lambda: (OrepaStem(4, 8, 7, 2), Orepa1x1(8, 8)), ((4, 8, 7, 2, 1), (8, 8, 1, 1, 1))),
    "orepa in repvgg": Case(lambda: (OrepaRepVGG(4, 8, 3, 2), OrepaRepVGG(8, 8)), DENSE),
    "unireplknet": Case(lambda: (Dilated(4, 9), Dilated(4, 7)), ((4, 4, 9, 1, 4), (4, 4, 7, 1, 4))),
}


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def difference(model: nn.Module, official: nn.Module, channels: int = 4, size: int = 16) -> float:
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    with torch.no_grad():
        want, got = official(x), model.double().eval()(x)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("size", [(1, 3), (5, 1), (1, 9), (2, 2), (3, 5)])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_network_says_what_kernels_are_not_square(size: tuple[int, int], renamed: bool, tmp_path: Path) -> None:
    """DO-Conv's tensors tell their number of taps: the layer of the same name says more, or the only one it fits."""
    sizes = (size, (2, 3) if renamed else size[::-1])
    pads = [tuple(k // 2 for k in each) for each in sizes]
    authors = (DOConv(8, 8, each, 1, pad) for each, pad in zip(sizes, pads, strict=True))
    convs = (nn.Conv2d(8, 8, each, 1, pad, bias=False) for each, pad in zip(sizes, pads, strict=True))
    official, stock = lively(Two(*authors, norms=True)), Two(*convs, norms=True)
    state = {f"net.{k}" if renamed else k: v for k, v in official.state_dict().items()}
    imported = reparam.import_checkpoint(save(tmp_path / "x.pth", state), like=stock)
    assert imported.model is not None
    assert difference(imported.model, official, channels=8) < EXACT


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("collapse", [False, True])
def test_into_a_network(name: str, collapse: bool, tmp_path: Path) -> None:
    case = CASES[name]
    official = case.official()
    channels = case.plain[0][0]
    file = save(tmp_path / "x.pth", official.state_dict())
    imported = reparam.import_checkpoint(file, like=case.stock(norms=True), collapse=collapse)
    assert sum(imported.blocks.values()) == 2
    assert imported.difference < EXACT
    assert imported.model is not None
    assert difference(imported.model, official, channels) < EXACT
    assert (imported.recipe is None) == (collapse or name in ("doconv, groups and one tap", "orepa, stem and 1x1"))
    if collapse:
        assert imported.tensors.keys() == case.stock(norms=True).state_dict().keys()


@pytest.mark.parametrize("name", CASES)
def test_block_by_block(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    official = case.official()
    file = save(tmp_path / "x.pth", {"state_dict": {f"module.{k}": v for k, v in official.state_dict().items()}})
    imported = reparam.import_checkpoint(file)
    plain = case.stock(norms=False).double()
    if case.norms:
        plain = case.stock(norms=True).double()
    plain.load_state_dict(imported.tensors)
    assert difference(plain, official, case.plain[0][0]) < EXACT


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: f"{n.grammar} {n.name}")
@pytest.mark.slow
def test_a_published_network(network: Published, tmp_path: Path) -> None:
    official = lively(network.make())
    file = save(tmp_path / "x.pth", network.state(official))
    for collapse in (False, True)[not network.expands :]:
        imported = reparam.import_checkpoint(file, like=network.plain(), collapse=collapse)
        assert imported.model is not None
        assert difference(imported.model, official, 3, network.size) < EXACT


def test_norms_inside_need_one_behind_the_convolution(tmp_path: Path) -> None:
    case = CASES["repvgg"]
    official = case.official()
    file = save(tmp_path / "x.pth", official.state_dict())
    with pytest.raises(files.FileError, match=r"norms inside, and the network's first has none .* --collapse"):
        reparam.import_checkpoint(file, like=case.stock(norms=False))
    imported = reparam.import_checkpoint(file, like=case.stock(norms=False), collapse=True)
    assert imported.model is not None
    assert difference(imported.model, official) < EXACT


def test_what_the_file_is_of_is_said(tmp_path: Path) -> None:
    case = CASES["dbb"]
    file = save(tmp_path / "x.pth", {"model": case.official().state_dict(), "ema": case.official().state_dict()})
    text = str(reparam.import_checkpoint(file, like=case.stock(norms=True)))
    assert "2 x Diverse Branch Block (CVPR 2021)" in text
    assert "read from 'model' of the checkpoint; it also has ema" in text
    assert "names: as they are" in text
    assert "at most" in text


def test_numbers_of_half_precision_are_taken_as_they_are(tmp_path: Path) -> None:
    official = CASES["repvgg"].official().half()
    file = save(tmp_path / "x.pth", official.state_dict())
    imported = reparam.import_checkpoint(file, like=CASES["repvgg"].stock(norms=True))
    assert imported.model is not None
    assert next(imported.model.parameters()).dtype == torch.float16
    assert difference(imported.model, official.double()) < EXACT


# ------------------------------------------------------------------ other layouts


def test_tensorflow_and_gluon(tmp_path: Path) -> None:
    """Their W is read as ``(m, in, out / groups)``: with groups each D belongs to the channel that the kernel reads."""
    out, groups, few = 8, 2, 3
    kernel, D = torch.randn(9, few, out).double(), torch.randn(9, 9, few * groups).double()
    total = D + torch.eye(9)[..., None]
    rows = torch.einsum("msi,sio->mio", total, kernel.reshape(9, few * groups, out // groups))
    want = rows.reshape(3, 3, few, out).permute(3, 2, 0, 1)
    norm = {"bn/gamma:0": torch.rand(8), "bn/moving_mean:0": torch.rand(8)}
    found = reparam.import_checkpoint(
        save(tmp_path / "tf.pth", {"conv/kernel:0": kernel, "conv/D:0": D, "conv/bias:0": torch.ones(8), **norm})
    )
    assert torch.allclose(found.tensors["conv.weight"], want, rtol=1e-13)
    assert found.tensors.keys() == {"conv.weight", "conv.bias", "bn.weight", "bn.running_mean"}
    gluon = kernel.reshape(3, 3, few, out).permute(3, 2, 0, 1)
    found = reparam.import_checkpoint(save(tmp_path / "gluon.pth", {"conv.weight": gluon, "conv.D": D}))
    assert torch.allclose(found.tensors["conv.weight"], want, rtol=1e-13)
    like = nn.Sequential()
    like.add_module("conv", nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False))
    expanded = reparam.import_checkpoint(tmp_path / "gluon.pth", like=like)
    assert str(expanded.recipe).startswith("doconv")
    assert torch.allclose(reparam.equivalent_conv(expanded.model.conv)[0], want, rtol=1e-12)  # type: ignore[union-attr,arg-type]


def write_hdf5(path: Path, state: dict[str, Tensor]) -> Path:
    with h5py.File(path, "w") as opened:
        for name, tensor in state.items():
            opened.create_dataset(name.replace("/", "+"), data=tensor.numpy())
        opened.create_dataset("deps", data=[64, 64])
    return path


def test_hdf5_by_names(tmp_path: Path) -> None:
    case = CASES["acb"]
    official = case.official()
    file = write_hdf5(tmp_path / "x.hdf5", official.state_dict())
    imported = reparam.import_checkpoint(file, like=case.stock(norms=True))
    assert imported.model is not None
    assert difference(imported.model, official) < EXACT


def by_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ACNet's code stores when it is to store by order."""
    words = {
        "conv.weight": "kernel",
        "bn.weight": "gamma",
        "bn.bias": "beta",
        "bn.running_mean": "mu",
        "bn.running_var": "sigma",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        word = next((to for part, to in words.items() if part in name), None)
        number = sum(key.startswith(word) for key in found) if word else 0
        found[f"{word}{number}" if word else name] = tensor
    return found


def test_hdf5_by_order(tmp_path: Path) -> None:
    """Its residual blocks register the projection first, torchvision's last."""
    network = next(n for n in NETWORKS if n.name == "sres18")
    official = lively(network.make())
    file = write_hdf5(tmp_path / "x.hdf5", by_order(official.state_dict()))
    imported = reparam.import_checkpoint(file, like=network.like, collapse=True)
    assert imported.model is not None
    assert difference(imported.model, official, 3, 64) < EXACT
    with pytest.raises(files.FileError, match="only an order: say of which network"):
        reparam.import_checkpoint(file)
    with pytest.raises(files.FileError, match="agree with the network's 36 in no order"):
        reparam.import_checkpoint(file, like="torchvision:resnet34")


def test_an_order_that_leaves_two_choices_is_refused() -> None:
    from reparam.published.order import named

    state = {f"kernel{i}": torch.zeros(8, 8, 1, 1) for i in range(2)}
    state |= {f"{word}{i}": torch.zeros(8) for i in range(2) for word in ("gamma", "beta", "mu", "sigma")}
    with pytest.raises(files.FileError, match="in more than one order"):
        named(state, {"conv": (8, 8, 1, 1), "downsample.0": (8, 8, 1, 1)})


# ------------------------------------------------------------------ deployed


def deploy(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    """What the authors' conversion leaves: the folded convolution of each block under a name of its own."""
    units, rest = find_units(state)
    from reparam.published.units import folded

    for unit in units:
        found = folded(unit)
        assert found.bias is not None
        rest |= {unit.key(f"{word}.weight"): found.weight, unit.key(f"{word}.bias"): found.bias}
    return rest


@pytest.mark.parametrize(("name", "word"), [("dbb", "dbb_reparam"), ("acb", "fused_conv"), ("repvgg", "rbr_reparam"),
                                            ("mobileone", "reparam_conv"), ("orepa", "orepa_reparam"),
                                            ("unireplknet", "lk_origin")])  # fmt: skip
def test_deployed(name: str, word: str, tmp_path: Path) -> None:
    case = CASES[name]
    official = case.official()
    file = save(tmp_path / "x.pth", deploy(official.state_dict(), word))
    imported = reparam.import_checkpoint(file, like=case.stock(norms=True))
    assert imported.model is not None
    assert any("deployed, and has no branches" in note for note in imported.notes)
    assert difference(imported.model, official, case.plain[0][0]) < EXACT
    plain = case.stock(norms=False).double()
    plain.load_state_dict(reparam.import_checkpoint(file).tensors)
    assert difference(plain, official, case.plain[0][0]) < EXACT


def test_a_deployed_network_of_timm_s(tmp_path: Path) -> None:
    network = next(n for n in NETWORKS if (n.grammar, n.name) == ("RepVGG", "A0"))
    official = lively(network.make()).float()
    state = {name: tensor.float() for name, tensor in deploy(official.state_dict(), "rbr_reparam").items()}
    imported = reparam.import_checkpoint(save(tmp_path / "x.pth", state), like=network.like)
    assert imported.collapsed
    assert imported.model is not None
    assert difference(imported.model, official.double(), 3, 64) < 1e-5  # the folds are rounded to float32
    again = files.load_model(imported.save(tmp_path / "collapsed.safetensors"))
    assert again.state_dict().keys() == imported.tensors.keys()


# ------------------------------------------------------------------ what no file says


def test_ecb(tmp_path: Path) -> None:
    """Whether there is an identity beside the branches stands in no key."""
    for identity in (False, True):
        official = lively(ECB(4, 4, identity=identity))
        file = save(tmp_path / "x.pth", {f"body.{k}": v for k, v in official.state_dict().items()})
        found = reparam.import_checkpoint(file, block=f"ecb:identity={identity}")
        assert found.tensors.keys() == {"body.weight", "body.bias", "body.act.weight"}
        x = torch.randn(1, 4, 9, 9).double()
        got = F.conv2d(x, found.tensors["body.weight"], found.tensors["body.bias"], padding=1)
        assert torch.allclose(F.prelu(got, found.tensors["body.act.weight"]), official(x), rtol=1e-12, atol=1e-12)


def test_an_identity_is_where_a_block_keeps_its_channels(tmp_path: Path) -> None:
    """The authors' option is one for the whole network; that it was not said is."""
    official = lively(nn.Sequential(ECB(4, 6), ECB(6, 6, identity=True)))
    file = save(tmp_path / "x.pth", official.state_dict())
    found = reparam.import_checkpoint(file, block="ecb:identity=true")
    x = torch.randn(1, 4, 9, 9).double()
    want, got = official(x), x
    for i in "01":
        got = F.conv2d(got, found.tensors[f"{i}.weight"], found.tensors[f"{i}.bias"], padding=1)
        got = F.prelu(got, found.tensors[f"{i}.act.weight"])
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert "--block ecb:identity=true" not in str(found)
    assert "no file says: taken to have the default; else --block ecb:identity=true" in str(
        reparam.import_checkpoint(file)
    )


def test_norms_inside_and_behind(tmp_path: Path) -> None:
    """UniRepLKNet's block has norms of its own and one more behind: expanding has one place for it, folding two."""

    class Block(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.dwconv, self.norm = conv, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.dwconv(x))

    official, stock = lively(Block(Dilated(4, 9))), Block(nn.Conv2d(4, 4, 9, padding=4, groups=4))
    file = save(tmp_path / "x.pth", official.state_dict())
    with pytest.raises(files.FileError, match=r"dwconv has norms inside and one more behind.*--collapse"):
        reparam.import_checkpoint(file, like=stock)
    imported = reparam.import_checkpoint(file, like=stock, collapse=True)
    assert imported.model is not None
    assert difference(imported.model, official) < EXACT


# ------------------------------------------------------------------ refused


def broken(change: Callable[[dict[str, Tensor]], Any], name: str = "dbb") -> dict[str, Tensor]:
    state = CASES[name].official().state_dict()
    change(state)
    return dict(state)


REFUSED = {
    "no block": (lambda: {"conv.weight": torch.rand(3, 3, 3, 3)}, "no block of a known publication"),
    "half a norm": (
        lambda: broken(lambda s: s.pop("first.dbb_1x1.bn.running_var")),
        r"first is Diverse Branch Block \(CVPR 2021\) in part: it misses first.dbb_1x1.bn.running_var",
    ),
    "without its kernel": (
        lambda: broken(lambda s: s.pop("second.dbb_origin.conv.weight")),
        "second.dbb_origin.conv.weight is missing",
    ),
    "foreign": (lambda: broken(lambda s: s.update({"first.dbb_1x1.extra": torch.zeros(1)})), "first.dbb_1x1.extra"),
    "both forms": (
        lambda: broken(lambda s: s.update({"first.dbb_reparam.weight": torch.zeros(8, 4, 3, 3)})),
        "first.dbb_reparam.weight beside",
    ),
    "two blocks in one place": (
        lambda: broken(lambda s: s.update({f"first.{k}": v for k, v in ACB(4, 8, 3).state_dict().items()})),
        "first.dbb_origin.conv.weight beside first.square_conv.weight",
    ),
    "something where the kernel goes": (
        lambda: broken(lambda s: s.update({"first.weight": torch.zeros(8, 4, 3, 3)})),
        "first.weight beside first.dbb_origin.conv.weight",
    ),
    "something where the bias goes": (
        lambda: broken(lambda s: s.update({"second.bias": torch.zeros(8)})),
        "second.bias beside second.dbb_origin.conv.weight",
    ),
    "a kernel of unknown shape": (
        lambda: {"first.W": torch.rand(8, 4, 15), "first.D": torch.zeros(4, 15, 15)},
        "first: its D is of 15 taps, which is no square kernel",
    ),
    "some deployed": (
        lambda: {
            **{k: v for k, v in CASES["dbb"].official().state_dict().items() if not k.startswith("first")},
            "first.dbb_reparam.weight": torch.zeros(8, 4, 3, 3),
            "first.dbb_reparam.bias": torch.zeros(8),
        },
        "1 of its 2 blocks are deployed, the first is first",
    ),
    "other shape": (
        lambda: broken(lambda s: s.update({"first.dbb_avg.conv.weight": torch.zeros(8, 3, 1, 1)})),
        "has of other shapes first.dbb_avg.conv.weight",
    ),
    "integers": (
        lambda: broken(lambda s: s.update({"first.dbb_origin.conv.weight": torch.zeros(8, 4, 3, 3).int()})),
        "is of dtype torch.int32",
    ),
    "a trained constant": (
        lambda: broken(lambda s: s["first.id_tensor"].add_(0.1), "orepa"),
        "first.id_tensor is frozen in OREPA",
    ),
    "a trained D_diag": (
        lambda: broken(lambda s: s["first.D_diag"].mul_(2), "doconv"),
        "first.D_diag is frozen in DO-Conv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(files.FileError, match=message) as caught:
        reparam.import_checkpoint(save(tmp_path / "x.pth", make()))
    assert "x.pth: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_file_lacks_it_is_one_line(name: str, tmp_path: Path) -> None:
    """Each tensor of the first block left out, and each in another shape."""
    state = {k: v for k, v in CASES[name].official().state_dict().items() if k.startswith("first.")}
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        spared = [] if key.endswith("D_diag") else [None]  # which is known, and TensorFlow's code does not store
        others: list[Tensor | None] = [*spared, tensor.new_ones(3, 5), tensor.new_ones(0), tensor.new_ones(())]
        for other in others:
            left = {k: v for k, v in state.items() if k != key} | ({} if other is None else {key: other})
            with pytest.raises(files.FileError) as caught:
                reparam.import_checkpoint(save(tmp_path / "x.pth", left), like=None)
            assert "\n" not in str(caught.value)
            assert "first" in str(caught.value)


def test_names_without_a_place_are_listed(tmp_path: Path) -> None:
    case = CASES["dbb"]
    file = save(
        tmp_path / "x.pth",
        {f"deep.{k}": v for k, v in case.official().state_dict().items()} | {"odd.weight": torch.zeros(3)},
    )
    with pytest.raises(files.FileError, match=r"no place for odd$"):
        reparam.import_checkpoint(file, like=case.stock(norms=True))
    with pytest.raises(files.FileError, match=r"no place for .*odd.*; nothing for its"):
        reparam.import_checkpoint(file, like=nn.Sequential(case.stock(norms=True), nn.PReLU(7)))
    with pytest.raises(files.FileError, match="no place for second"):
        reparam.import_checkpoint(
            save(tmp_path / "y.pth", case.official().state_dict()), like=CASES["acb"].stock(norms=True)
        )


def test_what_alone_keeps_a_file_from_fitting_is_said(tmp_path: Path) -> None:
    """The classes, the part that the network lacks, the part that the file lacks; by lists of names and by the tree."""

    class More(Two):
        def __init__(self) -> None:
            super().__init__(*(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s, _ in DENSE), norms=True)
            self.tail = nn.Conv2d(3, 7, 3)

    case = CASES["acb"]
    for prefix in ("", "deep."):
        state = {f"{prefix}{k}": v for k, v in case.official().state_dict().items()}
        file = save(tmp_path / "x.pth", state)
        seven = case.stock(norms=True)
        seven.head = nn.Linear(8, 7)
        wrong: tuple[tuple[nn.Module, str], ...] = (
            (seven, r"it is for 5 classes \((deep\.)?head\) and the network for 7; name the network for 5"),
            (More(), "to the network: nothing for its tail$"),
        )
        for like, message in wrong:
            with pytest.raises(files.FileError, match=message):
                reparam.import_checkpoint(file, like=like)
        file = save(tmp_path / "y.pth", {**state, f"{prefix}loss.weight": torch.zeros(5)})
        with pytest.raises(files.FileError, match=r"to the network: no place for (deep\.)?loss$"):
            reparam.import_checkpoint(file, like=case.stock(norms=True))
        lacks = {k: v for k, v in state.items() if k != f"{prefix}second.hor_bn.bias"}
        file = save(tmp_path / "z.pth", lacks)
        for collapse in (False, True):
            with pytest.raises(files.FileError, match=r"it misses (deep\.)?second.hor_bn.bias$"):
                reparam.import_checkpoint(file, like=case.stock(norms=True), collapse=collapse)


def test_a_block_that_is_not_what_its_authors_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "EPS", 1e-3)
    file = save(tmp_path / "x.pth", CASES["dbb"].official().state_dict())
    for options in ({}, {"like": CASES["dbb"].stock(norms=True)}):
        with pytest.raises(files.FileError, match="first is not what the authors of Diverse Branch Block"):
            reparam.import_checkpoint(file, **options)  # type: ignore[arg-type]


def test_a_norm_with_another_eps_is_seen(tmp_path: Path) -> None:
    case = CASES["acb"]
    stock = case.stock(norms=True)
    stock.second_norm.eps = 1e-3
    file = save(tmp_path / "x.pth", case.official().state_dict())
    with pytest.raises(files.FileError, match="second is not what the authors"):
        reparam.import_checkpoint(file, like=stock)


def test_a_file_of_this_package_is_no_published_one(tmp_path: Path) -> None:
    expanded = reparam.expand(CASES["acb"].stock(norms=True), "acb")
    with pytest.raises(files.FileError, match="it is a file of this package"):
        reparam.import_checkpoint(files.save_model(expanded, tmp_path / "x.safetensors"))


# ------------------------------------------------------------------ names


def side(text: str, **norms: str) -> Side:
    return Side({path: (int(size),) for path, size in (word.split("=") for word in text.split())}, norms)


def test_names_by_the_tree() -> None:
    """Other names for everything, blocks told apart by their numbers, a projection registered first."""
    theirs = side("body.part0.proj=3 body.part0.a1=1 body.part0.a2=1 body.part1.a1=1 body.part1.a2=1 out=9")
    network = side("net.1.c1=1 net.1.c2=1 net.1.skip.0=3 net.2.c1=1 net.2.c2=1 fc=9")
    paths, said = placed(theirs, network)
    assert paths["body.part0.proj"] == "net.1.skip.0"
    assert paths["body.part1.a2"] == "net.2.c2"
    assert said.startswith("by shapes")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("top.left=1 top.right=1 out=9", "x.up=1 x.low=1 fc=9"),  # words
        ("top.a1=1 top.b2=1 out=9", "x.c1=1 x.c2=1 fc=9"),  # numbers behind different words
    ],
)
def test_names_that_could_be_either_are_refused(theirs: str, ours: str) -> None:
    first, second = theirs.split()[:2]
    with pytest.raises(files.FileError, match=rf"ambiguous: {first[:-2]}, {second[:-2]} .* any of x\."):
        placed(side(theirs), side(ours))


def test_a_frozen_ninth_of_float32_counts_as_exact(tmp_path: Path) -> None:
    """What float32 makes of 1/9 is 1e-9 off, and the authors' files have it so: their formula is held to the ninth."""
    case = CASES["orepa"]
    official = case.official().float()
    file = save(tmp_path / "x.pth", official.state_dict())
    for collapse in (False, True):
        imported = reparam.import_checkpoint(file, like=case.stock(norms=True), collapse=collapse)
        assert imported.difference < EXACT


# ------------------------------------------------------------------ afterwards


def test_the_file_is_one_of_an_expanded_network(tmp_path: Path) -> None:
    """From the command line: import, collapse, compare with what was imported as the plain network."""
    network = next(n for n in NETWORKS if n.name == "cfqkbnc")
    official = lively(network.make())
    file = save(tmp_path / "x.pth", network.state(official))
    run = CliRunner()
    expanded, plain, again = (str(tmp_path / f"{name}.safetensors") for name in ("expanded", "plain", "again"))
    done = run.invoke(app, ["import", str(file), "--like", network.like, "-o", expanded])
    assert done.exit_code == 0, done.output
    assert "3 x Asymmetric Convolution Block" in done.output
    assert "an expanded network: zoo:cifar_quick with acb:line=3" in done.output
    assert run.invoke(app, ["import", str(file), "--like", network.like, "--collapse", "-o", plain]).exit_code == 0
    assert run.invoke(app, ["collapse", expanded, "-o", again]).exit_code == 0
    assert run.invoke(app, ["verify", plain, again]).exit_code == 0
    assert difference(files.load_model(expanded), official, 3, 32) < EXACT
    folded = str(tmp_path / "folded.pt")
    done = run.invoke(app, ["import", str(file), "-o", folded])
    assert "a state dict of 10 tensors" in done.output
    assert "conv1.acb.weight" in files.load_state(folded).tensors
    done = run.invoke(app, ["import", str(file), "--block", "dbb", "-o", folded])
    assert done.exit_code == 1


def test_a_network_of_layers_loads_it(tmp_path: Path) -> None:
    case = CASES["acb"]
    official = case.official()
    file = save(tmp_path / "x.pth", official.state_dict())
    imported = reparam.import_checkpoint(file, like=case.stock(norms=True))
    mine = Two(
        *(layers.AsymConvBlock(i, o, k, s, k // 2, groups=g, norm=nn.BatchNorm2d) for i, o, k, s, g in case.plain)
    )  # type: ignore[attr-defined]
    mine.double().load_state_dict(imported.tensors)
    assert difference(mine, official) < EXACT
    plain = case.stock(norms=False).double()
    with pytest.raises(reparam.ReparamError):
        layers.fuse_and_load(case.stock(norms=True), save(tmp_path / "bad.pth", {"a": torch.zeros(1)}))
    assert difference(layers.fuse_and_load(plain, file), official) < EXACT
