"""Which layers get which block in which form, so that a training step costs at most so many times the plain one.

Two limits, time and memory, each a factor on the plain step. What is above 1 is the *room*; an option (a block in a
form at one layer) takes up a share of each room. The rule:

1. The cheapest option of each layer, by the sum of its shares. Layers in the order of their *worth*: numbers of the
   kernel per share. Each gets its option if that still fits, else a dearer one that does, else none.
2. In the same order, what is left of the room goes to the option of each layer with most trained numbers that fits;
   among equal ones to the form that was named first.

This orders by cost and capacity. Nothing here knows which block makes a network more accurate.

Prices are those of single layers, so the chosen network is measured, too; the prices are scaled by what it took, and
the choice is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.blocks.kit.registry import Block
from passes.refusal import ReparamError
from passes.training.forms import Form

__all__ = ["Limits", "Option", "Pair", "Round", "choose", "settle", "worth"]

Pair = tuple[float, float]
"""Time and memory, in plain training steps."""

ROUNDS = 4
"""Choices that are measured at most."""
ENOUGH = 0.9
"""Share of a room from which on no better choice is looked for."""
MARGIN = 1.02
"""By so much more than was measured are prices raised after a choice that was too dear."""
SCALES = (0.1, 10.0)
"""Between these a price may be off."""


@dataclass(frozen=True)
class Limits:
    """What a training step may take at most, as factors on the plain one's; None where it does not matter.

    Raises :class:`ReparamError` for what is no number from 1 on.
    """

    time: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name, factor in (("budget", self.time), ("memory", self.memory)):
            number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
            if factor is not None and not (number and 1 <= factor < math.inf):
                raise ReparamError(
                    f"{name} is a number from 1 on, times what a plain training step takes, 1.5 for example; "
                    f"got {factor!r}"
                )

    @property
    def factors(self) -> Pair:
        return (self.time or math.inf, self.memory or math.inf)

    @property
    def room(self) -> Pair:
        return (self.factors[0] - 1, self.factors[1] - 1)

    def __str__(self) -> str:
        named = (("time", self.time), ("memory", self.memory))
        return " and ".join(f"{factor:g} times the {name}" for name, factor in named if factor is not None)


@dataclass(frozen=True)
class Option:
    """A block in a form at one layer.

    Args:
        kernel: numbers of the layer's kernel.
        trained: numbers that are trained with the block.
        rank: place of the form among those that were named.
        price: what it adds to a training step.
    """

    layer: str
    block: Block
    form: Form
    kernel: int
    trained: int
    rank: int
    price: Pair


@dataclass(frozen=True)
class Round:
    """A choice that was measured; ``scale`` is what its prices were taken times, ``result`` what was measured."""

    chosen: tuple[Option, ...]
    scale: Pair
    measured: Pair
    result: Any = field(default=None, compare=False, repr=False)

    @property
    def predicted(self) -> Pair:
        time, memory = _sum(self.chosen)
        return (1 + time * self.scale[0], 1 + memory * self.scale[1])

    def holds(self, limits: Limits) -> bool:
        return all(measured <= factor for measured, factor in zip(self.measured, limits.factors, strict=True))

    def used(self, limits: Limits) -> float:
        """The share of the room that is used up most."""
        return max((m - 1) / r for m, r in zip(self.measured, limits.room, strict=True))


def worth(option: Option, room: Pair, scale: Pair = (1.0, 1.0)) -> float:
    """Numbers of the kernel per share of the room that the option takes up."""
    return option.kernel / max(sum(_shares(option, room, scale)), 1e-9)


def choose(options: Sequence[Option], room: Pair, scale: Pair = (1.0, 1.0)) -> tuple[Option, ...]:
    """At most one option of each layer, by the rule above; in the order of the rule."""
    if min(room) <= 0:
        return ()
    layers: dict[str, list[Option]] = {}
    for option in sorted(options, key=lambda o: (sum(_shares(o, room, scale)), o.rank)):
        layers.setdefault(option.layer, []).append(option)
    order = sorted(layers, key=lambda layer: (-worth(layers[layer][0], room, scale), -layers[layer][0].kernel))
    chosen: dict[str, Option] = {}

    def fits(option: Option) -> bool:
        wanted = [*(o for layer, o in chosen.items() if layer != option.layer), option]
        taken = zip(*(_shares(o, room, scale) for o in wanted), strict=True)
        return all(math.fsum(shares) <= 1 + 1e-9 for shares in taken)

    for layer in order:
        first = next(filter(fits, layers[layer]), None)
        if first is not None:
            chosen[layer] = first
    for layer in list(chosen):
        chosen[layer] = next(filter(fits, sorted(layers[layer], key=lambda o: (-o.trained, o.rank))))
    return tuple(chosen.values())


def settle(
    options: Sequence[Option],
    limits: Limits,
    tried: Callable[[Sequence[Option]], tuple[set[str], Callable[[], Pair], Any]],
) -> tuple[Round | None, tuple[Round, ...]]:
    """Choose, measure, correct the prices and choose again: the best choice that keeps to the limits, and all of them.

    ``tried`` says of a choice which of its layers keep their block, what a step takes then, and anything to remember.
    """
    scale: Pair = (1.0, 1.0)
    rounds: list[Round] = []
    seen: set[tuple[Option, ...]] = set()
    while len(rounds) < ROUNDS:
        chosen = choose(options, limits.room, scale)
        if not chosen or chosen in seen:
            break
        seen.add(chosen)
        kept, measure, result = tried(chosen)
        lost = {option.layer for option in chosen} - kept
        options = [option for option in options if option.layer not in lost]
        chosen = tuple(option for option in chosen if option.layer in kept)
        if not chosen:
            continue
        rounds.append(Round(chosen, scale, measure(), result))
        if rounds[-1].holds(limits) and (
            rounds[-1].used(limits) >= ENOUGH or (not lost and _all_have_most(chosen, options))
        ):
            break
        scale = _corrected(rounds[-1], limits)
    good = [each for each in rounds if each.holds(limits)]
    return max(good, key=lambda each: each.used(limits), default=None), tuple(rounds)


def _corrected(last: Round, limits: Limits) -> Pair:
    """The scale with which the prices of a choice come to what it took."""
    found = []
    for price, measured, factor in zip(_sum(last.chosen), last.measured, limits.factors, strict=True):
        true = (measured - 1) / price if price > 0 else 1.0
        found.append(min(max(true * (MARGIN if measured > factor else 1), SCALES[0]), SCALES[1]))
    return found[0], found[1]


def _all_have_most(chosen: Sequence[Option], options: Sequence[Option]) -> bool:
    """Whether there is nothing left to add."""
    most = {o.layer: o for o in sorted(options, key=lambda o: (o.trained, -o.rank))}
    return set(chosen) == set(most.values())


def _shares(option: Option, room: Pair, scale: Pair) -> Pair:
    time, memory = (max(p, 0.0) * s / r for p, s, r in zip(option.price, scale, room, strict=True))
    return time, memory


def _sum(options: Sequence[Option]) -> Pair:
    return math.fsum(max(o.price[0], 0) for o in options), math.fsum(max(o.price[1], 0) for o in options)
