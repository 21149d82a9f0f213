"""``reparam evaluate``: how often networks are right on a test set, also when its images are turned and flipped.

The robustness table is that of Ding et al., "ACNet" (ICCV 2019), sec. 4.3: accuracy on rotated and flipped images, of
networks that have never seen any. Intervals are Wilson's, of a share of independent images.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from reparam import ReparamError
from reparam.commands import Blocks, FormName, Online, Pretrained, Where, form_of
from reparam.networks import UsageError
from reparam.sources import name_code
from reparam.tables import show
from zoo.render import console, markdown_table, provenance, rich_table, write_text
from zoo.train.data import Data
from zoo.train.targets import (
    Averaged,
    Batch,
    DataName,
    Model,
    Root,
    Size,
    Subject,
    check_fit,
    data_for,
    describe,
    expansion,
    find,
    tell,
)

__all__ = ["VIEWS", "Score", "Tally", "answers", "evaluate", "score"]

VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "90°": lambda images: images.rot90(1, (-2, -1)),
    "180°": lambda images: images.rot90(2, (-2, -1)),
    "270°": lambda images: images.rot90(3, (-2, -1)),
    "up-down": lambda images: images.flip(-2),
    "left-right": lambda images: images.flip(-1),
}
"""What is done to a batch ``(n, C, H, W)``; angles are counter-clockwise."""

TableParts = tuple[str, tuple[str, ...], list[list[str]]]

FIVE = 10
"""Top-5 says something where there are more classes than this."""


@dataclass(frozen=True)
class Score:
    """How a network did on a test set.

    Args:
        images: in the test set.
        right: images whose largest logit is that of their class.
        right_in_five: images whose class is among the five largest; None with at most ten classes.
        loss: mean cross-entropy.
    """

    images: int
    right: int
    right_in_five: int | None
    loss: float

    @property
    def top1(self) -> float:
        return self.right / self.images

    @property
    def top5(self) -> float | None:
        return None if self.right_in_five is None else self.right_in_five / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of ``top1``."""
        from scipy.stats import binomtest

        found = binomtest(self.right, self.images).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


# ------------------------------------------------------------------------------------------------- asking


