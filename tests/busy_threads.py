"""Threads that use the verbs, and run networks, all at once: ``python tests/busy_threads.py --minutes 10``.

Each thread picks a verb and one of the networks that all of them share, again and again, and checks what comes back.
Exit status 1 if anything raises, or differs from what one thread alone got before; the table says how often each was
done.
"""
# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import copy
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from small_networks import Branches, Net, Parallel, Residual, images, maps, ready
from torch import Tensor, nn

import reparam
from zoo.render import markdown_table

NETWORKS: tuple[tuple[Callable[[], nn.Module], Callable[[], Tensor]], ...] = (
    (Net, images),
    (Branches, maps),
    (Parallel, maps),
    (Residual, maps),
)


class Shared:
    """Networks that all threads use, and what one thread alone has found out about them."""

    def __init__(self) -> None:
        self.plain = [ready(make()) for make, _ in NETWORKS]
        self.inputs = [give() for _, give in NETWORKS]
        with torch.no_grad():
            self.outputs = [model(x) for model, x in zip(self.plain, self.inputs, strict=True)]
        self.folds = [len(reparam.explain(model).folds) for model in self.plain]
        self.expanded = [reparam.expand(model, "acb") for model in self.plain]


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def forward(shared: Shared, i: int) -> None:
    with torch.no_grad():
        check(torch.equal(shared.plain[i](shared.inputs[i]), shared.outputs[i]), "another output")


def train(shared: Shared, i: int) -> None:
    model = reparam.expand(shared.plain[i], "dbb", form="online").train()
    model(shared.inputs[i]).square().mean().backward()
    check(all(p.grad is not None for p in model.parameters() if p.requires_grad), "no gradient")


def collapse(shared: Shared, i: int) -> None:
    result, report = reparam.collapse_with_report(shared.plain[i])
    check(len(report.folds) == shared.folds[i], f"{len(report.folds)} folds instead of {shared.folds[i]}")
    with torch.no_grad():
        check(torch.allclose(result(shared.inputs[i]), shared.outputs[i], atol=1e-4, rtol=1e-4), "another network")


def collapse_in_place(shared: Shared, i: int) -> None:
    own = copy.deepcopy(shared.plain[i])
    check(reparam.collapse(own, inplace=True) is own, "another object")


def collapse_like(shared: Shared, i: int) -> None:
    result = reparam.collapse(shared.expanded[i], like=shared.plain[i])
    check(result.state_dict().keys() == shared.plain[i].state_dict().keys(), "other keys")


def expand(shared: Shared, i: int) -> None:
    block = random.choice(("acb", "dbb", "doconv", "repvgg"))
    with torch.no_grad():
        got = reparam.expand(shared.plain[i], block).eval()(shared.inputs[i])
    check(torch.equal(got, shared.outputs[i]), f"{block} begins as another function")


def explain(shared: Shared, i: int) -> None:
    check(len(reparam.explain(shared.plain[i]).folds) == shared.folds[i], "other folds")


def plan(shared: Shared, i: int) -> None:
    check(bool(reparam.plan(shared.plain[i], "acb").expanded), "no block")


def verify(shared: Shared, i: int) -> None:
    check(reparam.verify(shared.plain[i], shared.expanded[i]).ok, "not equal")


VERBS = (forward, forward, forward, train, collapse, collapse_in_place, collapse_like, expand, explain, plan, verify)


def run(threads: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """What was done, and what went wrong."""
    shared, done, failed, end = Shared(), Counter[str](), list[str](), time.monotonic() + seconds

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end and not failed:
            verb, i = rng.choice(VERBS), rng.randrange(len(NETWORKS))
            try:
                verb(shared, i)
            # Whatever it is, it is what is looked for.
            except Exception:
                failed.append(f"{verb.__name__} of {NETWORKS[i][0].__name__}:\n{traceback.format_exc()}")
            done[verb.__name__] += 1

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    forward(shared, 0)  # nothing was left behind
    return done, failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    done, failed = run(options.threads, 60 * options.minutes)
    print(markdown_table(("verb", "times"), [(name, f"{count:,}") for name, count in sorted(done.items())]))
    print(
        f"{options.threads} threads, {options.minutes:g} minutes, {sum(done.values()):,} calls, {len(failed)} failures"
    )
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
