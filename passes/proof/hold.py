"""Only what holds is kept: a fold that does not is taken back alone, and the rest stands.

A fold fails by its own proof, or the result as a whole differs from its original. Then the place where they part is
looked for, and the folds that stand nearest to it are taken back: those inside the module, else those of the modules
around it, one further with each round, all of them at last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from passes.algebra.conv_form import Form
from passes.algebra.lowering import Target, emit
from passes.fold.folds import Fold
from passes.fold.rules import Rules
from passes.graph.copies import deep_copy
from passes.graph.dataflow import Flow
from passes.proof.check import Checked, NoInputError, Observed, check, observe
from passes.proof.compare import Difference, Verdict
from passes.proof.locate import NOWHERE, Record, first_difference
from passes.proof.run import runner_of
from passes.refusal import Reason, Refusal

__all__ = ["Before", "Exact", "FoldKey", "Ledger", "check_against"]

FoldKey = tuple[str, ...]
"""A fold: the path of its unit, and the names that find it again there."""


class Exact(Mapping[int, Tensor]):
    """Float64 numbers of emitted layers, by the id of the tensor that is their rounding.

    Args:
        keep: whether anything is remembered; where nothing is compared, that would only take memory.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._numbers: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # so that no id is given to another tensor
        self.twice = False
        """Whether a layer was folded from layers that had been rounded already."""

    def note(self, layer: nn.Module, form: Form, sources: Iterable[Tensor] = ()) -> None:
        """Remember what ``form`` says of the layer that was made of it, from ``sources``."""
        self.twice |= any(id(t) in self._numbers for t in sources)
        numbers = dict(emit(form, Target(torch.float64, form.weight.device, False, False)).named_parameters())
        for name, shipped in layer.named_parameters():
            self.put(shipped, numbers[name])

    def put(self, shipped: Tensor, number: Tensor) -> None:
        """Remember the number that ``shipped`` is the rounding of."""
        if self._keep and shipped.dtype != torch.float64:
            self._numbers[id(shipped)] = number.detach()
            self._kept.append(shipped)

    def clear(self) -> None:
        self._numbers.clear()
        self._kept.clear()
        self.twice = False

    def __getitem__(self, key: int) -> Tensor:
        return self._numbers[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass
class Ledger:
    """What is proven, where each fold stands, and what was taken back.

    Args:
        prove: whether each fold is proven on its own.
        strict: whether what does not hold is an error.
        exact: numbers before rounding, for the module check; None without one.
        touched: paths of the modules that each fold has edited, the folded layer first.
        layers: the names of the layers that each fold replaced.
        taken_back: the folds that did not hold, with why.
        patience: how many more results may fail; the fewer, the more is given up with each.
        rules: what may fold.
        made: filled with the folds of each unit that was edited, in order, for who wants to undo them by numbers.
    """

    prove: bool = True
    strict: bool = False
    exact: Exact | None = None
    touched: dict[FoldKey, tuple[str, ...]] = field(default_factory=dict)
    layers: dict[FoldKey, str] = field(default_factory=dict)
    taken_back: dict[FoldKey, Refusal] = field(default_factory=dict)
    patience: int = 6
    rules: Rules = field(default_factory=Rules)
    made: list[tuple[Flow, list[Fold]]] | None = None

    def refuses(self, key: FoldKey, layers: Iterable[str]) -> bool:
        """Whether a fold is not to be made again.

        At first only those that failed; then also what shares a layer with one of them; at last none is made.
        """
        if key in self.taken_back or self.patience <= 0:
            return True
        return self.patience <= 2 and any(
            name in refusal.layer.split(", ") for refusal in self.taken_back.values() for name in layers
        )

    def begin(self) -> None:
        """Forget the folds of an attempt that failed."""
        self.touched.clear()
        if self.exact is not None:
            self.exact.clear()

    def take_back(self, key: FoldKey, layers: str, why: str) -> Refusal:
        """Never make this fold again."""
        self.taken_back[key] = Refusal(Reason.TAKEN_BACK, f"{Reason.TAKEN_BACK.value} ({why})", layers)
        return self.taken_back[key]

    def near(self, place: str) -> list[FoldKey]:
        """The folds nearest to a module: inside it, else around it, the innermost first."""
        while True:
            inside = [key for key, paths in self.touched.items() if any(_within(path, place) for path in paths)]
            if inside or not place:
                return inside
            around = [
                key for key, paths in self.touched.items() if any(path and _within(place, path) for path in paths)
            ]
            if around:
                return around
            place = place.rpartition(".")[0]

    def containers(self) -> dict[str, list[FoldKey]]:
        """The smallest module that holds all of a fold, with the folds in it."""
        found: dict[str, list[FoldKey]] = {}
        for key, paths in self.touched.items():
            found.setdefault(_common(paths), []).append(key)
        return found


def _within(path: str, around: str) -> bool:
    return path == around or not around or path.startswith(around + ".")


def _common(paths: Iterable[str]) -> str:
    split = [path.split(".") if path else [] for path in paths]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


# ------------------------------------------------------------------ before and after


@dataclass(frozen=True)
class Before:
    """The original as it was: what was observed of it, or why nothing could be, and the module itself.

    ``original`` is the caller's model, or a copy where that is edited in place and parts of it are to be run later.
    """

    observed: Observed | None
    why: str
    original: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, example: Any, *, inplace: bool) -> Before:
        """Look at a model before it is edited; raises as :func:`observe` if it rejects the caller's inputs."""
        try:
            observed, why = observe(model, example), ""
        except NoInputError as error:
            observed, why = None, str(error)
        if not inplace:
            return cls(observed, why, model)
        ran = frozenset[str]() if observed is None else observed.ran
        idle = any(path not in ran and module._parameters for path, module in model.named_modules())
        observed = None if observed is None else replace(observed, source=None)
        return cls(observed, why, _copy(model) if idle else None)


