"""A made-up package whose networks crash, hang, take all memory or fold wrongly, for the tests of batch conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

CODE = '''
import ctypes, os, subprocess, sys, time
import torch
from torch import nn

class Block(nn.Module):
    """Two branches and a head."""
    def __init__(self, width=4):
        super().__init__()
        self.square = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(torch.relu(self.square(x) + self.point(x)).mean((2, 3)))

class Plain(nn.Sequential):
    """A convolution that a block can take, and its norm."""
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

class Detector(nn.Module):
    """Takes no tensor that could be guessed."""
    def __init__(self):
        super().__init__()
        self.body = Plain()
    def forward(self, images, *, sizes):
        return self.body(torch.stack(images))

def plant_a_defect():
    """Make the collapse of this process wrong."""
    import reparam
    right = reparam.collapse_with_report
    def wrong(model, **options):
        folded, explanation = right(model, **options)
        with torch.no_grad():
            folded.head.weight[0, 0] += 1e-2
        return folded, explanation
    reparam.collapse_with_report = wrong

def greedy():
    held = []
    while True:
        held.append(torch.ones(8 << 20))
        time.sleep(0.01)

def hang():
    while True:
        pass

def noted(name):
    """Write down that this network is being built; slow enough to be killed meanwhile."""
    with open(os.environ["TROUBLE_LOG"], "a") as file:
        file.write(name + "\\n")
    time.sleep(0.4)
    return Block()

def leave_a_process():
    """Start what outlives this process, and write down who both are."""
    left = subprocess.Popen(["sleep", "600"])
    with open(os.environ["TROUBLE_LOG"], "a") as file:
        file.write(f"{left.pid} {os.getpid()}\\n")

def hang_in_c():
    """As code that never gives Python's lock back."""
    ctypes.PyDLL(None).sleep(600)

class Source:
    def names(self):
        return ["block", "plain", "detector", "linear", "batch", "empty", "abort", "hang", "greedy", "wrong", "killed",
                "exit", "raise", "leaves", "stuck", "between", *(f"slow{i}" for i in range(6))]
    def create(self, name, *, pretrained, **options):
        if pretrained:
            raise OSError("no weights") from ConnectionError("unreachable")
        if name.startswith("slow"):
            return noted(name)
        match name:
            case "leaves":
                leave_a_process()
            case "stuck":
                leave_a_process()
                hang_in_c()
            case "abort":
                print("last words", flush=True)
                os.abort()
            case "hang":
                hang()
            case "greedy":
                greedy()
            case "killed":
                os.kill(os.getpid(), 9)
            case "exit":
                sys.exit(3)
            case "raise":
                raise ValueError("out of cheese")
            case "wrong":
                plant_a_defect()
            case "plain":
                return Plain()
            case "between":
                return nn.Sequential(*Plain(), nn.BatchNorm2d(4), nn.ReLU())
            case "detector":
                return Detector()
            case "linear":
                return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            case "batch":
                return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
            case "empty":
                return nn.ReLU()
        return Block(**options)

source = Source()
'''
ENTRY_POINTS = "[reparam.sources]\ntrouble = troublesome_zoo:source\n"


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the package for one test, as the source ``trouble``; returns the folder that it is in."""
    folder = tmp_path / "installed"
    info = folder / "troublesome_zoo-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "troublesome_zoo.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: troublesome-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TROUBLE_LOG", str(tmp_path / "built.txt"))
    return folder
