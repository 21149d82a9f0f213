"""What comes after training: files are looked into, converted without changing an answer, and evaluated."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import reparam
from reparam import commands, files, sources
from reparam.cli import Commands
from reparam.networks import Network, UsageError
from reparam.recipe import Recipe
from zoo.train import deploy as deploying
from zoo.train.config import Config
from zoo.train.data import Data, load_data
from zoo.train.deploy import agreement, convert, deploy
from zoo.train.evaluate import VIEWS, Score, evaluate, score
from zoo.train.inspect import Entry, entries, inspect
from zoo.train.targets import find
from zoo.train.trainer import train

h5py = pytest.importorskip("h5py")
TOY = "zoo:mnist_toy"
QUICK = "zoo:cifar_quick,num_classes=10,in_chans=1"

app = typer.Typer(cls=Commands)
for command in (convert, evaluate, inspect, commands.collapse):
    app.command()(command)


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line and return all it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def trained(model: nn.Module) -> nn.Module:
    """The model after a few steps: no branch is silent any more, and statistics have moved."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 1, 32, 32)), torch.arange(16) % 10).backward()
        optimizer.step()
    return model.eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with blocks and averaged weights."""
    path = tmp_path_factory.mktemp("run")
    train(Config(model=TOY, block="acb", size=8, epochs=2, batch=128, ema=0.5, rate=0.05), path)
    return path


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network with blocks and batch norms, in a file of its own."""
    recipe = Recipe("acb")
    model = trained(recipe.expand(sources.create(QUICK)))
    return files.save_model(
        model, tmp_path_factory.mktemp("file") / "trained.safetensors", source=QUICK, expanded=recipe
    )


# ------------------------------------------------------------------------------------------------- reading


def write_hdf5(path: Path, state: dict[str, object]) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in state.items():
            file.create_dataset(name.replace("/", "+"), data=value)
    return path


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_weights_of_old_hdf5_files_are_read(tmp_path: Path, suffix: str) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    path = write_hdf5(tmp_path / f"net{suffix}", {name: value.numpy() for name, value in state.items()})
    content = files.load_state(path)
    assert same(content.tensors, state)
    assert content.tensors["1.num_batches_tracked"].dtype == torch.int64
    assert (content.source, content.metadata) == ("", {})


def test_names_and_numbers_of_other_machines_come_back(tmp_path: Path) -> None:
    import numpy as np

    numbers = np.arange(6, dtype=">f4").reshape(2, 3)
    content = files.load_state(write_hdf5(tmp_path / "net.h5", {"module.a/b": numbers}))
    assert torch.equal(content.tensors["a/b"], torch.arange(6.0).reshape(2, 3))
    assert content.dropped == "module."


def test_a_network_is_collapsed_from_an_hdf5_file(toy_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "net.h5", {name: value.numpy() for name, value in toy_state.items()})
    run("collapse", TOY, "--block", "acb", "--weights", path, "-o", tmp_path / "out.safetensors")
    sources.create(TOY).load_state_dict(files.load_state(tmp_path / "out.safetensors").tensors, strict=True)


@pytest.fixture
def toy_state() -> dict[str, Tensor]:
    return trained(Recipe("acb").expand(sources.create(TOY))).state_dict()


def test_hdf5_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "keras.h5", "w") as file:
        file.create_group("model_weights").create_dataset("kernel", data=[1.0])
    with pytest.raises(files.FileError, match=r"keras\.h5 holds the folder 'model_weights'"):
        files.load_state(tmp_path / "keras.h5")
    with pytest.raises(files.FileError, match=r"'words' holds no numbers"):
        files.load_state(write_hdf5(tmp_path / "words.h5", {"words": ["a", "b"]}))
    with pytest.raises(files.FileError, match="holds nothing"):
        files.load_state(write_hdf5(tmp_path / "empty.h5", {}))
    cut = write_hdf5(tmp_path / "cut.h5", {"weight": [1.0] * 1000})
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(files.FileError, match=r"cut\.h5 is truncated"):
        files.load_state(cut)


