"""``reparam study dynamics``: a block in training is not the convolution that it folds into.

Networks that compute the same function, one plain and the others with blocks (``init="preserve"``), see the same
batches, each with an optimizer of its own. After each step three things are measured, in evaluation mode:

* **outputs** f(x) on fixed test images: ||f_block - f_plain|| / ||f_plain||, over all logits;
* **kernels** K, with the batch norm behind each folded in: ||K_block - K_plain|| / ||K_plain||, the mean over the
  layers; K_block is :func:`reparam.equivalent_conv` of the block, which is what would be deployed at that step;
* **skeletons**: mean |K| over the taps of the centre row and column, divided by that over the other taps, the corners,
  the mean over the layers (X. Ding et al., ACNet, ICCV 2019, sec. 5: the skeleton outweighs the corners).

Two controls say what a drift means. A second plain network has to stay at exactly 0: anything else would be chance in
the training itself. A plain network whose kernels are nudged by 1e-6 shows how fast training takes any two networks
apart.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reparam
from passes.training.discovery import find_convs, plain_norm
from reparam import ReparamError
from zoo.measure import one_thread
from zoo.networks import find_spec
from zoo.render import console, markdown_table, provenance, rich_table, write_text
from zoo.train import build
from zoo.train.config import PLAIN, Config, variant
from zoo.train.data import Data
from zoo.train.plots import Panel, drift_plot

__all__ = [
    "Layer",
    "Measurement",
    "StudyError",
    "check_control",
    "dynamics",
    "relative_distance",
    "skeleton",
    "split_blocks",
    "study",
    "write_results",
]

AGAIN, NUDGED = "plain again", "plain nudged"
NUDGE = 1e-6
"""Relative change of the nudged network's kernels: some ten times the rounding of float32."""
PROBES = 64
"""Test images on which outputs are compared."""
CLEAR = 10
"""A drift so many times that of the nudged network stands out."""
HEADINGS = ("network", *(f"{what}, {when}" for what in ("outputs", "kernels") for when in ("1 step", "end")))
HEADINGS += ("skeleton / corners", "loss")
LEGEND = (
    "Outputs: relative distance of the logits to the plain network's, on test images in evaluation mode. Kernels: "
    "relative distance of the equivalent kernels to the plain network's, mean over the layers. Skeleton / corners: "
    "mean magnitude of centre row and column over that of the other taps, mean over the layers, start → end. Loss: of "
    "the first batch → of the last one. Plain again: a second plain network, which has to stay at 0. Plain nudged: "
    f"its kernels multiplied by 1 + {NUDGE:g} z, z standard normal, before training."
)


class StudyError(ReparamError):
    """A study that cannot be made, or whose control failed."""


@dataclass(frozen=True)
class Layer:
    """One convolution of a network after a step.

    Args:
        layer: its path in the plain network.
        kernel: relative distance to the plain network's kernel.
        skeleton: mean magnitude of the taps of centre row and column.
        corners: mean magnitude of the other taps; NaN for a kernel that has none.
    """

    layer: str
    kernel: float
    skeleton: float
    corners: float


@dataclass(frozen=True)
class Measurement:
    """One network after ``step`` steps.

    Args:
        step: 0 before the first.
        network: ``plain``, a control, or a block's text.
        loss: of the batch of this step; NaN before the first.
        outputs: relative distance of the logits to the plain network's.
        layers: convolutions with a kernel of more than one tap.
    """

    step: int
    network: str
    loss: float
    outputs: float
    layers: tuple[Layer, ...]

    @property
    def kernels(self) -> float:
        """Mean relative distance over the layers."""
        return float(np.mean([each.kernel for each in self.layers]))

    @property
    def ratio(self) -> float:
        """Mean of skeleton / corners over the layers that have corners; NaN if none has."""
        ratios = [each.skeleton / each.corners for each in self.layers if each.corners > 0]
        return float(np.mean(ratios)) if ratios else math.nan


