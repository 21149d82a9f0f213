"""``reparam bench onnx``: what each optimiser of ONNX files makes of the same file, batch norms kept by the exporter.

Files are counted as they are written, and as onnxruntime runs them: it fuses activations into convolutions, whatever
file it is given. Each file is run by onnxruntime with all of its optimisations, in turns with the others, on one
thread; a ratio is to the untouched file in the same round.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import nn

import reparam
from reparam import ReparamError, sources
from zoo.job import one_line
from zoo.measure import one_thread
from zoo.onnx_file import check_packages
from zoo.randomise import randomise_
from zoo.render import console, markdown_table, provenance, rich_table, write_text

__all__ = ["onnx"]

SIZE = 224
HOST = "torchvision:resnet18"
"""The network whose 3x3 convolutions get each block."""
BLOCKS = ("plain", "acb", "dbb", "doconv", "repvgg", "mobileone", "ecb")
NETWORKS = ("timm:repvgg_a0", "timm:mobileone_s0", "timm:fastvit_t8", "timm:repvit_m1", "timm:ghostnetv3_050")
HEADINGS = (
    "network", "optimiser", "nodes", "as run", "convs", "norms", "parameters", "bytes", "time", "quartiles", "error",
)  # fmt: skip
BEFORE = "none"
SUFFIX = ".onnx"

Optimiser = Callable[[Path, Path], None]
"""Reads one file and writes another."""


@dataclass(frozen=True)
class Size:
    """What one ONNX file holds, subgraphs and functions aside.

    Args:
        nodes: of the graph.
        as_run: nodes that onnxruntime makes of them before it runs the file.
        convs: convolutions, transposed ones included.
        norms: batch norms.
        parameters: floating-point numbers, as initialisers or constants.
        bytes: of the file.
    """

    nodes: int
    as_run: int
    convs: int
    norms: int
    parameters: int
    bytes: int


def onnx(
    networks: Annotated[
        str, typer.Option("--networks", help="Blocks, source:name or files, with commas between.")
    ] = "",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each file; the median is shown.")] = 15,
    size: Annotated[int, typer.Option("--size", min=32, help="Height and width of the image.")] = SIZE,
    out: Annotated[Path | None, typer.Option("--out", help="Also write Markdown here; docs/onnx.md.")] = None,
) -> None:
    """What reparam and the optimisers that ship make of the same ONNX files."""
    check_packages()
    terminal = console()
    rows: list[list[str]] = []
    with one_thread():
        for name in networks.split(",") if networks else [*BLOCKS, *NETWORKS]:
            with terminal.status(name):
                made = _network(name.strip(), rounds, size)
            terminal.print(rich_table(made[0][0], HEADINGS[1:], [row[1:] for row in made]))
            rows += made
    note = (
        "As written by torch.onnx.export with batch norms kept, constants computed and metadata left out, "
        f"1 x 3 x {size} x {size}; files as they are. Blocks stand in the 3x3 convolutions of {HOST}. As run: nodes of "
        "the graph that onnxruntime executes, activations fused. Time: processor time of one run by onnxruntime with "
        "all of its optimisations, relative to the untouched file in the same round; medians and quartiles of "
        f"{rounds}. Error: largest relative difference of the outputs from the untouched file's."
    )
    facts = provenance()
    terminal.print(note, soft_wrap=True)
    terminal.print(facts, soft_wrap=True)
    if out is not None:
        shown = [[row[0] if row[1] == BEFORE else "", *row[1:]] for row in rows]
        asked = ",".join(Path(name).name for name in networks.split(","))
        command = f"    reparam bench onnx{f' --networks {asked}' if networks else ''} --rounds {rounds}"
        text = (
            f"# One ONNX file, four optimisers\n\n{command}\n\n{facts}\n\n{markdown_table(HEADINGS, shown)}\n{note}\n"
        )
        write_text(out, text)
        terminal.print(f"wrote {out}", soft_wrap=True)


def _network(name: str, rounds: int, size: int) -> list[list[str]]:
    """A row for each optimiser of one network's file."""
    with TemporaryDirectory() as folder:
        files = {BEFORE: Path(folder, "before.onnx")}
        if name.endswith(SUFFIX):
            shutil.copyfile(name, files[BEFORE])
            name = Path(name).name
        else:
            _export(_built(name, size), size, files[BEFORE])
        failed: dict[str, str] = {}
        for optimiser, run in _optimisers().items():
            path = Path(folder, f"{optimiser}.onnx")
            try:
                run(files[BEFORE], path)
                files[optimiser] = path
            # Other people's code, which may fail in any way on a file: that is its row.
            except Exception as error:
                failed[optimiser] = one_line(error)
        seconds, errors = _race(files, rounds)
        rows = []
        for optimiser, path in files.items():
            held = _size(path)
            ratios = [mine / plain for mine, plain in zip(seconds[optimiser], seconds[BEFORE], strict=True)]
            cells = [held.nodes, held.as_run, held.convs, held.norms, held.parameters, held.bytes]
            rows.append([name, optimiser, *(f"{cell:,}" for cell in cells), *_time(optimiser, ratios, seconds)])
            rows[-1].append("" if optimiser == BEFORE else f"{errors[optimiser]:.0e}")
        rows += [[name, f"{optimiser}: {why}", *[""] * (len(HEADINGS) - 2)] for optimiser, why in failed.items()]
        return rows


