"""Planning without numbers says what would happen with them, and a summary of runs adds up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import reparam
from reparam import ReparamError, sources
from reparam.cli import app
from zoo.job import Job, Settings
from zoo.journal import Journal, JournalError, read
from zoo.measure import shipped_fold, size, size_of
from zoo.outcome import Converted, Failed, NothingToDo, Planned, Proof, Size, from_json
from zoo.plan import plan, skeleton
from zoo.run import convert_zoo
from zoo.summary import summary

NAMES = ("timm:resnet18", "torchvision:shufflenet_v2_x0_5")
LARGER = ("timm:repvgg_a0", "timm:efficientvit_m0", "timm:ghostnet_050", "timm:levit_128s", "torchvision:raft_small")


def planned(name: str, **settings: object) -> Planned:
    source, _, model = name.partition(":")
    outcome = plan(Job(source, model, Settings(plan=True, **settings)))  # type: ignore[arg-type]
    assert isinstance(outcome, Planned), outcome
    return outcome


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_a_plan_without_numbers_is_what_happens_with_them(name: str) -> None:
    found = planned(name, block="acb")
    model = sources.create(name).eval()
    folded, explanation = reparam.collapse_with_report(model, verify=False)
    assert found.before == size_of(model)
    assert found.after == size_of(folded)
    assert found.folds == len(explanation.folds)
    assert found.refused == dict(explanation.reasons())
    assert found.expanded == len(reparam.plan(model, "acb").expanded)


def test_a_plan_follows_the_rules_that_it_is_given() -> None:
    kept, plain = (planned("timm:densenet121", **rules) for rules in ({}, {"norms": "affine", "cost": "layers:2"}))
    assert kept.after.norms > 0
    assert plain.after.norms == 0
    assert plain.folds > kept.folds


def test_a_constructor_that_asks_tensors_for_values_gets_them() -> None:
    """Torchvision's RegNets compute their widths so."""
    found = planned("torchvision:regnet_y_400mf", block="acb")
    assert found.before == size_of(sources.create("torchvision:regnet_y_400mf"))
    assert all(parameter.is_meta for parameter in skeleton("torchvision:regnet_y_400mf").parameters())


def test_other_folds_are_counted_by_what_they_leave() -> None:
    found = planned("timm:repvgg_a0").others
    model = sources.create("timm:repvgg_a0").eval()
    for fold in ("timm", "fx"):
        left = size(shipped_fold(fold)(model))
        assert found[fold] == {"convs": left.convs, "norms": left.norms}
    assert found["timm"] != found["fx"]


def test_a_network_that_another_fold_cannot_take_has_no_count() -> None:
    assert planned("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn").others["fx"] is None  # it cannot be traced


def test_structure_is_all_that_collapse_gives_on_the_meta_device() -> None:
    model = skeleton("timm:resnet18")
    folded = reparam.collapse(model, verify=False)
    assert all(parameter.is_meta for parameter in folded.parameters())
    assert size(folded).norms == 0
    with pytest.raises(ReparamError, match="is on the meta device and has no numbers"):
        reparam.collapse(model)


def test_expanding_without_numbers_builds_the_same_layers() -> None:
    expanded = reparam.expand(skeleton("timm:test_resnet"), "dbb")
    with_numbers = reparam.expand(sources.create("timm:test_resnet"), "dbb")
    shapes = {name: tensor.shape for name, tensor in expanded.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in with_numbers.state_dict().items()}
    assert all(tensor.is_meta for tensor in expanded.state_dict().values())


def test_a_plan_survives_its_journal() -> None:
    found = planned("timm:resnet18", block="acb")
    assert from_json(found.to_json()) == found


def test_a_network_without_parameters_has_nothing_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.plan.skeleton", lambda spec: nn.ReLU())
    assert isinstance(plan(Job("timm", "resnet18", Settings(plan=True))), NothingToDo)


def test_a_constructor_that_needs_numbers_fails_in_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "create", lambda spec: nn.Linear(int(torch.ones(1).item()), 2))
    outcome = plan(Job("timm", "resnet18", Settings(plan=True)))
    assert isinstance(outcome, Failed)
    assert outcome.stage == "build"