class Trainee:
    """A network in training, and the kernels that it would be deployed with."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model = model
        self.optimizer = build.make_optimizer(model, config)

    def step(self, images: Tensor, labels: Tensor, seed: int) -> float:
        """One step; the loss before it. The seed is for dropout, which is to be the same in all networks."""
        self.model.train()
        torch.manual_seed(seed)
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """Logits in evaluation mode, float64."""
        logits: Tensor = self.model.eval()(images)
        return logits.double()

    @torch.no_grad()
    def kernel(self, layer: str, norm: str | None) -> Tensor:
        """What stands at ``layer``, with the batch norm at ``norm`` if that is still there, as one kernel, float64."""
        self.model.eval()
        block = self.model.get_submodule(layer)
        behind = self.model.get_submodule(norm) if norm is not None else None
        if isinstance(behind, _BatchNorm):
            block = nn.Sequential(block, plain_norm(behind, 2))
        return reparam.equivalent_conv(block)[0].double()


def study(config: Config, blocks: Sequence[str], *, steps: int, every: int = 1) -> Iterator[Measurement]:
    """Train plain network, controls and block versions side by side on the CPU; all measurements, step by step.

    Args:
        config: network, data, batch, optimizer's numbers and seed; the learning rate stays as it is, and epochs,
            schedule and averages are not used.
        blocks: variants as on the command line of ``reparam train``.
        steps: of training.
        every: steps between measurements; the first step and the last are always measured.

    Raises:
        StudyError: a block that is not started with ``preserve``, or a network without a convolution to compare.
    """
    data = build.load(config)
    plain = dataclasses.replace(config, block=None)
    configs = {PLAIN: plain, AGAIN: plain, NUDGED: plain} | {text: variant(config, text) for text in blocks}
    for text, each in configs.items():
        if each.init != "preserve":
            raise StudyError(f"{text} does not start from the plain network's function; leave out @{each.init}")
    trainees = {text: Trainee(build.build(each, data), each) for text, each in configs.items()}
    convs = [found for found in find_convs(trainees[PLAIN].model) if math.prod(found.conv.kernel_size) > 1]
    places = [(found.path, None if found.norm is None else found.norm.path) for found in convs]
    if not places:
        raise StudyError(f"{config.model} has no convolution with a kernel of more than one tap: nothing to compare")
    _nudge(trainees[NUDGED].model, config.seed)
    probes = next(iter(data.batches(train=False, batch=PROBES)))[0]
    losses = dict.fromkeys(trainees, math.nan)
    yield from _measure(trainees, places, probes, 0, losses)
    for step, (images, labels) in zip(range(1, steps + 1), _batches(data, config), strict=False):
        losses = {text: each.step(images, labels, step) for text, each in trainees.items()}
        if step % every == 0 or step in (1, steps):
            yield from _measure(trainees, places, probes, step, losses)


def _measure(
    trainees: dict[str, Trainee],
    places: Sequence[tuple[str, str | None]],
    probes: Tensor,
    step: int,
    losses: dict[str, float],
) -> Iterator[Measurement]:
    outputs = trainees[PLAIN].outputs(probes)
    kernels = [trainees[PLAIN].kernel(*place) for place in places]
    for text, each in trainees.items():
        layers = []
        for place, reference in zip(places, kernels, strict=True):
            kernel = each.kernel(*place)
            layers.append(Layer(place[0], relative_distance(kernel, reference), *skeleton(kernel)))
        distance = relative_distance(each.outputs(probes), outputs)
        yield Measurement(step, text, losses[text], distance, tuple(layers))


def relative_distance(mine: Tensor, reference: Tensor) -> float:
    """||mine - reference|| / ||reference||."""
    return float((mine - reference).norm() / reference.norm())


def skeleton(kernel: Tensor) -> tuple[float, float]:
    """Mean magnitude of the taps of a kernel's centre row and column, and of its other taps.

    Args:
        kernel: ``(out, in / groups, *taps)``. In three dimensions the skeleton is the three lines through the centre;
            of an even kernel the centre is the tap ``(k - 1) // 2``, as blocks have it.

    Returns:
        skeleton and corners; the latter NaN where all taps are skeleton.
    """
    magnitude = kernel.abs().mean((0, 1))
    centre = [(k - 1) // 2 for k in magnitude.shape]
    apart = sum(
        (torch.arange(k) != c).long().reshape([-1 if axis == i else 1 for i in range(magnitude.dim())])
        for axis, (k, c) in enumerate(zip(magnitude.shape, centre, strict=True))
    )
    lines = torch.as_tensor(apart).expand(magnitude.shape) <= 1
    corners = magnitude[~lines]
    return float(magnitude[lines].mean()), float(corners.mean()) if corners.numel() else math.nan


@torch.no_grad()
def _nudge(model: nn.Module, seed: int) -> None:
    """Multiply each weight of the convolutions by 1 + NUDGE z with z standard normal."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _ConvNd):
            module.weight.mul_(1 + NUDGE * torch.randn(module.weight.shape, generator=generator))