def _time(optimiser: str, ratios: list[float], seconds: dict[str, list[float]]) -> tuple[str, str]:
    if optimiser == BEFORE:
        return f"{statistics.median(seconds[optimiser]) * 1e3:.1f} ms", ""
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}"


def _built(name: str, size: int) -> nn.Module:
    """The network, in eval mode, with weights that a wrong fold would show on."""
    torch.manual_seed(0)
    host = name if ":" in name else HOST
    model = sources.create(host).eval()
    if name not in ("plain", host):
        model = reparam.expand(model, name, where={"kernel": 3}).eval()
    return randomise_(model, 0, (torch.randn(2, 3, size, size),))


def _export(model: nn.Module, size: int, path: Path) -> None:
    try:
        program = torch.onnx.export(
            model, (torch.randn(1, 3, size, size),), dynamo=True, optimize=False, verbose=False, external_data=False
        )
    # The exporter runs the network's own code, and may fail in any way.
    except Exception as error:
        raise ReparamError(f"the ONNX exporter fails: {one_line(error.__cause__ or error)}") from error
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import optimizer

    assert program is not None
    optimizer.fold_constants(program.model)  # the exporter writes biases of zeros as operators
    optimizer.remove_unused_nodes(program.model)
    ClearMetadataAndDocStringPass()(program.model)  # the bytes that count are those of the network
    program.save(path)


# ------------------------------------------------------------------------------------------------- optimisers


def _optimisers() -> dict[str, Optimiser]:
    """Those that are installed; onnxruntime's own stops before what only onnxruntime can run."""
    found: dict[str, Optimiser] = {"onnxruntime": _by_onnxruntime, "onnxscript": _by_onnxscript}
    if find_spec("onnxslim") is not None:
        found["onnxslim"] = _by_onnxslim
    return {**found, "reparam": _by_reparam}


def _by_onnxruntime(source: Path, target: Path) -> None:
    import onnxruntime

    _session(source, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, target)


def _by_onnxscript(source: Path, target: Path) -> None:
    import onnx_ir
    from onnxscript import optimizer, rewriter

    model = onnx_ir.load(source)
    optimizer.optimize_ir(model)
    onnx_ir.save(rewriter.rewrite(model), target)


def _by_onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnxslim.slim(str(source), str(target))


def _by_reparam(source: Path, target: Path) -> None:
    import reparam.onnx

    reparam.onnx.save(reparam.onnx.collapse(source), target)


# ------------------------------------------------------------------------------------------------- measures


def _session(path: Path, level: Any = None, written: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if level is not None:
        options.graph_optimization_level = level
    if written is not None:
        options.optimized_model_filepath = str(written)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _size(path: Path) -> Size:
    import onnxruntime

    with TemporaryDirectory() as folder:
        written = Path(folder, "as_run.onnx")
        _session(path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, written)
        as_run = len(_graph(written).node)
    graph = _graph(path)
    kinds = Counter(node.op_type for node in graph.node)
    held = [t for node in graph.node for a in node.attribute if a.name == "value" for t in [a.t]]
    floats = {1, 10, 11, 16}  # FLOAT, FLOAT16, DOUBLE, BFLOAT16 of TensorProto
    numbers = sum(math.prod(t.dims) for t in [*graph.initializer, *held] if t.data_type in floats)
    convs = kinds["Conv"] + kinds["ConvTranspose"]
    return Size(len(graph.node), as_run, convs, kinds["BatchNormalization"], numbers, path.stat().st_size)


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path).graph


def _race(files: dict[str, Path], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Processor seconds of each run, all files in turns, and how far each file's outputs are from the first's."""
    sessions = {name: _session(path) for name, path in files.items()}
    fed, wanted = _inputs(files[BEFORE], sessions[BEFORE])
    outputs = {name: session.run(None, fed) for name, session in sessions.items()}  # allocates, too
    errors = {name: max(map(_distance, got, wanted), default=0.0) for name, got in outputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, session in sessions.items():
            started = time.process_time()
            session.run(None, fed)
            seconds[name].append(time.process_time() - started)
    return seconds, errors


def _inputs(path: Path, session: Any) -> tuple[dict[str, Any], list[Any]]:
    """Inputs that a file takes, made up from the shapes that it declares, and what it gives for them."""
    import onnx_ir

    from passes.onnx.collapse import made_up

    why = "it declares no shapes"
    for fed in made_up(onnx_ir.load(path)):
        try:
            return fed, session.run(None, fed)
        # onnxruntime's errors have no class in common but this one.
        except Exception as error:
            why = one_line(error)
    raise ReparamError(f"{path.name}: no input could be made up ({why})")


def _distance(got: Any, wanted: Any) -> float:
    return float(abs(got - wanted).max() / max(float(abs(wanted).max()), 1e-30)) if wanted.size else 0.0
