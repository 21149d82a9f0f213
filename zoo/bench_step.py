"""``reparam bench step``: what a training step costs with each block, relative to the plain network.

A step is forward, backward and SGD with momentum. Runs take turns, and a ratio is to the plain run of the same round:
whatever slows the machine for a while slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.training.filters import ALL
from zoo.measure import one_thread
from zoo.render import console, markdown_table, provenance, rich_table, write_text

__all__ = ["step"]

CLASSES = 100
GPU_BATCH, GPU_SIZE = 128, 224
GPU_STEPS = 10
"""Steps of one timed run on a GPU, which are too short to be timed one by one."""
PLAIN = ("plain", "")
FORMS = ("branches", "sampled", "frozen", "online")
HEADINGS = ("block", "layers", *(cell for form in FORMS for cell in (form, "quartiles")))
GPU_HEADINGS = ("block", *(cell for form in FORMS for cell in (form, "compiled", "GiB")))

Variant = tuple[str, str]
"""A block's name, and its form; ``PLAIN`` is the network without blocks."""


@dataclass
class Trainee:
    """A network in training: runs one step at a time and says what that took."""

    model: nn.Module
    x: Tensor
    y: Tensor
    clock: Callable[[], float]
    steps: int = 1
    bf16: bool = False
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.step()  # The first one allocates, compiles and makes the momentum.

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()

    def run(self) -> None:
        started = self.clock()
        for _ in range(self.steps):
            self.step()
        self.seconds.append((self.clock() - started) / self.steps)


def step(
    blocks: Annotated[str, typer.Option("--blocks", help="Names, with commas between; all by default.")] = "",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each; the median ratio is shown.")] = 5,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images in a batch, on the CPU.")] = 32,
    size: Annotated[int, typer.Option("--size", min=32, help="Height and width of an image, on the CPU.")] = 128,
    stem: Annotated[bool, typer.Option("--stem", help="Blocks for the 7x7 stem too; no publication has them.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write Markdown here; docs/step.md.")] = None,
) -> None:
    """What a training step costs with each block, relative to the plain network."""
    names = [name.strip() for name in blocks.split(",")] if blocks else list(reparam.blocks())
    for name in names:
        if name not in reparam.blocks():
            raise typer.BadParameter(f"there is no block {name!r}; known: {', '.join(reparam.blocks())}")
    where = ALL if stem else {"kernel": 3}
    terminal = console()
    facts = provenance()
    text = f"# What a training step costs\n\n{facts}\n"
    measures: list[Callable[[], Table]] = [lambda: _on_cpu(names, where, rounds, batch, size)]
    if torch.cuda.is_available():
        measures.append(lambda: _on_gpu(names, where, rounds))
    for measure in measures:
        with terminal.status("measuring"):
            title, headings, rows, note = measure()
        terminal.print(rich_table(title, headings, rows))
        terminal.print(note, soft_wrap=True)
        text += f"\n## {title}\n\n{markdown_table(headings, rows)}\n{note}\n"
    terminal.print(facts, soft_wrap=True)
    if out is not None:
        write_text(out, text)
        terminal.print(f"wrote {out}", soft_wrap=True)


Where = dict[str, int] | str
Table = tuple[str, tuple[str, ...], list[list[str]], str]
"""Title, headings, rows and the note below."""


def _on_cpu(names: list[str], where: Where, rounds: int, batch: int, size: int) -> Table:
    """All variants take turns in one process, on one thread."""
    with one_thread():
        x, y = torch.randn(batch, 3, size, size), torch.randint(0, CLASSES, (batch,))
        # The process's own time: with one thread that is the step's, and neighbours on the machine do not count.
        trainees = {PLAIN: Trainee(_network("resnet18"), x, y, time.process_time)}
        layers = {}
        for name in names:
            layers[name], expanded = _expanded("resnet18", name, where)
            for variant, model in expanded.items():
                trainees[variant] = Trainee(model, x, y, time.process_time)
        for _ in range(rounds):
            for trainee in trainees.values():
                trainee.run()
    plain = trainees[PLAIN].seconds
    rows = []
    for name in (name for name in names if layers[name]):
        cells = [cell for form in FORMS for cell in _spread(trainees[name, form].seconds, plain)]
        rows.append([name, str(layers[name]), *cells])
    note = (
        f"Processor time of forward, backward and SGD with momentum, relative to the plain network's "
        f"{statistics.median(plain):.2f} s in the same round: medians and quartiles of {rounds} interleaved runs. "
        "Layers: convolutions that get a block" + (", the 7x7 stem not among them." if where != ALL else ".")
    )
    left = [name for name in names if not layers[name]]
    note += f" Blocks that apply to no layer of it: {', '.join(left)}." if left else ""
    return f"ResNet-18, batch {batch}, 3x{size}x{size}, one CPU thread", HEADINGS, rows, note


