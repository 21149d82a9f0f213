"""The few steps of training that the demo does on handwritten digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from zoo.train.data import Digits

__all__ = ["Score", "score", "train"]


@dataclass(frozen=True)
class Score:
    """What a network does on the held-out digits: mean cross-entropy, share of right answers, the answers."""

    loss: float
    accuracy: float
    answers: Tensor


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
