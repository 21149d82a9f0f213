"""Comparison of variants: the statistics against numbers worked out by hand and by scipy, the turns, the report."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import reparam
import zoo.train.compare as module
from zoo.train.compare import compare, order
from zoo.train.comparison import CompareError, Comparison, Deployment, Run, read_comparison, run_folder
from zoo.train.config import Config, override
from zoo.train.pairs import Difference, paired_difference, spread, verdict
from zoo.train.plots import Interval, Panel, difference_plot, drift_plot, learning_curves
from zoo.train.recipes import PUBLISHED
from zoo.train.report import write_documentation, write_results

# Worked out by hand: differences .01 .02 .03 .04 .05 have mean .03 and deviation .0158114; over sqrt(5) that is
# .00707107, and t(.975, 4) = 2.776445, so the half width is .0196324; t = 4.242641, p = .013236.
PLAIN = (0.90, 0.91, 0.92, 0.93, 0.94)
BETTER = (0.91, 0.93, 0.95, 0.97, 0.99)


# ------------------------------------------------------------------------------------------------- statistics


def test_spread_divides_by_one_less_than_the_number() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    assert math.isnan(spread([1.0])[1])


def test_paired_difference_is_what_is_worked_out_by_hand() -> None:
    found = paired_difference(BETTER, PLAIN)
    assert found.pairs == 5
    assert found.mean == pytest.approx(0.03)
    assert (found.low, found.high) == (pytest.approx(0.03 - 0.0196324, abs=1e-7), pytest.approx(0.0496324, abs=1e-7))
    assert found.p == pytest.approx(0.013236, abs=1e-6)


shares = st.floats(0, 1).map(lambda value: round(value, 6))


@given(st.lists(st.tuples(shares, shares), min_size=2, max_size=12))
def test_paired_difference_is_the_t_test_on_the_differences(pairs: list[tuple[float, float]]) -> None:
    mine, theirs = np.array(pairs).T
    differences = mine - theirs
    found = paired_difference(list(mine), list(theirs))
    if np.ptp(differences) < 1e-9:
        assert math.isnan(found.p)
        return
    error = differences.std(ddof=1) / math.sqrt(len(pairs))
    low, high = stats.t.interval(0.95, len(pairs) - 1, differences.mean(), error)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(differences.mean() / error), len(pairs) - 1), abs=1e-12)
    # Interval and test are one statement.
    assert found.decided == (found.p < 0.05) or abs(found.p - 0.05) < 1e-9


def test_pairs_count_not_the_two_groups() -> None:
    # The seeds differ by far more than the variants: only the pairs can show the difference.
    plain = [0.5, 0.6, 0.7, 0.8]
    mine = [0.511, 0.609, 0.710, 0.810]
    assert paired_difference(mine, plain).decided
    assert stats.ttest_ind(mine, plain).pvalue > 0.9


@pytest.mark.parametrize("values", [(0.9,), (0.91, 0.92, 0.93)])
def test_without_spread_there_is_no_interval(values: tuple[float, ...]) -> None:
    found = paired_difference(values, [value - 0.01 for value in values])
    assert found.mean == pytest.approx(0.01)
    assert all(map(math.isnan, (found.low, found.high, found.p)))
    assert not found.decided


def test_seeds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([0.9, 0.9], [0.9])


# ------------------------------------------------------------------------------------------------- words


def said(mean: float, low: float, high: float, p: float, comparisons: int = 1, pairs: int = 5) -> str:
    return verdict("acb", "plain", Difference(pairs, mean, low, high, p), comparisons)


def test_an_interval_around_zero_supports_neither_help_nor_harm() -> None:
    text = said(0.001, -0.002, 0.004, 0.4)
    assert text.startswith("acb: +0.10 points against plain over 5 seeds (95 % interval −0.20 to +0.40, p = 0.4).")
    assert "contains zero" in text
    assert "nor that it harms" in text
    assert "accurate" not in text


@pytest.mark.parametrize(("sign", "word"), [(1, "more accurate"), (-1, "less accurate")])
def test_harm_is_said_as_plainly_as_help(sign: int, word: str) -> None:
    low, high = sorted((sign * 0.001, sign * 0.005))
    text = said(sign * 0.003, low, high, 0.01)
    assert f"acb was {word} here" in text
    assert "contain zero" in text


def test_many_comparisons_ask_for_a_smaller_p() -> None:
    assert "luckiest" in said(0.003, 0.001, 0.005, 0.02, comparisons=5)
    assert "below 0.01, which 5 comparisons ask for" in said(0.003, 0.001, 0.005, 0.002, comparisons=5)
    assert "comparisons" not in said(0.003, 0.001, 0.005, 0.02, comparisons=1)


def test_one_seed_says_nothing_about_chance() -> None:
    nothing = math.nan
    assert "from one seed" in said(0.01, nothing, nothing, nothing, pairs=1)
    assert "the same with each of 3 seeds" in said(0.01, nothing, nothing, nothing, pairs=3)


# ------------------------------------------------------------------------------------------------- turns


def test_each_seed_begins_with_another_variant() -> None:
    assert [order("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    for place in range(3):
        assert {order("abc", turn)[place] for turn in range(3)} == set("abc")


# ------------------------------------------------------------------------------------------------- report


def run(text: str, seed: int, accuracy: float, seconds: float = 10.0, **changes: Any) -> Run:
    deployed = Deployment(297, 0, accuracy + 0.01, accuracy + 0.01, 1000, 0.5, 0.5)
    values: dict[str, Any] = {"mean_of_last": accuracy, "last": accuracy - 0.01, "best": accuracy + 0.01}
    values |= {"seconds": seconds, "peak_bytes": 2**20, "parameters": 3000, "deployment": deployed} | changes
    return Run(text, seed, **values, epochs=(1, 2), accuracies=(accuracy - 0.2, accuracy))


def comparison(others: dict[str, Sequence[float]] | None = None) -> Comparison:
    rows = {"plain": PLAIN} | ({"acb": BETTER} if others is None else others)
    runs = [run(text, seed, each) for text, row in rows.items() for seed, each in enumerate(row)]
    seeds = tuple(range(len(PLAIN)))
    return Comparison(Config(), tuple(rows), seeds, tuple(runs), "reparam train", "Written by the tool on a day.")


def written(found: Comparison, out: Path) -> str:
    """Keep a comparison as a folder, as the trainer and :func:`compare` do, and read the report that is made of it."""
    for each in found.runs:
        folder = out / each.variant / f"seed{each.seed}"
        folder.mkdir(parents=True)
        values = dataclasses.asdict(each)
        (folder / "result.json").write_text(json.dumps(values), encoding="utf-8")
        (folder / "deployment.json").write_text(json.dumps(values["deployment"]), encoding="utf-8")
        rows = "".join(f"{e},{a}\n" for e, a in zip(each.epochs, each.accuracies, strict=True))
        (folder / "log.csv").write_text(f"epoch,test_accuracy\n{rows}3,\n", encoding="utf-8")
    note = {"config": json.loads(found.config.to_json()), "variants": found.variants, "seeds": found.seeds}
    note |= {"command": found.command, "facts": found.facts}
    (out / "comparison.json").write_text(json.dumps(note), encoding="utf-8")
    write_documentation(out, out / "page.md")
    return (out / "page.md").read_text(encoding="utf-8")


def test_ratios_are_medians_over_pairs() -> None:
    plain = [run("plain", seed, 0.9, seconds) for seed, seconds in enumerate((10, 20, 40))]
    mine = [run("acb", seed, 0.9, seconds) for seed, seconds in enumerate((30, 20, 60))]
    found = Comparison(Config(), ("plain", "acb"), (0, 1, 2), (*mine[::-1], *plain), "", "")
    assert found.ratio("acb", "seconds") == 1.5
    assert found.ratio("plain", "seconds") == 1


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = comparison()
    written(found, tmp_path)
    again = read_comparison(tmp_path)
    assert dataclasses.replace(again, runs=()) == dataclasses.replace(found, runs=())
    for text in found.variants:
        assert again.of(text) == found.of(text)


def test_documentation_has_what_a_reader_needs(tmp_path: Path) -> None:
    text = written(comparison(), tmp_path)
    assert "| acb | 95.00 ± 3.16 | 94.00 ± 3.16 | 96.00 ± 3.16 | +3.00 | +1.04 to +4.96 | 0.013 |" in text
    assert "| plain | 92.00 ± 1.58 |" in text
    assert "| plain | 90.00 | 91.00 | 92.00 | 93.00 | 94.00 |" in text, "each seed has its own column"
    assert "Written by the tool on a day. 10 runs, 100 s of training." in text
    assert "reparam train" in text
    assert "more accurate than plain with an interval above zero: 1; less accurate with one below: 0" in text
    assert "A run has 2 evaluations" in text
    assert "Each of the 10 collapsed networks gives" in text
    assert PUBLISHED[0].system in text
    assert PUBLISHED[0].command in text
    assert "87.10 (+0.85)" in text
    assert "95.674 (+0.52)" not in text, "only rows with this network, where there are some"
    assert "Above and not in the recipe `acnet-cifar10`: " in text
    for name in ("page-curves", "page-differences"):
        assert f"({name}.svg)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_worse_variants_are_counted_and_shown_like_better_ones(tmp_path: Path) -> None:
    worse = [2 * plain - better for plain, better in zip(PLAIN, BETTER, strict=True)]
    text = written(comparison({"acb": BETTER, "dbb": worse, "doconv": PLAIN, "ecb": BETTER}), tmp_path)
    assert "| −3.00 | −4.96 to −1.04 | 0.013 |" in text
    assert "interval above zero: 2; less accurate with one below: 1; that cannot be told apart from it: 1." in text
    assert "dbb was less accurate here" in text


def test_a_collapsed_network_that_answers_differently_is_named(tmp_path: Path) -> None:
    found = comparison()
    wrong = dataclasses.replace(found.runs[7].deployment, different=2)
    runs = (*found.runs[:7], dataclasses.replace(found.runs[7], deployment=wrong), *found.runs[8:])
    text = written(dataclasses.replace(found, runs=runs), tmp_path)
    assert "WRONG: acb, seed 2: the collapsed network answers 2 of 297 test images differently" in text
    assert "Each of the" not in text


def test_csv_holds_the_numbers_in_full(tmp_path: Path) -> None:
    write_results(comparison(), tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text(encoding="utf-8"))))
    assert [row["variant"] for row in rows] == ["plain", "acb"]
    expected = paired_difference(BETTER, PLAIN)
    assert float(rows[1]["mean_of_last_p"]) == expected.p
    assert float(rows[1]["mean_of_last_low"]) == expected.low
    assert float(rows[1]["last_mean"]) == pytest.approx(statistics.fmean(BETTER) - 0.01)
    assert float(rows[1]["best_deviation"]) == pytest.approx(statistics.stdev(BETTER))
    assert (rows[1]["parameters"], rows[1]["deployed_parameters"]) == ("3000", "1000")


def test_an_unfinished_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="is the comparison finished"):
        read_comparison(tmp_path)
    written(comparison(), tmp_path)
    (tmp_path / "acb" / "seed3" / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(CompareError, match=r"seed3.result\.json is damaged"):
        read_comparison(tmp_path)


# ------------------------------------------------------------------------------------------------- figures


def texts(svg: Path) -> str:
    """The comments of an SVG: matplotlib draws text as outlines and says in a comment what it reads."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    found = ElementTree.parse(svg, parser).iter(ElementTree.Comment)  # type: ignore[arg-type]
    return "\n".join(str(each.text).strip() for each in found)


