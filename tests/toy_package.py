"""A made-up package that announces a model source and two commands, for the tests of discovery."""

from __future__ import annotations

from pathlib import Path

import pytest

CODE = '''
import torch, typer
from torch import nn

class Block(nn.Module):
    """Two branches and a head: what collapse is for, as small as it gets."""
    def __init__(self, width=4, dtype=None):
        super().__init__()
        self.square = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(torch.relu(self.square(x) + self.point(x)).mean((2, 3)))

class Source:
    def names(self):
        return ["block", "black", "tower"]
    def create(self, name, *, pretrained, **options):
        if pretrained:
            raise OSError("no weights here")
        return Block(**options)

class Missing:
    def names(self):
        import a_package_that_is_not_installed
    create = None

source, missing = Source(), Missing()

def hello(name: str = "you"):
    """Say hello."""
    typer.echo(f"hello {name}")

def crash():
    """Fail in a way nobody foresaw."""
    raise RuntimeError("out of\\ncheese")

group = typer.Typer(help="A group.")

@group.command()
def inner():
    typer.echo("inside")

@group.command()
def other():
    pass
'''
ENTRY_POINTS = """[reparam.sources]
toy = toy_zoo:source
missing = toy_zoo:missing
broken = toy_zoo_that_is_not_there:source

[reparam.commands]
hello = toy_zoo:hello
crash = toy_zoo:crash
group = toy_zoo:group
broken = toy_zoo_that_is_not_there:command
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install the package for one test; returns the spec of its network."""
    folder = tmp_path / "installed"
    info = folder / "toy_zoo-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "toy_zoo.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    return "toy:block"
