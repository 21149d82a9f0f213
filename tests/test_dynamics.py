"""The study of training dynamics: its measures against numbers worked out by hand, its controls, its report."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import reparam
import zoo.train.dynamics as module
from zoo.train import build
from zoo.train.config import Config
from zoo.train.dynamics import (
    Layer,
    Measurement,
    StudyError,
    Trainee,
    check_control,
    relative_distance,
    skeleton,
    split_blocks,
    study,
)
from zoo.train.study import app

CONFIG = Config(data="digits", size=16, batch=16, rate=0.02)
BLOCKS = ["acb", "doconv"]

# ------------------------------------------------------------------------------------------------- measures


def test_relative_distance_is_what_is_worked_out_by_hand() -> None:
    assert relative_distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_distance(torch.ones(3), torch.ones(3)) == 0


def test_skeleton_is_the_centre_row_and_column() -> None:
    kernel = torch.tensor([[1.0, -2, 3], [-4, 5, -6], [7, -8, 9]]).expand(4, 2, 3, 3)
    assert skeleton(kernel) == ((2 + 4 + 5 + 6 + 8) / 5, (1 + 3 + 7 + 9) / 4)


def test_skeleton_means_magnitudes_over_all_kernels() -> None:
    kernel = torch.zeros(2, 1, 3, 3)
    kernel[0, 0, 1, 1] = -5  # a sum without magnitudes would cancel this
    kernel[1, 0, 1, 1] = 5
    kernel[1, 0, 0, 0] = 4
    assert skeleton(kernel) == (1.0, 0.5)


@pytest.mark.parametrize(("shape", "lines"), [((5, 5), 9), ((4, 4), 7), ((3, 5), 7), ((3, 3, 3), 7), ((7,), 7)])
def test_skeleton_has_as_many_taps_as_the_lines_through_the_centre(shape: tuple[int, ...], lines: int) -> None:
    inside, corners = skeleton(torch.ones(1, 1, *shape))
    assert inside == 1
    if lines == math.prod(shape):
        assert math.isnan(corners)
        return
    centre = tuple((k - 1) // 2 for k in shape)
    kernel = torch.zeros(1, 1, *shape)
    kernel[0, 0][centre] = 1
    assert skeleton(kernel) == (pytest.approx(1 / lines), 0)


def test_ratio_leaves_out_kernels_without_corners() -> None:
    layers = (Layer("a", 0.1, 3.0, 1.0), Layer("b", 0.3, 2.0, 2.0), Layer("c", 0.2, 1.0, math.nan))
    found = Measurement(1, "acb", 0.0, 0.0, layers)
    assert found.kernels == pytest.approx(0.2)
    assert found.ratio == 2
    assert math.isnan(dataclasses.replace(found, layers=layers[2:]).ratio)


@pytest.mark.parametrize("block", [None, "acb", "dbb", "doconv"])
def test_a_kernel_is_that_of_convolution_and_norm(block: str | None) -> None:
    # Whether the norm moves into the block (acb) or stays behind it (doconv), the same kernel is compared.
    config = dataclasses.replace(CONFIG, block=block)
    model = build.build(config, build.load(config))
    for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
        norm.running_var.fill_(4 - norm.eps)  # type: ignore[union-attr]
    plain = build.stock(config, build.load(config)).state_dict()["conv1.conv.weight"]
    found = Trainee(model, config).kernel("conv1.conv", "conv1.norm")
    assert torch.allclose(found, plain.double() / 2)


# ------------------------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def measurements() -> list[Measurement]:
    return list(study(CONFIG, BLOCKS, steps=3, every=2))


def of(measurements: Sequence[Measurement], network: str) -> list[Measurement]:
    return [each for each in measurements if each.network == network]


def test_all_start_from_one_function_and_blocks_leave_it_in_one_step(measurements: list[Measurement]) -> None:
    for block in BLOCKS:
        start, first, *later = of(measurements, block)
        assert (start.step, start.outputs, start.kernels) == (0, 0, 0)
        assert first.loss == of(measurements, "plain")[1].loss, "the first batch is seen with the same function"
        assert first.outputs > 1e-5
        assert all(layer.kernel > 1e-6 for layer in first.layers)
        assert later[-1].kernels > first.kernels
    assert [each.step for each in of(measurements, "acb")] == [0, 1, 2, 3]


def test_the_control_stays_and_the_nudged_network_starts_where_it_was_put(measurements: list[Measurement]) -> None:
    assert all(each.outputs == each.kernels == 0 for each in of(measurements, "plain again"))
    check_control(measurements)
    nudged = of(measurements, "plain nudged")
    # A product with 1 + 1e-6 z has a relative distance of 1e-6 in the mean.
    assert nudged[0].kernels == pytest.approx(1e-6, rel=0.2)
    assert nudged[1].kernels < 0.1 * of(measurements, "acb")[1].kernels


def test_the_study_measures_what_collapse_would_deploy() -> None:
    data = build.load(CONFIG)
    config = dataclasses.replace(CONFIG, block="acb")
    trainees = [Trainee(build.build(each, data), each) for each in (config, CONFIG)]
    images, labels = next(iter(data.batches(train=True, batch=16, seed=CONFIG.seed)))
    for each in trainees:
        each.step(images, labels, 1)
    stock = build.stock(CONFIG, data)
    deployed, plain = (reparam.collapse(each.model.eval(), like=stock).state_dict() for each in trainees)
    kernels = [f"conv{number}.conv.weight" for number in (1, 2, 3)]
    expected = [relative_distance(deployed[name].double(), plain[name].double()) for name in kernels]
    found = next(each for each in study(CONFIG, ["acb"], steps=1) if (each.step, each.network) == (1, "acb"))
    assert [layer.kernel for layer in found.layers] == pytest.approx(expected, rel=1e-3)


def test_a_control_that_moved_fails_the_study(measurements: list[Measurement]) -> None:
    moved = dataclasses.replace(of(measurements, "plain again")[1], outputs=1e-9)
    with pytest.raises(StudyError, match=r"control failed.*after step 1"):
        check_control([*measurements, moved])
    layers = (Layer("conv1.conv", 1e-9, 1.0, 1.0),)
    with pytest.raises(StudyError, match="control failed"):
        check_control([dataclasses.replace(moved, outputs=0.0, layers=layers)])


def test_a_block_that_starts_elsewhere_is_refused() -> None:
    with pytest.raises(StudyError, match="leave out @paper"):
        next(study(CONFIG, ["acb@paper"], steps=1))


def test_a_network_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_convs", lambda model: [])
    with pytest.raises(StudyError, match="no convolution with a kernel"):
        next(study(CONFIG, [], steps=1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acb,dbb, doconv", ["acb", "dbb", "doconv"]),
        ("acb:gamma=1/3,bn=after,dbb", ["acb:gamma=1/3,bn=after", "dbb"]),
        ("acb@online,dbb:single=True@online", ["acb@online", "dbb:single=True@online"]),
    ],
)
def test_commas_separate_blocks_and_options(text: str, expected: list[str]) -> None:
    assert split_blocks(text) == expected


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_tables_figure_and_report(tmp_path: Path) -> None:
    words = ["dynamics", "--steps", "2", "--blocks", "acb", "--size", "16", "--batch", "16", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The control held" in text
    assert "acb: started from exactly the plain function. One step later" in text
    assert "times as far as the nudged network" in text
    assert f"reparam study {words[0]}" in text
    with (tmp_path / "dynamics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows[:4]] == ["plain", "plain again", "plain nudged", "acb"]
    assert len(rows) == 4 * 3
    assert float(rows[7]["kernels"]) > 0
    assert len((tmp_path / "layers.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 * len(rows)
    assert (tmp_path / "dynamics.svg").stat().st_size > 10_000
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000


def test_the_report_says_when_a_drift_may_be_chance_and_when_the_control_failed(
    tmp_path: Path, measurements: list[Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "drift_plot", lambda *args: None)  # the figure is drawn by the command's test
    layer = Layer("conv1.conv", 1e-6, 1.0, 1.0)
    small = [
        dataclasses.replace(each, layers=(layer,) * 3) if each.network == "acb" and each.step else each
        for each in measurements
    ]
    module.write_results(small, CONFIG, "again", tmp_path)
    assert "does not stand out from the nudged network's" in (tmp_path / "report.md").read_text(encoding="utf-8")
    moved = [dataclasses.replace(e, outputs=1e-9) if e.network == "plain again" else e for e in measurements]
    module.write_results(moved, CONFIG, "again", tmp_path)
    assert "The control FAILED" in (tmp_path / "report.md").read_text(encoding="utf-8")