def test_the_command_plans_and_the_summary_adds_up(tmp_path: Path) -> None:
    run, document = tmp_path / "run", tmp_path / "docs" / "zoo.md"
    arguments = ["zoo", "plan", "resnet18", "resnet26", "mixer_s32_224", "--block", "acb", "--out", str(run)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    outcomes = list(read(run).outcomes.values())
    assert CliRunner().invoke(app, ["zoo", "summary", str(run), "--out", str(document)]).exit_code == 0
    text = document.read_text(encoding="utf-8")
    convs = sum(o.before.convs for o in outcomes if isinstance(o, Planned))
    assert re.search(rf"\| as built \| {convs} \| ", text)
    assert "| resnet | 2 | " in text
    assert "3 architectures: 3 planned" in text


def converted(name: str, **changes: object) -> Converted:
    sizes = {"before": Size(10, 40, 3, 3, 0), "after": Size(5, 20, 1, 0, 0)}
    proof = Proof(2, 1e-8, "whole", 3e-7, 1e-7, 1e-5, True)
    return Converted(**{"name": name, "source": "timm", "proof": proof, "folds": 2, **sizes, **changes})  # type: ignore[arg-type]


def test_a_summary_names_the_largest_error_and_each_failure(tmp_path: Path) -> None:
    outcomes = [
        converted("resnet18"),
        converted("resnet34", proof=Proof(7, 4e-8, "whole", 6e-6, 1e-7, 1e-5, True)),
        Failed(name="vgg11", source="timm", stage="collapse", error="it broke"),
    ]
    write_run(tmp_path, outcomes)
    text = summary([tmp_path])
    assert "9 folds" in text
    assert "largest relative error 4.0e-08" in text
    assert "largest relative error 6.0e-06" in text
    assert "| resnet | 2 | 6 → 2 | 6 → 0 | 4 | 6e-06 |" in text
    assert "2 converted, 0 mismatch, 1 failed" in text
    assert "| failed | 1 | collapse: it broke | vgg11 |" in text


def test_a_summary_says_how_long_each_stage_took(tmp_path: Path) -> None:
    seconds = [{"build": 1.0, "collapse": 100.0, "all": 101.0}, {"collapse": 80.0, "roundtrip": 300.0, "all": 380.0}]
    write_run(
        tmp_path, [converted(name, seconds=took) for name, took in zip(("resnet18", "vgg11"), seconds, strict=True)]
    )
    assert "The models' times add up to 8 minutes (collapse 3 minutes, roundtrip 5 minutes)." in summary([tmp_path])


def test_a_summary_says_what_large_networks_took(tmp_path: Path) -> None:
    mib = 1 << 20
    sizes = {name: Size(1, size * mib, 1, 1, 0) for name, size in (("resnet18", 100), ("resnet34", 200), ("vgg11", 1))}
    peaks = {"resnet18": 200 * mib, "resnet34": 700 * mib, "vgg11": 50 * mib}
    write_run(tmp_path, [converted(name, before=sizes[name], peak=peaks[name]) for name in sizes])
    text = summary([tmp_path])
    assert "Peak memory of the 2 networks of 64 MiB or more" in text
    assert "median 2.8, largest 3.5 (resnet34), 1 below 3" in text


def test_a_run_that_is_not_at_its_end_has_no_summary(tmp_path: Path) -> None:
    write_run(tmp_path, [converted("resnet18")], asked=("timm:resnet18", "timm:resnet34"))
    with pytest.raises(JournalError, match="1 models have no outcome yet"):
        summary([tmp_path])


def write_run(folder: Path, outcomes: list[Converted | Failed], asked: tuple[str, ...] = ()) -> None:
    """A journal as a run leaves it."""
    with Journal(folder) as journal:
        header = {
            "started": "2026-01-31T22:00:00+00:00",
            "specs": list(asked or (o.spec for o in outcomes)),
            "settings": {"block": None},
            "limits": {"jobs": 1},
            "command": ["zoo", "convert", "*"],
            "versions": {"torch": "2"},
            "machine": "a machine",
        }
        journal.append("run", header)
        for outcome in outcomes:
            journal.append("outcome", outcome.to_json())


def test_plans_can_be_made_from_python() -> None:
    (outcome,) = convert_zoo(["resnet10t"], plan=True)
    assert isinstance(outcome, Planned)
    assert outcome.after.norms == 0
