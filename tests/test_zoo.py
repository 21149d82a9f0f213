"""The tables: what makes a row fail, and networks whose outputs can tell a wrong fold from a right one."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import reparam
from reparam import Counts, sources
from reparam.cli import app
from reparam.recipe import Recipe
from zoo import demo as demonstration
from zoo import measure as measuring
from zoo.demo import Case, try_out
from zoo.digits import score, train
from zoo.families import DEMO, FOLDING, ORDINARY, Network
from zoo.measure import Row, measure, relative_error, size
from zoo.randomise import randomise_
from zoo.render import folding_markdown, insert_between_markers
from zoo.train.data import Digits, digits

pytest_plugins = ("toy_package",)


@pytest.fixture
def network(toy: str) -> Network:
    return Network(toy, "fx", shape=(2, 3, 8, 8))


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_holds_for_a_right_fold(network: Network) -> None:
    row = measure(network)
    assert row.ok, row.failure
    assert row.error < 1e-12
    assert row.ours is not None
    assert (row.ours.convs, row.ours.norms) == (1, 0)
    assert row.theirs is not None
    assert (row.theirs.convs, row.theirs.norms) == (2, 0)
    assert "| toy:block | 2 → 1 | 2 → 0 |" in folding_markdown([row])


def test_a_row_fails_for_a_wrong_fold(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.collapse

    def wrong(model: nn.Module, **options: object) -> nn.Module:
        folded = right(model, **options)
        with torch.no_grad():
            next(folded.parameters()).flatten()[0] += 1e-6
        return folded

    monkeypatch.setattr(reparam, "collapse", wrong)
    row = measure(network)
    assert not row.ok
    assert "differs" in row.failure
    assert "FAILED" in folding_markdown([row])


def test_a_row_fails_when_nothing_folds(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    report = reparam.explain(sources.create(network.spec))
    monkeypatch.setattr(reparam, "collapse", lambda model, **_: model)
    monkeypatch.setattr(reparam, "collapse_with_report", lambda model, **_: (model, replace(report, folds=[])))
    assert measure(network).failure == "larger than the fold that ships"


def test_a_row_fails_when_the_output_ignores_the_input(network: Network) -> None:
    constant = replace(network, outputs=lambda model, inputs: model(torch.zeros_like(inputs[0])))
    assert "hardly depends" in measure(constant).failure


def test_an_exception_becomes_a_row(network: Network) -> None:
    row = measure(replace(network, spec="toy:nothing"))
    assert "UnknownNameError" in row.failure
    assert math.isnan(row.error)
    assert "toy:nothing (FAILED)" in folding_markdown([row])


@pytest.mark.parametrize(("value", "expected"), [(1.5, 0.5 / 3), (math.nan, math.inf), (math.inf, math.inf)])
def test_relative_error(value: float, expected: float) -> None:
    reference = {"out": torch.tensor([1.0, 3.0]), "ids": torch.tensor([1])}
    candidate = {"out": torch.tensor([value, 3.0]), "ids": torch.tensor([2])}
    assert relative_error(reference, candidate) == pytest.approx(expected)


def test_outputs_that_cannot_be_compared() -> None:
    assert relative_error(torch.ones(2), torch.ones(3)) == math.inf
    with pytest.raises(ValueError, match="no tensor"):
        relative_error([], [])
    with pytest.raises(ValueError, match="argument"):
        relative_error([torch.ones(1)], [torch.ones(1)] * 2)


def test_functional_layers_count() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.conv2d(x, self.conv.weight)
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var)

    traced = fx.symbolic_trace(Net())
    assert (size(traced).convs, size(traced).norms) == (1, 1)


# ------------------------------------------------------------------------------------------------ randomise_


class Scaled(nn.Module):
    """What initialisation hides: a tiny layer scale and a zero gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1e-5))
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * self.scale


