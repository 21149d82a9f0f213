"""Batch conversion: each outcome from a network that causes it, and a run folder that survives whatever happens."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import reparam
from passes.proof.compare import distance
from reparam import files, sources
from reparam.cli import app
from zoo import convert as converting
from zoo.convert import convert
from zoo.draw import draw, sketch
from zoo.inputs import View
from zoo.job import Job, Settings
from zoo.journal import Folder, Journal, JournalError, read
from zoo.outcome import (
    KINDS,
    Converted,
    Failed,
    Latency,
    Mismatch,
    NothingToDo,
    Outcome,
    OutOfMemory,
    Planned,
    Proof,
    Refused,
    Size,
    TimedOut,
    from_json,
)
from zoo.reference import in_double
from zoo.run import Running, convert_zoo, select
from zoo.weights import find_checkpoints

pytest_plugins = ("toy_package", "troublesome_package")


def job(name: str, folder: Path | None = None, checkpoint: Path | None = None, **settings: Any) -> Job:
    return Job("trouble", name, Settings(**settings), folder, None if checkpoint is None else str(checkpoint))


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line and return all that it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return " ".join(result.output.replace("│", " ").split())


def network(width: int = 4) -> Any:
    return sources.create(f"trouble:block,width={width}").eval()


# ------------------------------------------------------------------------------------------------ outcomes


SIZE = Size(10, 40, 2, 2, 1, 100)
COMMON: dict[str, Any] = {
    "name": "net",
    "source": "timm",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": {"build": 0.5, "all": 1.5},
    "peak": 7,
    "versions": {"torch": "2"},
    "notes": ("a note",),
}
OUTCOMES: tuple[Outcome, ...] = (
    Converted(
        **COMMON,
        before=SIZE,
        after=SIZE,
        stock=SIZE,
        proof=Proof(3, 1e-8, "whole", 1e-7, 1e-6, 1e-5, True),
        latency=Latency((1, 3, 8, 8), 2.0, 1.0, (2.0,), (1.0,)),
        folds=3,
        refused={"used from more than one place": 1},
        file="models/timm/net.safetensors",
    ),
    Planned(
        **COMMON, before=SIZE, after=SIZE, folds=3, expanded=1, others={"timm": {"convs": 1, "norms": 0}, "fx": None}
    ),
    NothingToDo(**COMMON, reason="no convolution", before=SIZE),
    Refused(**COMMON, reason="all of it", refused={"a": 2}),
    Mismatch(**COMMON, error=0.1, allowed=0.01, layer="head", message="differs"),
    Failed(**COMMON, stage="build", error="ValueError: no", traceback="Traceback"),
    TimedOut(**COMMON, stage="collapse", limit=3.0),
    OutOfMemory(**COMMON, stage="build", limit=0.5, message="more than 0.5 GiB"),
)


def test_a_run_of_an_older_version_can_be_resumed() -> None:
    assert Settings(block="acb").are({"block": "acb"})  # it knew no further settings
    assert not Settings(block="acb").are({"block": "dbb"})
    assert not Settings().are({"plan": True})
    assert not Settings().are(None)


def test_every_kind_of_outcome_goes_through_json() -> None:
    assert {type(outcome) for outcome in OUTCOMES} == set(KINDS.values())
    for outcome in OUTCOMES:
        line = json.loads(json.dumps(outcome.to_json(), allow_nan=False))
        assert from_json(line) == outcome
        assert from_json({**line, "a later version's field": 1}) == outcome
        assert outcome.sentence()


def test_a_number_that_is_not_known_goes_through_json() -> None:
    line = json.loads(json.dumps(Mismatch(**COMMON, error=math.inf).to_json(), allow_nan=False))
    assert line["error"] is None
    again = from_json(line)
    assert isinstance(again, Mismatch)
    assert math.isnan(again.error)


@pytest.mark.parametrize("line", [{"kind": "lost"}, {}, {"kind": "failed", "name": "net"}, {"kind": "timed_out"}])
def test_a_line_that_is_no_outcome_is_an_error(line: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown kind|not the line"):
        from_json(line)


# ------------------------------------------------------------------------------------------------ one model


def test_rules_are_those_of_collapse(trouble: Path, tmp_path: Path) -> None:
    kept, affine = (convert(job("between", tmp_path / rule, latency=False, norms=rule)) for rule in ("keep", "affine"))
    assert isinstance(kept, Converted)
    assert isinstance(affine, Converted)
    assert (kept.after.norms, affine.after.norms) == (1, 0)
    assert (kept.folds, affine.folds) == (1, 2)
    assert affine.file is not None
    network = files.load_model(tmp_path / "affine" / affine.file)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_a_model_is_collapsed_proven_measured_and_saved(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Converted), outcome
    assert (outcome.before.convs, outcome.after.convs, outcome.before.norms, outcome.after.norms) == (2, 1, 2, 0)
    assert outcome.proof.outputs == "whole"
    assert 0 < outcome.proof.error <= outcome.proof.allowed
    assert outcome.latency is not None
    assert outcome.latency.before_runs
    assert outcome.before.multiply_adds is not None
    assert outcome.after.multiply_adds is not None
    assert outcome.after.multiply_adds < outcome.before.multiply_adds
    assert outcome.file is not None
    x = torch.randn(2, 3, 8, 8)
    loaded = files.load_model(tmp_path / outcome.file)
    again = converting.Conversion(job("block"), lambda stage: None).prepare().model
    torch.testing.assert_close(loaded(x), again(x))
    assert outcome.file_bytes == (tmp_path / outcome.file).stat().st_size


def test_details_say_what_folded_and_draw_it(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Converted)
    assert outcome.details is not None
    details = json.loads((tmp_path / outcome.details).read_text())
    assert from_json(details["outcome"]) == outcome
    assert details["weights"]["origin"] == "random"
    assert set(details["folds"][0]["layers"]) >= {"square.0", "square.1", "point.0", "point.1"}
    region = details["regions"][details["folds"][0]["region"]]
    kinds = Counter(node["kind"] for node in region["before"]["nodes"])
    assert kinds == {"input": 1, "conv": 2, "norm": 2, "add": 1, "output": 1}
    assert len(region["before"]["edges"]) == 7
    assert [node["kind"] for node in region["after"]["nodes"]] == ["input", "conv", "output"]


def test_regions_of_one_shape_are_drawn_once() -> None:
    def conv() -> list[nn.Module]:
        return [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]

    model = nn.Sequential(*conv(), *conv(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()
    drawings = draw(sketch(model), reparam.explain(model).folds)
    assert sorted(region["count"] for region in drawings.regions) == [1, 2]
    counted = Counter(drawings.of_fold)
    assert {number: counted[number] for number in (0, 1)} == {
        number: region["count"] for number, region in enumerate(drawings.regions)
    }


def test_another_operation_of_the_same_name_is_not_drawn() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, k, padding=k // 2) for k in (3, 1, 3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x) + self.b(x))
            return self.c(x) + self.d(x)

    model = Twice().eval()
    folds = reparam.explain(model).folds
    assert len(folds) == 2
    region = draw(sketch(model), folds).regions[0]
    assert region["count"] == 2
    assert sum(node["kind"] == "add" for node in region["before"]["nodes"]) == 1


def test_a_block_is_a_round_trip_and_a_file_to_train(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("plain", tmp_path, block="acb"))
    assert isinstance(outcome, Converted), outcome
    assert outcome.proof.roundtrip is True
    assert outcome.expanded == 1
    assert outcome.stock is not None
    assert (outcome.stock.convs, outcome.before.convs, outcome.after.convs) == (1, 3, 1)
    assert outcome.expanded_file is not None
    torch.manual_seed(converting.SEED)
    stock = sources.create("trouble:plain").eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(files.load_model(tmp_path / outcome.expanded_file)(x), stock(x))


def test_branches_that_start_at_zero_are_part_of_the_round_trip(trouble: Path) -> None:
    model = converting.Conversion(job("plain", block="acb"), lambda stage: None).prepare().model
    assert all(bool(parameter.any()) for parameter in model.parameters())


def test_a_network_whose_input_cannot_be_guessed_is_proven_fold_by_fold(trouble: Path) -> None:
    outcome = convert(job("detector"))
    assert isinstance(outcome, Converted), outcome
    assert outcome.proof.folds == outcome.folds == 1
    assert outcome.proof.outputs == "none"
    assert "no input could be made" in outcome.proof.remark
    assert outcome.latency is None


@pytest.mark.parametrize(
    ("name", "block", "kind", "words"),
    [
        ("linear", None, NothingToDo, "no batch norm"),
        ("linear", "acb", NothingToDo, "no convolution"),
        ("empty", None, NothingToDo, "no parameters"),
        ("batch", None, Refused, "batch"),
    ],
)
def test_what_is_not_converted_says_why(
    trouble: Path, name: str, block: str | None, kind: type[Outcome], words: str
) -> None:
    outcome = convert(job(name, block=block))
    assert isinstance(outcome, kind), outcome
    assert words in outcome.sentence()
    assert outcome.ok


def test_an_error_says_where_and_what(trouble: Path) -> None:
    outcome = convert(job("raise"))
    assert isinstance(outcome, Failed)
    assert outcome.stage == "build"
    assert "out of cheese" in outcome.error


def test_without_a_network_trained_weights_are_a_plain_failure(trouble: Path) -> None:
    outcome = convert(job("block", pretrained=True))
    assert isinstance(outcome, Failed)
    assert outcome.stage == "weights"
    assert outcome.error.startswith("no network access")


def test_a_wrong_fold_is_found_and_located(trouble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.collapse_with_report

    def wrong(model: nn.Module, **options: Any) -> Any:
        folded: Any
        folded, explanation = right(model, **options)
        with torch.no_grad():
            folded.head.weight[0, 0] += 1e-2
        return folded, explanation

    monkeypatch.setattr(reparam, "collapse_with_report", wrong)
    outcome = convert(job("block"))
    assert isinstance(outcome, Mismatch), outcome
    assert outcome.layer == "head"
    assert outcome.error > outcome.allowed


def test_a_wrong_way_back_is_found(trouble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.collapse

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        restored = right(model, **options)
        with torch.no_grad():
            next(restored.parameters()).flatten()[0] += 1e-2
        return restored

    monkeypatch.setattr(reparam, "collapse", wrong)
    outcome = convert(job("plain", block="acb"))
    assert isinstance(outcome, Mismatch), outcome
    assert "stock architecture" in outcome.message


def test_a_failed_proof_names_the_layers(trouble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **options: Any) -> Any:
        raise reparam.EquivalenceError("the fold differs", layer="square.0, point.0", error=0.5)

    monkeypatch.setattr(reparam, "collapse_with_report", fail)
    outcome = convert(job("block"))
    assert isinstance(outcome, Mismatch)
    assert (outcome.error, outcome.layer) == (0.5, "square.0, point.0")


def test_a_full_disk_is_a_failure_without_half_a_file(
    trouble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        outcome = convert(job("block", tmp_path))
    assert isinstance(outcome, Failed)
    assert outcome.stage == "save"
    assert "No space left" in outcome.error
    assert not [path for path in Folder(tmp_path).models.rglob("*") if path.is_file()]


def test_outputs_in_double_are_those_of_a_cast_copy_and_leave_the_network_alone(trouble: Path) -> None:
    work = converting.Conversion(job("block"), lambda stage: None).prepare()
    before = {name: value.clone() for name, value in work.model.state_dict().items()}
    assert work.view is not None
    got = in_double(work.model, work.view)
    after = work.model.state_dict()
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in after.items())
    copy = deepcopy(work.model).double()
    assert distance(got, work.view.run(copy, tuple(x.double() for x in work.view.inputs(1))))[1] < 1e-14


def test_what_a_network_does_in_another_dtype_is_in_double_too() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3, 1, 1))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1  # the buffer itself, in its own dtype
            made = torch.arange(8, dtype=torch.float32) / 7
            return (x.float() * self.scale.half() + made.to(torch.bfloat16)).to(torch.float32)

    model, view = Casting(), View((3, 8, 8))
    result = in_double(model, view)[0]
    x = view.inputs(1)[0].double()
    assert torch.equal(result, x * model.scale.detach().double() + torch.arange(8).double() / 7)
    assert (model.count.dtype, float(model.count)) == (torch.float32, 1.0)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"block": "acb"}])
def test_converting_takes_less_than_three_times_the_network(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The network that is collapsed, blocks included; its process holds the libraries besides."""
    (outcome,) = convert_zoo(["resnet50"], out=tmp_path, latency=False, **settings)
    assert isinstance(outcome, Converted), outcome
    assert outcome.proof.outputs == "whole"
    assert outcome.peak < 3 * outcome.before.bytes


