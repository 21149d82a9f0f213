"""Kill runs at random moments, see what is there afterwards, and go on: ``python tests/kill_moments.py``.

    python tests/kill_moments.py --out docs/kills.md      fifty moments of each command, and the table
    python tests/kill_moments.py --each 5 --only train    some moments of one

Each run is killed by ``kill -9`` at a moment drawn from the time that a whole one takes. Every file that has its name
has to be whole then, nothing that the run has started may be there some seconds later, and the same command has to go
on to what a run gives that nobody killed. Exit status 1 if any does not.
"""
# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from test_train import numbers, rows

from reparam import files
from reparam.cli import app
from zoo.journal import JournalError, read
from zoo.render import markdown_table, provenance
from zoo.train.config import Config
from zoo.train.trainer import train

EACH = 50
PATIENCE = 5.0
"""Seconds that processes have to be gone in."""
TRAIN = "train --model zoo:mnist_toy --data synthetic --epochs 6 --block acb --ema 0.9 --set augment=shift --out run"
ZOO = "zoo convert test_convnext test_resnet test_vit test_byobnet --block acb --no-latency --jobs 2 --out run"
HEADINGS = ("command", "what was there", "moments", "processes left", "damaged files", "went on to the same")

ABOUT = (
    "What is there after `kill -9` at random moments, and whether the same command goes on from there to what a run "
    "gives that nobody killed: the same tensors to the bit, the same rows, each network once."
)


@dataclass(frozen=True)
class Verb:
    """A command that is killed.

    Args:
        name: for the table.
        command: its words; it runs in an empty folder.
        again: what goes on with it.
        there: what a folder holds, in words.
        result: what a finished run has given, to be compared.
    """

    name: str
    command: str
    again: str
    there: Callable[[Path], str]
    result: Callable[[Path], object]


# ------------------------------------------------------------------ what was there


def there_of_train(folder: Path) -> str:
    if (folder / "run/result.json").exists():
        return "the result"
    if (folder / "run/last.safetensors").exists():
        return f"the state of epoch {len(rows(folder / 'run'))} of 6"
    return "no state yet"


def result_of_train(folder: Path) -> object:
    out = folder / "run"
    states = [files.load_state(out / f"{name}.safetensors").tensors for name in ("last", "best", "best.ema")]
    return numbers(out), [_listed(state) for state in states], sorted(path.name for path in out.iterdir())


def there_of_convert(folder: Path) -> str:
    return "the file" if (folder / "net.safetensors").exists() else "no file"


def result_of_convert(folder: Path) -> object:
    return _listed(files.load_state(folder / "net.safetensors").tensors), sorted(path.name for path in folder.iterdir())


def there_of_zoo(folder: Path) -> str:
    try:
        done = len(read(folder / "run").outcomes)
    except JournalError:
        return "no journal yet"
    return f"{done} of 4 networks in the journal"


def result_of_zoo(folder: Path) -> object:
    lines = [json.loads(line) for line in (folder / "run/journal.jsonl").read_text().splitlines()]
    made = Counter((line["name"], line["kind"]) for line in lines if line["record"] == "outcome")
    models = sorted((folder / "run/models").rglob("*"))
    states = [_listed(files.load_state(path).tensors) for path in models if path.suffix == ".safetensors"]
    return made, [path.name for path in models], states, list((folder / "run/running").iterdir())


def _listed(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def verbs(trained: Path) -> list[Verb]:
    """The commands; ``trained`` is the folder of a finished training."""
    convert = f"convert {trained} -o net.safetensors"
    return [
        Verb("train", TRAIN, TRAIN, there_of_train, result_of_train),
        Verb("convert", convert, convert, there_of_convert, result_of_convert),
        Verb("zoo convert", ZOO, f"{ZOO} --resume", there_of_zoo, result_of_zoo),
    ]


# ------------------------------------------------------------------ killing


def start(command: str, folder: Path) -> int:
    """Run a command in a copy of this process, which has the libraries loaded: moments are then those of its work."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    status = 1
    try:
        app(command.split(), standalone_mode=False)
        status = 0
    finally:
        os._exit(status)


def finish(command: str, folder: Path) -> float:
    """Run a command to its end; its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(start(command, folder), 0)
    if status:
        raise SystemExit(f"{command} ends with status {status} in {folder}")
    return time.monotonic() - began


def processes(folder: Path) -> list[int]:
    """The processes whose working folder this is: all that a run there has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inside = (entry / "cwd").readlink() == folder
            if inside and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def left_over(folder: Path) -> list[int]:
    """The processes that are still there after some seconds."""
    end = time.monotonic() + PATIENCE
    while (found := processes(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def damaged(folder: Path) -> list[str]:
    """Files that have their names and cannot be read; what is being written has a name that begins with a dot."""
    bad = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                files.load_state(path)
            elif path.suffix == ".json" and not path.name.startswith("."):
                json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            bad.append(f"{path.name}: {error}")
    return bad


@dataclass(frozen=True)
class Moment:
    """What one kill has left."""

    there: str
    left: int
    damaged: list[str]
    same: bool


def kill(verb: Verb, seconds: float, wanted: object, base: Path) -> Moment:
    """Kill a run after some seconds, look, and go on."""
    folder = Path(tempfile.mkdtemp(dir=base)).resolve()
    victim = start(verb.command, folder)
    time.sleep(seconds)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    left, there, bad = left_over(folder), verb.there(folder), damaged(folder)
    finish(verb.again, folder)
    return Moment(there, len(left), bad, verb.result(folder) == wanted)


def moments(verb: Verb, each: int, rng: random.Random, base: Path) -> list[Moment]:
    """Kill a command at random moments of its run."""
    whole = Path(tempfile.mkdtemp(dir=base)).resolve()
    seconds = finish(verb.command, whole)
    wanted = verb.result(whole)
    found = []
    for number in range(each):
        found.append(kill(verb, rng.uniform(0, seconds), wanted, base))
        print(f"{verb.name} {number + 1}/{each}: {found[-1]}", flush=True)
    return found


# ------------------------------------------------------------------ the page


def document(found: dict[str, list[Moment]], command: str) -> str:
    table = []
    for name, each in found.items():
        groups = defaultdict[str, list[Moment]](list)
        for moment in each:
            groups[moment.there].append(moment)
        for there, group in sorted(groups.items()):
            sums = sum(m.left for m in group), sum(len(m.damaged) for m in group), sum(m.same for m in group)
            table.append([f"`{name}`", there, *map(str, (len(group), *sums))])
    whole = markdown_table(HEADINGS, table)
    return f"# Runs that are killed\n\n{ABOUT}\n\n```sh\n{command}\n```\n\n{whole}\n{provenance()}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=EACH, help="moments of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command alone")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[Moment]] = {}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        train(Config(model="zoo:mnist_toy", data="synthetic", epochs=1, block="acb"), base / "trained")
        for verb in verbs(base / "trained"):
            if options.only in (None, verb.name):
                found[verb.name] = moments(verb, options.each, random.Random(options.seed), base)
    words = ["python tests/kill_moments.py"]
    words += [f"--each {options.each}"] if options.each != EACH else []
    words += [f"--seed {options.seed}"] if options.seed else []
    text = document(found, " ".join(words))
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all(m.same and not m.left and not m.damaged for each in found.values() for m in each) else 1


if __name__ == "__main__":
    sys.exit(main())
