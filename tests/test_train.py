"""Training: resumed runs are the same runs, several processes are one, bad states and lost runs say what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import reparam
from passes.blocks.kit.layers import BranchSum
from reparam import ReparamError, files
from reparam.cli import app
from zoo.train import build, data
from zoo.train.checkpoint import CheckpointError, Folder
from zoo.train.config import Config, ConfigError, variant
from zoo.train.recipes import RECIPES
from zoo.train.result import Epoch, Result
from zoo.train.trainer import Training, TrainingError, train

SMALL = "timm:resnet18,layers=(1,1,1,1),channels=(4,4,4,4)"
QUICK = Config(model=SMALL, size=16, epochs=3, batch=128, rate=0.02, block="acb", ema=0.9, augment="shift")
ARGUMENTS = f"--model {SMALL} --size 16 --epochs 3 --batch 128 --rate 0.02 --block acb --ema 0.9 --set augment=shift"


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SYNTHETIC", {"train": 24, "test": 10})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``QUICK`` that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    train(QUICK, out)
    return out


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line and return all it printed."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def command(*arguments: object, processes: int = 1) -> list[str]:
    """The command in a process of its own, or under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *(launcher if processes > 1 else []), "reparam", "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    # As many threads as here, or sums are rounded in another order.
    return os.environ | {"OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path) -> list[list[str]]:
    """The log without what is measured: seconds and bytes."""
    return [[value for name, value in row.items() if name not in ("seconds", "peak_bytes")] for row in rows(out)]


def assert_same_run(out: Path, whole: Path) -> None:
    """Every number of the state, and of the log, to the bit."""
    assert numbers(out) == numbers(whole)
    for name in ("last", "best", "best.ema"):
        found, wanted = (files.load_state(folder / f"{name}.safetensors").tensors for folder in (out, whole))
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert torch.equal(value, wanted[key]), f"{name}: {key}"


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    arguments = command(*ARGUMENTS.split(), "--out", tmp_path)
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment())
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)  # into the next epoch
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stdout
    assert_same_run(tmp_path, whole)


def test_a_run_stopped_between_epochs_goes_on_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    assert len(train(QUICK, tmp_path, stop_after=1).epochs) == 1
    assert len(train(QUICK, tmp_path).epochs) == 3
    assert_same_run(tmp_path, whole)


def test_another_seed_is_another_run(tmp_path: Path, whole: Path) -> None:
    train(dataclasses.replace(QUICK, seed=1), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, whole)


def test_optimizers_with_more_state_resume_too(tmp_path: Path) -> None:
    config = Config(model="zoo:mnist_toy", data="synthetic", epochs=2, batch=8, optimizer="adamw", rate=1e-3)
    straight = train(config).model.state_dict()
    train(config, tmp_path, stop_after=1)
    resumed = train(config, tmp_path).model.state_dict()
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


@pytest.mark.parametrize("last", ["frozen", "branches"])
def test_the_last_epochs_have_a_form_of_their_own(tmp_path: Path, last: str) -> None:
    config = variant(dataclasses.replace(QUICK, last_epochs=1, ema=None), f"dbb@sampled@last:{last}")
    training = Training(config, tmp_path)
    blocks = [m for m in training.model.modules() if isinstance(m, BranchSum)]
    forms, means = [], []
    for _ in training.epochs():
        forms.append({block.form for block in blocks})
        means.append(torch.cat([b.flatten() for m in blocks for n, b in m.named_buffers() if n.endswith("_mean")]))
    assert forms == [{str(reparam.Form.of("sampled"))}] * 2 + [{last}]
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2]) == (last == "frozen")
    again = tmp_path / "again"
    train(config, again, stop_after=2)
    resumed = train(config, again).model.state_dict()
    assert all(torch.equal(value, training.model.state_dict()[name]) for name, value in resumed.items())


def test_last_epochs_that_cannot_be_are_told_before_the_first() -> None:
    with pytest.raises(ReparamError, match="built as online and cannot train as frozen"):
        Training(variant(dataclasses.replace(QUICK, last_epochs=1), "dbb@online@last:frozen"))
    with pytest.raises(ConfigError, match="no blocks that could be frozen"):
        Training(dataclasses.replace(QUICK, block=None, last_form="frozen", last_epochs=1))
    with pytest.raises(ConfigError, match="fewer than all 3 epochs, got 3"):
        dataclasses.replace(QUICK, last_form="frozen", last_epochs=3)
    with pytest.raises(ConfigError, match="'thawed' is none of the marks"):
        variant(QUICK, "acb@last:thawed")
    assert variant(variant(Config(), "acb@last:frozen"), "plain").last_form is None