def test_without_h5py_an_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "net.h5", {"weight": [1.0]})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(files.FileError, match=r"pip install 'reparam\[hdf5\]'"):
        files.load_state(path)


def test_hdf5_files_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(files.FileError, match=r"cannot write this kind of file, '\.h5'"):
        files.save_model(nn.Linear(2, 2), tmp_path / "net.h5")
    with pytest.raises(files.FileError, match="no_such_folder does not exist"):
        files.check_target(tmp_path / "no_such_folder" / "net.pt")


@pytest.mark.parametrize("suffix", [".pt", ".h5", ".safetensors"])
def test_a_file_says_which_prefix_was_dropped(tmp_path: Path, suffix: str) -> None:
    state = nn.Linear(2, 2).state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    path = tmp_path / f"net{suffix}"
    if suffix == ".h5":
        write_hdf5(path, {name: value.numpy() for name, value in wrapped.items()})
    elif suffix == ".safetensors":
        save_file(wrapped, path)
    else:
        torch.save(wrapped, path)
    content = files.load_state(path)
    assert same(content.tensors, state)
    assert content.dropped == "module._orig_mod."


def test_nothing_is_dropped_from_files_without_wrappers(tmp_path: Path) -> None:
    assert files.load_state(files.save_model(nn.Linear(2, 2), tmp_path / "net.safetensors")).dropped == ""


# ------------------------------------------------------------------------------------------------- inspect


def content(**tensors: Tensor) -> files.StateFile:
    return files.StateFile(tensors)


def test_an_entry_describes_all_numbers_of_a_tensor() -> None:
    entry = Entry.of("kernel", torch.tensor([[0.0, -2.0], [0.0, 4.0]], dtype=torch.float16))
    assert entry == Entry("kernel", (2, 2), "float16", 8, -2.0, 4.0, 0.5, 0.5)
    assert Entry.of("count", torch.tensor(7)) == Entry("count", (), "int64", 8, 7.0, 7.0, 7.0, 0.0)
    assert Entry.of("mask", torch.tensor([True, False])).zeros == 0.5
    empty = Entry.of("empty", torch.zeros(0, 3))
    assert (empty.numbers, empty.finite) == (0, True)
    assert math.isnan(empty.mean)


def test_numbers_that_are_not_finite_are_noticed() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert not Entry.of("x", torch.tensor([1.0, value])).finite
    assert Entry.of("x", torch.tensor([1.0, -1.0])).finite


def test_entries_are_chosen_and_sorted() -> None:
    made = content(b=torch.zeros(2), a=torch.tensor([5.0]), c=torch.tensor([1.0, -9.0, 0.0]), d=torch.zeros(0))
    names = {order: "".join(e.name for e in entries(made, order=order)) for order in (None, "name", "size", "max")}
    assert names == {None: "bacd", "name": "abcd", "size": "cbad", "max": "acbd"}
    assert next(e.name for e in entries(made, order="min")) == "c"
    assert [e.name for e in entries(made, order="zeros")][:2] == ["b", "c"]
    layered = files.StateFile({"layer1.conv": torch.zeros(1), "layer2.conv": torch.zeros(1)})
    assert [e.name for e in entries(layered, "layer1")] == ["layer1.conv"]
    assert len(entries(layered, "*.conv")) == 2
    with pytest.raises(UsageError, match="no tensor of 2 is named 'conv1'"):
        entries(layered, "conv1")
    with pytest.raises(UsageError, match="name, size, min"):
        entries(layered, order="shape")