def test_every_figure_names_its_lines_and_is_the_same_file_each_time(tmp_path: Path) -> None:
    values = np.array([[50.0, 90.0, 95.0], [40.0, 91.0, 96.0]])
    curves = {name: ((1, 2, 3), values + i) for i, name in enumerate(("plain", "acb:gamma=1/3@paper", "dbb"))}
    intervals = [Interval("acb", 0.5, -0.1, 1.1, (0.2, 0.8)), Interval("dbb", 0.3, math.nan, math.nan, (0.3,))]
    panels = [Panel("drift", {"acb": (0, 1e-3, 1e-2), "control": (0, 0, 0)}, logarithmic=True)]
    for stem in (tmp_path / "once.a", tmp_path / "again.a"):
        learning_curves(curves, stem.with_name(f"{stem.name}-curves"))
        difference_plot(intervals, "plain", stem.with_name(f"{stem.name}-differences"))
        drift_plot((0, 1, 2), panels, stem.with_name(f"{stem.name}-drift"))
    for name, words in {
        "curves": ("plain", "acb:gamma=1/3@paper", "dbb", "epoch"),
        "differences": ("acb", "dbb"),
        "drift": ("acb", "0 at every step: control"),
    }.items():
        once = tmp_path / f"once.a-{name}.svg"
        assert once.read_bytes() == (tmp_path / f"again.a-{name}.svg").read_bytes()
        for word in words:
            assert word in texts(once)


