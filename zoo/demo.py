"""``reparam demo``: expand, train and collapse three real networks; convert a small zoo; write what happened."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.status import Status
from torch import nn

import reparam
from reparam import Counts, sources
from reparam.recipe import Recipe
from reparam.tables import plan_table, show
from zoo.cli import follow
from zoo.digits import Score, score, train
from zoo.families import DEMO
from zoo.measure import one_thread
from zoo.outcome import Converted
from zoo.render import (
    console,
    markdown_table,
    provenance,
    rich_table,
    write_text,
)
from zoo.train.data import Digits, digits

__all__ = ["CASES", "Case", "Trial", "demo", "try_out"]

TRAINING = ("network", "block", "start", "loss", "accuracy", "same answers")
SIZES = ("network", "convs", "norms", "M params", "error", "loads")
TRIAL_LEGEND = (
    "Start: the largest difference between the network and its expanded form before the first step, in training "
    "and in evaluation. Loss and accuracy: on 297 held-out digits, before → after training, in a few steps that "
    "show that the blocks train, not how well (steps and a batch norm momentum of 0.3 were chosen so that a "
    "network learns within seconds); the last accuracy is that of the collapsed network. Same answers: "
    "of the 297 answers, those that the trained and the collapsed network share. Convolutions, batch norms and "
    "million parameters: of the plain network → in training → deployed. Error: the largest difference of the "
    "outputs of the trained network and of the collapsed ones (stock and deployed), relative to the largest "
    "output, in float64. Loads: whether the collapsed state dict loads with `strict=True` into the "
    "unmodified architecture."
)


@dataclass(frozen=True)
class Case:
    """A network, how it is expanded, and how long it is trained."""

    spec: str
    recipe: Recipe
    steps: int
    batch: int = 32
    rate: float = 5e-3


CASES = (
    Case("timm:resnet18,num_classes=10", Recipe("dbb"), steps=14, rate=2e-3),
    Case("timm:mobilenetv3_small_050,num_classes=10", Recipe("acb"), steps=40),
    Case("torchvision:shufflenet_v2_x0_5,num_classes=10", Recipe("doconv"), steps=40),
)
"""The plan of the first is printed."""

CONVERTED = tuple(network.spec for network in DEMO)
"""Networks that are collapsed as they are: most of them were made of blocks from the start."""


@dataclass(frozen=True)
class Trial:
    """What became of one case. What was not reached is None; ``failure`` says why it does not hold, if it does not.

    Args:
        start: largest difference between plain and expanded before training.
        before, after, collapsed: scores of the expanded network before and after training, and of the stock network
            with the collapsed weights.
        counts: plain, in training, deployed.
        error: relative difference of trained and collapsed network in float64.
        loads: whether the collapsed state dict loads strictly into the stock network.
    """

    case: Case
    start: float | None = None
    before: Score | None = None
    after: Score | None = None
    collapsed: Score | None = None
    counts: tuple[Counts, Counts, Counts] | None = None
    error: float | None = None
    loads: bool | None = None
    failure: str = ""


def demo(out: Annotated[Path, typer.Option("--out", help="Folder of the reports.")] = Path("build/demo")) -> None:
    """Expand, train and collapse three real networks, then convert a zoo of eight; every result is proven."""
    terminal = console()
    training, run = out / "training.md", out / "zoo"
    terminal.print(f"reports: {(run / 'report.html').resolve()}, {training.resolve()}", soft_wrap=True, markup=False)
    data = digits()
    plan_text = _show_plan(CASES[0], data, terminal)
    trials = []
    for number, case in enumerate(CASES, 1):
        with terminal.status(f"{number}/{len(CASES)} {case.spec}") as status:
            trials.append(try_out(case, data, partial(_update, status, case)))
    title = "Expanded, trained for a few steps on handwritten digits, collapsed"
    show(terminal, rich_table(title, TRAINING, [_training_cells(trial) for trial in trials]))
    show(terminal, rich_table("plain → in training → deployed", SIZES, [_size_cells(trial) for trial in trials]))
    failures = [f"{trial.case.spec}: {trial.failure}" for trial in trials if trial.failure]
    for failure in failures:
        terminal.print(failure, style="red", soft_wrap=True, markup=False)
    write_text(training, _report(trials, plan_text))
    terminal.print("Made of blocks from the start, or plain: collapsed, proven, saved", markup=False)
    shutil.rmtree(run, ignore_errors=True)  # of the demo before
    outcomes = follow(CONVERTED, run, jobs=min(2, os.cpu_count() or 1))
    failures += [outcome.spec for outcome in outcomes if not isinstance(outcome, Converted)]
    total = len(trials) + len(outcomes)
    terminal.print(f"{total - len(failures)} of {total} networks hold", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def try_out(case: Case, data: Digits, say: Callable[[str], object] = lambda stage: None) -> Trial:
    """Expand, train, collapse and compare one network. Never raises: what goes wrong stands in the trial.

    ``say`` is told what is being done.
    """
    trial = Trial(case)
    try:
        with one_thread():
            for trial in _steps(case, data):
                say(_stage(trial))
    # One network that fails, however it does, is a row that says so; the demo goes on and ends with status 1.
    except Exception as error:
        return replace(trial, failure=" ".join(f"{type(error).__name__}: {error}".split()))
    return replace(trial, failure=_verdict(trial))


# ------------------------------------------------------------------------------------------------- steps


def _steps(case: Case, data: Digits) -> Iterator[Trial]:
    """The trial after each of its steps."""
    torch.manual_seed(0)
    plain = _quick_norms(sources.create(case.spec)).train()
    expanded = case.recipe.expand(plain)
    trial = Trial(case, start=_largest_difference(plain, expanded, data), before=score(expanded, data))
    yield trial
    for _ in train(expanded, data, steps=case.steps, batch=case.batch, rate=case.rate):
        yield trial
    trial = replace(trial, after=score(expanded, data))
    yield trial
    weights = reparam.collapse(expanded, like=plain).state_dict()
    stock = sources.create(case.spec).eval()
    stock.load_state_dict(weights, strict=True)
    deployed = reparam.collapse(stock)
    counts = Counts.of(plain), Counts.of(expanded), Counts.of(deployed)
    trial = replace(trial, loads=True, counts=counts, collapsed=score(stock, data))
    yield trial
    results = [reparam.verify(expanded, candidate, data.test[:8]) for candidate in (stock, deployed)]
    for result in results:
        result.raise_if_different()
    yield replace(trial, error=max(result.max_rel for result in results))


def _update(status: Status, case: Case, stage: str) -> None:
    status.update(f"{case.spec}: {stage}")


def _stage(trial: Trial) -> str:
    if trial.after is None:
        return "training"
    return "collapsing" if trial.counts is None else "comparing"


def _quick_norms(model: nn.Module) -> nn.Module:
    """Running statistics that keep up with a few steps; blocks take the momentum of the norm that is there."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.3
    return model