def _on_gpu(names: list[str], where: Where, rounds: int) -> Table:
    """Each variant takes turns with the plain network: all of them at once might not fit."""
    plain = {False: _on_device(_network("resnet50"), compiled=False)}
    own = _peak(plain[False])
    plain[True] = _on_device(_network("resnet50"), compiled=True)
    rows = []
    for name in names:
        layers, expanded = _expanded("resnet50", name, where)
        row = [name]
        for model in expanded.values():
            before = torch.cuda.memory_allocated()
            trainee = _on_device(model, compiled=False)
            ratios = [_race(trainee, plain[False], rounds)]
            peak = _peak(trainee, before)
            del trainee
            ratios.append(_race(_on_device(model, compiled=True), plain[True], rounds))
            row += [*(f"{ratio:.2f}" for ratio in ratios), f"{peak:.1f}"]
            model.to("cpu")  # The others need the memory.
        if layers:
            rows.append(row)
    eager, compiled_step = (statistics.median(plain[c].seconds) * 1e3 for c in (False, True))
    note = (
        f"Forward, backward and SGD with momentum, relative to the plain network, which takes {eager:.0f} ms, compiled "
        f"{compiled_step:.0f} ms, and {own:.1f} GiB at its peak. Medians of {rounds} interleaved runs of {GPU_STEPS} "
        "steps. GiB: peak memory of an eager step, weights and momentum included."
    )
    device = torch.cuda.get_device_name()
    title = f"ResNet-50, batch {GPU_BATCH}, {GPU_SIZE} px, bf16 autocast, channels_last, {device}"
    return title, GPU_HEADINGS, rows, note


def _network(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES)
    return model.train()


def _expanded(network: str, block: str, where: Where) -> tuple[int, dict[Variant, nn.Module]]:
    """How many layers get the block, and the network with it in each form; nothing if there are none."""
    layers = len(reparam.plan(_network(network), block, where=where).expanded)
    if not layers:
        return 0, {}
    expanded = {}
    for form in FORMS:
        model = reparam.expand(_network(network), block, where=where, form=form, verify="folds").train()
        if form == "frozen":
            for module in model.modules():
                if isinstance(module, BranchSum):
                    module.eval()
        expanded[block, form] = model
    return layers, expanded


def _on_device(model: nn.Module, compiled: bool) -> Trainee:
    model = model.to("cuda").to(memory_format=torch.channels_last)
    x = torch.randn(GPU_BATCH, 3, GPU_SIZE, GPU_SIZE, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (GPU_BATCH,), device="cuda")
    torch._dynamo.reset()  # Or the variants would share one limit of recompilations.
    runs: Any = torch.compile(model) if compiled else model
    return Trainee(runs, x, y, _synchronised, GPU_STEPS, bf16=True)


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _race(trainee: Trainee, plain: Trainee, rounds: int) -> float:
    """Median of the ratios of runs in turns."""
    plain.step()  # Compiled anew, if the compiler was reset since.
    for _ in range(rounds):
        plain.run()
        trainee.run()
    pairs = zip(trainee.seconds, plain.seconds[-rounds:], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def _peak(trainee: Trainee, before: int = 0) -> float:
    """GiB that a step needs at its peak beyond ``before``, which others hold."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    trainee.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _spread(seconds: list[float], plain: list[float]) -> tuple[str, str]:
    """Median of the ratios, and their quartiles."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.2f}", f"{low:.2f} to {high:.2f}"
