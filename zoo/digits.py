"""Real data that needs no download, and the few steps of training that the demo does on it.

The data are the 1,797 handwritten digits that scikit-learn ships: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits" (UCI Machine Learning Repository, 1998), the test part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam

__all__ = ["Digits", "Score", "digits", "score", "train"]

HELD_OUT = 297
"""Digits that are never trained on."""


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 3, size, size)`` of mean 0 and deviation 1, float32; labels 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Score:
    """What a network does on the held-out digits: mean cross-entropy, share of right answers, the answers."""

    loss: float
    accuracy: float
    answers: Tensor


def digits(size: int = 32, seed: int = 0) -> Digits:
    """The digits, upscaled from 8x8 and with three equal channels, as networks for photographs take them.

    Raises :class:`reparam.ReparamError` if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise reparam.ReparamError(f"the digits need scikit-learn ({error}): pip install 'reparam[zoo]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    images = F.interpolate((images - images.mean()) / images.std(), size=(size, size), mode="bilinear")
    images = images.expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[rest], labels[rest], images[test], labels[test])


def train(
    model: nn.Module, data: Digits, *, steps: int, batch: int, rate: float = 2e-3, seed: int = 0
) -> Iterator[float]:
    """Train ``model`` in place; yields the loss of each step, so that the caller can say how far it is.

    AdamW with :func:`reparam.param_groups` and a rate that falls to zero along a cosine.
    """
    optimizer = torch.optim.AdamW(reparam.param_groups(model, 0.05), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(data.train), (batch,), generator=generator)
        loss = F.cross_entropy(model(data.train[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def score(model: nn.Module, data: Digits) -> Score:
    """The network in eval mode on the held-out digits."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = model(data.test)
    model.train(was)
    answers = logits.argmax(1)
    right = (answers == data.test_labels).float().mean()
    return Score(float(F.cross_entropy(logits, data.test_labels)), float(right), answers)
