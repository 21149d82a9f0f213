"""Runs over a zoo as one Markdown document: totals, a table by family, the reasons for what stays, other folds."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zoo.journal import Content, JournalError, read
from zoo.outcome import KINDS, Converted, Outcome, Planned
from zoo.plan import OTHERS
from zoo.render import markdown_table
from zoo.report.data import Reason, family, kind_words, missing, reasons

__all__ = ["summary"]

LARGE = 64 << 20
"""Bytes of a network from which its peak memory says something about it."""

FOLDS = {"timm": "timm's `reparameterize_model`", "fx": "`torch.fx.experimental.optimization.fuse`"}


def summary(folders: Sequence[Path]) -> str:
    """The document of one or several runs, each with the command that repeats it.

    Raises:
        JournalError: a folder holds no run, or one that has not come to its end.
    """
    parts = ["# What reparam does to a whole zoo\n"]
    for folder in folders:
        content = read(folder)
        if not content.runs:
            raise JournalError(f"{folder}: the line that says what was asked for is missing; run it again")
        left = missing(content)
        if left:
            raise JournalError(f"{folder}: {len(left)} models have no outcome yet; go on with --resume first")
        parts.append(_run(content))
    return "\n".join(parts)


def _run(content: Content) -> str:
    asked = {spec for run in content.runs for spec in run["specs"]}
    outcomes = [o for spec, o in content.outcomes.items() if spec in asked]
    planned = [o for o in outcomes if isinstance(o, Planned)]
    converted = [o for o in outcomes if isinstance(o, Converted)]
    block = content.runs[0]["settings"].get("block")
    title = "Planned on the meta device" if planned else f"Converted{f' with {block}' if block else ''}"
    parts = [f"## {title}\n", f"    {_command(content)}\n", _origin(content, outcomes)]
    if planned:
        parts += [_plan_totals(planned, block), _families(planned, _plan_cells, PLAN_HEADINGS)]
    if converted:
        parts += [_totals(converted, block), _families(converted, _cells, HEADINGS)]
    parts.append(_others_that_ended(outcomes))
    parts.append(_reasons("Why batch norms and branches stay", reasons(outcomes)))
    if block:
        parts.append(_reasons(f"Why convolutions get no {block}", reasons(outcomes, "left")))
    return "\n".join(part for part in parts if part)


def _command(content: Content) -> str:
    """The first command of the run: what went on with it later did the rest of the same."""
    return shlex.join(["reparam", *content.runs[0]["command"]])


def _origin(content: Content, outcomes: Sequence[Outcome]) -> str:
    """When, with what, on what machine, how long, and how the models ended."""
    first = content.runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    jobs = first["limits"].get("jobs", 1)
    names = dict.fromkeys(name for o in outcomes for name in o.seconds)
    stages = {name: sum(o.seconds.get(name, 0.0) for o in outcomes) for name in names}
    took = _long(stages.pop("all", 0.0))
    each = ", ".join(f"{name} {_long(seconds)}" for name, seconds in stages.items() if seconds >= 30)
    took += f" ({each})" if each else ""
    parts = "" if len(content.runs) == 1 else f", in {len(content.runs)} parts"
    counts = Counter(o.kind for o in outcomes)
    ends = ", ".join(f"{counts[kind]} {kind_words(kind)}" for kind in KINDS if counts[kind] or not KINDS[kind].ok)
    return (
        f"Written by the tool from the run's journal. Started {first['started'][:10]}: {versions}; {first['machine']}, "
        f"{jobs} at a time{parts}. The models' times add up to {took}.\n\n{len(outcomes)} architectures: {ends}.\n"
    )


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.0f} minutes"


# ------------------------------------------------------------------------------------------------- totals


def _plan_totals(outcomes: Sequence[Planned], block: str | None) -> str:
    """What is left in all networks together, here and after the folds that others ship."""
    parts = ("convs", "norms")
    before = {part: sum(getattr(o.before, part) for o in outcomes) for part in parts}
    rows = [["as built", *(f"{before[part]:,}" for part in parts), ""]]
    after = {part: sum(getattr(o.after, part) for o in outcomes) for part in parts}
    rows.append(["reparam", *(f"{after[part]:,}" for part in parts), "0"])
    for fold in OTHERS:
        # What a fold cannot do at all stays as it was built.
        left = {
            part: sum(found[part] if (found := o.others.get(fold)) else getattr(o.before, part) for o in outcomes)
            for part in parts
        }
        fails = sum(not o.others.get(fold) for o in outcomes)
        rows.append([FOLDS[fold], *(f"{left[part]:,}" for part in parts), str(fails)])
    table = markdown_table(("all networks together", "convs", "norms", "networks that it fails on"), rows)
    text = (
        f"{table}\nA network on which another fold raises an error counts as built. fx gives a graph back, in which "
        "convolutions that are calls of functions (blur pooling, conditional convolutions) are seen and counted too.\n"
    )
    if block:
        eligible = sum(o.expanded for o in outcomes)
        networks = sum(bool(o.expanded) for o in outcomes)
        text += f"\n{eligible:,} convolutions in {networks:,} networks would get the block {block}.\n"
    return text


def _totals(outcomes: Sequence[Converted], block: str | None) -> str:
    rows = []
    for name, size in (("stock", "stock"), ("expanded", "before"), ("collapsed", "after")):
        sizes = [found for o in outcomes if (found := getattr(o, size)) is not None]
        if sizes:
            sums = [sum(getattr(each, part) for each in sizes) for part in ("convs", "norms")]
            millions = sum(each.parameters for each in sizes) / 1e6
            label = name if block or name == "collapsed" else "as built"
            rows.append([label, *(f"{value:,}" for value in sums), f"{millions:,.0f}"])
    whole = [o for o in outcomes if o.proof.outputs != "none"]
    whole_worst = max((o.proof.error for o in whole), default=math.nan)
    folds = sum(o.proof.folds for o in outcomes)
    worst = max((o.proof.fold_error for o in outcomes), default=math.nan)
    proofs = (
        f"{folds:,} folds, each proven on its own in float64 against the float32 layer that takes its place: largest "
        f"relative error {worst:.1e}"
    )
    if whole:
        proofs += (
            f". Whole outputs compared as well in {len(whole):,} networks: largest relative error {whole_worst:.1e}"
        )
    back = sum(bool(o.proof.roundtrip) for o in outcomes)
    if back:
        proofs += (
            f". {back:,} collapsed state dicts load into the stock architecture with `strict=True` and compute the same"
        )
    table = markdown_table(("together", "convs", "norms", "M parameters"), rows)
    return f"{table}\n{proofs}.\n{_memory(outcomes)}{_remarks(outcomes)}"


def _memory(outcomes: Iterable[Converted]) -> str:
    """What large networks took, relative to their own size; of a small one it is mostly what tracing takes."""
    taken = sorted((o.peak / o.before.bytes, o.name) for o in outcomes if o.peak and o.before.bytes >= LARGE)
    if not taken:
        return ""
    (most, name), median = taken[-1], statistics.median(ratio for ratio, _ in taken)
    below = sum(ratio < 3 for ratio, _ in taken)
    return (
        f"\nPeak memory of the {len(taken):,} networks of {LARGE >> 20} MiB or more, libraries aside, relative to the "
        f"network that is collapsed: median {median:.1f}, largest {most:.1f} ({name}), {below:,} below 3.\n"
    )


def _remarks(outcomes: Iterable[Converted]) -> str:
    """Why whole outputs were not compared, or say little."""
    found: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.proof.remark:
            found[outcome.proof.remark].append(outcome.name)
    return "".join(f"\n- {remark}: {', '.join(names)}" for remark, names in found.items()) + ("\n" if found else "")


# ------------------------------------------------------------------------------------------------- tables

HEADINGS = ("family", "networks", "convs", "norms", "folds", "largest error")
PLAN_HEADINGS = ("family", "networks", "convs", "norms", "timm's norms", "fx's norms", "blocks")


def _families(outcomes: Sequence[Any], cells: Any, headings: Sequence[str]) -> str:
    """One row for each file in which the source keeps its architectures."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for outcome in outcomes:
        prefix = "" if outcome.source == "timm" else f"{outcome.source}:"
        groups[prefix + family(outcome.source, outcome.name)].append(outcome)
    rows = [[name, str(len(groups[name])), *cells(groups[name])] for name in sorted(groups)]
    return f"### By family\n\n{markdown_table(headings, rows)}"


