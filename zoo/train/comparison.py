"""A comparison of variants as it lies in a folder: what was compared, and all its runs.

``OUT/VARIANT/seedK/`` is the folder of a run (:mod:`zoo.train.checkpoint`), with ``deployment.json`` beside;
``OUT/comparison.json`` says what was compared. Tables, figures and reports are made of these files alone.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam import ReparamError
from zoo.train.config import Config
from zoo.train.pairs import Difference, paired_difference

__all__ = ["DECIDES", "METRICS", "CompareError", "Comparison", "Deployment", "Run", "read_comparison", "run_folder"]

METRICS = {"mean_of_last": "mean of last ten", "last": "last", "best": "best"}
"""Accuracies of a run by their names in its result, the deciding one first."""
DECIDES = "mean_of_last"


class CompareError(ReparamError):
    """A comparison that cannot be made, read, or believed; the message says which run and what to do."""


@dataclass(frozen=True)
class Deployment:
    """The collapsed network of a run's best weights.

    Args:
        images: of the test set.
        different: images to which trained and collapsed network, both in float64, give different answers.
        trained: accuracy of the trained network.
        collapsed: accuracy of the collapsed network.
        parameters: of the collapsed network.
        milliseconds: for one image on one thread, the fastest of a few runs.
        reference: milliseconds of the first variant's collapsed network of the same seed, whose runs took turns.
    """

    images: int
    different: int
    trained: float
    collapsed: float
    parameters: int
    milliseconds: float
    reference: float


@dataclass(frozen=True)
class Run:
    """One finished run; accuracies are shares of the test images. ``epochs`` are those that were evaluated."""

    variant: str
    seed: int
    mean_of_last: float
    last: float
    best: float
    seconds: float
    peak_bytes: int
    parameters: int
    epochs: tuple[int, ...]
    accuracies: tuple[float, ...]
    deployment: Deployment


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison; the first variant is what the others are compared with.

    Args:
        config: of every run but for block and seed.
        variants: as on the command line.
        seeds: of the runs.
        runs: all of them.
        command: repeats it.
        facts: versions, date and machine.
    """

    config: Config
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    command: str
    facts: str

    @property
    def reference(self) -> str:
        return self.variants[0]

    def of(self, variant: str) -> tuple[Run, ...]:
        """The runs of a variant, by seed."""
        return tuple(sorted((run for run in self.runs if run.variant == variant), key=lambda run: run.seed))

    def values(self, variant: str, metric: str) -> list[float]:
        """A number of each run of a variant, by seed."""
        return [getattr(run, metric) for run in self.of(variant)]

    def difference(self, variant: str, metric: str = DECIDES) -> Difference:
        """To the first variant."""
        return paired_difference(self.values(variant, metric), self.values(self.reference, metric))

    def ratio(self, variant: str, metric: str) -> float:
        """Median of the ratios to the first variant's run of the same seed."""
        pairs = zip(self.values(variant, metric), self.values(self.reference, metric), strict=True)
        return statistics.median(mine / theirs if theirs else math.nan for mine, theirs in pairs)

    def latency_ratio(self, variant: str) -> float:
        """Median of the ratios of the deployed networks' latencies, each to the one that it took turns with."""
        return statistics.median(run.deployment.milliseconds / run.deployment.reference for run in self.of(variant))

    @property
    def unequal(self) -> tuple[Run, ...]:
        """Runs whose collapsed network gives another answer to some image."""
        return tuple(run for run in self.runs if run.deployment.different)


def read_comparison(out: Path) -> Comparison:
    """The comparison that a folder holds.

    Raises:
        CompareError: there is none, a run is missing from it or is not finished.
    """
    note = _read(out / "comparison.json")
    variants, seeds = tuple(note["variants"]), tuple(note["seeds"])
    runs = tuple(_read_run(out, text, seed) for seed in seeds for text in variants)
    return Comparison(
        Config.from_json(json.dumps(note["config"])), variants, seeds, runs, note["command"], note["facts"]
    )


def _read_run(out: Path, text: str, seed: int) -> Run:
    folder = run_folder(out, text, seed)
    result = _read(folder / "result.json")
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = [(int(row["epoch"]), float(row["test_accuracy"] or math.nan)) for row in csv.DictReader(file)]
    rows = [row for row in rows if not math.isnan(row[1])]
    known = ("mean_of_last", "last", "best", "seconds", "peak_bytes", "parameters")
    return Run(
        text,
        seed,
        **{name: result[name] for name in known},
        epochs=tuple(epoch for epoch, _ in rows),
        accuracies=tuple(accuracy for _, accuracy in rows),
        deployment=Deployment(**_read(folder / "deployment.json")),
    )


def run_folder(out: Path, text: str, seed: int) -> Path:
    """The folder of a run: its variant's text, without what a file system might not take, and its seed."""
    return out / re.sub(r"[^\w.=@,-]", "-", text) / f"seed{seed}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"{path} cannot be read ({error.strerror}): is the comparison finished?") from error
    except ValueError as error:
        raise CompareError(f"{path} is damaged ({error}); remove it and compare again") from error
    return content