# ------------------------------------------------------------------------------------------------- whole runs

CONFIG = Config(data="digits", size=16, epochs=1, batch=256, rate=0.01)
VARIANTS = ["plain", "acb:gamma=1/3@paper"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_says_what_an_uninterrupted_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[str, int]] = []
    whole = compare(CONFIG, VARIANTS, 2, tmp_path / "whole", on_epoch=lambda text, seed, _: turns.append((text, seed)))
    assert turns == [(VARIANTS[0], 0), (VARIANTS[1], 0), (VARIANTS[1], 1), (VARIANTS[0], 1)]
    assert not whole.unequal
    for found in whole.runs:
        assert found.deployment.collapsed == found.deployment.trained == pytest.approx(found.best)
        assert found.deployment.parameters < found.parameters

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_deploy", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(CONFIG, VARIANTS, 2, tmp_path / "killed")
    turns.clear()
    again = compare(CONFIG, VARIANTS, 2, tmp_path / "killed", on_epoch=lambda text, seed, _: turns.append((text, seed)))
    assert turns == [(VARIANTS[1], 1), (VARIANTS[0], 1)], "runs that are finished are trained again"
    assert [run.accuracies for run in again.runs] == [run.accuracies for run in whole.runs]
    assert [run.mean_of_last for run in again.runs] == [run.mean_of_last for run in whole.runs]
    for name in ("table.md", "table.csv", "report.md", "curves.svg", "curves.png", "differences.svg"):
        assert (tmp_path / "killed" / name).stat().st_size > 100


