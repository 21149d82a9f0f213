"""``reparam bench step``: what a training step costs with each block in each form, relative to the plain network.

A step is forward, backward and SGD with momentum. Runs take turns, and a ratio is to the plain run of the same round:
whatever slows the machine for a while slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.training.filters import ALL
from passes.training.forms import FORMS, Form
from reparam import sources
from zoo.measure import one_thread
from zoo.memory import Peak
from zoo.render import console, markdown_table, provenance, rich_table, write_text

__all__ = ["Setting", "Trainee", "step"]

CLASSES = 100
GPU_STEPS = 10
"""Steps of one timed run on a GPU, which are too short to be timed one by one."""
EAGER = ("block", "layers", "form", "step", "quartiles", "images/s", "memory")
COMPILED = ("block", "form", "step", "quartiles", "compile s", "graph breaks", "recompiles")
Where = dict[str, int] | str
Table = tuple[str, tuple[str, ...], list[list[str]], str]
"""Title, headings, rows and what stands below."""


@dataclass(frozen=True)
class Setting:
    """What is trained and how.

    Args:
        network: its spec; it takes ``num_classes`` and images of three channels.
        batch: images.
        size: pixels of a side.
        device: ``cpu``, on one thread, or ``cuda``.
        bf16: autocast, with weights and images in channels_last.
        rounds: runs of each network, in turns.
        compiled: measure under ``torch.compile``, too.
    """

    network: str = "torchvision:resnet18"
    batch: int = 32
    size: int = 128
    device: str = "cpu"
    bf16: bool = False
    rounds: int = 5
    compiled: bool = False

    def plain(self) -> nn.Module:
        """The network without blocks, in training mode: always with the same numbers."""
        torch.manual_seed(0)
        return sources.create(f"{self.network},num_classes={CLASSES}").train()

    def clock(self) -> float:
        """Seconds; on one thread of the CPU the process's own, in which neighbours on the machine do not count."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __str__(self) -> str:
        kind = "one CPU thread" if self.device == "cpu" else torch.cuda.get_device_name()
        precision = "bf16 autocast, channels_last, " if self.bf16 else ""
        return f"{self.network}, batch {self.batch}, 3x{self.size}x{self.size}, {precision}{kind}"


@dataclass
class Trainee:
    """A network in training: runs one step at a time and says what that took."""

    model: nn.Module
    setting: Setting
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        setting = self.setting
        self.model.to(setting.device)
        self.x = torch.randn(setting.batch, 3, setting.size, setting.size, device=setting.device)
        self.y = torch.randint(0, CLASSES, (setting.batch,), device=setting.device)
        if setting.bf16:
            self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        self.steps = 1 if setting.device == "cpu" else GPU_STEPS
        self.call: Any = torch.compile(self.model) if self.compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        started = time.perf_counter()  # the compiler works in other processes as well
        self.step()  # The first one allocates, compiles and makes the momentum.
        self.first = time.perf_counter() - started

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.setting.bf16):
            loss = F.cross_entropy(self.call(self.x), self.y)
        loss.backward()
        self.optimizer.step()

    def run(self) -> None:
        started = self.setting.clock()
        for _ in range(self.steps):
            self.step()
        self.seconds.append((self.setting.clock() - started) / self.steps)

    def peak(self) -> int:
        """Bytes that a step holds at most, weights and momentum included; gradients count only while they are there."""
        self.optimizer.zero_grad(set_to_none=True)
        momentum = (value for state in self.optimizer.state.values() for value in state.values())
        held = [*self.model.parameters(), *self.model.buffers(), *(m for m in momentum if torch.is_tensor(m))]
        peak = Peak(self.x.device, sum(tensor.nbytes for tensor in held))
        self.step()
        self.optimizer.zero_grad(set_to_none=True)
        return peak.bytes()


def step(
    blocks: Annotated[str, typer.Option("--blocks", help="Names, with commas between; all by default.")] = "",
    forms: Annotated[str, typer.Option("--forms", help="Forms of training, with commas between.")] = ",".join(FORMS),
    network: Annotated[str, typer.Option("--network", help="Source and name.")] = Setting.network,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each; the median ratio is shown.")] = 5,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images in a batch.")] = Setting.batch,
    size: Annotated[int, typer.Option("--size", min=32, help="Height and width of an image.")] = Setting.size,
    device: Annotated[str, typer.Option("--device", help="cpu, on one thread, or cuda.")] = Setting.device,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast, channels_last.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Under torch.compile, too.")] = False,
    stem: Annotated[bool, typer.Option("--stem", help="Blocks for the 7x7 stem too; no publication has them.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write Markdown here; docs/step.md.")] = None,
) -> None:
    """What a training step costs with each block and form, relative to the plain network."""
    names = _split(blocks) or list(reparam.blocks())
    for name in names:
        if name not in reparam.blocks():
            raise typer.BadParameter(f"there is no block {name!r}; known: {', '.join(reparam.blocks())}")
    kinds = [str(Form.of(form)) for form in _split(forms)]
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"got {device!r}; cpu or cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; --device cpu measures on the CPU")
    setting = Setting(network, batch, size, device, bf16, rounds, compiled)
    where: Where = ALL if stem else {"kernel": 3}
    terminal, facts = console(), provenance()
    tables: list[Table] = []
    with terminal.status("measuring"):
        for tables in _measured(setting, names, kinds, where):
            if out is not None:  # hours may lie between two blocks
                write_text(out, _page(facts, tables))
    for title, headings, rows, note in tables:
        terminal.print(rich_table(title, headings, rows))
        terminal.print(note, soft_wrap=True)
    terminal.print(facts, soft_wrap=True)
    if out is not None:
        terminal.print(f"wrote {out}", soft_wrap=True)