# ------------------------------------------------------------------------------------------------ checkpoints


def _wrapped(prefix: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("file", "wrap", "note"),
    [
        ("block.safetensors", _wrapped(""), ""),
        ("block.safetensors", _wrapped("module."), "dropped the prefix 'module.'"),
        ("block.tag.safetensors", _wrapped("model.module."), "dropped the prefix 'model.module.'"),
        ("block/model.safetensors", _wrapped("ema."), "dropped the prefix 'ema.'"),
        ("block-0123abcd.pth", _wrapped("module."), "dropped the prefix 'module.'"),
        ("block.pt", lambda s: {"state_dict": s, "state_dict_ema": s}, "also holds 'state_dict_ema'"),
        ("block.pt", lambda s: {"state_dict_ema": s}, "took the state dict under 'state_dict_ema'"),
        (
            "block.safetensors",
            lambda s: {f"{p}.{k}": v * (p == "model") for p in ("model", "extra") for k, v in s.items()},
            "left out",
        ),
    ],
)
def test_a_checkpoint_is_found_and_its_names_are_made_to_fit(
    trouble: Path, tmp_path: Path, file: str, wrap: Callable[[dict[str, Any]], Any], note: str
) -> None:
    path = tmp_path / "weights" / file
    path.parent.mkdir(parents=True)
    trained = network()
    state = wrap({name: value.clone() for name, value in trained.state_dict().items()})
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    ((_, _, found),) = select(["*"], "trouble", tmp_path / "weights")
    assert found == str(path)
    outcome = convert(job("block", tmp_path / "out", path, weights=str(tmp_path / "weights")))
    assert isinstance(outcome, Converted), outcome
    assert note in " ".join(outcome.notes)
    assert outcome.file is not None
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(files.load_model(tmp_path / "out" / outcome.file)(x), trained(x))