@pytest.mark.slow
def test_a_collapsed_network_that_is_wrong_fails_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = reparam.collapse

    def wrong(model: nn.Module) -> nn.Module:
        folded = fold(model)
        last = [layer for layer in folded.modules() if isinstance(layer, nn.Linear)][-1]
        with torch.no_grad():
            last.bias[3] += 100
        return folded

    monkeypatch.setattr(reparam, "collapse", wrong)
    with pytest.raises(CompareError, match=r"plain, seed 0: the collapsed network answers \d+ of 297"):
        compare(CONFIG, ["plain"], 1, tmp_path)
    assert "WRONG: plain, seed 0" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("variants", "seeds"), [([], 1), (["acb", "acb"], 1), (["plain"], 0)])
def test_a_comparison_needs_variants_that_differ_and_a_seed(tmp_path: Path, variants: list[str], seeds: int) -> None:
    with pytest.raises(CompareError, match="different variants and a seed"):
        compare(CONFIG, variants, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_in_the_report_makes_the_same_configuration() -> None:
    config = dataclasses.replace(CONFIG, milestones=(0.25, 0.5), ema=None, decay_biases=True, seed=3, schedule="step")
    words = shlex.split(module._command(config, VARIANTS, 5, Path("runs/digits")))
    settings = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    named = {flag.removeprefix("--"): word for flag, word in itertools.pairwise(words) if flag.startswith("--")}
    named = {name: named[name] for name in ("model", "data", "epochs", "seed")}
    assert override(Config(), [*settings, *(f"{name}={value}" for name, value in named.items())]) == config
    assert words[words.index("--compare") + 1 :] == [*VARIANTS, "--seeds", "5", "--out", "runs/digits"]


def test_folders_of_variants_are_ordinary_names() -> None:
    assert run_folder(Path("out"), "acb:gamma=1/3@paper", 2) == Path("out/acb-gamma=1-3@paper/seed2")
