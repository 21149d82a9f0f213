"""Milliseconds and multiply-adds of two networks whose runs take turns, within a budget of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.inputs import View
from zoo.outcome import Latency

__all__ = ["in_turns", "race"]

BUDGET = 0.5
"""Seconds for all timed runs of both networks, if each then runs at least once."""
RUNS = 9
"""Runs of each at most."""


def race(before: nn.Module, after: nn.Module, view: View) -> tuple[Latency, int, int]:
    """Latency of both on one sample of ``view``, and the multiply-adds of each.

    The first run of each counts multiply-adds and is not timed: it pays for first uses.
    """
    inputs = view.inputs(1)
    work = [_multiply_adds(model, view, inputs) for model in (before, after)]
    return in_turns(inputs[0].shape, lambda: view.run(before, inputs), lambda: view.run(after, inputs)), *work


def in_turns(shape: Sequence[int], before: Callable[[], object], after: Callable[[], object]) -> Latency:
    """Latency of two networks that were run once before, on one sample of ``shape``."""
    runs: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while not runs[0] or (len(runs[0]) < RUNS and time.perf_counter() - began < BUDGET):
        for run, times in zip((before, after), runs, strict=True):
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e3)
    medians = [statistics.median(times) for times in runs]
    return Latency(tuple(shape), *medians, *(tuple(round(t, 4) for t in times) for times in runs))


def _multiply_adds(model: nn.Module, view: View, inputs: tuple[Tensor, ...]) -> int:
    with _no_gradients(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        view.run(model, inputs)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _no_gradients(model: nn.Module) -> Iterator[None]:
    """Torch's counter follows gradients through modules, and fails on a parameter that is passed to one."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