def test_inspect_lists_what_a_file_holds_and_says(expanded: Path) -> None:
    output = run("inspect", expanded, "square.conv", "--sort", "size")
    tensors = files.load_state(expanded).tensors
    rows = [line.split() for line in output.splitlines() if "float32" in line and "square.conv" in line]
    assert {row[0] for row in rows} == {name for name in tensors if "square.conv" in name}
    sizes = [tensors[row[0]].numel() for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    name, shape, _, low = rows[0][:4]
    assert shape == "×".join(map(str, tensors[name].shape))
    assert low == f"{float(tensors[name].min()):.4g}"
    assert f"{len(rows)} of {len(tensors)} tensors, {sum(sizes):,} numbers" in output
    assert f"source: {QUICK}" in output


def test_inspect_reads_checkpoints_and_marks_what_is_broken(tmp_path: Path) -> None:
    states = {key: {"module.weight": torch.full((2,), value)} for key, value in (("model", 1.0), ("ema", math.nan))}
    torch.save(states, tmp_path / "net.pt")
    output = run("inspect", tmp_path / "net.pt")
    assert "read from: 'model'; --key takes others: ema" in output
    assert "dropped before every name: 'module.'" in output
    assert "NaN" not in output
    assert "NaN or infinite: weight" in run("inspect", tmp_path / "net.pt", "--key", "ema")
    assert "no such file" in run("inspect", tmp_path / "other.pt", status=1)


def test_a_long_note_is_cut(folder: Path) -> None:
    assert max(map(len, run("inspect", folder / "last.safetensors").splitlines())) < 500


# ------------------------------------------------------------------------------------------------- convert


def answers_of(model: nn.Module, size: int = 8) -> Tensor:
    data = load_data("digits", size=size)
    with torch.no_grad():
        return torch.cat([model.double()(images.double()) for images, _ in data.batches(train=False, batch=64)])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_run_becomes_a_file_that_the_stock_architecture_loads(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deployed{suffix}"
    output = run("convert", folder / "best.safetensors", "-o", path)
    stock = sources.create(TOY)
    stock.load_state_dict(files.load_state(path).tensors, strict=True)
    before = files.load_model(folder / "best.safetensors")
    assert len(before.state_dict()) > len(stock.state_dict())
    assert torch.equal(answers_of(stock).argmax(1), answers_of(before).argmax(1))
    assert "float64: all 297 answers agree" in output
    assert "float32: 297 of 297 answers agree" in output
    assert "loads with strict=True" in output
    assert list(tmp_path.iterdir()) == [path]


def test_averaged_and_raw_weights_are_told_apart(folder: Path, tmp_path: Path) -> None:
    made = {}
    for target in (folder, folder / "last.safetensors"):
        for option in ((), ("--ema",), ("--raw",)):
            path = tmp_path / "out.safetensors"
            output = run("convert", target, *option, "-o", path)
            assert ("the averaged weights" in output) == (not option)
            made[target.name, option] = files.load_state(path).tensors
    for name in (folder.name, "last.safetensors"):
        assert same(made[name, ()], made[name, ("--ema",)])
        assert not same(made[name, ("--ema",)], made[name, ("--raw",)])
    state = files.load_state(folder / "last.safetensors").tensors
    assert same(
        dict(find(str(folder / "last.safetensors"), ema=True).network.model.state_dict()),
        {name[4:]: value for name, value in state.items() if name.startswith("ema.")},
    )
    assert "--raw" in run("convert", folder / "best.safetensors", "--raw", "-o", tmp_path / "x.pt", status=2)


def test_a_run_without_averaged_weights_says_so(tmp_path: Path) -> None:
    train(Config(model=TOY, size=8, epochs=1, batch=256), tmp_path / "run")
    for target in (tmp_path / "run", tmp_path / "run" / "last.safetensors"):
        assert "holds no averaged weights" in run("convert", target, "--ema", "-o", tmp_path / "x.pt", status=1)
    output = run("convert", tmp_path / "run", "-o", tmp_path / "x.pt")
    assert "the averaged" not in output
    best = files.load_state(tmp_path / "run" / "best.safetensors")
    assert same(files.load_state(tmp_path / "x.pt").tensors, best.tensors)
    assert "is it the folder of a run" in run("convert", tmp_path, "-o", tmp_path / "y.pt", status=1)


def test_checkpoints_of_other_programs_are_converted(toy_state: dict[str, Tensor], tmp_path: Path) -> None:
    average = {name: value * 0.5 if value.is_floating_point() else value for name, value in toy_state.items()}
    torch.save({"epoch": 3, "state_dict": toy_state, "state_dict_ema": average}, tmp_path / "net.pth")
    options = ("--model", "mnist_toy", "--block", "acb", "-o", tmp_path / "out.pt")
    kernels = {}
    for option in ((), ("--ema",), ("--raw",)):
        output = run("convert", tmp_path / "net.pth", *options, *option)
        assert ("the averaged weights" in output) == (not option)
        assert "not compared on data" in output
        kernels[option] = files.load_state(tmp_path / "out.pt").tensors
    assert same(kernels[()], kernels[("--ema",)])
    assert not same(kernels[("--ema",)], kernels[("--raw",)])
    compared = run("convert", tmp_path / "net.pth", *options, "--data", "digits", "--size", 8)
    assert "float64: all 297 answers agree" in compared
    torch.save(toy_state, tmp_path / "one.pth")
    run("convert", tmp_path / "one.pth", *options)
    assert "no averaged weights" in run("convert", tmp_path / "one.pth", *options, "--ema", status=1)


def test_the_norms_are_folded_on_request(expanded: Path, tmp_path: Path) -> None:
    data = ("--data", "digits", "--size", 16)
    stock, folded = tmp_path / "stock.safetensors", tmp_path / "folded.safetensors"
    assert "297 answers agree" in run("convert", expanded, "-o", stock, *data)
    assert "297 answers agree" in run("convert", expanded, "--deploy", "-o", folded, *data)
    assert any("running_var" in name for name in files.load_state(stock).tensors)
    assert not any("running_var" in name for name in files.load_state(folded).tensors)
    assert files.load_state(folded).collapsed
    reparam.verify(files.load_model(expanded), files.load_model(folded)).raise_if_different()
    assert "collapsed already" in run("convert", folded, "-o", tmp_path / "x.pt", status=2)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_run_becomes_a_file_that_runs_without_this_library(suffix: str, expanded: Path, tmp_path: Path) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
    target = tmp_path / f"deployed.{suffix}"
    output = run("convert", expanded, "-o", target, "--data", "digits", "--size", 16, "--dynamic", "batch")
    assert "297 answers agree" in output
    assert "gives the same for" in output
    assert "strict=True" not in output
    x = torch.randn(5, 1, 16, 16)
    wanted = files.load_model(expanded).eval()(x)
    if suffix == "pt2":
        program = torch.export.load(target)
        assert not any("running_var" in name for name in program.state_dict)
        got = program.module()(x)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)
    assert "--dynamic is for" in run("convert", expanded, "-o", tmp_path / "x.pt", "--dynamic", "batch", status=2)


def test_a_plain_network_is_taken_as_it_is() -> None:
    network = Network(sources.create(TOY).eval(), TOY)
    made, explanation = deploy(network)
    assert made is network.model
    assert explanation is None


def spoiled(amount: float) -> object:
    def wrong(network: Network, *, fold_norms: bool) -> tuple[nn.Module, None]:
        made, _ = deploy(network, fold_norms=fold_norms)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(amount * torch.randn_like(parameter))
        return made, None

    return wrong


@pytest.mark.parametrize("amount", [0.3, math.nan])
def test_a_network_that_answers_differently_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: float
) -> None:
    monkeypatch.setattr(deploying, "deploy", spoiled(amount))
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"the old file")
    output = run("convert", folder, "-o", path, status=1)
    assert "differently in float64" in output
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_agreement_counts_answers_and_measures_logits() -> None:
    data = quadrants()
    one, other = linear(torch.eye(4)), linear(torch.eye(4)[[1, 0, 2, 3]])
    found = agreement(one, other, data)
    assert (found.different, found.own_different) == (2, 2)
    assert found.largest == found.own_largest == 1.0
    assert (found.before.top1, found.after.top1) == (1.0, 0.5)
    equal = agreement(one, linear(torch.eye(4)), data)
    assert (equal.different, equal.largest) == (0, 0.0)
    broken = agreement(linear(torch.full((4, 4), math.nan)), linear(torch.full((4, 4), math.nan)), data)
    assert broken.different == 4