def _change(group: Sequence[Any], part: str) -> str:
    before, after = (sum(getattr(getattr(o, size), part) for o in group) for size in ("before", "after"))
    return f"{before:,} → {after:,}" if before != after else f"{before:,}"


def _cells(group: Sequence[Converted]) -> list[str]:
    errors = [o.proof.error if o.proof.outputs != "none" else o.proof.fold_error for o in group]
    folds = sum(o.folds for o in group)
    return [_change(group, "convs"), _change(group, "norms"), f"{folds:,}", f"{max(errors):.0e}"]


def _plan_cells(group: Sequence[Planned]) -> list[str]:
    left = [
        f"{sum(found['norms'] if (found := o.others.get(fold)) else o.before.norms for o in group):,}"
        for fold in OTHERS
    ]
    return [_change(group, "convs"), _change(group, "norms"), *left, f"{sum(o.expanded for o in group):,}"]


def _others_that_ended(outcomes: Iterable[Outcome]) -> str:
    """What was neither planned nor converted, by its reason."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        if not isinstance(outcome, Converted | Planned):
            sentence = outcome.sentence()
            # Sizes differ from network to network: what they have in common is that they are larger.
            sentence = (
                "more parameters than the run takes" if " M parameters; this run takes " in sentence else sentence
            )
            found[outcome.kind, sentence].append(outcome.name)
    if not found:
        return ""
    rows = [
        [kind_words(kind), str(len(names)), sentence, ", ".join(names[:6]) + (", …" if len(names) > 6 else "")]
        for (kind, sentence), names in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return (
        f"### What was not converted, and why\n\n{markdown_table(('outcome', 'networks', 'reason', 'such as'), rows)}"
    )


def _reasons(title: str, found: Sequence[Reason]) -> str:
    if not found:
        return ""
    rows = [[reason.text, f"{reason.layers:,}", f"{reason.models:,}"] for reason in found]
    return f"### {title}\n\n{markdown_table(('reason', 'layers', 'networks'), rows)}"
