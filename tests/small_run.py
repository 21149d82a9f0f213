"""A run of training as small as it gets, and the folder that it leaves, for the tests of training states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.train.checkpoint import Folder
from zoo.train.config import Config
from zoo.train.result import Epoch
from zoo.train.state import Parts

CONFIG = Config(epochs=3)


def fresh(kind: str = "sgd") -> Parts:
    """A run that has not begun: a small network, its average and an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    }
    return Parts(model, copy.deepcopy(model), make[kind](model.parameters()))


def row(number: int) -> Epoch:
    return Epoch(number, 1.0, 0.1, 0.5, 0.5, 0.5, 0.5, None, 1000)


def step(run: Parts) -> None:
    run.optimizer.zero_grad()
    run.model(torch.randn(4, 1, 4, 4)).square().sum().backward()
    run.optimizer.step()


def write_run(path: Path, kind: str = "sgd", epochs: int = 2) -> Folder:
    """The folder of a run that was stopped after these epochs."""
    folder, run, log = Folder(path), fresh(kind), list[Epoch]()
    for number in range(1, epochs + 1):
        step(run)
        log.append(row(number))
        folder.path.mkdir(exist_ok=True)
        folder.write_state(run.pack(log), CONFIG, "zoo:mnist_toy", None)
    return folder
