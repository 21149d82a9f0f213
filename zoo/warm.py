"""Imported by the server that processes are forked from: loads, and uses once, what each would load and use anew."""

from __future__ import annotations

import contextlib
import importlib

import torch
from torch import nn

from zoo import job, orphan
from zoo.inputs import find_view
from zoo.latency import race
from zoo.measure import warm_up

# A process may only be forked while no thread but the main one is at work.
torch.set_num_threads(1)

for package in ("timm", "torchvision"):
    with contextlib.suppress(ImportError):
        importlib.import_module(package)
warm_up()
small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
view, _ = find_view(small)
if view is not None:
    race(small, small, view)
job.versions()
del small
orphan.settled()
