"""What a training step costs: the tables of `reparam bench step`, and the line that measures on a GPU."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from reparam.cli import app
from zoo import bench_step
from zoo.bench_step import Setting, Trainee

ROOT = Path(__file__).parents[1]


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "step", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_the_line_of_make_gpu_measures_small_networks_on_the_cpu(tmp_path: Path) -> None:
    """The very options of the Makefile, with a device and sizes that a test can have."""
    line = re.search(r"^\t\S+/reparam bench step (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    options = shlex.split(line[1].replace("$(BLOCKS)", "doconv,repvgg"))
    assert (options[options.index("--device") + 1], options[-1]) == ("cuda", "docs/gpu.md")
    small = {"--device": "cpu", "--network": "zoo:cifar_quick", "--batch": "4", "--size": "32", "--out": tmp_path / "a"}
    for option, value in small.items():
        options[options.index(option) + 1] = str(value)
    run(*[option for option in options if option != "--compiled"], "--stem", "--rounds", 2)
    text = (tmp_path / "a").read_text()
    assert "bf16 autocast, channels_last, one CPU thread" in text
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| doconv")]
    assert [row[2] for row in rows] == ["branches", "online", "sampled", "frozen"]
    assert all(float(row[3]) > 0.3 and float(row[6]) > 0.3 for row in rows)


def test_what_was_measured_is_there_if_the_rest_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_step._eager

    def cut(plain: Trainee, own: int, found: dict[str, nn.Module]) -> dict[str, list[str]]:
        if (tmp_path / "a").exists():
            raise KeyboardInterrupt
        return right(plain, own, found)

    monkeypatch.setattr(bench_step, "_eager", cut)
    small = ("--network", "zoo:cifar_quick", "--batch", 4, "--size", 32, "--stem", "--rounds", 1, "--forms", "branches")
    run(*small, "--blocks", "repvgg,doconv", "--out", tmp_path / "a", status=130)
    text = (tmp_path / "a").read_text()
    assert "| repvgg |" in text
    assert "| doconv |" not in text


def test_a_device_that_is_not_there_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert "no CUDA device here" in run("--device", "cuda", status=2)
    assert "cpu or cuda" in run("--device", "tpu", status=2)
    assert "no form 'onlin'" in run("--forms", "onlin", status=1)


def test_peak_memory_counts_what_a_step_keeps() -> None:
    """A layer in whose place eight of its outputs are kept for the backward pass takes that much more."""

    class Keeps(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.conv, self.times = nn.Conv2d(3, 64, 3, padding=1), times
            self.head = nn.Linear(64, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            for _ in range(self.times):
                x = x.sin()  # keeps its input
            result: torch.Tensor = self.head(x.mean((2, 3)))
            return result

    setting = Setting(batch=8, size=128)
    few, many = (Trainee(Keeps(times), setting).peak() for times in (1, 9))
    kept = 8 * 8 * 64 * 128 * 128 * 4
    assert 0.8 * kept < many - few < 1.2 * kept


@pytest.mark.gpu
def test_a_step_is_measured_on_a_gpu(tmp_path: Path) -> None:
    small = ("--network", "zoo:cifar_quick", "--batch", 8, "--size", 32, "--blocks", "acb", "--stem", "--rounds", 2)
    run("--device", "cuda", "--bf16", "--compiled", *small, "--out", tmp_path / "gpu.md")
    assert torch.cuda.get_device_name() in (tmp_path / "gpu.md").read_text()


def test_seconds_of_compilation_are_not_those_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain network and a block's are compiled from nothing, each time."""
    import torch._inductor.config as inductor

    seen: list[bool] = []
    monkeypatch.setattr(torch, "compile", lambda model: seen.append(inductor.force_disable_caches) or model)
    small = ("--network", "zoo:cifar_quick", "--batch", 4, "--size", 32, "--stem", "--rounds", 1)
    run("--compiled", *small, "--blocks", "repvgg", "--forms", "branches")
    assert seen == [True, True]


def test_a_network_whose_layers_get_no_block_is_said() -> None:
    five = "zoo:cifar_quick"  # kernels of 5x5
    output = run("--network", five, "--blocks", "acb", "--batch", 2, "--size", 32, status=2)
    assert "no layer of zoo:cifar_quick gets one of these blocks" in " ".join(output.split())
