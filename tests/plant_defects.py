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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage import Coverage, CoverageData
from defects import DEFECTS, Defect, place_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("passes", "reparam", "zoo", "tests")
TESTS = (
    "blocks", "capture", "check", "compare", "conv_form", "dynamics", "edits", "equivalent_conv", "expand",
    "expand_faithful", "files", "fold", "in_place", "interface", "networks", "opset", "own_networks", "proof",
    "python_fuzz", "random_graphs", "refusals", "round_trip", "selection",
)  # fmt: skip
"""Files of tests that the compiler itself must pass."""

SECONDS = 400
"""Most seconds for the networks of one defect, and for its tests; a compiler that hangs is noticed too."""

EQUAL, PROOF, CHECK, RAISED, OTHER, NOTED, SURVIVED, SILENT = (
    "equal", "fold proof", "module check", "an error", "other folds", "no effect", "SURVIVED", "SILENT",
)  # fmt: skip

Ends = dict[str, tuple[str, str]]
"""Per network how it ended and what came out, as text."""

Runs = dict[str, dict[int, list[str]]]
"""By file and line, the names of what ran it."""


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


def _trial(tree: str, chosen: Sequence[str] | None, noted: bool, send: Any) -> None:
    """Import the planted copy and compile networks; runs in a fork of a process that has torch loaded."""
    try:
        sys.path[:0] = [tree, str(Path(tree) / "tests")]
        torch.set_num_threads(1)
        import logging
        import warnings

        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        send.send(_ends(tree, chosen, noted))
    except BaseException as error:  # the planted copy may not even import
        send.send(({"import": (f"{RAISED}: {type(error).__name__}: {error}"[:160], "")}, {}))


def _ends(tree: str, chosen: Sequence[str] | None, noted: bool) -> tuple[Ends, Runs]:
    """For every network how it ended and what came out, as text; and which networks ran which lines, if noted."""
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
    return ends, _read(coverage.get_data()) if coverage else {}


def _read(data: CoverageData) -> Runs:
    """What coverage has seen, by the files' names in the repository."""
    return {f"passes/{file.rpartition('/passes/')[2]}": data.contexts_by_lineno(file) for file in data.measured_files()}


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

            def expanded(original: Any = original, kind: str = kind, online: Any = bool(online) or None) -> Any:
                return reparam.expand(original(), kind, online=online)

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
    like = plain().double()
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

    answers = []
    for seed, shape in enumerate([*shapes, shapes[0]]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            answers.append(describe((model(x), x)))  # it may change its input
    return answers


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


def ends_of(defect: Defect | None, chosen: Sequence[str] | None, noted: bool = False) -> tuple[Ends, Runs]:
    """How networks end with the defect planted; without one, how they must."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_trial, args=(planted(defect, folder), chosen, noted, send))
        process.start()
        send.close()
        try:
            if receive.poll(SECONDS if defect is not None else None):
                ends, runs = receive.recv()
            else:
                ends, runs = {"all": (f"{RAISED}: no end within {SECONDS} s", "")}, {}
        except EOFError:
            ends, runs = {"all": (f"{RAISED}: the process died", "")}, {}
        process.kill()
        process.join()
        return ends, runs


def who_runs(defect: Defect, runs: Runs) -> list[str]:
    """Names of what runs the statement with the defect; of a statement that only an import runs, nothing."""
    path = place_of(defect, ROOT)
    source = path.read_text()
    start = source[: source.index(defect.old)].count("\n") + 1
    stop = start + defect.old.rstrip("\n").count("\n")
    around = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno <= start]
    statement = min((n for n in around if (n.end_lineno or 0) >= stop), key=lambda n: (n.end_lineno or 0) - n.lineno)
    lines = range(statement.lineno, (statement.end_lineno or 0) + 1)
    ran = runs.get(str(path.relative_to(ROOT)), {})
    return list(dict.fromkeys(name for line in lines for name in ran.get(line, ()) if name))


def _widths(runs: Runs) -> Counter[str]:
    """How many lines each runs: what runs few is quick, and made for what it runs."""
    return Counter(name for ran in runs.values() for names in ran.values() for name in names)


def compared(defect: Defect, usual: Ends, runs: Runs, most: int) -> Result:
    """The defect's ends where they are not the usual ones."""
    found = sorted(who_runs(defect, runs) or usual, key=_widths(runs).__getitem__)
    result = Result(defect.name)
    for start in range(0, len(found), most):
        if result.verdict:  # more are asked only where the first have nothing to say
            break
        chosen = found[start : start + most]
        result.tried += len(chosen)
        for name, (end, picture) in ends_of(defect, chosen)[0].items():
            as_usual, usual_picture = usual.get(name, ("", ""))
            if end.partition(":")[0] != as_usual.partition(":")[0]:
                result.ends[name] = end
            elif picture != usual_picture:
                result.other.append(name)
    return result


# ------------------------------------------------------------------ tests


def tests_by_line(data: Path) -> Runs:
    """Which tests run which line of the compiler; run them all, which takes long, unless ``data`` has it."""
    if not data.exists():
        with tempfile.TemporaryDirectory() as folder:
            options = ("--cov=passes", "--cov-context=test", "--cov-report=")
            done = _pytest(planted(None, folder), *options, *(f"tests/test_{name}.py" for name in TESTS), data=data)
        if done.returncode:
            data.unlink(missing_ok=True)
            raise SystemExit(f"tests fail without a defect:\n{done.stdout[-2000:]}")
    found = CoverageData(str(data.resolve()))
    found.read()
    runs = _read(found)
    return {
        file: {
            line: [name.rpartition("|")[0] for name in names if name.endswith("|run")] for line, names in ran.items()
        }
        for file, ran in runs.items()
    }


def narrowest(defect: Defect, runs: Runs, most: int) -> list[str]:
    """Tests that run the statement with the defect: of each file in turn the one that runs the fewest lines."""
    own = runs.get(str(place_of(defect, ROOT).relative_to(ROOT)), {})
    found = who_runs(defect, runs) or list(dict.fromkeys(name for names in own.values() for name in names))
    files: dict[str, list[str]] = defaultdict(list)
    for name in sorted(found, key=_widths(runs).__getitem__):
        files[name.partition("::")[0]].append(name)
    return list(islice(filter(None, chain.from_iterable(zip_longest(*files.values()))), most))


def first_red(defect: Defect, tests: Sequence[str]) -> str:
    """The first test that fails with the defect planted; empty if all pass."""
    if not tests:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = _pytest(planted(defect, folder), "-x", *tests, seconds=SECONDS)
        except subprocess.TimeoutExpired:
            return f"no end within {SECONDS} s"
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest says {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(test_\w+\.py\S*)", done.stdout, re.MULTILINE)
    return "" if done.returncode == 0 else failed.group(1) if failed else "tests do not start"


def _pytest(tree: str, *arguments: str, data: Path | None = None, seconds: int | None = None) -> Any:
    """Run tests of a copy: always the same examples, no cache."""
    environment = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1", "CI": "1"}
    if data is not None:
        environment["COVERAGE_FILE"] = str(data.resolve())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)


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
    parser.add_argument(
        "--most", type=int, default=24, help="networks at a time, until one shows the defect; and tests"
    )
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
    tests = {} if options.no_tests else tests_by_line(options.coverage)
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
        result = compared(defect, usual, runs, options.most)
        if not result.verdict and not options.no_tests:
            result.red = first_red(defect, narrowest(defect, tests, options.most))
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