def test_a_checkpoint_of_another_model_names_what_would_fit(toy_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(toy_state, tmp_path / "net.pt")
    out = ("-o", tmp_path / "out.pt")
    assert "It is of another network" in run("convert", tmp_path / "net.pt", "--model", "cifar_quick", *out, status=1)
    assert "--block acb" in run("convert", tmp_path / "net.pt", "--model", TOY, *out, status=1)
    assert "--model" in run("convert", tmp_path / "net.pt", *out, status=2)
    assert "did you mean" in run("convert", tmp_path / "net.pt", "--model", "mnist_toi", *out, status=2)
    assert not (tmp_path / "out.pt").exists()


def test_options_that_mean_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out.pt")
    assert "leave out --model" in run("convert", folder / "best.safetensors", "--model", TOY, *out, status=2)
    assert "leave out --block" in run("convert", folder / "best.safetensors", "--block", "acb", *out, status=2)
    assert "--block as well" in run("convert", folder / "best.safetensors", "--where", "a", *out, status=2)
    assert "cannot write" in run("convert", folder, "-o", tmp_path / "out.bin", status=1)


# ------------------------------------------------------------------------------------------------- evaluate


def quadrants(classes: int = 4) -> Data:
    """Four images of 2x2 pixels, each with one bright pixel, which is its class."""
    images = torch.eye(4).reshape(4, 1, 2, 2)
    labels = TensorDataset(images, torch.arange(4))
    return Data("quadrants", tuple(map(str, range(classes))), (1, 2, 2), labels, labels)


def linear(weight: Tensor) -> nn.Module:
    """A network whose logits are ``weight`` times the pixels."""
    layer = nn.Linear(4, len(weight), bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return nn.Sequential(nn.Flatten(), layer)


def test_a_score_is_what_is_counted_by_hand() -> None:
    weight = torch.zeros(12, 4)
    weight[:4] = torch.eye(4)
    weight[0, 1] = 2.0  # image 1 is taken for class 0, its own class comes second
    weight[4:9, 2] = 2.0  # image 2 has five classes before its own
    found = score(linear(weight), quadrants(classes=12))
    assert (found.images, found.right, found.right_in_five) == (4, 2, 3)
    assert (found.top1, found.top5) == (0.5, 0.75)
    logits = weight.t().double()
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.arange(4))))
    assert score(linear(torch.eye(4)), quadrants()).top5 is None


