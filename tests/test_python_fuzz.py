"""A fuzz of Python, not only of graphs: what a forward does beside its graph survives every verb.

Each kind of Python alone, then random mixtures; see :mod:`python_modules` for how they are made and
:mod:`python_oracle` for what must hold. ``REPARAM_FUZZ=2000 pytest tests/test_python_fuzz.py -k mixture`` looks deeper.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from python_modules import AROUND, Program, Snippet, kinds, program, shrink, single
from python_oracle import VERBS, Problem, problems
from torch import nn

import reparam

SEEDS = int(os.environ.get("REPARAM_FUZZ", "300"))

FAILS: dict[str, str] = {}
"""Kinds that do not hold yet, with the reason."""

RAISES: dict[str, str] = {}
"""Kinds that a verb may answer with a ReparamError, with the reason; in any other an error is needless."""


def verbs_of(number: int) -> tuple[str, ...]:
    """One verb after the other; with ``REPARAM_FUZZ`` every program is tried with all of them."""
    return tuple(VERBS) if "REPARAM_FUZZ" in os.environ else (list(VERBS)[number % len(VERBS)],)


def needless(of: Program, verbs: tuple[str, ...]) -> list[Problem]:
    """What does not hold, errors included that this program has no reason for."""
    may_raise = any(kind in RAISES for kind in of.features())
    return [problem for problem in problems(of, verbs) if not (problem.allowed and may_raise)]


def marked(number: int, kind: str) -> Any:
    """Two of seven kinds are quick: seven has no divisor in common with the numbers of verbs and of places."""
    marks = [pytest.mark.xfail(reason=FAILS[kind])] if kind in FAILS else []
    return pytest.param(kind, marks=[*marks, *([] if number % 7 in (0, 3) else [pytest.mark.slow])])


@pytest.mark.parametrize("kind", [marked(*each) for each in enumerate(kinds())])
def test_each_kind_alone(kind: str) -> None:
    number = kinds().index(kind)
    of = single(kind, AROUND[number % 3])
    found = needless(of, verbs_of(number))
    assert not found, f"{found[0]}\n\n{of.source}"


def mixtures() -> list[Any]:
    """Seeds of programs without a kind that does not hold alone."""
    seeds = [seed for seed in range(SEEDS) if not any(kind in FAILS for kind in program(seed).features())]
    return [seed if seed < 24 else pytest.param(seed, marks=pytest.mark.slow) for seed in seeds]


@pytest.mark.parametrize("seed", mixtures())
def test_mixture(seed: int) -> None:
    """Fails with the source of the smallest program that shows the same problem."""
    of = program(seed)
    found = needless(of, verbs_of(seed))
    if found:
        verb = found[0].verb.partition(",")[0]

        def fails(smaller: Program) -> bool:
            return any((p.verb, p.kind) == (found[0].verb, found[0].kind) for p in problems(smaller, (verb,)))

        raise AssertionError(f"{found[0]}\n\n{shrink(of, fails).source}")


# ------------------------------------------------------------------ the fuzz itself


def test_a_seed_is_one_program() -> None:
    assert program(5) == program(5)
    assert len({program(seed).source for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", range(20))
def test_every_program_runs(seed: int) -> None:
    """Without one line of the library: the network, built twice, is the same network, and a copy of it."""
    of = program(seed)
    scope = of.load()
    first, second = scope["build"](), scope["build"]()
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let collapse return something else than it does."""
    honest = reparam.collapse_with_report

    def planted(model: nn.Module, **options: Any) -> Any:
        result, report = honest(model, **options)
        return change(result), report

    monkeypatch.setattr(reparam, "collapse_with_report", planted)


def kinds_found(of: Program) -> set[str]:
    return {problem.kind for problem in problems(of, ("collapse",))}


@torch.no_grad()
def off(model: nn.Module) -> nn.Module:
    """The model with one tensor a little off."""
    next(model.parameters()).mul_(1.001)
    return model


def drawing(model: nn.Module) -> nn.Module:
    """The model, and a number drawn on the way."""
    random.random()
    return model


def returning(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    """The model with another output."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return change(self.model(*args, **kwargs))

    return Changed()


def taking_one(model: nn.Module) -> nn.Module:
    """The model with one argument."""

    class One(nn.Module):
        def forward(self, x: Any) -> Any:
            return model(x)

    return One()


@pytest.mark.parametrize(
    ("kind", "change", "seen"),
    [
        ("conv_bn", off, "output differs"),
        ("returns:tuple", lambda m: returning(m, list), "output differs"),
        ("returns:named_tuple", lambda m: returning(m, tuple), "output differs"),
        ("conv_bn", lambda m: returning(m, lambda y: y.detach()), "output differs"),
        ("conv_bn", lambda m: returning(m, lambda y: y + 0 * torch.rand(())), "generators differs"),
        ("conv_bn", drawing, "generator disturbed"),
        ("arguments:flag", taking_one, "call raises"),
        ("numel", lambda m: 1 / 0, "raw exception"),
    ],
)
def test_the_oracle_sees_a_planted_defect(
    monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Any], Any], seen: str
) -> None:
    plant(monkeypatch, change)
    assert seen in kinds_found(single(kind))


def test_the_oracle_sees_a_disturbed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reparam.collapse_with_report

    def planted(model: nn.Module, **options: Any) -> Any:
        outcome = honest(model, **options)
        next(model.parameters()).data.add_(1e-6)
        return outcome

    monkeypatch.setattr(reparam, "collapse_with_report", planted)
    assert "model disturbed" in kinds_found(single("conv_bn"))


def test_shrinking_leaves_what_matters() -> None:
    """Of a large program only the snippet that fails is left."""
    big = next(p for p in map(program, range(500)) if "numel" in p.features() and len(p.body) > 1)

    def fails(of: Program) -> bool:
        return "numel" in of.features()

    small = shrink(big, fails)
    assert [item.kind for item in small.body if isinstance(item, Snippet)] == ["numel"]
    assert (small.style, small.arguments, small.returns) == ("plain", "one", "tensor")