def test_a_finished_run_is_not_trained_again(tmp_path: Path, whole: Path) -> None:
    before = (whole / "last.safetensors").stat().st_mtime_ns
    output = run(*ARGUMENTS.split(), "--out", whole)
    assert "is finished" in output
    assert "epoch 1/3" not in output
    assert (whole / "last.safetensors").stat().st_mtime_ns == before


def test_a_result_that_a_kill_prevented_is_written_later(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    train(QUICK, out)
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Training._step

    def interrupted(self: Training, *arguments: Any) -> list[float]:
        if len(self.log) == 1:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_step", interrupted)
    output = run("--model", "mnist_toy", "--data", "synthetic", "--batch", 8, "--out", tmp_path, status=130)
    assert "epoch  1/30" in output
    assert "the same command goes on" in " ".join(output.split())
    assert len(rows(tmp_path)) == 1


# ------------------------------------------------------------------------------------------------- bad states


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_truncated_state_is_named_and_the_one_before_it_used(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(QUICK, tmp_path, stop_after=2)
    truncate(tmp_path / "last.safetensors")
    with caplog.at_level(logging.WARNING, "reparam.train"):
        train(QUICK, tmp_path)
    assert "last.safetensors is truncated" in caplog.text
    assert "Going on from previous.safetensors, after epoch 1" in caplog.text
    assert_same_run(tmp_path, whole)


def test_without_any_good_state_the_run_is_refused(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("last", "previous"):
        truncate(out / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"last\.safetensors is truncated .* previous\.safetensors cannot be used"
    ):
        train(QUICK, out)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "zoo:mnist_toy", "there and 'zoo:mnist_toy' here"),
        ("block", "dbb", "block is 'acb' there and 'dbb' here"),
        ("epochs", 4, "epochs is 3 there and 4 here"),
    ],
)
def test_a_state_of_another_run_is_refused(field: str, value: object, words: str, whole: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        train(dataclasses.replace(QUICK, **{field: value}), whole)


def test_where_the_data_lie_may_change(whole: Path, tmp_path: Path) -> None:
    assert len(train(dataclasses.replace(QUICK, root=str(tmp_path)), whole).epochs) == 3


def test_a_state_of_another_network_of_the_same_name_is_refused(tmp_path: Path, whole: Path) -> None:
    other = Training(dataclasses.replace(QUICK, model="zoo:mnist_toy"))
    with pytest.raises(CheckpointError, match="of another network than the run has now"):
        Folder(whole).read_state(QUICK, other._parts)


def test_a_file_of_weights_is_no_state(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / "best.safetensors", tmp_path / "last.safetensors")
    with pytest.raises(CheckpointError, match=r"last\.safetensors is not a checkpoint of"):
        train(QUICK, tmp_path)


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".next.safetensors.0123.tmp"
    leftover.write_bytes(b"half")
    Training(QUICK, tmp_path)
    assert not leftover.exists()


HOLDS = "import sys, time, pathlib; from zoo.train.checkpoint import held\n"
HOLDS += "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    """The second one would remove what the first one is writing; it is an error, and a killed run holds nothing."""
    folder = tmp_path / "runs" / "one"
    words = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            output = run(*ARGUMENTS.split(), "--out", folder, status=1)
        finally:
            other.kill()
    assert "one is in use by another run; wait for it, or train into another folder" in output
    assert len(train(QUICK, folder).epochs) == 3


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ReparamError):
        train(dataclasses.replace(QUICK, model="zoo:nothing"), tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    with pytest.raises(ReparamError, match="one cannot be written: File exists; there is a file of that name; give an"):
        train(QUICK, tmp_path / "one")
    assert (tmp_path / "one").read_text() == "mine"


def test_a_file_is_no_network(whole: Path) -> None:
    for path in (whole, whole / "best.safetensors"):
        output = " ".join(run("--model", path, "--epochs", 1, status=2).split())
        assert f"{path.name} is a file or folder: name a network, timm:resnet18 or ./net.py:Net" in output


@pytest.mark.parametrize("words", [["--form", "online"], ["--init", "paper"], ["--set", "where=conv1"]])
def test_options_of_a_block_without_one(words: list[str], tmp_path: Path) -> None:
    output = run("--model", SMALL, "--epochs", 1, *words, "--out", tmp_path / "one", status=2)
    assert "name one with --block" in output
    assert not (tmp_path / "one").exists()


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_with_shared_norms_are_one_run(tmp_path: Path) -> None:
    """Losses agree to 1e-4, relatively: sums are rounded in another order. Without shared norms they do not."""
    line = f"--model {SMALL} --size 16 --epochs 2 --batch 250 --rate 0.02 --block acb"
    single = train(Config(SMALL, size=16, epochs=2, batch=250, rate=0.02, block="acb")).epochs

    def loss_curve(out: Path, *more: str) -> list[tuple[float, float]]:
        launched = command(*line.split(), *more, "--out", out, processes=2)
        done = subprocess.run(launched, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 1/2") == 1  # one of them reports
        return [(float(row["train_loss"]), float(row["test_loss"])) for row in rows(out)]

    wanted = [(epoch.train_loss, epoch.test_loss) for epoch in single]
    assert loss_curve(tmp_path / "shared") == [pytest.approx(pair, rel=1e-4) for pair in wanted]
    assert loss_curve(tmp_path / "own", "--set", "sync_norms=false") != [
        pytest.approx(pair, rel=1e-4) for pair in wanted
    ]
    tensors = files.load_state(tmp_path / "shared" / "best.safetensors").tensors
    assert tensors.keys() == build.build(QUICK, build.load(QUICK)).state_dict().keys()  # no "module."


# ------------------------------------------------------------------------------------------------- lost runs


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path: Path) -> None:
    training = Training(QUICK, tmp_path)
    epochs = training.epochs()
    next(epochs)
    name, weight = next((n, p) for n, p in training.model.named_parameters() if n.startswith("layer2") and p.dim() == 4)
    weight.data[0, 0, 0, 0] = torch.nan
    module = name.rpartition(".")[0]
    with pytest.raises(TrainingError) as caught:
        next(epochs)
    text = str(caught.value)
    assert "nan in epoch 2, step 1 of 11" in text
    assert f"that of {module!r}, and its weight is not finite" in text
    assert "learning rate of 0.015" in text
    assert f"{tmp_path} has epoch 1" in text
    assert len(rows(tmp_path)) == 1


def test_a_rate_that_is_too_high_is_found_on_the_command_line(tmp_path: Path) -> None:
    output = run(
        "--model", "mnist_toy", "--data", "synthetic", "--batch", 8, "--rate", 1e30, "--out", tmp_path, status=1
    )
    assert "in epoch 1, step 2 of 3" in " ".join(output.split())
    assert "Lower the rate" in " ".join(output.split())


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="fewer images to train on than a batch of 25"):
        Training(Config(model="zoo:mnist_toy", data="synthetic", batch=25))


def test_one_process_has_one_precision() -> None:
    config = Config(model="zoo:mnist_toy", data="synthetic", batch=8)
    Training(config)
    with pytest.raises(TrainingError, match="precision bf16 cannot be had in this process"):
        Training(dataclasses.replace(config, precision="bf16"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("optimizer=adamv", "unknown optimizer 'adamv'; did you mean adam"),
        ("block=repvgg,where=1", "repvgg"),
        ("model=zoo:nothing", "unknown network 'nothing'"),
    ],
)
def test_what_cannot_be_built_is_named(settings: str, words: str) -> None:
    field, _, value = settings.partition("=")
    with pytest.raises(reparam.ReparamError, match=words):
        Training(dataclasses.replace(QUICK, **{field: value}))


def test_a_block_that_no_layer_can_have_is_refused() -> None:
    config = Config(model="zoo:mnist_toy", data="synthetic", block="largekernel")
    with pytest.raises(ConfigError, match="no convolution of zoo:mnist_toy gets the block largekernel: "):
        build.build(config, build.load(config))


# ------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains(name: str, tmp_path: Path) -> None:
    model = {"acnet-cifar10": "cifar_quick", "dbb-imagenet": "mobilenetv1_100"}.get(name, RECIPES[name].model)
    size = 32 if "cifar" in name or name == "digits" else 24
    arguments = f"--recipe {name} --model {model} --data synthetic --size {size} --epochs 1 --batch 12 --block acb"
    run(*arguments.split(), "--out", tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"]["init"] == RECIPES[name].init
    assert files.load_model(tmp_path / "best.safetensors")(torch.randn(2, *about["data"]["shape"])).shape == (2, 10)


def test_an_unknown_recipe_names_near_ones() -> None:
    output = " ".join(run("--recipe", "acnet-cifar", status=2).split())
    assert "unknown recipe 'acnet-cifar'; did you mean acnet-cifar10" in output


def test_a_recipe_is_printed_with_what_the_command_line_changes() -> None:
    output = run("--recipe", "acnet-cifar10", "--model", "resnet56", "--print-recipe", "--set", "rate=1/8")
    assert "model = zoo:resnet56" in output
    assert "rate = 0.125" in output
    assert {line.partition(" = ")[0] for line in output.splitlines() if " = " in line} >= {
        field.name for field in dataclasses.fields(Config)
    }


def test_a_bare_block_keeps_the_options_that_its_recipe_has() -> None:
    line = ("--recipe", "acnet-cifar10", "--model", "resnet56", "--print-recipe", "--block")
    assert "block = acb:gamma=1/3\n" in run(*line, "acb")
    assert "block = acb:bn=after\n" in run(*line, "acb:bn=after")
    assert "block = dbb\n" in run(*line, "dbb")


# ------------------------------------------------------------------------------------------------- fair comparison


@pytest.mark.parametrize("text", ["acb", "acb@paper", "dbb@paper", "doconv", "acb@online", "repvgg@paper@all"])
def test_variants_of_one_seed_begin_with_the_same_weights_and_see_the_same_batches(text: str) -> None:
    plain = variant(Config(model="zoo:cifar_quick", data="synthetic", batch=8, epochs=2, size=16), "plain")
    reference, other = Training(plain), Training(variant(plain, text))
    tensors = list(other.model.state_dict().values())
    for name, wanted in reference.model.state_dict().items():
        if name.endswith("weight") and wanted.dim() > 1:
            # DO-Conv keeps the numbers of a kernel in another shape.
            assert any(torch.equal(wanted.flatten(), found.flatten()) for found in tensors), name
    assert len(tensors) > len(reference.model.state_dict())
    seen: list[list[Tensor]] = []
    for training in (reference, other):
        images: list[Tensor] = []
        training.model.register_forward_pre_hook(lambda module, arguments, images=images: images.append(arguments[0]))
        assert len(list(training.epochs())) == 2
        seen.append(images)
    assert len(seen[0]) == 2 * (3 + 2)
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], seen[0][5])  # another order in the second epoch


def test_another_seed_has_other_weights_and_batches() -> None:
    config = Config(model="zoo:cifar_quick", data="synthetic", size=16)
    first, second = (Training(dataclasses.replace(config, seed=seed, batch=8)) for seed in (0, 1))
    assert not torch.equal(first.model.fc2.weight, second.model.fc2.weight)
    assert not torch.equal(*(next(iter(each._batches(train=True)))[0] for each in (first, second)))


def test_gamma_is_that_of_every_batch_norm_of_the_stock_network() -> None:
    config = Config(model="zoo:cifar_quick", data="synthetic", gamma=1 / 3)
    norms = [m for m in build.stock(config, build.load(config)).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3
    assert all(bool((norm.weight == 1 / 3).all()) for norm in norms)


def test_networks_for_photographs_get_digits_in_three_channels() -> None:
    config = Config(model="torchvision:squeezenet1_1", size=32)
    shown = build.load(config)
    assert shown.shape == (3, 32, 32)
    assert build.spec(config, shown) == "torchvision:squeezenet1_1,num_classes=10"
    assert build.load(QUICK).shape == (1, 16, 16)


# ------------------------------------------------------------------------------------------------- rates, results


def rates(**fields: object) -> list[float]:
    """The learning rate of each step of a run with ten steps."""
    config = Config(model="zoo:mnist_toy", rate=1.0, epochs=5, **fields)
    optimizer = build.make_optimizer(torch.nn.Linear(1, 1), config)
    schedule = build.make_schedule(optimizer, config, steps=2)
    found = []
    for step in range(10):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_step_schedule_drops_at_its_milestones_also_behind_a_warm_up() -> None:
    assert rates(schedule="step", milestones=(0.5, 0.8)) == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)
    warm = rates(schedule="step", milestones=(0.5, 0.8), warmup=2.0)
    assert warm == pytest.approx([0, 0.25, 0.5, 0.75, 1.0] + [0.1] * 3 + [0.01] * 2)


def test_a_cosine_begins_at_the_rate_behind_the_warm_up_and_ends_near_zero() -> None:
    cosine = rates(warmup=1.0)
    assert cosine[:3] == pytest.approx([0, 0.5, 1.0])
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert 0 < cosine[-1] < 0.05


@pytest.mark.parametrize("decay_biases", [True, False])
def test_norms_and_biases_decay_if_asked(decay_biases: bool) -> None:
    config = dataclasses.replace(QUICK, decay_biases=decay_biases, weight_decay=1e-3)
    model = build.build(config, build.load(config))
    decays = {
        id(p): group["weight_decay"]
        for group in build.make_optimizer(model, config).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        kernel = name.endswith("weight") and parameter.dim() > 1
        assert decays[id(parameter)] == (1e-3 if kernel or decay_biases else 0.0), name


def test_the_averaged_weights_are_the_moving_average_of_every_step() -> None:
    training = Training(dataclasses.replace(QUICK, epochs=1))
    average = {name: value.detach().clone() for name, value in training.model.named_parameters()}

    def add(step: int) -> None:
        for name, value in training.model.named_parameters():
            average[name].mul_(0.9).add_(value.detach(), alpha=0.1)

    list(training.epochs(add))
    result = training.result()
    assert result.averaged is not None
    for name, value in result.averaged.named_parameters():
        torch.testing.assert_close(value.detach(), average[name], rtol=1e-4, atol=1e-6)
    assert len(result.averaged_evaluations) == 1


def epochs_of(accuracies: list[float | None]) -> tuple[Epoch, ...]:
    return tuple(Epoch(n, 2.0, 0.1, 1.0, 0.5, None, value, None, n) for n, value in enumerate(accuracies, 1))


def test_a_result_has_the_mean_of_the_last_ten_evaluations() -> None:
    found = Result(epochs_of([0.9, None, *(0.1 * n for n in range(1, 9)), None, 0.7, 0.5]), 100, 7, torch.nn.Identity())
    assert found.mean_of_last == pytest.approx((sum(range(1, 9)) * 0.1 + 0.7 + 0.5) / 10)
    assert (found.best, found.last) == (0.9, 0.5)
    assert found.seconds == 26
    assert found.images_per_second == 50
    assert found.peak_bytes == 7  # the middle epoch


def test_only_every_so_many_epochs_are_evaluated_and_the_last() -> None:
    config = Config(model="zoo:mnist_toy", data="synthetic", epochs=3, batch=8, evaluate_every=2)
    assert [epoch.test_accuracy is not None for epoch in train(config).epochs] == [False, True, True]


def test_a_run_leaves_its_files(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    accuracies = [float(row["test_accuracy"]) for row in rows(whole)]
    assert result["best"] == max(accuracies)
    assert result["peak_bytes"] > 4 * result["parameters"]
    assert result["ema_best"] == max(float(row["ema_test_accuracy"]) for row in rows(whole))
    about = json.loads((whole / "run.json").read_text())
    assert Config.from_json(json.dumps(about["config"])) == QUICK
    assert about["source"] == f"{SMALL},num_classes=10,in_chans=1"


def test_the_best_weights_have_the_accuracy_of_the_log(whole: Path) -> None:
    model = files.load_model(whole / "best.safetensors")
    test = build.load(QUICK).batches(train=False, batch=297)
    images, labels = next(iter(test))
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).double().mean())
    assert right == pytest.approx(json.loads((whole / "result.json").read_text())["best"])


# ------------------------------------------------------------------------------------------------- command line


def test_each_epoch_is_a_line_where_the_output_is_no_terminal(tmp_path: Path) -> None:
    output = run("--model", "mnist_toy", "--data", "synthetic", "--batch", 8, "--epochs", 2, "--out", tmp_path)
    assert [line[:9] for line in output.splitlines()[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert "mean of the last ten" in output
    assert (tmp_path / "curves.svg").is_file()
    assert (tmp_path / "curves.png").is_file()


def test_the_variants_of_a_comparison_follow_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def compare(config: Config, variants: list[str], seeds: int, out: Path, **options: Any) -> None:
        calls.append((config.model, config.epochs, variants, seeds, out))
        for text in variants:
            options["on_epoch"](text, 3, epochs_of([0.5])[0])
        (out / "table.md").write_text("THE TABLE")

    monkeypatch.setattr("zoo.train.compare.compare", compare)
    line = f"--model cifar_quick --data digits --compare plain acb dbb doconv --seeds 5 --epochs 2 --out {tmp_path}"
    output = run(*line.split())
    assert calls == [("zoo:cifar_quick", 2, ["plain", "acb", "dbb", "doconv"], 5, tmp_path)]
    assert "acb, seed 3: epoch 1/2" in output
    assert "THE TABLE" in output


@pytest.mark.parametrize("line", ["acb dbb", "--compare", "--seeds 3", "--set rat=1", "--print-recipe"])
def test_a_line_that_means_nothing_is_wrong_usage(line: str) -> None:
    run(*line.split(), status=2)
