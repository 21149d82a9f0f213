"""A candidate with its numbers: the layer that takes the place of the layers that vanish."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from passes.algebra.conv_form import ConvForm, Form
from passes.algebra.lowering import emit, target_of
from passes.fold.candidates import Candidate
from passes.fold.placement import Placement
from passes.graph.dataflow import Flow
from passes.laws.interpreter import form_of, shares_of
from passes.refusal import RefusalError

__all__ = ["Fold", "folded"]


@dataclass(frozen=True, eq=False)
class Fold:
    """What one candidate becomes.

    Args:
        candidate: the region.
        placement: where the layer goes.
        layer: the convolution or linear layer, in the dtype that it is shipped in; None for a map that others take.
        form: what the layer computes, exactly.
        error: largest difference found by the proof, relative to the largest output; None if not proven.
    """

    candidate: Candidate
    placement: Placement
    layer: nn.Module | None
    form: Form
    error: float | None = None


def folded(flow: Flow, candidate: Candidate, placement: Placement) -> Fold:
    """The fold of a candidate, its form in float64; refuses what only numbers tell."""
    with torch.no_grad():
        if candidate.is_alias and candidate.spread is not None:
            shares_of(flow, candidate.spread)
            return Fold(candidate, placement, None, candidate.form)
        form = form_of(flow, candidate)
        if isinstance(form, ConvForm) and isinstance(candidate.form, ConvForm):
            form = replace(form, channelwise=candidate.form.channelwise)
        refusal = candidate.costs(form)
        if refusal is not None:
            raise RefusalError(refusal.reason, refusal.message)
        nodes = [*candidate.dying, *candidate.constants]
        layer = emit(form, target_of(t for n in nodes for t in flow.tensors.get(n, ())))
    return Fold(candidate, placement, layer, form)
