"""A run folder as one page: a self-contained HTML file that loads nothing, for whoever wants to know what happened.

Summary, table, plots and a page for each model. What the table and the pages need is JSON within the file, drawn when
it is looked at; a model's page is made when it is opened. Names and messages come from other people's packages: here
they are escaped, in the page's script they are only ever text, and its policy lets no other script run.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from zoo.journal import Content, read
from zoo.outcome import KINDS, Outcome
from zoo.render import write_text
from zoo.report.data import Details, Reason, kind_words, missing, reasons, table, totals

__all__ = ["NAME", "write_report"]

NAME = "report.html"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into the run folder, which may be in use; returns its path.

    Raises:
        JournalError: it is no run folder, or its journal is damaged.
        FileError: the page cannot be written.
    """
    content = read(folder)
    path = Path(folder) / NAME
    write_text(path, _page(content, Path(folder)))
    return path


def _page(content: Content, folder: Path) -> str:
    outcomes = sorted(content.outcomes.values(), key=lambda o: (o.source, o.name))
    details = Details(folder)
    for outcome in outcomes:
        details.add(outcome)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'",
        title=escape(_title(content, folder)),
        style=_asset("page.css"),
        lead=_lead(content, outcomes),
        provenance=escape(_provenance(content)),
        command=escape(_command(content)),
        warnings="".join(f'<p class="warning">{escape(text)}</p>' for text in _warnings(content)),
        bar=_bar(outcomes),
        chips=_chips(outcomes),
        totals=_totals(outcomes),
        reasons=_reasons("Refused folds, by reason", "refused", reasons(outcomes))
        + _reasons("Layers left without a block, by reason", "left", reasons(outcomes, "left")),
        footer=f"Written by <code>reparam zoo report</code> on {_now()}.",
        data=_json(table(outcomes)),
        details=_json(details.to_json()),
        script=script,
    )


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element: no ``<`` that could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# ------------------------------------------------------------------------------------------------- head


def _settings(content: Content) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (content.runs[-1].get("settings") if content.runs else None) or {}
    return found


def _title(content: Content, folder: Path) -> str:
    block = _settings(content).get("block")
    if _settings(content).get("plan"):
        done = "planned without numbers"
    else:
        done = f"expanded with {block}, then collapsed" if block else "collapsed"
    return f"Run {folder.resolve().name}: models {done}"


def _lead(content: Content, outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in outcomes)
    bad = sum(not outcome.ok for outcome in outcomes)
    done = f"{counts['planned']:,} planned" if counts["planned"] else f"{counts['converted']:,} converted and proven"
    text = f"{_plural(len(outcomes), 'model')}: {done}"
    idle = counts["nothing_to_do"] + counts["refused"]
    text += f", {idle:,} left as they are with a reason" if idle else ""
    text += f", <strong>{bad:,} failed or differ</strong>" if bad else ", none failed, none differs"
    speeds = totals(outcomes).faster
    if speeds:
        text += f". The median forward pass takes {100 / median(speeds):.0f} % of its former time"
    return f"{text}."


def _provenance(content: Content) -> str:
    if not content.runs:
        return "The journal does not say what was run."
    first, last = content.runs[0], content.runs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in (last.get("versions") or {}).items())
    words = [str(first.get("started", "")).replace("T", " ").replace("+00:00", " UTC")]
    if content.seconds:
        words.append(_duration(content.seconds) + (f" in {len(content.runs)} parts" if len(content.runs) > 1 else ""))
    words += [str(last.get("machine", "")), versions]
    weights = _settings(content).get("weights") or ("pretrained" if _settings(content).get("pretrained") else "random")
    return "; ".join(word for word in words if word) + f"; weights: {weights}."


def _command(content: Content) -> str:
    return shlex.join(["reparam", *map(str, content.runs[-1].get("command") or ())]) if content.runs else ""


def _warnings(content: Content) -> list[str]:
    found = []
    absent = missing(content)
    if absent:
        shown = ", ".join(absent[:5]) + (" and others" if len(absent) > 5 else "")
        found.append(f"The run has not ended: no outcome yet of {_plural(len(absent), 'model')} ({shown}).")
    if content.torn:
        found.append("The last line of the journal is torn, as after a crash, and was passed over.")
    return found


# ------------------------------------------------------------------------------------------------- summary


def _bar(outcomes: Sequence[Outcome]) -> str:
    return "".join(
        f'<span style="flex: {number} 0 0; background: var(--{kind})"></span>' for kind, number in _by_kind(outcomes)
    )


def _chips(outcomes: Sequence[Outcome]) -> str:
    return "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="false"><span class="dot" style="--of: var(--{kind})">'
        f"</span>{number:,} {kind_words(kind)}</button>"
        for kind, number in _by_kind(outcomes)
    )


def _by_kind(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    counts = Counter(outcome.kind for outcome in outcomes)
    return [(kind, counts[kind]) for kind in KINDS if counts[kind]]


def _totals(outcomes: Sequence[Outcome]) -> str:
    sums = totals(outcomes)
    if not sums.models:
        return ""
    columns = {"stock": sums.stock, "before": sums.before, "after": sums.after}
    shown = {name: values for name, values in columns.items() if values or name != "stock"}
    head = "".join(f'<th scope="col" class="n">{name}</th>' for name in shown)
    lines = ""
    for part in ("convs", "norms", "parameters"):
        cells = "".join(f'<td class="n">{values[part]:,}</td>' for values in shown.values())
        saved = 1 - sums.after[part] / sums.before[part] if sums.before[part] else 0.0
        lines += f'<tr><th scope="row">{part}</th>{cells}<td class="n">{_percent(saved)}</td></tr>'
    return (
        f'<div><h2>Totals of {_plural(sums.models, "converted network")}</h2><div class="inner"><table class="facts">'
        f'<thead><tr><td></td>{head}<th scope="col" class="n">change</th></tr></thead><tbody>{lines}</tbody></table>'
        "</div></div>"
    )


def _reasons(title: str, name: str, found: Sequence[Reason]) -> str:
    if not found:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{escape(reason.text)}</th><td class="n">{reason.layers:,}</td>'
        f'<td class="n">{reason.models:,}</td></tr>'
        for reason in found
    )
    return (
        f'<div><h2>{title}</h2><table class="facts" id="{name}"><thead><tr><th scope="col">reason</th>'
        f'<th scope="col" class="n">layers</th><th scope="col" class="n">models</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _percent(saved: float) -> str:
    return "none" if saved == 0 else f"{-100 * saved:+.1f} %".replace("-", "−")


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