def _page(facts: str, tables: Sequence[Table]) -> str:
    parts = [f"\n## {title}\n\n{markdown_table(headings, rows)}\n{note}\n" for title, headings, rows, note in tables]
    return f"# What a training step costs\n\n{facts}\n{''.join(parts)}"


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _measured(setting: Setting, names: Sequence[str], forms: Sequence[str], where: Where) -> Iterator[list[Table]]:
    """A table of plain steps and, where asked for, one of compiled steps: those of all blocks so far, after each.

    The forms of one block and the plain network take turns; all blocks at once might not fit.
    """
    eager: list[list[str]] = []
    fast: list[list[str]] = []
    left: list[str] = []
    with one_thread() if setting.device == "cpu" else nullcontext():
        plain = Trainee(setting.plain(), setting)
        own = plain.peak()
        under = _compiled(setting.plain(), setting) if setting.compiled else None
        for name in names:
            layers = len(reparam.plan(setting.plain(), name, where=where).expanded)
            if not layers:
                left.append(name)
                continue
            found = {form: _expanded(setting, name, form, where) for form in forms}
            eager += [[name, str(layers), form, *cells] for form, cells in _eager(plain, own, found).items()]
            if under is not None:
                fast += [[name, form, *_under_compiler(under, model)] for form, model in found.items()]
            yield _tables(plain, own, where, left, eager, under, fast)
    if left and eager:
        yield _tables(plain, own, where, left, eager, under, fast)
    if not eager:
        raise typer.BadParameter(
            f"no layer of {setting.network} gets one of these blocks: only those of 3x3 do without --stem"
        )


def _tables(
    plain: Trainee, own: int, where: Where, left: list[str], eager: list[list[str]], under: Trainee | None,
    fast: list[list[str]],
) -> list[Table]:  # fmt: skip
    """What was measured, with what is said of it."""
    setting = plain.setting
    note = (
        f"Step: time of forward, backward and SGD with momentum, relative to the plain network's {_middle(plain)} in "
        f"the same round: medians and quartiles of {setting.rounds} interleaved runs. Memory: peak of a step, weights "
        f"and momentum included, relative to the plain network's {own / 2**20:.0f} MiB. Layers: convolutions that get "
        f"a block{'' if where == ALL else ', those of 3x3'}. Frozen: norms of blocks in evaluation mode."
    )
    note += f" Blocks that apply to no layer of it: {', '.join(left)}." if left else ""
    tables: list[Table] = [(str(setting), EAGER, eager, note)]
    if under is not None:
        note = (
            f"Relative to the compiled plain network's {_middle(under)}. Compile s: seconds of the first step, "
            f"{under.first:.0f} for the plain network. Recompiles: graphs that later steps added."
        )
        tables.append(("Under torch.compile", COMPILED, fast, note))
    return tables


def _middle(trainee: Trainee) -> str:
    return f"{statistics.median(trainee.seconds) * 1e3:.0f} ms"


def _expanded(setting: Setting, block: str, form: str, where: Where) -> nn.Module:
    model = reparam.expand(setting.plain(), block, where=where, form=form, verify="folds").train()
    if form == "frozen":
        for module in model.modules():
            if isinstance(module, BranchSum):
                module.eval()
    return model


def _eager(plain: Trainee, own: int, found: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Cells of each form: step, quartiles, images a second, memory."""
    setting = plain.setting
    trainees, peaks = {}, {}
    for form, model in found.items():
        trainees[form] = Trainee(model, setting)
        peaks[form] = trainees[form].peak()
    theirs = _race(plain, trainees.values())
    return {
        form: [
            *_spread(trainee.seconds, theirs),
            f"{setting.batch / statistics.median(trainee.seconds):.0f}",
            f"{peaks[form] / own:.2f}",
        ]
        for form, trainee in trainees.items()
    }


def _race(plain: Trainee, others: Collection[Trainee]) -> list[float]:
    """Run all in turns; the plain network's seconds of these rounds."""
    for _ in range(plain.setting.rounds):
        plain.run()
        for trainee in others:
            trainee.run()
    return plain.seconds[-plain.setting.rounds :]


def _compiled(model: nn.Module, setting: Setting) -> Trainee:
    """Compiled from nothing: what the compiler keeps on disk of earlier runs would hide the time that it takes."""
    import torch._inductor.config as inductor

    with inductor.patch(force_disable_caches=True):
        return Trainee(model, setting, compiled=True)


def _under_compiler(plain: Trainee, model: nn.Module) -> list[str]:
    """Cells: step, quartiles, seconds of the first step, graph breaks, graphs that came later."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # or the variants would share one limit of recompilations
    counters.clear()
    trainee = _compiled(model, plain.setting)
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    trainee.run()
    trainee.run()
    recompiles = counters["stats"]["unique_graphs"] - graphs
    trainee.seconds.clear()
    plain.step()  # compiled anew, since the compiler was reset
    theirs = _race(plain, [trainee])
    return [*_spread(trainee.seconds, theirs), f"{trainee.first:.0f}", str(breaks), str(recompiles)]


def _spread(seconds: Sequence[float], plain: Sequence[float]) -> tuple[str, str]:
    """Median of the ratios, and their quartiles."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.2f}", f"{low:.2f} to {high:.2f}"
