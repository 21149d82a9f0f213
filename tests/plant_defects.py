"""Plant defects in the compiler, one at a time, and see what notices: ``python tests/plant_defects.py``.

Each defect of :mod:`defects` is one fragment of source replaced by another. A copy of the packages with that one change
is imported in a process of its own and compiles the networks of :mod:`defect_networks` that run the fragment, without
example inputs where the compiler can make some up; what comes back is compared, independently of the compiler's own
checks, with the network as it was. A defect that neither the proof of each fold nor the check of the whole network
noticed must turn a test red: those tests that run the fragment are run on the copy, the narrowest first.

    python tests/plant_defects.py --coverage DATA --out docs/defects.md     all of them, and the table
    python tests/plant_defects.py --only algebra --no-tests                 what a part's defects do

Which tests run which line is read from DATA, where pytest-cov writes it first if it is not there yet.
"""
# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coverage import Coverage, CoverageData
from defects import DEFECTS, Defect, place_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("passes", "reparam", "zoo", "tests")
TESTS = (
    "bad_input", "blocks", "capture", "changed_blocks", "check", "compare", "conv_form", "edits", "equivalent_conv",
    "expand", "expand_faithful", "files", "fold", "forms", "in_place", "interface", "memos", "opset", "proof",
    "random_graphs", "refusals", "round_trip", "rows", "selection",
)  # fmt: skip
"""Files of tests of the compiler itself, those of large networks aside."""

SECONDS = 200
"""Most seconds for the networks of one defect, and for its tests; a compiler that hangs is noticed too."""

EQUAL, PROOF, CHECK, RAISED, OTHER, NOTED, SURVIVED, SILENT = (
    "equal", "fold proof", "module check", "an error", "other folds", "no effect", "SURVIVED", "SILENT",
)  # fmt: skip

Ends = dict[str, tuple[str, str]]
"""Per network how it ended and what came out, as text."""


class Runs:
    """What ran which lines, by file and line; ``kept`` makes the name of a context of coverage, or nothing."""

    def __init__(self, data: CoverageData, kept: Callable[[str], str] = str) -> None:
        self.by_line: dict[str, dict[int, list[str]]] = {}
        for file in data.measured_files():
            lines = data.contexts_by_lineno(file).items()
            names = {line: list(filter(None, map(kept, contexts))) for line, contexts in lines}
            self.by_line[f"passes/{file.rpartition('/passes/')[2]}"] = names
        self.width = Counter(name for ran in self.by_line.values() for names in ran.values() for name in names)
        """How many lines each runs: what runs few is quick, and made for what it runs."""

    def of(self, defect: Defect, root: Path = ROOT) -> list[str]:
        """What runs the statement with the defect, or, if only an import does, its file.

        First what runs a line of it that few run, such as what a condition guards; then what runs few lines.
        """
        path = place_of(defect, root)
        source = path.read_text()
        start = source[: source.index(defect.old)].count("\n") + 1
        stop = start + defect.old.rstrip("\n").count("\n")
        nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= start)
        around = sorted((n for n in nodes if (n.end_lineno or 0) >= stop), key=lambda n: (n.end_lineno or 0) - n.lineno)
        lines = range(around[0].lineno, (around[0].end_lineno or 0) + 1)
        ran = self.by_line.get(str(path.relative_to(root)), {})
        called = any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in around)
        rarity: dict[str, int] = {}
        for names in [ran[line] for line in lines if ran.get(line)] if called else ran.values():
            rarity.update((name, min(rarity.get(name, len(names)), len(names))) for name in names)
        return sorted(rarity, key=lambda name: (rarity[name], self.width[name], name))


@dataclass
class Result:
    """What one defect did: per network the way it ended, where that is not as without the defect."""

    defect: str
    tried: int = 0
    ends: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    """Networks that come out right, but not the same: fewer or other folds."""
    red: str = ""
    """The test that fails, if tests were run."""

    @property
    def verdict(self) -> str:
        """The worst that happened on networks; nothing if all came out right."""
        found = {end.partition(":")[0] for end in self.ends.values()}
        return next((kind for kind in (SILENT, CHECK, PROOF, RAISED) if kind in found), "")


