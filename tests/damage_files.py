"""Damage files of every format at every part and in every way, and see what the readers make of them.

    python tests/damage_files.py --out docs/damage.md     all of it, and the table
    python tests/damage_files.py --each 50 --seed 1       other damage, and more of it

A file that is damaged is read as whole (where the damage does not matter, or cannot be known), or refused in one line.
Exit status 1 if any reader raises another exception.
"""
# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from damage import KINDS, outcome, parts, sealed, with_junk, write_network
from small_run import CONFIG, fresh, step, write_run
from test_zoo_report import OUTCOMES, PLANNED, details, run_folder

from reparam import files
from zoo.render import markdown_table, provenance
from zoo.report import write_report
from zoo.summary import summary
from zoo.train.checkpoint import Folder

EACH = 12
"""Files of each class."""
HEADINGS = ("format", "what is damaged", "how", "files", "loaded", "refused", "raw exceptions")

ABOUT = (
    "What the readers make of files that are damaged: each is loaded, where the damage does not matter or nothing in "
    "the format can tell (weights have no checksum), or refused in one line. A training state that is damaged is "
    "passed over for the one before it, which counts as loaded; where it is the only one, its digest tells all changes."
)
LEGEND = (
    "Cut off: the file ends there. Noise, doubled, zeroed: up to 63 bytes. Values: one value of the JSON replaced by "
    "one of another type, or missing. Shapes: one tensor of another shape or type, or missing."
)

Damage = Callable[[random.Random], None]
Class = tuple[str, str, str, Damage, Callable[[], Any]]
"""Format, part, kind, what damages the file, what reads it."""


def bytes_of(path: Path, form: str, read: Callable[[], Any]) -> Iterator[Class]:
    """Each part of a file with each kind of damage."""
    content = path.read_bytes()

    def damage(kind: str, part: range, rng: random.Random) -> None:
        path.write_bytes(KINDS[kind](content, rng.choice(part), rng))

    for name, part in parts(content, path.suffix).items():
        for kind in KINDS:
            yield form, name, kind, partial(damage, kind, part), read
    yield form, "all", "empty", lambda rng: path.write_bytes(b"") and None, read


def networks(folder: Path) -> Iterator[Class]:
    for suffix in (".safetensors", ".pt", ".h5"):
        path = write_network(folder / f"net{suffix}")

        def read(path: Path = path) -> None:
            content = files.load_state(path)
            if content.source:
                files.rebuild(content, path)

        whole = path.read_bytes()
        yield from bytes_of(path, suffix, read)
        if suffix == ".safetensors":
            yield suffix, "header", "values", partial(_header, path, whole), read


def _header(path: Path, whole: bytes, rng: random.Random) -> None:
    """A header whose values are of other types, in a file that is whole otherwise."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(with_junk(json.loads(whole[8:end]), rng)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])


def journals(folder: Path) -> Iterator[Class]:
    run = run_folder(folder / "zoo", (*OUTCOMES[:2], PLANNED, *OUTCOMES[6:]), {"net_fast": details()})

    def read() -> None:
        write_report(run)
        summary([run])

    for path in (run / "journal.jsonl", run / "models" / "made" / "net_fast.json"):
        form = "journal" if path.suffix == ".jsonl" else "details of a model"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

        def values(rng: random.Random, path: Path = path, lines: Any = lines) -> None:
            text = "".join(f"{json.dumps(line)}\n" for line in with_junk(lines, rng))
            path.write_text(text, encoding="utf-8")

        whole = path.read_bytes()
        yield from bytes_of(path, form, read)
        yield form, "all", "values", values, read
        path.write_bytes(whole)  # what follows damages another file


def states(folder: Path) -> Iterator[Class]:
    run = write_run(folder / "run")
    yield from bytes_of(run.last, "training state", partial(_go_on, run))
    run = write_run(folder / "alone", epochs=1)
    yield from bytes_of(run.last, "the only training state", partial(_go_on, run))
    whole = files.load_state(write_run(folder / "sealed", epochs=1).last)

    def values(rng: random.Random) -> None:
        key = rng.choice(["config", "epochs", "settings"])
        text = json.dumps(with_junk(json.loads(whole.metadata[key]), rng))
        sealed(run.last, whole.tensors, whole.metadata | {key: text})

    def shapes(rng: random.Random) -> None:
        name = rng.choice(list(whole.tensors))
        value = whole.tensors[name]
        other = rng.choice([value.new_zeros(7, 3), value.new_zeros(()), value.new_zeros(0), value.bool(), None])
        rest = {key: tensor for key, tensor in whole.tensors.items() if key != name}
        sealed(run.last, rest if other is None else rest | {name: other}, whole.metadata)

    yield "the only training state", "note, digest right", "values", values, partial(_go_on, run)
    yield "the only training state", "tensors, digest right", "shapes", shapes, partial(_go_on, run)


def _go_on(run: Folder) -> None:
    """What a run does with the state that it finds: it takes it up and makes a step."""
    again = fresh()
    state = run.read_state(CONFIG, again)
    assert state is not None
    again.take(state)
    step(again)


def look(classes: Iterator[Class], each: int, seed: int) -> tuple[list[list[str]], list[str]]:
    """A row for each class of damage, and the raw exceptions."""
    rows, raw = [], []
    for form, part, kind, damage, read in classes:
        rng, found = random.Random(f"{form}, {part}, {kind}, {seed}"), Counter[str]()
        count = 1 if kind == "empty" else each
        for _ in range(count):
            damage(rng)
            found[outcome(read)] += 1
        good = found["loaded"], found["refused"]
        raw += [f"{form}, {part}, {kind}: {text}" for text in found.keys() - {"loaded", "refused"}]
        rows.append([form, part, kind, *map(str, (count, *good, count - sum(good)))])
    return rows, raw


def document(rows: Sequence[Sequence[str]], command: str) -> str:
    total = [sum(int(row[column]) for row in rows) for column in range(3, 7)]
    sums = f"{total[0]:,} files: {total[1]:,} loaded, {total[2]:,} refused in one line, {total[3]} raw exceptions."
    table = markdown_table(HEADINGS, rows)
    return f"# Damaged files\n\n{ABOUT}\n\n```sh\n{command}\n```\n\n{sums}\n\n{table}\n{LEGEND}\n\n{provenance()}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=EACH, help="files of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # torch's own, of what it reads
    logging.getLogger("reparam").setLevel(logging.ERROR)
    rows, raw = [], []
    for make in (networks, journals, states):
        with tempfile.TemporaryDirectory() as folder:
            found = look(make(Path(folder)), options.each, options.seed)
        rows += found[0]
        raw += found[1]
    words = ["python tests/damage_files.py"]
    words += [f"--each {options.each}"] if options.each != EACH else []
    words += [f"--seed {options.seed}"] if options.seed else []
    text = document(rows, " ".join(words))
    print(text)
    for line in raw:
        print(line)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 1 if raw else 0


if __name__ == "__main__":
    sys.exit(main())