def test_the_interval_is_wilsons() -> None:
    images, right, z = 297, 280, 1.959964
    share = right / images
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    assert Score(images, right, None, 0.0).interval == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert Score(10, 10, None, 0.0).interval[1] == 1.0


def test_views_turn_and_flip_as_they_say() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]])
    turned: dict[str, Sequence[int]] = {name: view(image).flatten().tolist() for name, view in VIEWS.items()}
    assert turned == {
        "upright": [1, 2, 3, 4],
        "90°": [2, 4, 1, 3],
        "180°": [4, 3, 2, 1],
        "270°": [3, 1, 4, 2],
        "up-down": [3, 4, 1, 2],
        "left-right": [2, 1, 4, 3],
    }
    # Answers "upper left" for all: right for one image of four in every view, and not for those it was for before.
    top = linear(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [-1.0, -1, 0, 0], [-1.0, -1, -1, 0]]))
    assert score(top, quadrants()).top1 == 0.5
    assert score(linear(torch.eye(4)), quadrants(), view=VIEWS["up-down"]).top1 == 0.0


def test_networks_are_evaluated_side_by_side(folder: Path, tmp_path: Path) -> None:
    deployed = tmp_path / "deployed.safetensors"
    run("convert", folder, "--raw", "-o", deployed)
    report = tmp_path / "new" / "report.md"
    both = (folder / "best.safetensors", deployed)
    output = run("evaluate", *both, "--data", "digits", "--size", 8, "--robustness", "--out", report)
    data = load_data("digits", size=8)
    expected = score(files.load_model(deployed), data)
    text = report.read_text()
    for words in (output, text):
        assert words.count(f"{100 * expected.top1:.2f}") >= 4
        assert "digits: 297 test images" in words
        assert all(view in words for view in VIEWS)
        assert "with acb" in words
    upside = score(files.load_model(deployed), data, view=VIEWS["180°"])
    row = next(line for line in text.splitlines() if line.startswith(f"| {deployed}") and line.count("|") == 8)
    assert row.split("|")[4].strip() == f"{100 * upside.top1:.2f}"
    again = shlex.join(["reparam", "evaluate", *map(str, both), "--data", "digits", "--size", "8", "--robustness"])
    assert f"Repeat it with\n\n```sh\n{again}\n```" in text


