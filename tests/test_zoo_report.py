"""The report of a run: what is on the page, and the page itself in headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
from damage import outcome, with_junk
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from reparam.cli import app
from zoo.convert import convert
from zoo.job import Job, Settings
from zoo.journal import Journal, JournalError
from zoo.outcome import (
    KINDS,
    Converted,
    Failed,
    Latency,
    Mismatch,
    NothingToDo,
    Outcome,
    OutOfMemory,
    Planned,
    Proof,
    Refused,
    Size,
    TimedOut,
)
from zoo.report import write_report
from zoo.report.data import family, reasons, totals
from zoo.report.layout import below, common_prefix, lay_out, outline, short_layer
from zoo.summary import summary

pytest_plugins = ("toy_package", "troublesome_package")

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">&amp;'
LARGER = "one convolution would cost more than the layers it replaces"


# ------------------------------------------------------------------------------------------------ a run


def node(number: int, label: str, path: str, kind: str) -> dict[str, Any]:
    return {"id": number, "label": label, "path": path, "kind": kind}


BEFORE = {
    "nodes": [
        node(0, "input", "stem", "input"),
        node(1, "Conv2d 8→8 3x3", "body.0.square", "conv"),
        node(2, "BatchNorm2d 8", "body.0.norm", "norm"),
        node(3, "Conv2d 8→8 1x1", "body.0.point", "conv"),
        node(4, "add", "body.0:add", "add"),
        node(5, "output", "", "output"),
    ],
    "edges": [[0, 1], [1, 2], [0, 3], [2, 4], [3, 4], [4, 5]],
}
AFTER = {
    "nodes": [
        node(0, "input", "", "input"),
        node(1, "Conv2d(8 -> 8, 3x3, stride 2x2)", "body.0.square", "conv"),
        node(2, "output", "", "output"),
    ],
    "edges": [[0, 1], [1, 2]],
}


def converted(name: str, before_ms: float, after_ms: float, **fields: Any) -> Converted:
    values: dict[str, Any] = {
        "source": "made",
        "seconds": {"build": 0.5, "all": 1.5},
        "before": Size(1000, 4000, 20, 10, 1, 5000),
        "after": Size(600, 2400, 8, 0, 1, 3000),
        "proof": Proof(3, 1e-8, "whole", 1e-7, 1e-6, 1e-5),
        "latency": Latency((1, 3, 8, 8), before_ms, after_ms),
        "folds": 3,
        "refused": {LARGER: 2},
        "details": f"models/made/{name}.json",
    }
    return Converted(name=name, **values | fields)


def details(folds: int = 3, refusals: int = 2, layer: str = "body") -> dict[str, Any]:
    members = ["square", "norm", "point"]
    return {
        "weights": {"origin": "random", "randomised": True, "file": None, "notes": []},
        "folds": [
            {
                "layers": [f"{layer}.{i}.{member}" for member in members] + [f"{layer}.{i}:add"],
                "into": "Conv2d(8 -> 8, 3x3)",
                "numbers": [1000 + i, 600],
                "error": 2.5e-8,
                "region": 0,
            }
            for i in range(folds)
        ],
        "refusals": [
            {"layer": f"head.{i}", "reason": "LARGER", "text": LARGER, "message": f"{LARGER}: {i} numbers"}
            for i in range(refusals)
        ],
        "left": [],
        "untraced": [],
        "notes": ["a note of the collapse"],
        "regions": [{"count": folds, "example": [f"{layer}.0.square"], "before": BEFORE, "after": AFTER}],
    }


WIDE = Size(311_234_567, 9**9, 1000, 0, 1)
OUTCOMES: tuple[Outcome, ...] = (
    converted("net_slow", 9000.0, 3000.0, before=Size(387_934_888, 9**9, 2000, 2100, 1), after=WIDE),
    converted("net_fast", 9.0, 8.0),
    converted("other10", 50.0, 10.0),
    NothingToDo(name="idle", source="made", reason="no convolution", before=Size(7, 28, 0, 0, 1)),
    Refused(name="kept", source="made", reason="all of it stays", refused={"used from more than one place": 4}),
    NothingToDo(name="vit_so150m2_patch16_reg1_gap_448_and_then_some", source="made", reason="no batch norm"),
    Mismatch(name="wrong", source="made", error=0.1, allowed=0.01, layer="head", message="differs"),
    Failed(
        name="broken", source="made", stage="build", error="ValueError: no", traceback="Traceback: line 3 " + 300 * "x"
    ),
    TimedOut(name="slow", source="made", stage="collapse", limit=3.0),
    OutOfMemory(name="greedy", source="made", stage="build", limit=0.5, message="more than 0.5 GiB"),
)


PLANNED = Planned(name="plan", source="made", before=WIDE, after=WIDE, others={"fx": {"convs": 1, "norms": 1}})


def run_folder(
    path: Path, outcomes: tuple[Outcome, ...], pages: Mapping[str, Any], asked: tuple[str, ...] = ()
) -> Path:
    """A run folder as ``zoo convert`` leaves it."""
    header = {"started": "2026-01-31T22:00:00+00:00", "specs": [o.spec for o in outcomes] + list(asked)}
    with Journal(path) as journal:
        journal.append("run", header | {"settings": {"block": None}, "command": ["zoo", "convert", "net*"]})
        for outcome in outcomes:
            journal.append("outcome", outcome.to_json())
        journal.append("end", {"finished": "2026-01-31T22:10:00+00:00", "seconds": 75.0})
    for name, content in pages.items():
        file = path / "models" / "made" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with every kind of outcome, among them names and messages that are markup."""
    hostile = converted(HOSTILE, 20.0, 10.0, details="models/made/hostile.json", notes=(HOSTILE,), refused={HOSTILE: 1})
    pages = {name: details() for name in ("net_slow", "net_fast", "other10")} | {"hostile": details(layer=HOSTILE)}
    return write_report(run_folder(tmp_path_factory.mktemp("run"), (*OUTCOMES, hostile), pages))