def test_randomise_gives_what_is_constant_a_value_that_matters() -> None:
    model = Scaled()
    weight = model.conv.weight.clone()
    randomise_(model, 1)
    assert torch.equal(model.conv.weight, weight)
    assert model.scale.min().item() >= 0.2
    for value in (model.norm.weight, model.norm.bias, model.norm.running_mean, model.norm.running_var):
        assert value.std().item() > 0.01
    assert model.norm.running_var.min().item() > 0
    assert not model.training


def test_randomise_depends_on_the_seed_alone() -> None:
    model = Scaled()
    x = torch.randn(2, 3, 8, 8)
    states = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        states.append(randomise_(copy.deepcopy(model), seed, (x,)).state_dict())
    same = [all(torch.equal(states[0][name], other[name]) for name in other) for other in states[1:]]
    assert same == [True, False]


def test_statistics_follow_the_example_inputs() -> None:
    model = Scaled()
    x = torch.randn(8, 3, 16, 16) * 100
    randomise_(model, 0, (x,))
    spread = model.conv(x).detach().var((0, 2, 3))
    ratio = model.norm.running_var / spread
    assert 0.4 < float(ratio.min()) < float(ratio.max()) < 2.1
    assert model.norm.momentum == 0.1


# ------------------------------------------------------------------------------------------------ lists and reports


def test_the_lists_name_networks_that_exist() -> None:
    pytest.importorskip("timm")
    known = {source: set(sources.names(source)) for source in ("timm", "torchvision")}
    networks = FOLDING + ORDINARY
    assert len({network.spec for network in networks}) == len(networks)
    assert set(DEMO) <= set(networks)
    for network in networks:
        assert network.name in known[network.spec.partition(":")[0]]


def test_markers_are_filled_in_twice_the_same(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("above\n<!-- t -->\nold\n<!-- /t -->\nbelow\n")
    for _ in range(2):
        insert_between_markers(path, "t", "new\n")
        assert path.read_text() == "above\n<!-- t -->\nnew\n<!-- /t -->\nbelow\n"
    with pytest.raises(ValueError, match="other"):
        insert_between_markers(path, "other", "new")


def test_a_larger_result_does_not_hold() -> None:
    counts = Counts(convs=1, norms=0, linears=0, parameters=10)
    row = Row(DEMO[0], before=counts, ours=replace(counts, parameters=11), error=0.0)
    assert measuring._verdict(row) == "more parameters than before"


# ------------------------------------------------------------------------------------------------ demo

SMALL = Case("timm:test_resnet,num_classes=10", Recipe("acb"), steps=12, rate=5e-3)


@pytest.fixture(scope="module")
def data() -> Digits:
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    return digits()


def test_the_digits_are_split_once_and_for_all(data: Digits) -> None:
    assert data.train.shape == (1500, 3, 32, 32)
    assert data.test.shape == (297, 3, 32, 32)
    assert abs(float(data.train.mean())) < 0.05
    assert torch.equal(data.test, digits().test)
    assert set(data.test_labels.tolist()) == set(range(10))
    everything = torch.cat([data.train, data.test])[:, 0].flatten(1)
    assert len(torch.unique(everything, dim=0)) == 1797


def test_images_and_labels_belong_together(data: Digits) -> None:
    flat, held = data.train[:, 0].flatten(1), data.test[:, 0].flatten(1)
    nearest = torch.cdist(held, flat).argmin(1)
    assert float((data.train_labels[nearest] == data.test_labels).float().mean()) > 0.95


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(reparam.ReparamError, match=r"reparam\[zoo\]"):
        digits()


def test_training_learns_and_scoring_changes_nothing(data: Digits) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 225, 10))
    before = score(model, data)
    state = copy.deepcopy(model.state_dict())
    assert torch.equal(score(model, data).answers, before.answers)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    losses = list(train(model, data, steps=20, batch=32))
    after = score(model, data)
    assert len(losses) == 20
    assert after.loss < before.loss
    assert after.accuracy > 0.6 > before.accuracy


