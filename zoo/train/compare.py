"""Variants of one network trained with the same configuration and several seeds.

Seed by seed; within a seed the variants run one after the other, and each seed begins with another variant. A
comparison that is killed thus has whole pairs, whatever slows the machine for a while does not meet the same variant
each time, and only one network is in memory, so that peak memory is that of the run alone.

Runs of one seed see the same batches and start from the same main-branch weights, so they are pairs
(:mod:`zoo.train.pairs`). What a comparison leaves on the disk is described in :mod:`zoo.train.comparison`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import reparam
from reparam import Counts, files
from zoo.inputs import View
from zoo.latency import race
from zoo.measure import one_thread
from zoo.render import provenance, write_text
from zoo.train import build
from zoo.train.comparison import CompareError, Comparison, Deployment, read_comparison, run_folder
from zoo.train.config import Config, variant
from zoo.train.data import Data
from zoo.train.deploy import agreement
from zoo.train.report import write_results
from zoo.train.result import Epoch
from zoo.train.trainer import TrainingError, train

__all__ = ["compare", "order"]


def compare(
    config: Config,
    variants: Sequence[str],
    seeds: int,
    out: Path,
    *,
    workers: int = 0,
    on_epoch: Callable[[str, int, Epoch], None] | None = None,
) -> Comparison:
    """Train every variant with every seed, one run at a time, and write tables, figures and a report to ``out``.

    Runs that are finished are not repeated, and one that was interrupted goes on, if ``out`` holds them: a killed
    comparison is continued by calling it again.

    Args:
        config: of all runs; ``config.seed`` is the first seed.
        variants: ``plain``, ``acb:gamma=1/3@paper``, ...; the others are compared with the first.
        seeds: how many.
        out: folder.
        workers: processes that load images.
        on_epoch: told variant, seed and epoch after each epoch.

    Raises:
        CompareError: a variant is named twice, a run failed (its others are kept), or a collapsed network answers
            differently from the trained one; everything is then written all the same.
    """
    if len({run_folder(out, text, 0) for text in variants}) < len(variants) or not variants or seeds < 1:
        raise CompareError(f"a comparison needs different variants and a seed at least, got {', '.join(variants)}")
    configs = {text: variant(config, text) for text in variants}
    chosen = tuple(range(config.seed, config.seed + seeds))
    note = {"config": json.loads(config.to_json()), "variants": list(variants), "seeds": list(chosen)}
    note |= {"command": _command(config, variants, seeds, out), "facts": provenance()}
    data = build.load(config)
    for turn, seed in enumerate(chosen):
        for text in order(variants, turn):
            told = None if on_epoch is None else partial(on_epoch, text, seed)
            own = dataclasses.replace(configs[text], seed=seed)
            try:
                train(own, run_folder(out, text, seed), workers=workers, on_epoch=told)
            except TrainingError as error:
                raise CompareError(f"{text}, seed {seed}: {error}") from error
        _deploy([run_folder(out, text, seed) for text in variants], data)
    _write(out / "comparison.json", note)
    comparison = read_comparison(out)
    write_results(comparison, out)
    if comparison.unequal:
        first = comparison.unequal[0]
        raise CompareError(
            f"{first.variant}, seed {first.seed}: the collapsed network answers {first.deployment.different} of "
            f"{first.deployment.images} test images differently; everything is in {out}, do not deploy this run"
        )
    return comparison


def order(variants: Sequence[str], turn: int) -> list[str]:
    """The variants in the order of one seed: each turn begins one variant later."""
    start = turn % len(variants)
    return [*variants[start:], *variants[:start]]


def _deploy(folders: Sequence[Path], data: Data) -> None:
    """Collapse the runs of one seed, and race each against the first, where that has not been done."""
    if all((folder / "deployment.json").is_file() for folder in folders):
        return
    reference = reparam.collapse(files.load_model(folders[0] / "best.safetensors"))
    for folder in folders:
        trained = files.load_model(folder / "best.safetensors")
        _write(folder / "deployment.json", dataclasses.asdict(_deployment(trained, reference, data)))


def _deployment(trained: nn.Module, reference: nn.Module, data: Data) -> Deployment:
    shipped = reparam.collapse(trained)
    found = agreement(trained, shipped, data)
    with one_thread():
        latency, _, _ = race(reference.cpu(), shipped.cpu(), View(data.shape))
    return Deployment(
        images=found.before.images,
        different=found.different,
        trained=found.before.top1,
        collapsed=found.after.top1,
        parameters=Counts.of(shipped).parameters,
        # The fastest run: neighbours on the machine only ever add to a run of so short a network.
        milliseconds=min(latency.after_runs),
        reference=min(latency.before_runs),
    )


def _command(config: Config, variants: Sequence[str], seeds: int, out: Path) -> str:
    """The command line that makes this comparison: every value that is not the usual one."""
    words = ["--model", config.model, "--data", config.data, "--epochs", str(config.epochs), "--seed", str(config.seed)]
    for name, value in dataclasses.asdict(config).items():
        # The variants say the block; the folder of downloaded data is this machine's business.
        named = ("model", "data", "epochs", "seed", "block", "root")
        if name not in named and value != getattr(Config(), name):
            words += ["--set", f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"]
    return shlex.join(["reparam", "train", *words, "--compare", *variants, "--seeds", str(seeds), "--out", str(out)])


def _write(path: Path, content: Any) -> None:
    """JSON, renamed into place: a file that is there is whole."""
    write_text(path, json.dumps(content, indent=1) + "\n")