# ------------------------------------------------------------------ in a process of its own


def _forked(work: Callable[..., Any], defect: Defect | None, *given: Any) -> Any:
    """What ``work`` returns in a planted copy, in a fork of this process, which has torch loaded; or an error."""

    def run() -> None:
        try:
            os.chdir(tree)
            os.environ.update(PYTHONPATH=tree, CI="1")  # tests: always the same examples
            sys.path[:0] = [tree, f"{tree}/tests"]
            torch.set_num_threads(1)
            send.send(work(tree, *given))
        except BaseException as error:  # the planted copy may not even import
            send.send(f"{RAISED}: {type(error).__name__}: {error}"[:160])

    with tempfile.TemporaryDirectory() as folder:
        tree = planted(defect, folder)
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run)
        process.start()
        send.close()
        try:
            ready = receive.poll(SECONDS if defect is not None else None)
            return receive.recv() if ready else f"{RAISED}: no end within {SECONDS} s"
        except EOFError:
            return f"{RAISED}: the process died"
        finally:
            process.kill()
            process.join()


def _ends(tree: str, chosen: Sequence[str] | None, noted: bool) -> tuple[Ends, Runs | None]:
    """For every network how it ended and what came out, as text; and which networks ran which lines, if noted."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    ends, runs = {}, _runs()
    coverage = Coverage(data_file=None, config_file=False, include=[f"{tree}/passes/*"]) if noted else None
    if coverage:
        coverage.start()
    for name in runs if chosen is None else chosen:
        if coverage:
            coverage.switch_context(name)
        ends[name] = runs[name]()
    if coverage:
        coverage.stop()
    return ends, Runs(coverage.get_data()) if coverage else None


def _runs() -> dict[str, Callable[[], tuple[str, str]]]:
    """Everything that is tried, by name."""
    from defect_networks import BLOCKS, FLAT, NETWORKS, PLAIN
    from small_networks import ready

    import reparam

    runs: dict[str, Callable[[], tuple[str, str]]] = {}
    for name, make in NETWORKS.items():
        runs[name] = functools.partial(_collapsed, make)
    for name, plain in PLAIN.items():
        for block in BLOCKS:
            kind, _, online = block.partition(" ")

            def original(plain: Any = plain) -> Any:
                torch.manual_seed(0)
                return ready(plain().double())

            def expanded(original: Any = original, kind: str = kind, form: Any = online or None) -> Any:
                return reparam.expand(original(), kind, form=form)

            runs[f"expand {name} {block}"] = functools.partial(_expanded, original, expanded, FLAT)
            runs[f"like {name} {block}"] = functools.partial(_restored, plain, expanded, FLAT)
    return runs


def _collapsed(make: Callable[[], Any]) -> tuple[str, str]:
    import reparam

    model, shapes = make()
    wanted = _answers(make()[0], shapes)
    given = _given(model, shapes)
    folds = _try(lambda: reparam.collapse_with_report(model, verify="folds", strict=True))
    if isinstance(folds, str):
        return folds, ""
    result, report = folds
    picture = f"{_picture(result)} {len(report.folds)} folds, {len(report.refusals)} refusals"
    if not _differ(wanted, result, shapes):
        return EQUAL, picture
    again = functools.partial(reparam.collapse, model, **given)
    return _checked(functools.partial(again, strict=True), again, wanted, shapes), picture


def _given(model: Any, shapes: Any) -> dict[str, Any]:
    """An example input for the check of the whole, where the compiler says that it can make up none."""
    from passes.proof.check import NoInputError, observe

    try:
        observe(model)
    except NoInputError:
        return {"example_inputs": torch.randn(shapes[0], dtype=torch.float64)}
    return {}


def _expanded(original: Callable[[], Any], expanded: Callable[[], Any], shapes: Any) -> tuple[str, str]:
    result = _try(expanded)
    if isinstance(result, str):
        return result, ""
    picture = _picture(result)
    for training in (False, True):
        wanted = _answers(original().train(training), shapes)
        if end := _differ(wanted, result.train(training), shapes):
            return f"{SILENT}: {end}", picture
    return EQUAL, picture


def _restored(plain: Callable[[], Any], expanded: Callable[[], Any], shapes: Any) -> tuple[str, str]:
    """Every number moved, as training would, then back into the plain architecture."""
    from small_networks import ready

    import reparam

    def moved() -> Any:
        model = ready(expanded(), 1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
        return model.eval()

    model = _try(moved)
    if isinstance(model, str):
        return model, ""
    wanted = _answers(model, shapes)
    torch.manual_seed(9)
    like = ready(plain().double(), 3)
    result = _try(lambda: reparam.collapse(moved(), like=like, verify="folds"))
    if isinstance(result, str):
        return result, ""
    picture = _picture(result)
    if not _differ(wanted, result, shapes):
        return EQUAL, picture
    again = functools.partial(reparam.collapse, moved(), like=like)
    return _checked(again, again, wanted, shapes), picture


def _checked(strictly: Callable[[], Any], freely: Callable[[], Any], wanted: Any, shapes: Any) -> str:
    """A wrong result passed the proof of its folds; what the check of the whole makes of it."""
    noticed = _try(strictly)
    result = _try(freely)
    if isinstance(result, str):
        return CHECK + result.removeprefix(PROOF) if result.startswith(PROOF) else result
    if end := _differ(wanted, result, shapes):
        return f"{SILENT}: {end}"
    return f"{CHECK}: taken back" if isinstance(noticed, str) else f"{SILENT}: taken back without a word"


def _try(make: Callable[[], Any]) -> Any:
    """What it returns; or, as text, how it raised."""
    from reparam import EquivalenceError, ReparamError

    try:
        return make()
    except EquivalenceError as error:
        return f"{PROOF}: {error}"
    except ReparamError as error:
        return f"{RAISED}: {error}"
    except Exception as error:  # a planted defect may raise anything
        return f"{RAISED}: {type(error).__name__}: {error}"


def _answers(model: Any, shapes: Any) -> list[Any]:
    from python_oracle import describe

    answers: list[Any] = []
    before = _numbers_held(model)
    for seed, shape in enumerate([*shapes, shapes[0]]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            answers.append(describe((model(x), x)))  # it may change its input
    return [*answers, {name: value for name, value in _numbers_held(model).items() if value != before.get(name)}]


def _numbers_held(model: Any) -> dict[str, float]:
    """Plain numbers that calls may leave behind in attributes."""
    held = [(f"{path}.{name}", value) for path, module in model.named_modules() for name, value in vars(module).items()]
    return {name: value for name, value in held if type(value) in (int, float)}


def _differ(wanted: list[Any], model: Any, shapes: Any) -> str:
    from python_oracle import difference

    try:
        return difference(wanted, _answers(model, shapes), "output")
    except Exception as error:  # a planted defect may break the result's forward
        return f"its forward raises {type(error).__name__}: {error}"


def _picture(model: Any) -> str:
    """The structure as text, without the numbers."""
    lines = [f"{path} {module._get_name()} {module.extra_repr()}" for path, module in model.named_modules()]
    code = [str(module.graph) for module in model.modules() if hasattr(module, "graph")]
    return hashlib.sha256("\n".join(lines + code).encode()).hexdigest()[:12]


# ------------------------------------------------------------------ planting


def planted(defect: Defect | None, folder: str) -> str:
    """A copy of the packages with the defect in it; raises if its fragment is not there exactly once."""
    tree = Path(folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package)
    shutil.copy(ROOT / "pyproject.toml", tree)
    if defect is not None:
        path = place_of(defect, tree)
        path.write_text(path.read_text().replace(defect.old, defect.new))
    return str(tree)


def ends_of(defect: Defect | None, chosen: Sequence[str] | None, noted: bool = False) -> tuple[Ends, Any]:
    """How networks end with the defect planted; without one, how they must."""
    answer = _forked(_ends, defect, chosen, noted)
    return ({"all": (answer, "")}, None) if isinstance(answer, str) else answer


def compare(result: Result, defect: Defect, usual: Ends, chosen: Sequence[str]) -> None:
    """Note the defect's ends where they are not the usual ones; once one is, no more are asked."""
    if result.verdict or not chosen:
        return
    result.tried += len(chosen)
    for name, (end, picture) in ends_of(defect, chosen)[0].items():
        as_usual, usual_picture = usual.get(name, ("", ""))
        if end.partition(":")[0] != as_usual.partition(":")[0]:
            result.ends[name] = end
        elif picture != usual_picture:
            result.other.append(name)