def _largest_difference(plain: nn.Module, expanded: nn.Module, data: Digits) -> float:
    """Largest difference of the outputs in training and in evaluation, on copies: training moves the statistics."""
    differences = []
    for training in (True, False):
        outputs = []
        for model in (plain, expanded):
            with _same_chance(), torch.no_grad():
                outputs.append(copy.deepcopy(model).train(training)(data.train[:16]))
        differences.append(float((outputs[0] - outputs[1]).abs().max()))
    return max(differences)


@contextmanager
def _same_chance() -> Iterator[None]:
    """The same random numbers, for dropout, each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _verdict(trial: Trial) -> str:
    """Why a trial that ran to its end does not hold, or an empty string."""
    before, after, collapsed = trial.before, trial.after, trial.collapsed
    if before is None or after is None or collapsed is None or trial.counts is None or trial.error is None:
        return "it did not run to its end"
    if trial.start != 0.0:
        return f"the expanded network differs by {trial.start:.1e} before training"
    if not after.loss < before.loss:
        return f"training did not lower the loss: {before.loss:.3f} → {after.loss:.3f}"
    if not torch.equal(after.answers, collapsed.answers):
        return "the collapsed network gives other answers"
    plain, training, deployed = trial.counts
    if training.parameters <= plain.parameters:
        return "expanding added no parameters"
    if deployed.convs > plain.convs or deployed.norms > plain.norms or deployed.parameters > plain.parameters:
        return "the collapsed network is larger than the plain one"
    return ""


# ------------------------------------------------------------------------------------------------- report


def _show_plan(case: Case, data: Digits, terminal: Console) -> str:
    """Print what expanding would do; the same as Markdown."""
    planned = case.recipe.plan(sources.create(case.spec), example_inputs=data.test[:1])
    size = "x".join(map(str, data.test.shape[1:]))
    title = f"The plan: {case.spec} with {case.recipe}, multiply-adds for {size}"
    show(terminal, plan_table(planned, title, limit=len(planned.rows)))
    return f"```\n{planned}\n```\n"


def _training_cells(trial: Trial) -> list[str]:
    before, after, collapsed = trial.before, trial.after, trial.collapsed
    same = "–"
    if after is not None and collapsed is not None:
        same = f"{int((after.answers == collapsed.answers).sum())} of {len(after.answers)}"
    return [
        _name(trial),
        str(trial.case.recipe),
        "–" if trial.start is None else f"{trial.start:.0e}" if trial.start else "0",
        " → ".join("–" if score is None else f"{score.loss:.2f}" for score in (before, after)),
        " → ".join("–" if score is None else f"{100 * score.accuracy:.1f}%" for score in (before, after, collapsed)),
        same,
    ]


def _size_cells(trial: Trial) -> list[str]:
    counts = trial.counts or ()
    return [
        _name(trial),
        " → ".join(str(each.convs) for each in counts) or "–",
        " → ".join(str(each.norms) for each in counts) or "–",
        " → ".join(f"{each.parameters / 1e6:.2f}" for each in counts) or "–",
        "–" if trial.error is None else f"{trial.error:.0e}",
        "yes" if trial.loads else "–",
    ]


def _name(trial: Trial) -> str:
    name = trial.case.spec.partition(":")[2].partition(",")[0]
    return f"{name} (FAILED)" if trial.failure else name


def _report(trials: list[Trial], plan_text: str) -> str:
    failed = "".join(f"- {trial.case.spec}: {trial.failure}\n" for trial in trials if trial.failure)
    training = "".join(
        f"- {t.case.spec} with {t.case.recipe}: {t.case.steps} steps of {t.case.batch} digits, rate {t.case.rate:g}\n"
        for t in trials
    )
    return (
        "# Networks expanded, trained and collapsed by reparam\n\n"
        f"{provenance()}\n\n{TRIAL_LEGEND}\n\n"
        f"{markdown_table(TRAINING, [_training_cells(trial) for trial in trials])}\n"
        f"{markdown_table(SIZES, [_size_cells(trial) for trial in trials])}\n"
        + (f"Failed:\n\n{failed}\n" if failed else "")
        + "Trained with AdamW on handwritten digits that scikit-learn ships, upscaled to 32x32:\n\n"
        f"{training}\n## The plan of the first\n\n{plan_text}"
    )


if __name__ == "__main__":
    typer.run(demo)