@pytest.mark.parametrize("block", [pytest.param("acb", marks=pytest.mark.slow), "dbb", "doconv"])  # acb: the demo
def test_a_trial_holds(data: Digits, block: str) -> None:
    trial = try_out(replace(SMALL, recipe=Recipe(block)), data)
    assert not trial.failure
    assert trial.start == 0.0
    assert trial.loads
    assert trial.error is not None
    assert trial.error < 1e-5
    assert trial.counts is not None
    plain, training, deployed = trial.counts
    assert training.parameters > plain.parameters > deployed.parameters
    assert (plain.convs, deployed.norms) == (deployed.convs, 0)


def spoiled(model: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        list(model.parameters())[-1][0] += by
    return model


def test_a_trial_fails_if_expanding_changes_the_function(data: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.Plan.apply
    monkeypatch.setattr(reparam.Plan, "apply", lambda plan: spoiled(right(plan), 1e-4))
    assert "before training" in try_out(SMALL, data).failure


@pytest.mark.parametrize("by", [1e-3, pytest.param(100.0, marks=pytest.mark.slow)])
def test_a_trial_fails_if_collapsing_changes_the_function(
    data: Digits, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    right = reparam.collapse
    monkeypatch.setattr(reparam, "collapse", lambda *args, **options: spoiled(right(*args, **options), by))
    assert "differ by" in try_out(SMALL, data).failure


def test_a_trial_fails_if_the_weights_do_not_load(data: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.collapse
    monkeypatch.setattr(reparam, "collapse", lambda model, like=None: right(model))
    assert "state_dict" in try_out(SMALL, data).failure


def test_a_trial_fails_if_nothing_is_learnt_or_expanded(data: Digits) -> None:
    assert "did not lower the loss" in try_out(replace(SMALL, steps=0), data).failure
    nothing = replace(SMALL, recipe=Recipe("acb", where={"kernel": 9}))
    assert "no parameters" in try_out(nothing, data).failure


def test_a_trial_that_raises_is_a_row(data: Digits) -> None:
    assert "UnknownNameError" in try_out(replace(SMALL, spec="timm:nothing"), data).failure


@pytest.mark.parametrize("good", [True, False])
def test_the_demo_reports_and_fails_if_anything_does_not_hold(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    case = SMALL if good else replace(SMALL, steps=0)
    monkeypatch.setattr(demonstration, "CASES", (case,))
    monkeypatch.setattr(demonstration, "CONVERTED", ("timm:test_resnet",))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == (0 if good else 1), result.output
    assert f"{2 if good else 1} of 2 networks hold" in result.output
    assert "The plan: timm:test_resnet,num_classes=10 with acb" in result.output
    assert "report.html" in result.output.splitlines()[0]
    assert "test_resnet" in (tmp_path / "zoo" / "report.html").read_text(encoding="utf-8")
    report = (tmp_path / "training.md").read_text(encoding="utf-8")
    assert ("(FAILED)" in report) == (not good)
    assert ("did not lower the loss" in result.output) == (not good)
    assert "| test_resnet" in report
    assert "297 of 297" in report


def test_the_demo_names_networks_that_exist() -> None:
    pytest.importorskip("timm")
    assert len(demonstration.CASES) == 3
    assert len(demonstration.CONVERTED) == 8
    for case in demonstration.CASES:
        source, _, rest = case.spec.partition(":")
        assert rest.partition(",")[0] in sources.names(source)


def test_step_benchmark_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "step.md"
    small = ["--rounds", "1", "--batch", "2", "--size", "32", "--out", str(out)]
    result = CliRunner().invoke(app, ["bench", "step", "--blocks", "acb,largekernel", *small])
    assert result.exit_code == 0, result.output
    row = next(line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("| acb |"))
    layers, form, ratio = row.strip("| ").split(" | ")[1:4]
    assert int(layers) == 16  # the 3x3 convolutions of ResNet-18
    assert (form, float(ratio) > 0) == ("branches", True)
    assert "largekernel" in out.read_text(encoding="utf-8")  # named as one that applies nowhere
    assert CliRunner().invoke(app, ["bench", "step", "--blocks", "acbb"]).exit_code == 2
