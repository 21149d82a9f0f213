"""Expansion tried on a copy: the original against the network with blocks, in evaluation and in training.

A block is built from what the graphs say; whether the module does the same is seen by running it. Every block has to be
entered where its convolution was: a layer that other code holds as well (in a list, in a closure) would be called past
its block. What does not hold is taken back alone, or keeps its norm outside if that is enough; the rest stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from passes.graph.copies import deep_copy, shadow
from passes.graph.errors import first_line
from passes.graph.inputs import likely
from passes.graph.modes import has_own_modes
from passes.graph.patches import patched
from passes.proof.check import Checked, NoInputError, Observed, check, observe
from passes.proof.compare import Difference, Verdict
from passes.refusal import Reason, Refusal, ReparamError
from passes.training.retrace import Reading, traced_alike

__all__ = ["Outcome", "try_blocks"]

MAX_CULPRITS = 16
"""Most blocks that are looked for one by one; beyond that the expansion as a whole is wrong."""


class Placed(Protocol):
    """A block in a convolution's place."""

    @property
    def layer(self) -> str: ...


Row = TypeVar("Row", bound=Placed)
Put = Callable[[nn.Module, Sequence[Row]], dict[str, dict[str, str]]]


@dataclass(frozen=True)
class Outcome(Generic[Row]):
    """What holds: the rows to carry out, what was taken back or changed, and what was compared.

    Args:
        kept: rows in their order; one may stand for another that kept less outside.
        taken_back: why a row is not carried out, by its layer.
        changed: why a row is carried out in another way, by its layer.
        compared: what was compared and on what, or why nothing could be.
        unseen: why a row that only a run can show was not tried, by its layer.
    """

    kept: tuple[Row, ...]
    taken_back: dict[str, Refusal]
    changed: dict[str, Refusal]
    compared: tuple[str, ...]
    unseen: dict[str, Refusal] = field(default_factory=dict)


def try_blocks(
    model: nn.Module,
    rows: Sequence[Row],
    put: Put[Row],
    smaller: Callable[[Row], Row | None],
    example: Any = None,
    expected: Callable[[Row], bool] = lambda row: True,
    unread: Callable[[Row], Refusal | None] = lambda row: None,
    again: Callable[[Row], Row] = lambda row: row,
    *,
    exact_in_training: bool = True,
    read: Sequence[Reading] = (),
) -> Outcome[Row]:
    """Which blocks the model runs, and computes the same with.

    Args:
        model: the original; it is not changed.
        rows: what to try.
        put: puts blocks, made to keep the function, into a model, and gives the new paths of modules that moved, by the
            layer that they moved for.
        smaller: the row with less in its block; None if there is no less.
        example: example inputs in any form, or None to make some up.
        expected: whether a row's convolution runs on every input.
        unread: why no graph shows how a row's convolution is used, if none does: it is tried if it is seen called.
        again: such a row for a convolution that is called more than once.
        exact_in_training: whether the blocks compute the same in training too; if not, they are tried in evaluation.
        read: what is known of the code of the model, in evaluation and in training.

    Raises:
        EquivalenceError: the network differs, and it is not single blocks that are to blame.
        ReparamError: the model rejects ``example``.
    """
    if not rows:
        return Outcome((), {}, {}, ())
    with _eager():
        seen, why = _observed(model, example)
        unseen = {row.layer: told for row in rows if (told := _not_shown(row, unread(row), seen, why)) is not None}
        rows = [again(row) if unread(row) and _calls(row, seen) > 1 else row for row in rows if row.layer not in unseen]
        if seen and not exact_in_training:
            seen, why = seen[:1], [*why, "not compared in training, where a block is exact only up to eps"]
        copied: nn.Module | None = None
        if not seen:
            try:
                copied = shadow(model)
            except ReparamError:  # it is edited in place, and nothing can be seen before
                return Outcome(tuple(rows), {}, {}, tuple(why), unseen)
        trial = _Trial(model, seen, put, expected, read, copied)
        doubted = frozenset(row.layer for row in rows if unread(row) is not None)
        return replace(trial.settle(list(rows), smaller, why, doubted), unseen=unseen)


