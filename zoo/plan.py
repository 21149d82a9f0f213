"""One model of a run, planned only: on the meta device, where a network of a billion parameters is as light as any.

The network is collapsed there (what would fold, and what would be left), expanded there, and given to the folds that
others ship, to count what those leave.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

import reparam
from reparam import ReparamError, sources
from reparam.recipe import parse_block
from zoo.families import Baseline
from zoo.job import Ended, Job, Tell, Work, attempt, silent
from zoo.measure import shipped_fold, size, size_of
from zoo.outcome import NothingToDo, Outcome, Planned

__all__ = ["OTHERS", "Planning", "plan", "skeleton"]

OTHERS: tuple[Baseline, ...] = ("timm", "fx")
"""Folds that others ship: timm's ``reparameterize_model`` and ``torch.fx.experimental.optimization.fuse``."""


def skeleton(spec: str) -> nn.Module:
    """The architecture without numbers: the network on the meta device, in eval mode.

    Raises :class:`ReparamError` if it cannot be built.
    """
    try:
        with torch.device("meta"):
            return sources.create(spec).eval().to("meta")  # one that stood ready in a module has numbers
    # Some constructors compute their widths with tensors, and ask those for values: these need numbers for a moment.
    except ReparamError:
        return sources.create(spec).eval().to("meta")


def plan(job: Job, tell: Tell = silent) -> Outcome:
    """Plan one model. Never raises an ordinary exception: what goes wrong is the outcome."""
    return attempt(Planning(job, tell))


class Planning(Work):
    """One plan: its stages as methods."""

    def run(self) -> Outcome:
        """Collapse and expand without numbers, and compare what is left with what other folds leave."""
        with self.clock("build"):
            model = skeleton(self.job.spec)
        if next(model.parameters(), None) is None:
            raise Ended(NothingToDo, reason="it has no parameters")
        with self.clock("collapse"):
            rules = {"norms": self.job.settings.norms, "cost": self.job.settings.cost}
            folded, explanation = reparam.collapse_with_report(model, verify=False, **rules)
        expanded, left = 0, {}
        if self.job.settings.block is not None:
            with self.clock("expand"):
                found = reparam.plan(model, parse_block(self.job.settings.block))
            expanded = len(found.expanded)
            left = dict(Counter(row.refusal.reason.value for row in found.refused if row.refusal is not None))
        before, after = size_of(model), size_of(folded)
        with self.clock("others"):
            others = {name: _left_by(name, model) for name in OTHERS}
        return Planned(
            **self.common(),
            before=before,
            after=after,
            folds=len(explanation.folds),
            refused=dict(explanation.reasons()),
            expanded=expanded,
            left=left,
            others=others,
        )


def _left_by(fold: Baseline, model: nn.Module) -> dict[str, int] | None:
    """Convolutions and batch norms that another fold leaves; None if it fails on this network.

    Where it asks for numbers it gets some, of any value: only layers are counted.
    """
    # It is other people's code on other people's networks, which may fail in any way.
    try:
        counts = size(shipped_fold(fold)(model))
    except Exception:
        try:
            counts = size(shipped_fold(fold)(model.to_empty(device="cpu")))
        except Exception:
            return None
    return {"convs": counts.convs, "norms": counts.norms}
