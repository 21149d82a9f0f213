"""Tables, figures and the report of a comparison, all made from its folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.render import markdown_table, write_text
from zoo.train.comparison import DECIDES, METRICS, Comparison, read_comparison
from zoo.train.config import Config, field_text
from zoo.train.pairs import interval, points, spread, verdict
from zoo.train.plots import Interval, difference_plot, learning_curves
from zoo.train.recipes import PUBLISHED, SOURCES, Published, recipe
from zoo.train.result import LAST

__all__ = ["write_documentation", "write_results"]

ACCURACY = ("variant", *METRICS.values(), "difference", "95 % interval", "p")
COST = (
    "variant",
    "training s",
    "ratio",
    "peak MiB",
    "ratio",
    "M params",
    "deployed",
    "ms",
    "ratio",
    "collapsed",
    "differ",
)
ACCURACY_LEGEND = (
    "Accuracy on the test images in per cent: mean ± standard deviation over the seeds, of the mean of the last ten "
    "evaluations, of the last, and of the best (picked by the test images themselves, so optimistic). Difference: of "
    "the mean of the last ten, in points, to the first variant's run of the same seed, with the 95 % interval and the "
    "p value of Student's paired t test."
)
COST_LEGEND = (
    "Training seconds and peak memory of a run: means, and medians of the ratios to the first variant's run of the "
    "same seed. M params: million parameters in training, and deployed, which is collapsed with all batch norms "
    "folded. ms: the deployed network on one image and one thread, the fastest of a few runs; its runs took turns "
    "with those of the first variant's deployed network, the first variant's with its own, which shows the noise. "
    "Collapsed: accuracy in per cent of the collapsed network of the best weights. Differ: test images, of all seeds, "
    "to which trained and collapsed network give different answers in float64."
)


def write_results(comparison: Comparison, out: Path) -> None:
    """Write ``table.md``, ``table.csv``, ``report.md``, and the figures ``curves`` and ``differences``, to ``out``."""
    _draw(comparison, out / "curves", out / "differences")
    write_text(out / "table.md", _tables(comparison))
    write_text(out / "table.csv", _csv(comparison))
    write_text(out / "report.md", _report(comparison, "curves.svg", "differences.svg"))


def write_documentation(out: Path, path: Path) -> None:
    """The report of a finished comparison as a page of the documentation, with the published results beside it.

    Args:
        out: folder of the comparison.
        path: Markdown file; the figures are written beside it, named after it.

    Raises:
        CompareError: the comparison is not finished.
    """
    comparison = read_comparison(out)
    curves, differences = (path.with_name(f"{path.stem}-{name}") for name in ("curves", "differences"))
    _draw(comparison, curves, differences)
    text = _report(comparison, f"{curves.name}.svg", f"{differences.name}.svg")
    write_text(path, f"{text}\n{_published(comparison.config)}")


def _draw(comparison: Comparison, curves: Path, differences: Path) -> None:
    runs = {text: comparison.of(text) for text in comparison.variants}
    lines = {text: (found[0].epochs, 100 * np.array([run.accuracies for run in found])) for text, found in runs.items()}
    learning_curves(lines, curves)
    intervals = [_percent(comparison, text) for text in comparison.variants[1:]]
    if intervals:
        difference_plot(intervals, comparison.reference, differences)


def _percent(comparison: Comparison, text: str) -> Interval:
    """The difference of a variant in points."""
    found = comparison.difference(text)
    pairs = zip(comparison.values(text, DECIDES), comparison.values(comparison.reference, DECIDES), strict=True)
    points = [100 * (mine - theirs) for mine, theirs in pairs]
    return Interval(text, 100 * found.mean, 100 * found.low, 100 * found.high, points)


def _report(comparison: Comparison, curves: str, differences: str) -> str:
    others = comparison.variants[1:]
    runs = comparison.runs
    seconds = sum(run.seconds for run in runs)
    title = f"# {comparison.config.model.partition(':')[2] or comparison.config.model} on {comparison.config.data}"
    images = f"\n![Test accuracy over epochs, mean and standard deviation over seeds]({curves})\n"
    if others:
        images += f"\n![Paired differences of accuracy with 95 % intervals]({differences})\n"
    says = "".join(f"- {line}\n" for line in _sentences(comparison))
    return (
        f"{title}\n\n{comparison.facts} {len(runs)} runs, {seconds:.0f} s of training. Repeat it with\n\n"
        f"```sh\n{comparison.command}\n```\n\n{_setting(comparison)}\n\n{_tables(comparison)}{images}"
        f"\n## What the numbers support\n\n{says}\n## Each seed\n\n{METRICS[DECIDES].capitalize()}, per cent.\n\n"
        f"{_each_seed(comparison)}"
    )


def _sentences(comparison: Comparison) -> Iterator[str]:
    others = comparison.variants[1:]
    for text in others:
        yield verdict(text, comparison.reference, comparison.difference(text), len(others))
    if others and len(comparison.seeds) > 1:
        yield _summary(comparison)
    images = comparison.runs[0].deployment.images
    evaluations = len(comparison.runs[0].epochs)
    if evaluations < LAST:
        yield (
            f"A run has {evaluations} evaluations, so the mean of the last {LAST} is that of all of them, the first "
            "epochs included: train for longer before believing it."
        )
    if not comparison.unequal:
        yield (
            f"Each of the {len(comparison.runs)} collapsed networks gives, in float64, the answer of its trained "
            f"network to every one of the {images:,} test images."
        )
    for run in comparison.unequal:
        yield (
            f"WRONG: {run.variant}, seed {run.seed}: the collapsed network answers {run.deployment.different} of "
            f"{images:,} test images differently."
        )


def _summary(comparison: Comparison) -> str:
    """How many variants were better, worse, and undecided, and what none of it can say."""
    others = comparison.variants[1:]
    found = [comparison.difference(each) for each in others]
    better = sum(each.low > 0 for each in found)
    worse = sum(each.high < 0 for each in found)
    images = comparison.runs[0].deployment.images
    return (
        f"Variants more accurate than {comparison.reference} with an interval above zero: {better}; less accurate with "
        f"one below: {worse}; that cannot be told apart from it: {len(others) - better - worse}. "
        f"One of the {images:,} test images is {100 / images:.2g} points. The intervals are about other seeds: all "
        "runs have the same network, training recipe and test images, and other ones may say otherwise."
    )


def _setting(comparison: Comparison) -> str:
    """What all runs had in common, with every value of the configuration that is not about the variant."""
    left = ("model", "data", "block", "init", "form", "seed", "root")
    values = {name: value for name, value in dataclasses.asdict(comparison.config).items() if name not in left}
    words = ", ".join(f"{name} {_word(value)}" for name, value in values.items() if value is not None)
    return f"Network {comparison.config.model}, data {comparison.config.data}; {words}."


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " and ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tables(comparison: Comparison) -> str:
    accuracy = markdown_table(ACCURACY, [_accuracy_cells(comparison, text) for text in comparison.variants])
    cost = markdown_table(COST, [_cost_cells(comparison, text) for text in comparison.variants])
    return f"## Accuracy\n\n{accuracy}\n{ACCURACY_LEGEND}\n\n## Cost\n\n{cost}\n{COST_LEGEND}\n"


def _accuracy_cells(comparison: Comparison, text: str) -> list[str]:
    cells = [text]
    for metric in METRICS:
        mean, deviation = spread(comparison.values(text, metric))
        cells.append(f"{100 * mean:.2f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.2f}"))
    if text == comparison.reference:
        return [*cells, "", "", ""]
    found = comparison.difference(text)
    tested = not math.isnan(found.p)
    return [*cells, points(found.mean), interval(found) if tested else "–", f"{found.p:.2g}" if tested else "–"]


def _cost_cells(comparison: Comparison, text: str) -> list[str]:
    runs = comparison.of(text)
    deployed = [run.deployment for run in runs]
    return [
        text,
        f"{statistics.fmean(run.seconds for run in runs):.1f}",
        f"{comparison.ratio(text, 'seconds'):.2f}",
        f"{statistics.fmean(run.peak_bytes for run in runs) / 2**20:.0f}",
        f"{comparison.ratio(text, 'peak_bytes'):.2f}",
        f"{runs[0].parameters / 1e6:.3f}",
        f"{deployed[0].parameters / 1e6:.3f}",
        f"{statistics.median(each.milliseconds for each in deployed):.2f}",
        f"{comparison.latency_ratio(text):.2f}",
        f"{100 * statistics.fmean(each.collapsed for each in deployed):.2f}",
        str(sum(each.different for each in deployed)),
    ]


def _each_seed(comparison: Comparison) -> str:
    headings = ["variant", *(f"seed {seed}" for seed in comparison.seeds)]
    rows = [
        [text, *(f"{100 * value:.2f}" for value in comparison.values(text, DECIDES))] for text in comparison.variants
    ]
    return markdown_table(headings, rows)


def _csv(comparison: Comparison) -> str:
    """One row for each variant, every number in full; shares, bytes, seconds and milliseconds."""
    text = io.StringIO()
    rows = [_csv_row(comparison, each) for each in comparison.variants]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(comparison: Comparison, text: str) -> dict[str, Any]:
    runs = comparison.of(text)
    deployed = [run.deployment for run in runs]
    row: dict[str, Any] = {"variant": text, "seeds": len(runs)}
    for metric in METRICS:
        mean, deviation = spread(comparison.values(text, metric))
        found = comparison.difference(text, metric)
        row |= {f"{metric}_mean": mean, f"{metric}_deviation": deviation, f"{metric}_difference": found.mean}
        row |= {f"{metric}_low": found.low, f"{metric}_high": found.high, f"{metric}_p": found.p}
    for name in ("seconds", "peak_bytes"):
        row |= {name: statistics.fmean(comparison.values(text, name)), f"{name}_ratio": comparison.ratio(text, name)}
    return row | {
        "parameters": runs[0].parameters,
        "deployed_parameters": deployed[0].parameters,
        "deployed_milliseconds": statistics.median(each.milliseconds for each in deployed),
        "deployed_milliseconds_ratio": comparison.latency_ratio(text),
        "collapsed_accuracy": statistics.fmean(each.collapsed for each in deployed),
        "different_answers": sum(each.different for each in deployed),
    }


def _published(config: Config) -> str:
    """The published results with the network of ``config``, or all if there are none, with the command for each."""
    chosen = [each for each in PUBLISHED if each.model == config.model] or list(PUBLISHED)
    rows = [
        [
            f"{each.system}, {each.data}",
            each.network,
            "–" if each.plain is None else _as_published(each.plain),
            ", ".join(_published_block(each, text, value) for text, value in each.blocks.items()),
            f"`{each.command}`",
        ]
        for each in chosen
    ]
    table = markdown_table(("publication", "network", "plain", "blocks", "command"), rows)
    differing = [
        f"- Above and not in the recipe `{name}`: {_differing(config, name)}. Its values are from {SOURCES[name]}."
        for name in dict.fromkeys(each.recipe for each in chosen if each.model == config.model)
    ]
    return "\n".join([
        "## Published results\n\nTop-1 accuracy in per cent as published, and the command that trains the same network "
        "with the same recipe, on a machine that has the data. None of these rows was measured here. What a recipe "
        f"sets is shown by `reparam train --recipe NAME --print-recipe`.\n\n{table}",
        *differing,
    ]).rstrip() + "\n"  # fmt: skip


def _differing(config: Config, name: str) -> str:
    """The values of a configuration that are not the recipe's, but for block and seed, which a comparison varies."""
    published = recipe(name, config.model)
    fields = [
        f.name
        for f in dataclasses.fields(config)
        if f.name not in ("block", "init", "form", "last_form", "seed", "where")
    ]
    pairs = [(field, getattr(config, field), getattr(published, field)) for field in fields]
    told = [f"{field} {field_text(mine)} for {field_text(theirs)}" for field, mine, theirs in pairs if mine != theirs]
    return ", ".join(told) or "nothing"


def _published_block(row: Published, text: str, value: float) -> str:
    if row.plain is None:
        return f"{text} {value:+g} points"
    return f"{text} {_as_published(value)} ({points((value - row.plain) / 100)})"


def _as_published(accuracy: float) -> str:
    """With the two or three decimals that it was printed with."""
    return f"{accuracy:.2f}" if accuracy == round(accuracy, 2) else f"{accuracy:.3f}"
