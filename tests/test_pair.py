"""Networks of any class to disk and back, whole pickles, and what libraries would read of them as another network."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pickled_networks as networks
import pytest
import torch
from pickled_networks import Chain, Net
from torch import Tensor, nn

import reparam
from passes.edits.carried import made_by
from passes.portable import Rewritten

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Trainer(nn.Module):
    """A network inside of something that trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = Net(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.net(x))


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def inner(verb: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        model.net = verb(model.net)  # type: ignore[arg-type]
        return model

    return change


KINDS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "plain": (Net, lambda m: m),
    "expanded": (Net, lambda m: lively(reparam.expand(m, "dbb"))),
    "online": (Net, lambda m: lively(reparam.expand(m, "acb", form="online"))),
    "own options": (Net, lambda m: lively(reparam.expand(m, reparam.Block("acb", gamma=1 / 3), where="stem"))),
    "collapsed": (Net, reparam.collapse),
    "there and back": (Net, lambda m: reparam.collapse(lively(reparam.expand(m, "acb")))),
    "like": (Net, lambda m: reparam.collapse(lively(reparam.expand(m, "acb")), like=m)),
    "twice": (
        Net,
        lambda m: lively(reparam.expand(lively(reparam.expand(m, "acb", where="stem")), "dbb", where="square")),
    ),
    "chain": (Chain, reparam.collapse),
    "half": (Chain, lambda m: reparam.collapse(m).half()),
    "inside expanded": (Trainer, inner(lambda m: lively(reparam.expand(m, "repvgg")))),
    "inside collapsed": (Trainer, inner(reparam.collapse)),
    "inside, then all": (Trainer, lambda m: reparam.collapse(inner(lambda n: lively(reparam.expand(n, "acb")))(m))),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_comes_back(tmp_path: Path, kind: str, suffix: str) -> None:
    cls, change = KINDS[kind]
    model = change(lively(cls())).eval()
    path = reparam.save(model, tmp_path / f"net{suffix}")
    before = torch.get_rng_state()
    for plain in (cls, cls()):
        again = reparam.load(path, plain)
        x = X.half() if kind == "half" else X
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        assert isinstance(again, cls)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert made_by(again) == made_by(model)
        assert torch.equal(reparam.collapse(again, verify=False)(x), reparam.collapse(model, verify=False)(x))
        torch.set_rng_state(before)
    if isinstance(plain, nn.Module):
        assert not made_by(plain)  # it is not changed


def test_loading_draws_nothing(tmp_path: Path) -> None:
    plain = lively(Net())
    path = reparam.save(reparam.expand(plain, "acb"), tmp_path / "net.pt")
    before = torch.get_rng_state()
    reparam.load(path, plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_expanded_network_goes_on_training(tmp_path: Path) -> None:
    model = lively(reparam.expand(Net(), "acb"))
    again = reparam.load(reparam.save(model, tmp_path / "net.pt"), Net).train()
    again(X).square().mean().backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (lambda: Net(classes=5), r"does not fit .*'head.weight' is \(3, 4\) in the file and \(5, 4\)"),
        (Chain, "is of the class Net, and plain= is a Chain"),
        (lambda: reparam.expand(Net(), "acb"), "as it was before it was expanded"),
        (lambda: 3, "takes a network or what makes one, got int"),
        ("timm:resnet18", "takes a network or what makes one, got 'timm:resnet18'"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, plain: Callable[[], nn.Module], words: str) -> None:
    path = reparam.save(reparam.collapse(lively(Net())), tmp_path / "net.safetensors")
    with pytest.raises(reparam.ReparamError, match=words):
        reparam.load(path, plain)


@pytest.mark.parametrize("note", ["[", '{"nothing": "{}"}', '{"net": 3}', '{"net": "{}"}', "3"])
def test_a_damaged_note_on_parts_is_named(tmp_path: Path, note: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = reparam.save(inner(reparam.collapse)(lively(Trainer())), tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata=metadata | {"parts": note})
    with pytest.raises(reparam.ReparamError, match=r"a\.safetensors: the note on "):
        reparam.load(path, Trainer)


# ------------------------------------------------------------------------------------------------- whole pickles


ALONE = """
import copy, io, sys
sys.path.insert(0, sys.argv[1])
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("passes", "reparam", "zoo"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
x, wanted, model = torch.load(sys.argv[2], weights_only=False)
def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
for each in (model, copy.deepcopy(model), copy.copy(model), saved(model), saved(saved(model))):
    torch.testing.assert_close(each(x), wanted)
    try:
        torch.testing.assert_close(torch.fx.GraphModule(each, each.graph)(x), wanted)
    except AttributeError:
        assert not isinstance(model, torch.fx.GraphModule)
if hasattr(model, "fuse"):
    assert model.fuse() is model and model(x).equal(wanted)
if "Told" in str(type(model)):
    for wrong in (dict(scales=(1.0, 3.0)), dict(mode="b")):
        try:
            model(x, **wrong)
        except ValueError as error:
            assert "this forward was collapsed for" in str(error)
        else:
            raise AssertionError(wrong)
if hasattr(model, "square"):
    try:
        model.square = torch.nn.Identity()
    except ValueError as error:
        assert "replace it in the network that was collapsed" in str(error)
    else:
        assert type(model).__name__ == "Chain"
torch.save((x, wanted, model), sys.argv[3])
assert not {m.partition(".")[0] for m in sys.modules} & {"passes", "reparam"}
"""
PICKLED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "chain": (Chain, {}),
    "forward": (Net, {}),
    "method, constant, fold of its own": (networks.Deployable, {}),
    "fixed options": (networks.Told, {}),
    "scale and shift": (networks.LeftOver, {"norms": "affine"}),
    "a function of its own": (networks.Calling, {}),
    "graph": (networks.graph, {}),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_the_pickle_of_a_collapsed_network_needs_no_compiler(kind: str, tmp_path: Path) -> None:
    """It loads, computes, is copied and pickled again where neither package is found; and comes back."""
    build, options = PICKLED[kind]
    model = reparam.collapse(lively(build()), **options)
    assert made_by(model)
    wanted = model(X)
    with torch.no_grad():
        torch.save((X, wanted, model), tmp_path / "there.pt")
    arguments = [str(Path(__file__).parent), str(tmp_path / "there.pt"), str(tmp_path / "back.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = torch.load(tmp_path / "back.pt", weights_only=False)[2]
    torch.testing.assert_close(again(X), wanted)
    assert isinstance(again, Rewritten) == isinstance(model, Rewritten)
    assert [*map(str, made_by(again) or ())] == [*map(str, made_by(model) or ())]
    assert [type(m) for m in again.modules() if not isinstance(m, Rewritten)] == [
        type(m) for m in model.modules() if not isinstance(m, Rewritten)
    ]
    assert not reparam.collapse_with_report(again)[1].folds


def test_a_pickled_network_still_knows_its_edits(tmp_path: Path) -> None:
    collapsed = reparam.collapse(lively(Net()))
    again = pickle.loads(pickle.dumps(collapsed))
    assert made_by(again) == made_by(collapsed)
    assert made_by(copy.deepcopy(again)) == made_by(collapsed)
    back = reparam.load(reparam.save(again, tmp_path / "net.pt"), Net)
    assert torch.equal(back(X), collapsed(X))


# ------------------------------------------------------------------------------------------------- other libraries


class Published(Net):
    """As Hugging Face's models and all that has their mix-in."""

    def save_pretrained(self, folder: str) -> None: ...

    @classmethod
    def from_pretrained(cls, folder: str) -> Published:
        return cls()


def test_where_a_library_would_load_another_network_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plain = lively(Published())
    with caplog.at_level(logging.WARNING, "reparam"):
        expanded = reparam.expand(plain, "acb")
        assert "what save_pretrained writes of this Published" in caplog.text
        caplog.clear()
        _, explanation = reparam.collapse_with_report(expanded)
        assert "reparam.save and reparam.load" in caplog.text
        assert any("reparam.load" in note for note in explanation.notes)
        caplog.clear()
        reparam.collapse(expanded, like=plain)
        reparam.collapse(reparam.expand(lively(Net()), "acb"))
        reparam.collapse(lively(Published().head))
    assert not caplog.text