def test_a_config_beside_the_file_says_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "model.safetensors").touch()
    (tmp_path / "any" / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "stranger.pt").touch()
    (tmp_path / "resnet34.pth").touch()
    (tmp_path / "resnet34.safetensors").touch()
    shelf = find_checkpoints(tmp_path, ["resnet18", "resnet34"])
    assert dict(shelf.files) == {
        "resnet18": tmp_path / "any" / "model.safetensors",
        "resnet34": tmp_path / "resnet34.safetensors",
    }
    assert shelf.strangers == (tmp_path / "stranger.pt",)


@pytest.mark.parametrize("kind", ["damaged", "pickle", "other"])
def test_weights_that_cannot_be_read_are_a_failure(trouble: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("block.safetensors" if kind == "damaged" else "block.pt")
    if kind == "damaged":
        path.write_bytes(b"\xff" * 100)
    else:
        torch.save(_Dangerous() if kind == "pickle" else network(6).state_dict(), path)
    outcome = convert(job("block", None, path))
    assert isinstance(outcome, Failed)
    assert outcome.stage == "weights"
    words = {"damaged": "truncated", "pickle": "run any code", "other": "does not fit"}[kind]
    assert words in outcome.error
    assert not outcome.traceback


class _Dangerous:
    """What a pickle could do."""

    def __reduce__(self) -> Any:
        return os.abort, ()


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_a_network_that_ends_badly_costs_one_row(trouble: Path, tmp_path: Path) -> None:
    names = ["abort", "block", "hang", "killed", "exit", "greedy", "wrong", "linear", "raise", "plain"]
    iterator = convert_zoo(names, source="trouble", out=tmp_path / "run", jobs=2, timeout=6, memory=0.5)
    found = {outcome.name: outcome for outcome in iterator}
    assert {name: type(found[name]) for name in names} == {
        "abort": Failed,
        "block": Converted,
        "hang": TimedOut,
        "killed": OutOfMemory,
        "exit": Failed,
        "greedy": OutOfMemory,
        "wrong": Mismatch,
        "linear": NothingToDo,
        "raise": Failed,
        "plain": Converted,
    }
    crashed = found["abort"]
    assert isinstance(crashed, Failed)
    assert (crashed.stage, "SIGABRT" in crashed.error) == ("build", True)
    assert "last words" in crashed.traceback
    assert "troublesome_zoo.py" in crashed.traceback  # the stack, by faulthandler
    greedy = found["greedy"]
    assert isinstance(greedy, OutOfMemory)
    assert greedy.limit == 0.5
    assert 0.5 * 2**30 < greedy.peak < 2 * 2**30
    assert read(tmp_path / "run").outcomes == {f"trouble:{name}": outcome for name, outcome in found.items()}
    kept = {path.name for path in Folder(tmp_path / "run").models.rglob("*") if path.is_file()}
    assert kept == {f"{name}.{kind}" for name in ("block", "plain") for kind in ("json", "safetensors")}
    assert not list(Folder(tmp_path / "run").running.iterdir())


@pytest.mark.slow
def test_a_run_that_is_left_early_ends_its_processes(trouble: Path, tmp_path: Path) -> None:
    states: list[int] = []
    iterator = convert_zoo(
        ["block", "hang"],
        source="trouble",
        out=tmp_path / "run",
        jobs=2,
        on_tick=lambda run: states.extend(each.process.pid for each in run.running),
    )
    assert next(iterator).name == "block"
    iterator.close()  # type: ignore[attr-defined]
    assert states
    for pid in set(states):
        assert not Path(f"/proc/{pid}").exists()
    with Journal(tmp_path / "run"):
        pass  # the folder is free again


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(trouble: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "built.txt"
    arguments = ["zoo", "convert", "slow*", "--source", "trouble", "--out", str(folder), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(trouble), "TROUBLE_LOG": str(log)}
    victim = subprocess.Popen(
        [sys.executable, "-m", "reparam", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    for _ in range(2):
        assert "converted" in victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    done = set(read(folder).outcomes)
    assert 2 <= len(done) < 6
    _wait_for_quiet(log)
    half = Folder(folder).models / "trouble" / ".slow5.safetensors.0123.tmp"
    half.write_bytes(b"half a file")
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"record": "outcome", "kind": "conv')

    built = Counter(log.read_text().split())
    # A model whose files were whole when the run was killed counts as done, although its line is missing.
    whole = {f"trouble:{path.stem}" for path in (Folder(folder).models / "trouble").glob("*.json")}
    outcomes = list(convert_zoo(["slow*"], source="trouble", out=folder, jobs=2, resume=True))
    everything = {f"trouble:slow{i}" for i in range(6)}
    assert {outcome.spec for outcome in outcomes} == everything - done
    again = {f"trouble:{name}" for name, count in Counter(log.read_text().split()).items() if count > built[name]}
    assert again == everything - done - whole
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert Counter(line["name"] for line in lines if line["record"] == "outcome") == {f"slow{i}": 1 for i in range(6)}
    assert not half.exists()
    for i in range(6):
        files.load_model(Folder(folder).of("trouble", f"slow{i}", ".safetensors"))
    assert list(convert_zoo(["slow*"], source="trouble", out=folder, resume=True)) == []


def test_what_a_network_starts_ends_with_it(trouble: Path, tmp_path: Path) -> None:
    outcome = next(iter(convert_zoo(["leaves"], source="trouble", out=tmp_path)))
    assert outcome.kind == "converted"
    assert _gone(_pids(Path(os.environ["TROUBLE_LOG"])))


def test_a_killed_run_leaves_no_process_though_one_hangs_in_c(trouble: Path, tmp_path: Path) -> None:
    log = tmp_path / "started.txt"
    command = [sys.executable, "-m", "reparam", "zoo", "convert", "stuck", "--source", "trouble", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": f"{trouble}:{Path.cwd()}", "TROUBLE_LOG": str(log)}
    victim = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (log.exists() and log.read_text().endswith("\n")):
        assert victim.poll() is None
        time.sleep(0.1)
    started = _pids(log)
    assert all(map(_runs, started))
    victim.kill()
    victim.wait()
    assert _gone(started)


def _pids(log: Path) -> list[int]:
    return [int(word) for word in log.read_text().split()]


def _runs(pid: int) -> bool:
    """Whether a process is more than an entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether processes end within some seconds."""
    end = time.monotonic() + seconds
    while any(map(_runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(_runs, pids))


def _wait_for_quiet(log: Path) -> None:
    """Until nothing that the killed run had started builds any more."""
    before, size = -1, log.stat().st_size
    while before != size:
        time.sleep(1.0)
        before, size = size, log.stat().st_size


def test_files_that_are_whole_without_a_line_are_not_made_again(trouble: Path, tmp_path: Path) -> None:
    outcome = convert(job("slow0", tmp_path))
    with Journal(tmp_path) as journal:
        journal.append("run", {"settings": vars(Settings())})
    resumed = list(convert_zoo(["slow0"], source="trouble", out=tmp_path, resume=True))
    assert resumed == [outcome]
    assert Counter(Path(os.environ["TROUBLE_LOG"]).read_text().split()) == {"slow0": 1}
    assert read(tmp_path).outcomes == {"trouble:slow0": outcome}


# ------------------------------------------------------------------------------------------------ the folder


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append("outcome", OUTCOMES[0].to_json())
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"record": "outc', b"\0" * 40, b"\0" * 40 + b"\n", whole[:-1]):
        path.write_bytes(whole + torn)
        assert read(tmp_path).torn == 1
        assert path.read_bytes() == whole + torn  # reading leaves it as it is
        with Journal(tmp_path) as journal:
            assert list(journal.content.outcomes.values()) == [OUTCOMES[0]]
            assert path.read_bytes() == whole
            journal.append("outcome", OUTCOMES[1].to_json())
        assert len(path.read_bytes().splitlines()) == 2
        path.write_bytes(whole)


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append("outcome", OUTCOMES[0].to_json())
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(JournalError, match="line 1 is damaged"):
        read(tmp_path)


def test_each_line_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    with Journal(tmp_path) as journal:

        def note(descriptor: int) -> None:
            real(descriptor)
            synced.append(journal.folder.journal.stat().st_size)

        monkeypatch.setattr(os, "fsync", note)
        journal.append("outcome", OUTCOMES[0].to_json())
        assert synced == [journal.folder.journal.stat().st_size]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path) as journal:
        journal.append("outcome", OUTCOMES[0].to_json())
        before = journal.folder.journal.read_bytes()
        real = os.write

        def half(descriptor: int, data: bytes) -> int:
            if len(data) < 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data[: len(data) - 39])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(JournalError, match=r"No space left.*--resume"):
            journal.append("outcome", OUTCOMES[1].to_json())
        assert journal.folder.journal.read_bytes() == before


def test_a_second_run_in_the_folder_says_so(trouble: Path, tmp_path: Path) -> None:
    with Journal(tmp_path):
        with pytest.raises(JournalError, match=rf"in use by another run \(process {os.getpid()}\)"):
            list(convert_zoo(["linear"], source="trouble", out=tmp_path))
        output = run("zoo", "convert", "linear", "--source", "trouble", "--out", tmp_path, status=1)
        assert "in use" in output
    assert list(read(tmp_path).outcomes) == []


def test_a_folder_with_a_run_is_not_overwritten(trouble: Path, tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append("run", {"settings": vars(Settings(block="acb"))})
    with pytest.raises(JournalError, match="--resume"):
        list(convert_zoo(["linear"], source="trouble", out=tmp_path, block="acb"))
    with pytest.raises(JournalError, match=r"other settings.*acb"):
        list(convert_zoo(["linear"], source="trouble", out=tmp_path, block="dbb", resume=True))


def test_names_that_are_no_file_names_are_quoted(tmp_path: Path) -> None:
    path = Folder(tmp_path).of("timm", "hf-hub:timm/../x", ".json")
    assert path.parent == tmp_path / "models" / "timm"


# ------------------------------------------------------------------------------------------------ the verbs


def test_names_patterns_and_specs_are_selected_once(trouble: Path, toy: str) -> None:
    found = select(["slow[01]", "slow1", "toy:block", "block,width=6"], "trouble")
    expected = [("trouble", "slow0"), ("trouble", "slow1"), ("toy", "block"), ("trouble", "block,width=6")]
    assert [(source, name) for source, name, _ in found] == expected
    for bad in ("nothing*", "blok", "nowhere:block"):
        with pytest.raises(sources.UnknownNameError):
            select([bad], "trouble")


@pytest.mark.parametrize(
    "options", [{"jobs": 0}, {"timeout": 0}, {"memory": -1}, {"block": "abc"}, {"resume": True}, {"pretrained": True}]
)
def test_bad_options_are_said_at_once(trouble: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    weights = tmp_path if "pretrained" in options else None
    with pytest.raises(reparam.ReparamError):
        convert_zoo(["block"], source="trouble", weights=weights, **options)


@pytest.mark.slow
def test_the_command_line_converts_and_shows(trouble: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output = run("zoo", "convert", "plain", "linear", "--source", "trouble", "--out", out, "--block", "acb")
    assert "1/2 converted trouble:plain" in output
    assert "1 converted, 1 nothing to do" in output
    shown = run("zoo", "show", out, "plain")
    assert "takes the collapsed weights" in shown
    assert "plain.acb.safetensors" in shown
    assert "no convolution" in run("zoo", "show", out, "trouble:linear")
    arguments = ("zoo", "convert", "raise", "--source", "trouble", "--out", tmp_path / "bad")
    assert "1 failed" in run(*arguments, status=1)
    assert "1 failed" in run(*arguments, "--resume", status=1)
    assert "out of cheese" in run("zoo", "show", tmp_path / "bad", "raise")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "nothing*", "--source", "trouble"), "no network"),
        (("list", "--source", "nowhere"), "unknown source"),
        (("convert", "block"), "--out"),
        (("convert", "--out", "x"), "PATTERN"),
        (("convert", "blok", "--source", "trouble", "--out", "x"), "did you mean block"),
        (("convert", "block", "--source", "trouble", "--out", "x", "--jobs", "0"), "--jobs"),
        (("convert", "block", "--source", "trouble", "--out", "x", "--timeout", "-1"), "--timeout"),
        (("convert", "x.onnx", "--out", "x", "--norms", "affine"), "drop --block"),
    ],
)
def test_wrong_usage_has_exit_status_2(trouble: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in run("zoo", *arguments, status=2)
    assert not Path("x").exists()


def test_a_terminal_sees_what_runs_and_how_long_it_will_take() -> None:
    from rich.console import Console

    from zoo.cli import LiveDisplay, _display, _picture
    from zoo.run import Limits, Run

    state = Run(4, Limits(), done=[OUTCOMES[0], OUTCOMES[5]], fresh=1, began=time.monotonic() - 60)
    running: Any = Running(Job("timm", "resnet18"), None, None, None, stage="collapse", base=1, peak=2 * 10**9)  # type: ignore[arg-type]
    state.running.append(running)
    terminal = Console(force_terminal=True, width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with terminal.file, _display(terminal) as display:
        assert isinstance(display, LiveDisplay)
        display.tick(state)
        display.show(OUTCOMES[5])
        terminal.print(_picture(state))
    text = terminal.export_text()
    for words in ("timm:resnet18", "collapse", "2.0 GB", "2/4, about 2 min 00 s left", "1 converted, 1 failed"):
        assert words in text
    with _display(Console(file=sys.stderr, force_terminal=False)) as plain:
        assert not isinstance(plain, LiveDisplay)


def test_a_pattern_lists_names(trouble: Path) -> None:
    assert run("zoo", "list", "slow*", "--source", "trouble") == " ".join(f"slow{i}" for i in range(6))


@pytest.mark.slow
def test_the_python_verb_yields_outcomes_without_a_folder(trouble: Path) -> None:
    from reparam.zoo import convert_zoo as verb

    (outcome,) = verb(["trouble:block"])
    assert outcome.kind == "converted"
    assert outcome.file is None


def test_all_outcomes_are_frozen() -> None:
    for outcome in OUTCOMES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            outcome.name = "other"  # type: ignore[misc]
