"""Networks of a person's own files and modules: named wherever a spec is, and never run because a file says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import reparam
from reparam import cli, files, sources
from reparam.own_code import NAMED

NET = '''
import pathlib
from torch import nn
from parts_beside import conv

pathlib.Path(__file__).with_suffix(".ran").touch()

class Net(nn.Module):
    """Two convolutions and a head."""
    def __init__(self, width=4, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(conv(1, width), conv(width, width))
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

class Family:
    small = staticmethod(lambda: Net(2))

ready = Net(3)
number = 3

def nothing():
    return None

def fails():
    raise ValueError("no cheese")

def trained(pretrained=False):
    net = Net()
    nn.init.constant_(net.head.bias, 7 if pretrained else 0)
    return net
'''
PARTS = """
from torch import nn

def conv(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
"""
MODELS = """
from .layers import conv
from torch import nn

def build(width=1):
    return nn.Sequential(conv(3, 4 * width), conv(4 * width, 8))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a file and a package of a person; nothing of it is left in Python afterwards."""
    (tmp_path / "net_of_mine.py").write_text(NET)
    (tmp_path / "parts_beside.py").write_text(PARTS)
    package = tmp_path / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MODELS)
    (package / "layers.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    token, before = NAMED.set(frozenset()), set(sys.modules)
    yield tmp_path
    NAMED.reset(token)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


# ------------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize(
    "spec",
    ["./net_of_mine.py:Net", "net_of_mine.py:Net", "net_of_mine:Net", "./net_of_mine.py:trained"],
)
def test_a_callable_of_a_file_is_a_network(here: Path, spec: str) -> None:
    model = sources.create(spec)
    assert type(model).__name__ == "Net"
    assert model.get_submodule("head").in_features == 4


def test_options_follow_and_dots_lead_inside(here: Path) -> None:
    assert sources.create("./net_of_mine.py:Net,width=6,num_classes=2").get_submodule("head").in_features == 6
    assert sources.create("net_of_mine.py:Family.small").get_submodule("head").in_features == 2
    absolute = sources.create(f"{here / 'net_of_mine.py'}:Net")
    assert type(absolute) is type(sources.create("net_of_mine.py:Net"))  # one module, however it is written


def test_a_network_that_stands_ready_is_copied(here: Path) -> None:
    one, other = (sources.create("./net_of_mine.py:ready") for _ in range(2))
    assert one is not other
    nn.init.zeros_(one.get_submodule("head").weight)
    assert other.get_submodule("head").weight.any()


@pytest.mark.parametrize("spec", ["package_of_mine.models:build,width=2", "./package_of_mine/models.py:build,width=2"])
def test_a_module_of_a_package_imports_its_siblings(here: Path, spec: str) -> None:
    assert sources.create(spec)[0][0].out_channels == 8


def test_a_file_named_like_an_installed_module_is_the_file(here: Path) -> None:
    (here / "typer.py").write_text("from torch import nn\ndef build():\n    return nn.Conv2d(1, 5, 1)\n")
    assert sources.create("./typer.py:build").out_channels == 5
    assert sys.modules["typer"].__file__ != str(here / "typer.py")


def test_sources_come_before_modules_of_their_name(here: Path) -> None:
    pytest.importorskip("timm")
    (here / "timm.py").write_text("raise AssertionError")
    assert "resnet18" in sources.names("timm")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("./net.py:Net", True),
        ("net.py:Net.small,width=(1,2)", True),
        ("C:\\nets\\net.py:Net", True),
        ("a.b:c", True),
        ("./net.py", False),
        ("./net.py:", False),
        ("C:\\model.pt", False),
        ("runs/a.pt", False),
    ],
)
def test_code_and_paths_are_told_apart(text: str, answer: bool) -> None:
    assert sources.is_spec(text) is answer
    if answer:
        assert ":".join(sources.split(text)) == text


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./net_of_mine.py:Nett", r"no 'Nett'; did you mean Net\?; it has Net, ready, nothing, fails, trained"),
        (
            "./net_of_min.py:Net",
            r"no file ./net_of_min.py; did you mean net_of_mine.py\?; .* has net_of_mine.py",
        ),
        ("package_of_mine.model:build", r"no module 'package_of_mine.model'; did you mean models\?; .*layers, models"),
        (
            "package_of_min.models:build",
            r"no module 'package_of_min'; .*none is installed, and the folder",
        ),
        ("package_of_mine:build", "no 'build'; it has none; modules in it: layers, models"),
        ("./net_of_mine.py:number", "is a int, and nothing that makes a network"),
        ("./net_of_mine.py:nothing", "made a NoneType"),
        ("./net_of_mine.py:fails", "failed: ValueError: no cheese"),
        ("./net_of_mine.py:Net,wide=2", r"takes \(width=4, num_classes=10\)"),
        ("./net_of_mine.py:ready,width=2", "takes no options"),
        ("./net_of_mine.py:Net,width=2,width=3", "says width twice"),
        ("mine:Net", "known sources: .*nor is there a module of that name"),
    ],
)
def test_an_error_says_what_was_looked_for_and_what_is_there(here: Path, spec: str, words: str) -> None:
    with pytest.raises(reparam.ReparamError, match=words):
        sources.create(spec)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_this_name", r"cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("raise SystemExit(2)", "ends Python; put its script under"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_code_that_cannot_be_imported_says_why(here: Path, code: str, words: str) -> None:
    (here / "broken_of_mine.py").write_text(code)
    for spec in ("./broken_of_mine.py:Net", "broken_of_mine:Net"):
        with pytest.raises(reparam.ReparamError, match=words):
            sources.create(spec)


def test_trained_weights_are_asked_of_code_that_has_them(here: Path) -> None:
    assert sources.create("net_of_mine.py:trained", pretrained=True).head.bias[0] == 7
    assert sources.create("net_of_mine.py:trained").head.bias[0] == 0
    with pytest.raises(reparam.ReparamError, match="no option pretrained; give it trained weights with --weights"):
        sources.create("net_of_mine.py:Net", pretrained=True)


# ------------------------------------------------------------------------------------------------- the command line


def test_the_way_there_and_back(here: Path) -> None:
    net = "./net_of_mine.py:Net,width=6"
    assert "2 of 2 convolutions get a block" in run("plan", net, "--block", "acb")
    run("expand", net, "--block", "acb", "-o", "expanded.safetensors")
    assert "strict=True into" in run("collapse", net, "--weights", "expanded.safetensors", "-o", "plain.safetensors")
    assert "equal" in run("verify", net, "plain.safetensors")
    assert "equal" in run("verify", "expanded.safetensors", net)
    run("collapse", net, "--weights", "plain.safetensors", "-o", "deployed.safetensors")
    assert "equal" in run("verify", "deployed.safetensors", net)
    assert files.load_state("deployed.safetensors", allow_code=True).source == net


def test_options_that_a_file_says_need_not_be_repeated(here: Path) -> None:
    run("expand", "./net_of_mine.py:Net,width=6", "--block", "acb", "-o", "e.safetensors")
    printed = run("collapse", "net_of_mine.py:Net,num_classes=10", "--weights", "e.safetensors", status=1)
    assert "does not fit net_of_mine.py:Net,num_classes=10" in printed  # another network: not the file's
    assert "in other sizes: see its options" in printed
    for net in ("./net_of_mine.py:Net", "net_of_mine.py:Net", here / "net_of_mine.py:Net"):  # however it is written
        assert "width=6" in run("collapse", net, "--weights", "e.safetensors", "-o", "d.safetensors")


def test_the_classes_to_ask_for_stand_in_the_place_of_others(here: Path) -> None:
    run("expand", "net_of_mine.py:Net,width=6", "--block", "acb", "-o", "e.safetensors")
    printed = run("collapse", "net_of_mine.py:Net,num_classes=7,width=6", "--weights", "e.safetensors", status=1)
    assert "is for 10 classes" in printed
    assert "net_of_mine.py:Net,width=6,num_classes=10 where" in printed


def test_a_block_of_the_file_is_known(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.blocks.kit import registry

    monkeypatch.setattr(registry, "_BLOCKS", reparam.blocks())
    code = (
        NET
        + """
import reparam
@reparam.block("double_of_mine")
def double(conv):
    \"\"\"The kernel twice.\"\"\"
    yield "square", conv.main()
    last = conv.new_norm(conv.out_channels)
    yield "again", conv.row(**conv.begin(4), square=conv.windowed(4), last=last)
"""
    )
    (here / "net_of_mine.py").write_text(code)
    run("expand", "./net_of_mine.py:Net", "--block", "double_of_mine", "-o", "e.safetensors")
    run("collapse", "./net_of_mine.py:Net", "--weights", "e.safetensors")


def test_training_and_batches_take_code(here: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    net = ("--model", "./net_of_mine.py:Net")
    run("train", *net, "--block", "acb", "--data", "digits", "--epochs", 1, "--set", "batch=256", "--out", "runs/x")
    assert "--allow-code" in run("convert", "runs/x", "-o", "t.safetensors", status=1)
    assert "answers agree" in run("convert", "runs/x", *net, "-o", "t.safetensors")
    assert "./net_of_mine.py:Net" in run("evaluate", "t.safetensors", *net, "--data", "digits")
    assert "./net_of_mine.py:Net" in run("evaluate", "t.safetensors", "--model", "net_of_mine:Net", status=1)
    for same in ("net_of_mine.py:Net", here / "net_of_mine.py:Net"):
        assert "./net_of_mine.py:Net" in run("evaluate", "t.safetensors", "--model", same, "--data", "digits")
    assert "would be lost" in run("convert", "runs/x", *net, "-o", "runs/x/best.safetensors", status=2)
    wrong = run("train", "--model", "./net_of_mine.py:Net,num_classes=7", "--data", "digits", "--out", "y", status=1)
    assert "digits, which has 10 classes, with (2, 7)" in wrong
    batch = ("./net_of_mine.py:Net", "package_of_mine.models:build,width=2")
    assert "2 converted" in run("zoo", "convert", *batch, "--block", "acb", "--no-latency", "--out", "runs/z")
    for name in ("Nat", "N*"):
        printed = run("zoo", "convert", f"./net_of_mine.py:{name}", "--out", "runs/w", status=2)
        assert f"net_of_mine.py has no '{name}'" in printed
    assert "1 planned" in run("zoo", "plan", "./net_of_mine.py:ready", "--out", "runs/p")


def test_a_file_without_a_name_says_how_one_names_it(here: Path) -> None:
    assert "name the network in it, net_of_mine.py:Net" in run("plan", "net_of_mine.py", "--block", "acb", status=1)


# ------------------------------------------------------------------------------------------------- files of strangers


@pytest.mark.parametrize("source", ["./net_of_mine.py:Net", "net_of_mine:Net", "os:system,command='touch net.ran'"])
@pytest.mark.parametrize("command", ["collapse", "explain", "verify"])
def test_no_code_is_run_because_a_file_says_so(here: Path, source: str, command: str) -> None:
    model = nn.Conv2d(1, 1, 1)
    path = files.save_model(model, here / "strange.safetensors", source=source)
    others = [path] if command == "verify" else []
    printed = run(command, path, *others, status=1)
    assert "strange.safetensors: its network is code, " in printed
    assert "none is run because a file says so" in printed
    assert not list(here.glob("*.ran"))
    with pytest.raises(files.FileError, match="--allow-code"):
        files.load_model(path)
    assert files.load_state(path).tensors.keys() == {"weight", "bias"}  # the numbers are not at stake


def test_naming_one_network_allows_no_other(here: Path) -> None:
    path = files.save_model(nn.Conv2d(1, 1, 1), here / "a.safetensors", source="./net_of_mine.py:fails")
    assert "net_of_mine.py:fails" in run("verify", "./net_of_mine.py:Net", path, status=1)
    sources.create("./net_of_mine.py:Net")
    with pytest.raises(files.FileError, match="--allow-code"):
        files.load_model(path)


def test_a_named_network_still_has_plain_options_only(here: Path) -> None:
    path = files.save_model(nn.Conv2d(1, 1, 1), here / "a.safetensors", source="./net_of_mine.py:Net,width='/etc'")
    assert "asks for a network with width=" in run("verify", "./net_of_mine.py:Net", path, status=1)


def test_code_of_a_file_runs_where_that_is_allowed(here: Path) -> None:
    model = sources.create("./net_of_mine.py:Net")
    path = files.save_model(model, here / "a.safetensors", source="./net_of_mine.py:Net")
    run("explain", path, status=1)
    run("--allow-code", "explain", path)
    run("explain", path, status=1)
    NAMED.set(frozenset())
    assert torch.equal(files.load_model(path, allow_code=True).head.weight, model.head.weight)