class Reader(HTMLParser):
    """Scripts, elements and text of a page, as a browser finds them."""

    def __init__(self, page: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts[-1] += data
        else:
            self.text += data


def data_of(page: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table by column, and the details."""
    data, more, _ = Reader(page).scripts[:3]
    found = json.loads(data)
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]], json.loads(more.split("\n")[0])


# ------------------------------------------------------------------------------------------------ what is on it


def test_every_outcome_has_a_row_and_is_counted(report: Path) -> None:
    rows, more = data_of(report)
    assert len(rows) == len(more["models"]) == len(OUTCOMES) + 1
    assert {list(KINDS)[row["kind"]] for row in rows} == set(KINDS) - {"planned"}  # which runs of another sort have
    text = " ".join(Reader(report).text.split())
    for words in ("11 models: 4 converted and proven", "3 left as they are", "4 failed or differ", "1 timed out"):
        assert words in text
    slow = next(row for row in rows if row["name"] == "net_slow")
    assert (slow["convs"], slow["convs_after"], slow["ms"], slow["ms_after"]) == (2000, 1000, 9000.0, 3000.0)


def test_totals_are_of_converted_networks_and_reasons_of_all() -> None:
    sums = totals(OUTCOMES)
    assert (sums.models, sums.before["convs"], sums.after["convs"], sums.after["norms"]) == (3, 2040, 1016, 0)
    assert sorted(sums.faster) == [9 / 8, 3.0, 5.0]
    assert [(r.text, r.layers, r.models) for r in reasons(OUTCOMES)] == [
        (LARGER, 6, 3),
        ("used from more than one place", 4, 1),
    ]


def test_the_page_names_nothing_that_it_would_load(report: Path) -> None:
    reader = Reader(report)
    assert not {tag for tag, _ in reader.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not [attributes for _, attributes in reader.tags if "src" in attributes or "href" in attributes]
    style = report.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "--page" in style
    assert "url(" not in style
    assert "@import" not in style


def test_names_and_messages_cannot_become_markup(report: Path) -> None:
    reader = Reader(report)
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {"type": "application/json", "id": "details"},
        {},
    ]
    rows, more = data_of(report)
    assert HOSTILE in [row["name"] for row in rows]
    assert HOSTILE in reader.text, "the reason is shown as it is"
    assert any(HOSTILE in text for text in more["strings"]), "the layers are shown as they are"


def test_the_policy_allows_the_page_s_script_alone(report: Path) -> None:
    reader = Reader(report)
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a) or ""
    text = report.read_text(encoding="utf-8").rpartition("<script>")[2].rpartition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


def test_shared_strings_and_layouts_stand_once(report: Path) -> None:
    _, more = data_of(report)
    assert len(more["layouts"]) == 2, "before and after, in four models"
    assert len(set(more["strings"])) == len(more["strings"])


@pytest.mark.parametrize("damage", ["missing", "torn", "another format"])
def test_details_that_cannot_be_read_are_a_note(tmp_path: Path, damage: str) -> None:
    folder = run_folder(tmp_path, (converted("net", 2.0, 1.0),), {"net": {"weights": {}} if damage != "torn" else None})
    file = folder / "models/made/net.json"
    if damage == "missing":
        file.unlink()
    elif damage == "torn":
        file.write_text('{"weights": ', encoding="utf-8")
    _, more = data_of(write_report(folder))
    assert "models/made/net.json cannot be read" in more["models"][0]["notes"][0]


def test_long_lists_are_cut_and_say_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (converted("net", 2.0, 1.0),), {"net": details(folds=700, refusals=400)})
    model = data_of(write_report(folder))[1]["models"][0]
    assert model["more"] == {"folds": 100, "refusals": 100}
    assert (len(model["folds"]), len(model["refusals"])) == (600, 300)


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, OUTCOMES[3:4], {}, asked=("made:later",))
    with (folder / "journal.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"record": "outcome", "kind": "conv')
    text = Reader(write_report(folder)).text
    assert "no outcome yet of 1 model (made:later)" in text
    assert "last line of the journal is torn" in text


def test_the_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", OUTCOMES[3:], {})
    result = CliRunner().invoke(app, ["zoo", "report", str(folder)])
    assert (result.exit_code, result.output.strip()) == (0, str(folder / "report.html"))
    assert Reader(folder / "report.html").tags
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="not the folder of a run"):
        write_report(tmp_path)
    assert CliRunner().invoke(app, ["zoo", "report", str(tmp_path)]).exit_code != 0


def test_a_journal_with_values_of_other_types_is_read_or_named(tmp_path: Path) -> None:
    """One value of a line or of the details replaced by another kind of thing, hundreds of times."""
    folder = run_folder(tmp_path, (*OUTCOMES[:2], PLANNED, *OUTCOMES[6:]), {"net_fast": details()})
    sources = [folder / "journal.jsonl", folder / "models" / "made" / "net_fast.json"]
    rng, named = random.Random(0), 0
    for path in sources:
        original = path.read_text(encoding="utf-8")
        for _ in range(250):
            lines = [json.loads(line) for line in original.splitlines()]
            changed = with_junk(lines, rng)
            path.write_text("".join(f"{json.dumps(line)}\n" for line in changed), encoding="utf-8")
            for reader in (write_report, lambda run: summary([run])):
                found = outcome(partial(reader, folder))
                assert found in ("loaded", "refused"), found
                named += found == "refused"
        path.write_text(original, encoding="utf-8")
    assert named > 100


@pytest.mark.parametrize("path", ["/dev/zero", "../outside.json", "models/../../x.json", "C:/x.json", ""])
def test_details_outside_of_the_folder_are_not_opened(path: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (converted("net", 2.0, 1.0, details=path), OUTCOMES[3]), {})
    with pytest.raises(JournalError, match=r"line 2 is damaged.*not in the folder of the run"):
        write_report(folder)


def test_a_converted_network_is_drawn(trouble: Path, tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        outcome = convert(Job("trouble", "block", Settings(None, False, None, False), tmp_path, None))
        journal.append("outcome", outcome.to_json())
    rows, more = data_of(write_report(tmp_path))
    assert isinstance(outcome, Converted)
    assert rows[0]["folds"] == len(more["models"][0]["folds"]) == outcome.folds
    count, where, before, after = more["models"][0]["regions"][0]
    texts = [more["strings"][number] for number in before[1::2]]
    assert (count, where) == (1, outcome_module(tmp_path, outcome))
    assert [text for text in texts if text.startswith("Conv2d\n3→4")], texts
    assert len(more["layouts"][before[0]][2]) > len(more["layouts"][after[0]][2]) == 3


def outcome_module(folder: Path, outcome: Converted) -> str:
    region = json.loads((folder / str(outcome.details)).read_text(encoding="utf-8"))["regions"][0]
    return common_prefix(region["example"]) or str(region["example"][0])


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("timm", "resnet18", "resnet"),
        ("timm", "repvgg_a0.rvgg_in1k", "byobnet"),
        ("torchvision", "fasterrcnn_resnet50_fpn", "faster_rcnn"),
        ("timm", "no_such_network", "no"),
        ("made", "widenet50_2,width=4", "widenet"),
    ],
)
def test_a_family_is_the_file_of_the_architecture(source: str, name: str, expected: str) -> None:
    assert family(source, name) == expected


# ------------------------------------------------------------------------------------------------ drawings


def boxes_and_lines(graph: Mapping[str, Any]) -> tuple[list[tuple[float, ...]], list[list[float]]]:
    width, height, nodes, edges = lay_out(outline(graph))
    found = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h, _ in nodes]
    for left, top, right, bottom in found:
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
    return found, edges


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 14))
    pairs = list(itertools.combinations(range(size), 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    kinds = draw(st.lists(st.sampled_from(["input", "conv", "add"]), min_size=size, max_size=size))
    labels = {"input": "input", "conv": "Conv2d 64→128 3x3", "add": "add"}
    nodes = [node(i, labels[kind], f"n{i}", kind) for i, kind in enumerate(kinds)]
    return {"nodes": nodes, "edges": [list(edge) for edge in edges]}


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_boxes_do_not_overlap_and_lines_run_down_beside_them(graph: dict[str, Any]) -> None:
    boxes, lines = boxes_and_lines(graph)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert len(lines) == len(graph["edges"])
    for line in lines:
        stops = list(zip(line[::2], line[1::2], strict=True))
        assert all(y0 < y1 for (_, y0), (_, y1) in itertools.pairwise(stops))
        for (x0, y0), (x1, y1) in itertools.pairwise(stops):
            if x0 == x1:  # beside the boxes of a layer
                hit = [box for box in boxes if box[0] < x0 - 1 and x0 + 1 < box[2] and box[1] < y1 and y0 < box[3]]
                assert not hit, (line, hit)


@pytest.mark.parametrize("edges", [[[0, 1], [1, 0]], [[0, 7]]])
def test_what_is_no_acyclic_graph_is_not_laid_out(edges: list[list[int]]) -> None:
    graph = {"nodes": [node(0, "a", "", "conv"), node(1, "b", "", "conv")], "edges": edges}
    with pytest.raises(ValueError, match="cycle"):
        lay_out(outline(graph))


def test_graphs_that_differ_by_their_channels_share_a_layout() -> None:
    other = json.loads(json.dumps(BEFORE).replace("8", "9"))
    assert outline(other) == outline(BEFORE)
    other["edges"].pop()
    assert outline(other) != outline(BEFORE)


def test_layers_are_named_briefly() -> None:
    assert short_layer("Conv2d(8 -> 16, 3x3, stride 2x2, groups 8)") == "Conv2d 8→16 3x3 stride 2 groups 8"
    assert short_layer("Conv2d(8 -> 16, 3x3, stride 2x1)") == "Conv2d 8→16 3x3 stride 2x1"
    assert short_layer("Conv2d 8→16 3x3") == "Conv2d 8→16 3x3"


def test_the_module_of_a_fold_is_what_its_layers_share() -> None:
    assert common_prefix(["a.b.conv", "a.b.bn", "a.b:add"]) == "a.b"
    assert common_prefix(["a.b1.conv", "a.b.bn"]) == "a"
    assert common_prefix(["conv", "bn"]) == ""
    assert [below(path, "a.b") for path in ("a.b.conv", "a.b:add", "a.bc")] == ["conv", ":add", "a.bc"]


# ------------------------------------------------------------------------------------------------ in a browser


needs_chromium = pytest.mark.skipif(chromium.find() is None, reason="Chromium is not installed")
NAMES = "[...document.querySelectorAll('tr.row:not([hidden])')].map(r => r.dataset.spec.slice(5))"
SHOWN = "document.getElementById('shown').textContent"
CIRCLES = "document.querySelectorAll('#charts svg')[0].querySelectorAll('circle').length"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: chromium.Page, report: Path) -> chromium.Page:
    """The report freshly opened in a wide window."""
    tab.errors.clear()
    tab.requests.clear()
    tab.look(1280, 900)
    tab.open(report)
    assert tab.run("document.documentElement.dataset.ready") == "yes", tab.errors
    return tab


def until(page: chromium.Page, expression: str, wanted: Any) -> None:
    """Wait for what the page does a moment later."""
    end = time.monotonic() + 10
    while (found := page.run(expression)) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert found == wanted


@needs_chromium
def test_a_click_on_a_header_sorts_and_another_turns_it_round(page: chromium.Page) -> None:
    assert page.run(NAMES) == sorted(page.run(NAMES), key=str.lower)
    page.click("th[data-key=speedup] button")
    assert page.run(NAMES)[:4] == ["other10", "net_slow", HOSTILE, "net_fast"]
    assert page.run("document.querySelector('th[data-key=speedup]').ariaSort") == "descending"
    page.click("th[data-key=speedup] button")
    assert page.run(NAMES)[:4] == ["net_fast", HOSTILE, "net_slow", "other10"], "what is not known stays last"
    assert page.run("document.querySelector('th[data-key=speedup]').ariaSort") == "ascending"
    assert page.run("document.querySelectorAll('th[aria-sort]').length") == 1


@needs_chromium
def test_typing_filters_by_name_and_the_plots_follow(page: chromium.Page) -> None:
    assert page.run(CIRCLES) == 4
    page.click("#q")
    page.type("NET")
    until(page, SHOWN, "2 of 11 models")
    assert page.run(NAMES) == ["net_fast", "net_slow"]
    assert page.run(CIRCLES) == 2
    page.click("#reset")
    until(page, SHOWN, "11 models")
    page.click("#q")
    page.type("*[os]t*")
    until(page, NAMES, ["net_fast", "other10"])


@needs_chromium
def test_filters_by_family_and_outcome_work_together(page: chromium.Page) -> None:
    page.click(".chips button[data-kind=converted]")
    assert sorted(page.run(NAMES)) == sorted(["net_fast", "net_slow", "other10", HOSTILE])
    assert page.run("document.querySelector('.chips [data-kind=converted]').ariaPressed") == "true"
    page.run("(() => { const f = document.getElementById('family'); f.value = 'net';"
             " f.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert page.run(NAMES) == ["net_fast", "net_slow"]
    page.click(".chips button[data-kind=converted]")
    page.click(".chips button[data-kind=failed]")
    assert page.run(NAMES) == []
    assert "No model" in page.run("document.getElementById('charts').textContent")


@needs_chromium
def test_a_click_opens_a_model_in_place_and_another_closes_it(page: chromium.Page) -> None:
    page.click("tr[data-spec='made:net_slow'] button")
    opened = "document.querySelector(\"tr[data-spec='made:net_slow']\").nextElementSibling"
    text = page.run(f"{opened}.innerText")
    for words in ("3 folds of this shape, for example body.0", LARGER, "a note of the collapse", "noise floor 1.0e-06"):
        assert words in text
    drawn = f"[...{opened}.querySelectorAll('.side svg')].map(s => [s.querySelectorAll('rect').length, s.ariaLabel])"
    (before, words), (after, _) = page.run(drawn)
    assert (before, after) == (6, 3)
    assert "Conv2d 8→8 3x3" in words
    page.run(f"{opened}.querySelectorAll('details').forEach(d => d.open = true)")
    text = page.run(f"{opened}.innerText")
    assert "body.2 square norm point :add" in text
    assert "head.1 one convolution would cost more than the layers it replaces: 1 numbers" in text
    assert "open=made%3Anet_slow" in page.run("location.hash")
    page.click("tr[data-spec='made:net_slow'] button")
    assert page.run(f"{opened}.hidden") is True
    assert page.errors == []


@needs_chromium
def test_keys_reach_and_work_everything_and_the_focus_is_seen(page: chromium.Page) -> None:
    page.run("document.getElementById('reset').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Model"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.run("document.querySelector('th[data-key=name]').ariaSort") == "descending"
    page.run("document.querySelector(\"tr[data-spec='made:broken'] button\").focus()")
    page.press("Enter")
    assert page.run("document.activeElement.ariaExpanded") == "true"
    assert page.run("document.getElementById(document.activeElement.getAttribute('aria-controls')).innerText.includes("
                    "'Traceback: line 3')")  # fmt: skip


@needs_chromium
def test_a_point_of_a_plot_opens_its_model(page: chromium.Page) -> None:
    title = page.run("document.querySelector('#charts circle').textContent")
    page.run("document.querySelector('#charts circle').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    spec = page.run("document.querySelector('tr.row.open').dataset.spec")
    assert title.startswith(f"{spec}: ")


@needs_chromium
def test_the_address_says_what_is_shown(page: chromium.Page, report: Path) -> None:
    page.open(report, "#q=net&outcome=converted&sort=-ms&open=made%3Anet_fast")
    assert page.run(NAMES) == ["net_slow", "net_fast"]
    assert page.run("document.querySelectorAll('tr.open').length") == 1
    page.open(report, "#sort=nonsense&family=nonsense&open=nonsense&outcome=nonsense")
    assert len(page.run(NAMES)) == 11
    assert page.errors == []


@needs_chromium
def test_names_that_are_markup_stay_text_and_nothing_is_loaded(page: chromium.Page, report: Path) -> None:
    page.run("document.querySelectorAll('tr.row button').forEach(b => b.click())")
    assert page.run("document.querySelectorAll('tr.open').length") == len(OUTCOMES) + 1
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("typeof window.hacked") == "undefined"
    assert page.requests == ["about:blank", report.as_uri()] or page.requests == [report.as_uri()]
    assert page.errors == []
    # The second line of defence: markup that did get in could not run.
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:x\" onerror=\"window.hacked = 1\">')")
    time.sleep(0.2)
    assert page.run("typeof window.hacked") == "undefined"
    assert page.errors


@needs_chromium
@pytest.mark.parametrize("width", [390, 660, 1000, 1160, 1280])
def test_nothing_is_wider_than_the_window(page: chromium.Page, report: Path, width: int) -> None:
    page.look(width, 844)
    page.open(report, "#open=made%3Anet_slow&open=made%3Abroken")
    assert page.run("document.documentElement.scrollWidth") == width
    # The table is clipped, so that its header can stay in sight: it has to fit by itself.
    assert page.run("document.getElementById('table').getBoundingClientRect().right") <= width
    assert page.run("document.querySelector('.side svg').getBoundingClientRect().width") > 100


@needs_chromium
def test_light_and_dark_follow_the_person(page: chromium.Page, tmp_path: Path) -> None:
    lightness = {}
    pictures = {}
    for dark in (False, True):
        page.look(1280, 900, dark)
        colours = page.run("['backgroundColor', 'color'].map(c => getComputedStyle(document.body)[c])")
        lightness[dark] = [sum(map(int, colour[4:-1].split(","))) / 765 for colour in colours]
        pictures[dark] = page.screenshot()
    assert lightness[False][0] > 0.9 > 0.3 > lightness[False][1]
    assert lightness[True][0] < 0.2 < 0.8 < lightness[True][1]
    assert pictures[True] != pictures[False]


@pytest.mark.slow
@needs_chromium
def test_a_whole_zoo_opens_quickly(tab: chromium.Page, tmp_path: Path) -> None:
    names = [f"family{i % 60}_{i}" for i in range(1500)]
    outcomes = tuple(converted(name, 5.0 + i, 4.0 + i / 2) for i, name in enumerate(names))
    pages = {name: details(folds=100, refusals=30, layer=f"stages.{i % 7}") for i, name in enumerate(names)}
    file = write_report(run_folder(tmp_path, outcomes, pages))
    assert file.stat().st_size < 15e6
    tab.look(1280, 900)
    tab.open(file, "#sort=-speedup")
    assert tab.run("performance.getEntriesByType('navigation')[0].domComplete") < 15_000  # of a busy machine
    assert tab.run("document.querySelectorAll('tr.row').length") == 1500
    tab.click("tr[data-spec='made:family7_1147'] button")
    assert "100 folds of this shape" in tab.run("document.querySelector('tr.open + tr').innerText")