def test_a_network_that_answers_nonsense_has_no_score(folder: Path, tmp_path: Path) -> None:
    model = files.load_model(folder / "best.safetensors")
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    name = next(iter(model.state_dict()))
    with pytest.raises(reparam.ReparamError, match=f"NaN or infinity, as '{name}' holds"):
        score(model, load_data("digits", size=8))


def test_a_run_is_evaluated_on_its_own_data(folder: Path) -> None:
    log = (folder / "log.csv").read_text().splitlines()
    column = log[0].split(",").index("test_accuracy")
    best = max(float(line.split(",")[column]) for line in log[1:])
    assert f"{100 * best:.2f}" in run("evaluate", folder, "--raw")
    assert f"{100 * best:.2f}" in run("evaluate", folder / "best.safetensors")


def test_a_deployed_file_is_evaluated_at_the_size_it_was_trained_at(folder: Path, tmp_path: Path) -> None:
    deployed, again = tmp_path / "deployed.safetensors", tmp_path / "again.safetensors"
    run("convert", folder, "-o", deployed)
    run("collapse", deployed, "-o", again)
    wanted = f"{100 * score(files.load_model(deployed), load_data('digits', size=8)).top1:.2f}"
    for file in (deployed, again):
        assert files.load_state(file).shape == (1, 8, 8)
        assert wanted in run("evaluate", file, "--data", "digits")


def test_grey_images_are_shown_to_networks_for_colours() -> None:
    assert "297 test images" in run("evaluate", "mnist_toy", "mnist_toy,in_chans=3", "--data", "digits", "--size", 8)


def test_data_of_another_kind_than_the_networks_are_refused(folder: Path, tmp_path: Path) -> None:
    assert "name the data" in run("evaluate", TOY, status=2)
    output = run("evaluate", "zoo:mnist_toy,num_classes=7", "--data", "digits", status=2)
    assert "answers with 7 classes, and digits has 10" in output
    assert "zoo:mnist_toy,num_classes=10" in output
    output = run("evaluate", "zoo:mnist_toy,in_chans=5", "--data", "digits", status=2)
    assert "1×32×32" in output
    assert "takes 5 channels" in output
    other = tmp_path / "other"
    other.mkdir()
    for name in ("best.safetensors", "run.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    text = (other / "run.json").read_text()
    (other / "run.json").write_text(text.replace('"data": "digits"', '"data": "synthetic"'))
    assert "digits and synthetic" in run("evaluate", folder, other, status=2)
    (other / "run.json").write_text("{")
    assert "run.json cannot be read" in run("evaluate", other, status=1)


def test_a_file_that_does_not_say_its_network_is_refused(toy_state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(toy_state, tmp_path / "net.safetensors")
    assert "--model" in run("evaluate", tmp_path / "net.safetensors", "--data", "digits", status=2)
    options = ("--model", "mnist_toy", "--block", "acb", "--data", "digits", "--size", 8)
    assert "297 test images" in run("evaluate", tmp_path / "net.safetensors", *options)