def _copy(model: nn.Module) -> nn.Module | None:
    try:
        return deep_copy(model)
    # A model that cannot be copied cannot be run beside its result.
    except ValueError:
        return None


def check_against(before: Before, result: nn.Module, ledger: Ledger) -> Checked:
    """Compare a result with its original: as a whole, and module by module what that does not run."""
    exact = ledger.exact
    allowed = 1e-10 if exact is None or not exact.twice else 1e-4
    idle = dict(ledger.containers())
    if before.observed is None:
        whole = Checked(Verdict.INCONCLUSIVE, f"not compared as a whole: {before.why}")
        idle.pop("", None)
    else:
        whole = check(before.observed, result, exact=exact, allowed=allowed)
        if not whole.ok:
            return whole
        idle = {at: keys for at, keys in idle.items() if not any(ledger.touched[key][0] in whole.ran for key in keys)}
    return _with_parts(whole, before, result, idle, exact, allowed)


def _with_parts(
    whole: Checked,
    before: Before,
    result: nn.Module,
    idle: Mapping[str, list[FoldKey]],
    exact: Exact | None,
    allowed: float,
) -> Checked:
    if not idle or before.original is None:
        return whole
    replayed: dict[str, Checked | None] = {}
    for at in idle:
        for path in _prefixes(at):
            if path in whole.ran:
                continue
            if path not in replayed:
                replayed[path] = _replay(before.original, result, path, exact, allowed)
            if replayed[path] is not None:
                break
    parts = {path: part for path, part in replayed.items() if part is not None}
    for path, part in parts.items():
        if not part.ok:
            there = tuple(
                Difference(d.what, ".".join(filter(None, [path, d.layer])), d.error) for d in part.differences
            )
            return Checked(Verdict.DIFFERENT, part.compared.replace("whole network", path, 1), there, part.error)
    covered = sum(any(_within(at, path) for path in parts) for at in idle)
    worst = max([whole.error, *(part.error for part in parts.values())])
    said = f"{covered} of {len(idle)} rewritten parts that it does not run were replayed on their own"
    if before.observed is None:
        said = (
            f"{covered} of {len(idle)} rewritten parts replayed on their own: largest relative difference {worst:.1g}"
        )
    ran = whole.ran | {".".join(filter(None, [path, name])) for path, part in parts.items() for name in part.ran}
    verdict = Verdict.EQUAL if whole.verdict is Verdict.EQUAL or parts else whole.verdict
    return Checked(verdict, f"{whole.compared}; {said}", (), worst, ran)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _replay(original: nn.Module, result: nn.Module, path: str, exact: Exact | None, allowed: float) -> Checked | None:
    """Compare one module with what became of it; None if it cannot be run by itself."""
    try:
        ours, theirs = result.get_submodule(path), original.get_submodule(path)
    except AttributeError:  # it is inside of a module that became one layer
        return None
    if type(theirs).forward is nn.Module.forward and "forward" not in vars(theirs):
        return None  # a list of modules
    found = check(theirs, ours, exact=exact, by_name=False, allowed=allowed)
    return None if found.verdict is Verdict.INCONCLUSIVE else found


# ------------------------------------------------------------------ where it differs


def place_of(found: Checked, observed: Observed, original: nn.Module, candidate: nn.Module) -> str:
    """Path of the module where a result parts from its original; empty if in none.

    Args:
        found: the differences.
        observed: what the original did.
        original: the module.
        candidate: a copy of the result in float64, to be run.
    """
    first = found.differences[0]
    if first.layer or not observed.double:
        return first.layer
    try:
        wanted = Record.of(runner_of(original), observed.example)
        got = Record.of(candidate, observed.example)
    # A result that raises cannot be followed.
    except Exception:
        return ""
    where = first_difference(wanted, got, None, torch.float64)
    return "" if where == NOWHERE else where