def _not_shown(row: Placed, unread: Refusal | None, seen: list[Observed], why: list[str]) -> Refusal | None:
    """Why a run does not show either how a convolution is used that no graph shows."""
    if unread is None:
        return None
    if not seen:
        return replace(unread, message=f"{unread.message}; no run shows how it is used ({why[0]})")
    if not _calls(row, seen):
        return replace(unread, message=f"{unread.message}; no call of it is seen: pass example_inputs that lead there")
    return None


def _calls(row: Placed, seen: list[Observed]) -> int:
    """The most calls of a convolution in one call of the network."""
    return max(run.counts.get(row.layer, 0) for one in seen for run in one.calls)


def _eager() -> Any:
    """Parts that are compiled run as they are written: to compile them for one call takes longer than all the rest."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def _observed(model: nn.Module, example: Any) -> tuple[list[Observed], list[str]]:
    """The model in evaluation and in training, and why one of them could not be seen."""
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        return [], ["not run: the model is on the meta device"]
    try:
        evaluated = observe(model, example) if example is not None else _made_up(model)
    except NoInputError as error:
        return [], [f"not run: {error}; pass example_inputs"]
    except ReparamError as error:
        if example is not None and "rejects" in str(error):
            raise
        return [], [f"not run: {error}"]
    try:
        return [evaluated, observe(model, evaluated.example, training=True)], []
    except ReparamError as error:
        return [evaluated], [f"not run in training: {error}"]


LEAST = {4: (32, 32), 5: (8, 16, 16)}
"""Sizes of a map, by its rank, that show who calls whom as well as larger ones do."""


def _made_up(model: nn.Module) -> Observed:
    first = next(likely(model), None)
    if first is not None and all(isinstance(x, Tensor) and x.dim() in LEAST for x in first.args):
        cropped = [x[(..., *(slice(size) for size in LEAST[x.dim()]))] for x in first.args]
        try:
            return observe(model, replace(first, args=tuple(cropped)))
        except ReparamError:
            pass  # too small for this model, which other sizes may not be
    return observe(model)


def _modes(model: nn.Module) -> list[dict[str, bool]]:
    """The mode of every module after the model's own train(), and after its eval(); empty if these are torch's."""
    if not has_own_modes(model):
        return []
    copied = deep_copy(model)
    found = []
    for training in (True, False):
        copied.train(training)
        found.append({path: module.training for path, module in copied.named_modules()})
    return found


class _Trial(Generic[Row]):
    """Runs the model with some of the blocks; every attempt begins with a new copy."""

    def __init__(
        self,
        model: nn.Module,
        seen: list[Observed],
        put: Put[Row],
        expected: Callable[[Row], bool],
        read: Sequence[Reading],
        copied: nn.Module | None,
    ) -> None:
        self.model, self.seen, self.put, self.expected = model, seen, put, expected
        self.copied = copied  # for the first attempt
        self.read = read or (None, None)
        self.ran: frozenset[str] = frozenset[str]().union(*(one.ran for one in seen))
        self.modes = _modes(model)

    def settle(
        self, rows: list[Row], smaller: Callable[[Row], Row | None], why: list[str], doubted: frozenset[str]
    ) -> Outcome[Row]:
        taken_back: dict[str, Refusal] = {}
        changed: dict[str, Refusal] = {}
        while True:
            checks, unlike = self.run(rows)
            missing = self.never_run(rows, checks)
            for row in missing:
                why_not = f"{Reason.NOT_RUN.value}: other code holds the layer and calls it itself"
                taken_back[row.layer] = Refusal(Reason.NOT_RUN, why_not, row.layer)
            for row in [row for row in rows if row.layer in unlike]:
                (taken_back if smaller(row) is None else changed)[row.layer] = unlike[row.layer]
            left = [smaller(row) if row.layer in unlike else row for row in rows if row not in missing]
            rows = [row for row in left if row is not None]
            if missing or unlike:
                continue
            wrong = next((c for c in checks if not c.ok), None)
            if wrong is None:
                idle = [row for row in rows if self.seen and row.layer not in self.ran]
                said = [c.compared for c in checks]
                said = [*said, *why] if self.seen else [*why, *said]
                said += [f"{len(idle)} blocks did not run, nor did their convolutions before"] if idle else []
                return Outcome(tuple(rows), taken_back, changed, tuple(said))
            if not self.equal([]):
                said = [f"inconclusive: a copy of the model itself differs from it ({wrong})", *why]
                return Outcome(tuple(rows), taken_back, changed, tuple(said))
            if len(taken_back) + len(changed) >= MAX_CULPRITS:
                if doubted.isdisjoint(row.layer for row in rows):
                    wrong.raise_if_different()
                doubt = f"{Reason.DIFFERS.value}, with too many others to tell them apart: {wrong.differences[0]}"
                for layer in [row.layer for row in rows if row.layer in doubted]:
                    taken_back[layer] = Refusal(Reason.DIFFERS, doubt, layer)
                rows = [row for row in rows if row.layer not in doubted]
                continue
            i, reason = self.culprit(rows)
            row, less = rows[i], smaller(rows[i])
            if less is not None and self.holds([*rows[:i], less]):
                rows[i] = less
                changed[row.layer] = reason
            else:
                del rows[i]
                taken_back[row.layer] = reason

    def run(self, rows: Sequence[Row]) -> tuple[list[Checked], dict[str, Refusal]]:
        """The model with ``rows`` compared with itself without, and rows whose norm is put into another mode."""
        trial, self.copied = shadow(self.model) if self.copied is None else self.copied, None
        moved = self.put(trial, rows)
        everywhere = {old: new for paths in moved.values() for old, new in paths.items()}
        checks = [check(seen, trial, training=seen.training, moved=everywhere) for seen in self.seen]
        if not self.seen:
            blocks, away = [row.layer for row in rows], [old for old, new in everywhere.items() if old != new]
            with patched():  # for both traces at once
                checks = [
                    traced_alike(self.model, trial, blocks, away, training=training, read=read)
                    for training, read in zip((False, True), self.read, strict=True)
                ]
        if not self.modes:
            return checks, {}
        try:
            return checks, self.unlike(trial, moved)
        # The model's own train() may use a layer as what it was, and fail in any way.
        except Exception as error:
            failed = Difference(f"its own train() raises {type(error).__name__}: {first_line(error)}")
            return [*checks, Checked(Verdict.DIFFERENT, "its own train() and eval()", (failed,))], {}

    def equal(self, rows: Sequence[Row]) -> bool:
        return all(c.ok for c in self.run(rows)[0])

    def holds(self, rows: Sequence[Row]) -> bool:
        checks, unlike = self.run(rows)
        return all(c.ok for c in checks) and not unlike and not self.never_run(rows, checks)

    def unlike(self, trial: nn.Module, moved: dict[str, dict[str, str]]) -> dict[str, Refusal]:
        """Rows with a norm that the model's own train() would no longer find where it is now."""
        now = _modes(trial)
        return {
            layer: Refusal(Reason.MODES, f"the model's own train() sets the mode of {old}", layer)
            for layer, paths in moved.items()
            for old, new in paths.items()
            if any(modes.get(old) != after.get(new) for modes, after in zip(self.modes, now, strict=True))
        }

    def never_run(self, rows: Sequence[Row], checks: Sequence[Checked]) -> list[Row]:
        """Rows whose block was not entered, although the convolution was, or has to be."""
        if not self.seen or any("raises" in str(c.differences[0]) for c in checks if c.differences):
            return []  # it did not come that far
        called = frozenset().union(*(c.called for c in checks))
        return [r for r in rows if r.layer not in called and (r.layer in self.ran or self.expected(r))]

    def culprit(self, rows: Sequence[Row]) -> tuple[int, Refusal]:
        """The last of the shortest run of rows that does not hold, and what is seen then."""
        low, high = 0, len(rows)  # the first `low` rows hold, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if self.equal(rows[:middle]):
                low = middle
            else:
                high = middle
        wrong = next(c for c in self.run(rows[:high])[0] if not c.ok)
        layer = rows[high - 1].layer
        return high - 1, Refusal(Reason.DIFFERS, f"{Reason.DIFFERS.value}: {wrong.differences[0]}", layer)