# ------------------------------------------------------------------ tests


def tests_by_line(data: Path) -> Runs:
    """Which tests run which line of the compiler; run them all, which takes long, unless ``data`` has it."""
    if not data.exists():
        with tempfile.TemporaryDirectory() as folder:
            tree = planted(None, folder)
            options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--cov=passes", "--cov-context=test"]
            files = [f"tests/test_{name}.py" for name in TESTS]
            own = {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1", "CI": "1", "COVERAGE_FILE": str(data.resolve())}
            command = [sys.executable, "-m", "pytest", *options, "--cov-report=", *files]
            done = subprocess.run(command, cwd=tree, env={**os.environ, **own}, capture_output=True, text=True)
        if done.returncode:
            data.unlink(missing_ok=True)
            raise SystemExit(f"tests fail without a defect:\n{done.stdout[-2000:]}")
    found = CoverageData(str(data.resolve()))
    found.read()
    files = {f"tests/test_{name}.py" for name in TESTS}

    def kept(context: str) -> str:
        name, _, phase = context.rpartition("|")
        return name if phase == "run" and name.partition("::")[0] in files else ""

    return Runs(found, kept)


def spread(tests: Sequence[str], most: int) -> list[str]:
    """The first of each file in turn."""
    files: dict[str, list[str]] = defaultdict(list)
    for name in tests:
        files[name.partition("::")[0]].append(name)
    return list(islice(filter(None, chain.from_iterable(zip_longest(*files.values()))), most))


def first_red(defect: Defect, tests: Sequence[str]) -> str:
    """The first of these tests that fails with the defect; empty if all pass, or if pytest itself does not work."""
    red = _forked(_first_red, defect, tests)
    if red.startswith(RAISED):
        print(f"{defect}: {red}")
        return ""
    return str(red)


def _first_red(tree: str, tests: Sequence[str]) -> str:
    """The first test that fails; empty if all pass."""
    red: list[str] = []

    class Noting:
        def pytest_runtest_logreport(self, report: Any) -> None:
            red.extend([report.nodeid] if report.failed else [])

        pytest_collectreport = pytest_runtest_logreport

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    loaded = "ignore::pytest.PytestAssertRewriteWarning"  # this process has some plugins already
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", loaded, *tests], plugins=[Noting()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ends with {code!r}")
    return next(iter(red), "")


