"""Comparing two whole networks that need not have been made of each other; see :mod:`passes.proof.compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from passes.graph.inputs import Example
from passes.proof.compare import Comparison, Equivalence, Verdict, coarsest_dtype, compared, distance, judge, tolerance
from passes.proof.locate import NOWHERE, Choices, Record, choose_alike, first_difference
from passes.proof.run import in_dtype, outputs, runner_of
from passes.refusal import ReparamError

__all__ = ["Expected", "compare", "compare_outputs", "expect"]


@dataclass(frozen=True)
class Expected:
    """What a model returns on some inputs, in float64, and how far its own dtype is from that."""

    value: Any
    noise: float | None


def expect(model: nn.Module, example: Example, dtype: torch.dtype | None = None) -> Expected:
    """What to expect of a model that should compute what ``model`` computes, shipped in ``dtype`` (default: its own).

    Raises :class:`ReparamError` if there is nothing to compare.
    """
    dtype = dtype or coarsest_dtype(model)
    wanted = outputs(model, example)
    if not compared(wanted, wanted).numbers:
        raise ReparamError("nothing to compare: the model returns no numbers for these inputs")
    return Expected(wanted, None if dtype == torch.float64 else distance(outputs(model, example, dtype), wanted)[1])


def compare_outputs(expected: Expected, candidate: nn.Module, example: Example) -> Equivalence:
    """As :func:`compare`, when the reference is not at hand; without the place of the first difference."""
    dtype = coarsest_dtype(candidate)
    found = compared(outputs(candidate, example), expected.value, types=False)
    verdict = judge(found.max_rel, expected.noise, dtype)
    allowed = tolerance(expected.noise, dtype)
    return Equivalence(verdict, found.max_abs, found.max_rel, allowed, expected.noise, None, _kind(found))


def compare(reference: nn.Module, candidate: nn.Module, example: Example) -> Equivalence:
    """Compare two networks on one call, in float64; see :class:`Equivalence`.

    Raises :class:`ReparamError` if there is nothing to compare.
    """
    dtype = coarsest_dtype(candidate)
    result = compare_outputs(expect(reference, example, dtype), candidate, example)
    return result if result.ok else _located(result, reference, candidate, example, dtype)


def _kind(found: Comparison) -> str:
    return found.differences[0].what.replace("returns", "the candidate returns", 1) if found.differences else ""


def _located(
    result: Equivalence, reference: nn.Module, candidate: nn.Module, example: Example, dtype: torch.dtype
) -> Equivalence:
    """Find the module where the difference starts, or the selection that makes it say nothing."""
    rough = dtype != torch.float64
    where = first_difference(
        Record.of(runner_of(reference), example),
        Record.of(runner_of(candidate), example),
        Record.of(_in(reference, dtype), in_dtype(example, dtype), double=False) if rough else None,
        dtype,
    )
    if where != NOWHERE:
        return replace(result, verdict=Verdict.DIFFERENT, first_difference=where)
    choice = choose_alike(
        Choices.of(runner_of(reference), example),
        Choices.of(runner_of(candidate), example),
        Choices.of(_in(reference, dtype), in_dtype(example, dtype), double=False) if rough else None,
        dtype,
    )
    if choice is not None:
        reason = f"{choice} selects otherwise by numbers that agree within rounding: what is behind it says nothing"
        return replace(result, verdict=Verdict.INCONCLUSIVE, reason=reason)
    if result.verdict is Verdict.INCONCLUSIVE:
        reason = f"rounding alone makes a difference of {result.noise:.2g} in the reference"
        return replace(result, reason=reason)
    return replace(result, first_difference=where)


def _in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return runner_of(model, double=False).to(dtype)