def _batches(data: Data, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from data.batches(train=True, batch=config.batch, seed=config.seed, epoch=epoch)


# ------------------------------------------------------------------------------------------------- results


def dynamics(
    out: Annotated[Path, typer.Option("--out", help="Folder of the tables, the figure and the report.")],
    model: Annotated[str, typer.Option("--model", help="Network: a name, or source:name.")] = "cifar_quick",
    data: Annotated[str, typer.Option("--data", help="Data set, or a folder with train/ and val/.")] = "digits",
    blocks: Annotated[str, typer.Option("--blocks", help="Blocks, with commas between.")] = "acb,dbb,doconv",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of training.")] = 200,
    every: Annotated[int, typer.Option("--every", min=1, help="Steps between measurements.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images in a step.")] = Config.batch,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate, of every step.")] = 0.02,
    size: Annotated[int | None, typer.Option("--size", help="Pixels; by default the data's own.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and order.")] = 0,
) -> None:
    """Train the plain network and its block versions from one function on the same batches: how do they part?"""
    config = Config(model=find_spec(model), data=data, batch=batch, rate=rate, size=size, seed=seed)
    terminal = console()
    found = []
    with one_thread(), terminal.status("training") as status:
        for each in study(config, split_blocks(blocks), steps=steps, every=every):
            status.update(f"step {each.step} of {steps}")
            found.append(each)
    options = {"model": model, "data": data, "blocks": blocks, "steps": steps, "every": every, "batch": batch}
    options |= {"rate": rate, "seed": seed, "out": out} | ({} if size is None else {"size": size})
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    write_results(found, config, shlex.join(["reparam", "study", "dynamics", *words]), out)
    terminal.print(rich_table("Drift from the plain network", HEADINGS, _table(by_network(found))))
    terminal.print(f"report: {out / 'report.md'}", soft_wrap=True)
    check_control(found)


def split_blocks(text: str) -> list[str]:
    """The blocks of ``acb:gamma=1/3,bn=after,dbb``: a comma also separates options, which have ``=`` in them."""
    parts: list[str] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        if parts and "=" in part.partition(":")[0]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def check_control(measurements: Sequence[Measurement]) -> None:
    """Raise :class:`StudyError` if the second plain network was ever anywhere but where the first was."""
    for each in measurements:
        if each.network == AGAIN and (each.outputs or any(layer.kernel for layer in each.layers)):
            raise StudyError(
                f"the control failed: a second plain network differs after step {each.step} by {each.outputs:.1e}, so "
                "training depends on chance here, and no drift of a block can be read from this study"
            )


def by_network(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements by network, in the order of steps."""
    lines: dict[str, list[Measurement]] = {}
    for each in measurements:
        lines.setdefault(each.network, []).append(each)
    return lines


def write_results(measurements: Sequence[Measurement], config: Config, command: str, out: Path) -> None:
    """Write ``dynamics.csv``, ``layers.csv``, ``dynamics.svg`` and ``.png``, and ``report.md`` to ``out``."""
    names = ("step", "network", "loss", "outputs", "kernels", "ratio")
    _write_csv(out / "dynamics.csv", names, ([getattr(each, name) for name in names] for each in measurements))
    layers = ((each.step, each.network, *dataclasses.astuple(layer)) for each in measurements for layer in each.layers)
    _write_csv(out / "layers.csv", ("step", "network", "layer", "kernel", "skeleton", "corners"), layers)
    lines = by_network(measurements)
    drift_plot([each.step for each in lines[PLAIN]], _panels(lines), out / "dynamics")
    write_text(out / "report.md", _report(lines, config, command))


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _panels(lines: dict[str, list[Measurement]]) -> list[Panel]:
    drifting = [name for name in lines if name != PLAIN]
    shown = [name for name in lines if name not in (AGAIN, NUDGED)]

    def values(names: list[str], what: str) -> dict[str, list[float]]:
        return {name: [getattr(each, what) for each in lines[name]] for name in names}

    return [
        Panel("outputs: relative distance to plain", values(drifting, "outputs"), True, NUDGED),
        Panel("kernels: relative distance to plain", values(drifting, "kernels"), True, NUDGED),
        Panel("skeleton / corners", values(shown, "ratio"), reference=PLAIN),
        Panel("training loss", values(shown, "loss"), reference=PLAIN),
    ]


def _table(lines: dict[str, list[Measurement]]) -> list[list[str]]:
    rows = []
    for name, (start, first, *later) in lines.items():
        end = later[-1] if later else first
        drifts = [first.outputs, end.outputs, first.kernels, end.kernels]
        cells = [f"{value:.1e}" if value else "0" for value in drifts]
        rows.append([name, *cells, f"{start.ratio:.3f} → {end.ratio:.3f}", f"{first.loss:.3f} → {end.loss:.3f}"])
    return rows


def _report(lines: dict[str, list[Measurement]], config: Config, command: str) -> str:
    layers = [each.layer for each in lines[PLAIN][0].layers]
    steps = lines[PLAIN][-1].step
    sentences = "".join(f"- {text}\n" for text in _sentences(lines))
    return (
        f"# Training dynamics: {config.model.partition(':')[2] or config.model} on {config.data}\n\n{provenance()} "
        f"Repeat it with\n\n```sh\n{command}\n```\n\n{steps} steps of the optimizer "
        f"{config.optimizer} with a batch of {config.batch}, a constant "
        f"learning rate of {config.rate:g}, momentum {config.momentum:g} and weight decay {config.weight_decay:g}, in "
        f"float32 on the CPU; all networks start from the same function and see the same batches. Kernels are compared "
        f"with their batch norms folded in, in {len(layers)} layers: {', '.join(layers)}.\n\n"
        f"{markdown_table(HEADINGS, _table(lines))}\n{LEGEND}\n\n![Drift from the plain network](dynamics.svg)\n\n"
        f"## What the numbers say\n\n{sentences}"
    )


def _sentences(lines: dict[str, list[Measurement]]) -> Iterator[str]:
    plain, nudged = lines[PLAIN], lines[NUDGED]
    apart = max(max(each.outputs, each.kernels) for each in lines[AGAIN])
    if apart:
        yield f"The control FAILED: a second plain network came to differ by {apart:.1e}. No drift can be read here."
    else:
        yield "The control held: a second plain network was at exactly 0 at every step, in outputs and in kernels."
    for name in (name for name in lines if name not in (PLAIN, AGAIN, NUDGED)):
        start, first, end = lines[name][0], lines[name][1], lines[name][-1]
        begins = (
            "exactly the plain function" if start.outputs == 0 else f"an output that differs by {start.outputs:.1e}"
        )
        text = (
            f"{name}: started from {begins}. One step later its kernels were {first.kernels:.1e} from the plain ones, "
            f"{_times(first.kernels, nudged[1].kernels)}; after step {end.step} {end.kernels:.1e}, "
            f"{_times(end.kernels, nudged[-1].kernels)}."
        )
        if math.isfinite(end.ratio):
            text += (
                f" Its skeletons went from {start.ratio:.3f} to {end.ratio:.3f} times the corners, the plain network's "
                f"from {plain[0].ratio:.3f} to {plain[-1].ratio:.3f}."
            )
        yield text
    yield (
        "One seed and one network: the drift is a fact about these runs; it says that the block trains differently, "
        "not that it trains better. For that, compare accuracies over seeds: `reparam train --compare`."
    )


def _times(mine: float, nudged: float) -> str:
    """How a drift stands to that of the nudged network at the same step."""
    if mine < CLEAR * nudged:
        return f"which does not stand out from the nudged network's {nudged:.1e}"
    return f"{mine / nudged:,.0f} times as far as the nudged network"