# ------------------------------------------------------------------ the table


def column(result: Result, defect: Defect) -> str:
    """The column of the table under which a defect counts."""
    if result.verdict:
        return result.verdict
    return "tests" if result.red else NOTED if defect.note else SURVIVED


def table(results: Sequence[Result], networks: int) -> str:
    """The page for the documentation."""
    by_name = {defect.name: defect for defect in DEFECTS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    kinds = [PROOF, CHECK, RAISED, "tests", NOTED, SURVIVED, SILENT]
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        defect = by_name[result.defect]
        counted[defect.part][column(result, defect)] += 1
    counted["all"] = sum(counted.values(), Counter())
    lines = [
        "# Planted defects",
        "",
        f"Written by `python tests/plant_defects.py --out docs/defects.md` on {datetime.date.today()} at commit "
        f"{commit.strip()}, with Python {platform.python_version()} and torch {torch.__version__}.",
        "",
        f"{len(results)} defects were planted in the compiler, one at a time. Each was tried on those of {networks} "
        "small networks that run the changed statement, without example inputs, and counts under the worst that it "
        "did on any of them:",
        "",
        f"- **{PROOF}**: a fold computed something else, and was not returned.",
        f"- **{CHECK}**: every fold was right and the network was not; it was taken back, or an error.",
        f"- **{RAISED}**: another error, such as of the check that `like=` holds the numbers that it should.",
        "- **tests**: every network came out right, some with fewer or other folds; a test that runs the statement "
        "fails.",
        f"- **{NOTED}**: nothing can be noticed, for the reason given below.",
        f"- **{SURVIVED}**: nobody noticed, and no network came out wrong.",
        f"- **{SILENT}**: a wrong network was returned without a word.",
        "",
        _row("part", "planted", *kinds),
        _row("---", *["---:"] * (len(kinds) + 1)),
        *(_row(part, count.total(), *(count[kind] or "" for kind in kinds)) for part, count in counted.items()),
        "",
        _row("defect", "noticed by", "of networks"),
        _row("---", "---", "---:"),
    ]
    for result in results:
        defect = by_name[result.defect]
        noticed = Counter(end.partition(":")[0] for end in result.ends.values())
        said = [f"{kind} {count}" for kind, count in noticed.items()]
        said += [f"`{result.red}`"] if result.red else []
        if not said:
            said = [f"{NOTED}: {defect.note}" if defect.note else SURVIVED]
        lines.append(_row(defect, ", ".join(said).replace("|", " "), result.tried))
    return "\n".join(lines) + "\n"


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> int:
    """Run what was asked for; the exit status is 1 if a defect went through without a word."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where the table goes")
    parser.add_argument("--only", default="", help="defects whose part and name match this regular expression")
    parser.add_argument("--networks", type=lambda names: names.split(","), help="names of networks; all without it")
    parser.add_argument("--most", type=int, default=12, help="networks to begin with; tests and more, four times that")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests")
    parser.add_argument("--coverage", type=Path, default=Path("defects.coverage"), help="which tests run which line")
    parser.add_argument("--journal", type=Path, help="results so far; a run that was cut off goes on from there")
    options = parser.parse_args()
    chosen = [d for d in DEFECTS if re.search(options.only, str(d))]
    for defect in chosen:  # all fragments must be there before anything runs
        place_of(defect, ROOT)
    start = time.time()
    usual, runs = ends_of(None, options.networks, noted=True)
    tests = None if options.no_tests else tests_by_line(options.coverage)
    print(f"{len(usual)} networks without a defect in {time.time() - start:.0f} s")
    for name, (end, _) in usual.items():
        if end.startswith((SILENT, RAISED)):
            print(f"  {name}: {end[:150]}")
    known = {}
    if options.journal and options.journal.exists():
        known = {entry["defect"]: Result(**entry) for entry in map(json.loads, options.journal.open())}

    def run(defect: Defect) -> Result:
        if defect.name in known:
            return known[defect.name]
        result = Result(defect.name)
        found, few, more = runs.of(defect) or list(usual), options.most, 4 * options.most
        running = [] if tests is None else tests.of(defect)
        stages = ((found[:few], []), (found[few:more], running[: 2 * few]), (found[more:], spread(running, more)))
        for chosen, asked in stages:
            compare(result, defect, usual, chosen)
            if asked and result.verdict in ("", SILENT):
                result.red = first_red(defect, asked)
            if result.red:
                break
        if options.journal:
            with options.journal.open("a") as journal:
                journal.write(json.dumps(asdict(result)) + "\n")
        some = next((f"{name}: {end}" for name, end in result.ends.items() if end.startswith(result.verdict)), "")
        which = column(result, defect)
        others = f"other folds {len(result.other)}" if result.other else ""
        print(f"{defect}: {which} {len(result.ends)} {result.red} {some[:130]} {others}", flush=True)
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, chosen))
    if options.out:
        options.out.write_text(table(results, len(usual)))
    columns = [column(result, defect) for result, defect in zip(results, chosen, strict=True)]
    print(f"{len(results)} defects in {time.time() - start:.0f} s: {dict(Counter(columns))}")
    return 1 if {SURVIVED, SILENT} & set(columns) else 0


if __name__ == "__main__":
    sys.exit(main())
