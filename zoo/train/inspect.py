"""``reparam inspect``: what a file of weights holds, tensor by tensor."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from reparam.files import StateFile, load_state
from reparam.networks import UsageError
from reparam.tables import short, show
from zoo.render import console

__all__ = ["ORDERS", "Entry", "entries", "inspect"]


LONG = 300
"""Characters of metadata that are shown."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. Statistics are of all its numbers, computed in float64; NaN where there are none.

    Args:
        zeros: share of numbers that are exactly zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    min: float
    max: float
    mean: float
    zeros: float

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or infinite; a tensor without numbers has none that is."""
        return self.numbers == 0 or math.isfinite(self.min + self.max)

    @staticmethod
    def of(name: str, tensor: Tensor) -> Entry:
        low, high, mean, zeros = (math.nan,) * 4
        if tensor.numel():
            # Complex numbers have no order; their magnitudes have.
            values = (tensor.abs() if tensor.is_complex() else tensor).double()
            low, high, mean = float(values.min()), float(values.max()), float(values.mean())
            zeros = float((values == 0).double().mean())
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(name, tuple(tensor.shape), dtype, tensor.nbytes, low, high, mean, zeros)


ORDERS: dict[str, Callable[[Entry], float | str]] = {
    "name": lambda entry: entry.name,
    "size": lambda entry: -entry.numbers,
    "min": lambda entry: entry.min,
    "max": lambda entry: -entry.max,
    "mean": lambda entry: -abs(entry.mean),
    "zeros": lambda entry: -entry.zeros,
}
"""What ``--sort`` takes; numbers go from the remarkable end."""


def entries(content: StateFile, pattern: str = "*", order: str | None = None) -> list[Entry]:
    """The tensors whose names match the shell ``pattern`` (or hold it, if it has no wildcard).

    In the file's order, or in one of ``ORDERS``; tensors without numbers come last.

    Raises:
        UsageError: an unknown order, or no tensor of such a name.
    """
    if order is not None and order not in ORDERS:
        raise UsageError(f"cannot sort by {order!r}; use {', '.join(ORDERS)}")
    wanted = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    found = [Entry.of(name, tensor) for name, tensor in content.tensors.items() if fnmatch.fnmatchcase(name, wanted)]
    if not found:
        raise UsageError(f"no tensor of {len(content.tensors)} is named {pattern!r}; the first is {_first(content)}")
    if order is not None:
        key = ORDERS[order]
        found.sort(key=lambda entry: (math.isnan(entry.mean) and not entry.numbers, key(entry), entry.name))
    return found


def _first(content: StateFile) -> str:
    return repr(next(iter(content.tensors), "(none)"))


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".safetensors, .pt, .pth, .h5, .hdf5 or .onnx.")],
    pattern: Annotated[str, typer.Argument(help="Only these names: part of a name, or a shell pattern.")] = "*",
    sort: Annotated[str | None, typer.Option("--sort", help=f"By {', '.join(ORDERS)}; default: as stored.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Where in a checkpoint the state dict is.")] = None,
) -> None:
    """List the tensors of a file: shapes, dtypes, ranges, zeros; totals; what the file says of itself."""
    if file.suffix == ".onnx":
        if key is not None:
            raise UsageError("--key: an ONNX file has its weights in one place; leave that out")
        content = _onnx(file)
    else:
        content = load_state(file, key=key)
    listed = entries(content, pattern, sort)
    terminal = console()
    show(terminal, _table(str(file), listed))
    for line in (*_totals(listed, len(content.tensors)), *_notes(content)):
        terminal.print(line, soft_wrap=True, markup=False)
    broken = [entry.name for entry in listed if not entry.finite]
    if broken:
        rest = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        terminal.print(f"NaN or infinite: {', '.join(broken[:3])}{rest}", style="red", soft_wrap=True, markup=False)


def _onnx(file: Path) -> StateFile:
    """The weights and constants of an ONNX file, and what its graph is."""
    import reparam.onnx

    model = reparam.onnx.load(file)
    operators = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph)
    metadata = {
        "operators": ", ".join(f"{count} {kind}" for kind, count in operators.most_common()),
        "inputs": ", ".join(f"{v.name}: {v.dtype}{v.shape}" for v in model.graph.inputs if not v.is_initializer()),
        "outputs": ", ".join(f"{v.name}: {v.dtype}{v.shape}" for v in model.graph.outputs),
        "operator set": ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in model.opset_imports.items()),
        "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip() or "not said",
        **dict(model.metadata_props),
    }
    return StateFile(reparam.onnx.weights(model), metadata)


def _table(title: str, listed: Sequence[Entry]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold")
    for heading in ("shape", "dtype", "min", "max", "mean", "zeros"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in listed:
        shape = "×".join(map(str, entry.shape)) or "scalar"
        numbers = (f"{value:.4g}" if entry.numbers else "" for value in (entry.min, entry.max, entry.mean))
        zeros = f"{entry.zeros:.1%}" if entry.numbers else ""
        table.add_row(escape(entry.name), shape, entry.dtype, *numbers, zeros, style=None if entry.finite else "red")
    return table


def _totals(listed: Sequence[Entry], tensors: int) -> list[str]:
    """Tensors, numbers and bytes, by dtype where there are several."""
    of = "" if len(listed) == tensors else f" of {tensors}"
    numbers, size = sum(entry.numbers for entry in listed), sum(entry.bytes for entry in listed)
    zeros = sum(entry.zeros * entry.numbers for entry in listed if entry.numbers)
    share = f", {zeros / numbers:.1%} zero" if numbers else ""
    dtypes: Counter[str] = Counter()
    for entry in listed:
        dtypes[entry.dtype] += entry.numbers
    kinds = ", ".join(f"{short(count)} {dtype}" for dtype, count in dtypes.most_common())
    return [f"{len(listed)}{of} tensors, {numbers:,} numbers ({kinds}){share}, {size / 1e6:.2f} MB"]


def _notes(content: StateFile) -> list[str]:
    """The metadata, and what reading did to find the tensors."""
    lines = [f"{key}: {_compact(value)}" for key, value in content.metadata.items()]
    if content.key:
        others = f"; --key takes others: {', '.join(content.others)}" if content.others else ""
        lines.append(f"read from: {content.key!r}{others}")
    if content.dropped:
        lines.append(f"dropped before every name: {content.dropped!r}")
    return lines


def _compact(value: str) -> str:
    """Metadata on one line, cut where it goes on for long, as the log in a training state does."""
    line = " ".join(value.split())
    return line if len(line) <= LONG else f"{line[:LONG]}… ({len(line):,} characters)"
