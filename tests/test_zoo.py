"""The tables: what makes a row fail, and networks whose outputs can tell a wrong fold from a right one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import reparam
from reparam import Counts, sources
from zoo import measure as measuring
from zoo.families import DEMO, FOLDING, ORDINARY, Network
from zoo.measure import Row, measure, relative_error, size
from zoo.randomise import randomise_
from zoo.render import folding_markdown, insert_between_markers

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
