"""What a run gives: one row of numbers for each epoch, and what is read off them at the end."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Epoch", "Result"]

LAST = 10
"""Evaluations that the reported mean is over, as in ACNet (ICCV 2019), sec. 4.1."""


@dataclass(frozen=True)
class Epoch:
    """A row of the log. Losses are means of the cross-entropy, accuracies shares; None where nothing was evaluated.

    Args:
        epoch: counted from 1.
        seconds: of training, evaluation aside.
        rate: learning rate of the last step.
        train_loss: of the batches as they were trained on, label smoothing included.
        train_accuracy: likewise, with augmentation and before the step.
        test_loss: on the test images, without smoothing.
        test_accuracy: likewise.
        ema_test_accuracy: of the averaged weights.
        peak_bytes: memory that the network, its optimizer and the steps of this epoch held at most.
    """

    epoch: int
    seconds: float
    rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    ema_test_accuracy: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    """What a run gave; accuracies are shares of the test images.

    Args:
        epochs: the log.
        images: trained on in each epoch.
        parameters: of the network in training.
        model: as the last epoch left it, without any wrapper.
        averaged: the averaged weights, if the run averages.
    """

    epochs: tuple[Epoch, ...]
    images: int
    parameters: int
    model: nn.Module
    averaged: nn.Module | None = None

    @property
    def evaluations(self) -> list[float]:
        return [epoch.test_accuracy for epoch in self.epochs if epoch.test_accuracy is not None]

    @property
    def averaged_evaluations(self) -> list[float]:
        """Of the averaged weights."""
        return [epoch.ema_test_accuracy for epoch in self.epochs if epoch.ema_test_accuracy is not None]

    @property
    def best(self) -> float:
        return max(self.evaluations, default=math.nan)

    @property
    def last(self) -> float:
        return self.evaluations[-1] if self.evaluations else math.nan

    @property
    def mean_of_last(self) -> float:
        """Mean of the last ten evaluations."""
        return statistics.fmean(self.evaluations[-LAST:]) if self.evaluations else math.nan

    @property
    def seconds(self) -> float:
        """Of training, evaluation aside."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def peak_bytes(self) -> int:
        """Memory of an epoch at most, of the middle epoch: the first one also loads libraries."""
        return statistics.median_low([epoch.peak_bytes for epoch in self.epochs]) if self.epochs else 0

    @property
    def images_per_second(self) -> float:
        return self.images * len(self.epochs) / self.seconds if self.seconds else math.nan

    def to_json(self) -> dict[str, Any]:
        """The numbers; those of averaged weights only where there are some."""
        names = ("best", "last", "mean_of_last", "seconds", "peak_bytes", "parameters", "images_per_second")
        numbers = {name: getattr(self, name) for name in names}
        averaged = self.averaged_evaluations
        if averaged:
            numbers |= {"ema_best": max(averaged), "ema_last": averaged[-1]}
            numbers["ema_mean_of_last"] = statistics.fmean(averaged[-LAST:])
        return numbers