def answers(
    models: Sequence[nn.Module],
    data: Data,
    *,
    view: Callable[[Tensor], Tensor] = VIEWS["upright"],
    batch: int = 256,
    device: torch.device | None = None,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The test set, batch by batch: logits ``(n, classes)`` of every model, each in its own dtype, and labels ``(n,)``.

    The models are put into eval mode and onto ``device``, by default a GPU where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [next(model.to(device).eval().parameters()).dtype for model in models]
    for images, labels in data.batches(train=False, batch=batch):
        seen = view(images.to(device))
        with torch.no_grad():
            logits = [model(seen.to(dtype)) for model, dtype in zip(models, kinds, strict=True)]
        yield logits, labels.to(device)


def score(model: nn.Module, data: Data, **options: Any) -> Score:
    """The model on the test set; options are those of :func:`answers`.

    Raises:
        ReparamError: it answers with numbers that are not finite, of which even the largest means nothing.
    """
    tally = Tally(len(data.classes))
    for (logits,), labels in answers([model], data, **options):
        if not logits.isfinite().all():
            raise ReparamError(f"nothing to count: the network answers with NaN or infinity{_not_finite(model)}")
        tally.add(logits, labels)
    return tally.score


def _not_finite(model: nn.Module) -> str:
    state = model.state_dict()
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    return f", as {bad[0]!r} holds ({len(bad)} of {len(state)} tensors do); train or download it again" if bad else ""


class Tally:
    """A score in the making."""

    def __init__(self, classes: int) -> None:
        self.classes, self.images, self.right, self.right_in_five, self.loss = classes, 0, 0, 0, 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch."""
        self.images += len(labels)
        self.right += int((logits.argmax(1) == labels).sum())
        self.loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        if self.classes > FIVE:
            self.right_in_five += int((logits.topk(5).indices == labels[:, None]).any(1).sum())

    @property
    def score(self) -> Score:
        in_five = self.right_in_five if self.classes > FIVE else None
        return Score(self.images, self.right, in_five, self.loss / self.images)


# ------------------------------------------------------------------------------------------------- command

LEGEND = (
    "Shares of the test images in per cent. Interval: Wilson's, 95 %, of the share for other images of the same kind; "
    "two networks that answer the same images can be told apart more finely. Angles are counter-clockwise."
)


def evaluate(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Files, folders of runs, or source:name.")],
    data: DataName = None,
    root: Root = None,
    size: Size = None,
    batch: Batch = 256,
    robustness: Annotated[bool, typer.Option("--robustness", help="Also on turned and flipped images.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the tables here as Markdown.")] = None,
    pretrained: Pretrained = False,
    ema: Averaged = None,
    model: Model = None,
    block: Blocks = None,
    where: Where = None,
    form: FormName = None,
    online: Online = None,
) -> None:
    """Say how often networks are right on a test set: top-1 with its 95 % interval, top-5, loss; several side by side.

    --model, --block, --where and --form describe files that do not say which network they are of.
    """
    for target in targets:
        name_code(target)
    recipe = expansion(block, where, form_of(form, online))
    subjects = [find(target, model=model, recipe=recipe, ema=ema, pretrained=pretrained) for target in targets]
    tell(subjects)
    images = [_data(subject, data, size, root) for subject in subjects]
    names = list(dict.fromkeys(each.name for each in images))
    if len(names) > 1:
        raise UsageError(f"the networks are of different data, {' and '.join(names)}; choose with --data")
    terminal = console()
    views = VIEWS if robustness else {"upright": VIEWS["upright"]}
    scores: list[dict[str, Score]] = [{} for _ in subjects]
    with terminal.status("") as status:
        for subject, own, found in zip(subjects, images, scores, strict=True):
            for name, view in views.items():
                status.update(f"{subject.label}, {name}")
                found[name] = score(subject.network.model, own, view=view, batch=batch)
    labels = [subject.label for subject in subjects]
    tables = [_accuracy(labels, scores, names[0]), *([_robustness(labels, scores)] if robustness else [])]
    for title, headings, rows in tables:
        show(terminal, rich_table(title, headings, rows))
    about = [f"{subject.label}: {describe(subject.network)}" for subject in subjects]
    for line in about:
        terminal.print(line, soft_wrap=True, markup=False)
    if out is not None:
        parts = [f"## {title}\n\n{markdown_table(headings, rows)}" for title, headings, rows in tables]
        options = {"--data": data, "--root": root, "--size": size, "--model": model, "--form": form_of(form, online)}
        flags = {"--robustness": robustness, "--pretrained": pretrained, "--ema": ema is True, "--raw": ema is False}
        again = _command(targets, {**options, "--block": block, "--where": where}, flags)
        facts = f"{provenance()} Repeat it with\n\n```sh\n{again}\n```\n"
        parts += ["".join(f"- {line}\n" for line in about), LEGEND + "\n", facts]
        write_text(out, "\n".join([f"# Accuracy on {names[0]}\n", *parts]))
        terminal.print(f"wrote {out}", soft_wrap=True, markup=False)


def _command(targets: list[str], options: Mapping[str, Any], flags: Mapping[str, bool]) -> str:
    """The command line that says this again; an option that is a list is repeated."""
    words = ["reparam", "evaluate", *targets]
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value] * (value is not None):
            words += [name, str(each)]
    return shlex.join([*words, *(name for name, given in flags.items() if given)])


def _data(subject: Subject, name: str | None, size: int | None, root: str | None) -> Data:
    found = data_for(subject, name, size, root)
    if found is None:
        raise UsageError(f"name the data, --data digits for example, or a folder: {subject.label} does not say its own")
    check_fit(subject, found)
    return found


def _accuracy(labels: Sequence[str], scores: Sequence[Mapping[str, Score]], data: str) -> TableParts:
    """Title, headings and rows."""
    upright = [found["upright"] for found in scores]
    five = upright[0].top5 is not None
    headings = ("network", "top-1", "interval", *(("top-5",) if five else ()), "loss")
    rows = []
    for label, found in zip(labels, upright, strict=True):
        low, high = found.interval
        fifth = [] if found.top5 is None else [_percent(found.top5)]
        rows.append([label, _percent(found.top1), f"{_percent(low)} to {_percent(high)}", *fifth, f"{found.loss:.4f}"])
    return f"{data}: {upright[0].images:,} test images", headings, rows


def _robustness(labels: Sequence[str], scores: Sequence[Mapping[str, Score]]) -> TableParts:
    """Title, headings and rows."""
    pairs = zip(labels, scores, strict=True)
    rows = [[label, *(_percent(found[view].top1) for view in VIEWS)] for label, found in pairs]
    return "Top-1 on turned and flipped images", ("network", *VIEWS), rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
