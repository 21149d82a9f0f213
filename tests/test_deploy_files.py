"""Files that run without this library: torch.export's and ONNX, written by ``reparam collapse -o``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.onnx
from small_networks import Net, images, ready
from torch import Tensor, nn
from typer.testing import CliRunner

import reparam
from reparam import EquivalenceError, ReparamError, export
from reparam.cli import app


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_pt2_file_runs_without_this_library(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    done = run("collapse", "timm:test_byobnet", "-o", path, "--dynamic", "batch")
    assert done.exit_code == 0, done.output
    assert "the file was read again and gives the same for 2x3x" in done.output
    code = (
        "import sys, torch; "
        f"net = torch.export.load({str(path)!r}).module(); "
        "assert net(torch.zeros(5, 3, 160, 160)).shape[0] == 5; "
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('reparam', 'passes', 'zoo')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_of_open_sizes(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    done = run("collapse", "timm:test_byobnet", "-o", path, "--dynamic", "batch,height,width")
    assert done.exit_code == 0, done.output
    assert "onnxruntime gives the same for 2x3x160x160 and 3x3x192x224" in done.output
    assert run("verify", "timm:test_byobnet", path).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_computes_something_else_gets_no_name(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(Net())
    other = ready(Net())
    for name in ("torch.export.export", "torch.onnx.export"):
        home, _, last = name.rpartition(".")
        module = sys.modules[home]
        right = getattr(module, last)
        monkeypatch.setattr(module, last, lambda _, *rest, right=right, **options: right(other, *rest, **options))
    with pytest.raises(EquivalenceError):
        export.write_program(model, tmp_path / f"net{suffix}", (images(),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.filterwarnings("ignore")
def test_a_size_that_the_network_fixes_cannot_stay_open(suffix: str, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.zeros(4, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.table

    with pytest.raises(ReparamError, match=r"cannot export the network.*leave out what it fixes of --dynamic height"):
        export.write_program(Fixed(), tmp_path / f"net{suffix}", (torch.zeros(2, 3, 16, 16),), ("height",))
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_get_one_line(tmp_path: Path) -> None:
    done = run("collapse", "timm:test_byobnet", "-o", tmp_path / "a.pt2", "--dynamic", "depth")
    assert done.exit_code == 2
    assert "--dynamic takes batch, height, width, got 'depth'" in done.stderr
    done = run("collapse", "timm:test_byobnet", "-o", tmp_path / "a.pt", "--dynamic", "batch")
    assert done.exit_code == 2
    assert "for files that end in .pt2 or .onnx" in done.stderr
    assert run("collapse", "timm:test_byobnet", "-o", tmp_path / "none" / "a.pt2").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_sizes_come_from_what_the_network_is_made_for() -> None:
    model = ready(Net())
    assert export.inputs_for(model, (3, 40, 40))[0].shape == (1, 3, 40, 40)
    assert export.inputs_for(model, (3, 40, 40), ("batch",))[0].shape == (2, 3, 40, 40)
    model.pretrained_cfg = {"input_size": (3, 48, 48)}
    assert export.inputs_for(model)[0].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv"])
def test_an_expanded_network_exports_and_its_program_folds(block: str) -> None:
    plain = ready(Net())
    expanded = reparam.expand(plain, block).eval()
    program = torch.export.export(expanded, (images(),))
    result, report = reparam.collapse_with_report(program)
    assert report.after == reparam.collapse_with_report(torch.export.export(plain, (images(),)))[1].after
    assert torch.allclose(result.module()(images()), plain(images()), atol=1e-4)
