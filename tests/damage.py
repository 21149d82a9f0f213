"""Damage to files, for the tests and for ``damage_files.py``: bytes by place and kind, values by type."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
from safetensors.torch import save_file
from torch import Tensor

from reparam import ReparamError, files, sources
from zoo.train.state import DIGEST, digest

# ------------------------------------------------------------------------------------------------ bytes


def _noise(content: bytes, at: int, rng: random.Random) -> bytes:
    more = rng.randrange(1, 64)
    return content[:at] + bytes(rng.randrange(256) for _ in range(more)) + content[at + more :]


def _doubled(content: bytes, at: int, rng: random.Random) -> bytes:
    more = rng.randrange(1, 64)
    return content[:at] + content[at : at + more] * 2 + content[at + more :]


def _zeroed(content: bytes, at: int, rng: random.Random) -> bytes:
    more = rng.randrange(1, 64)
    return content[:at] + bytes(len(content[at : at + more])) + content[at + more :]


def _flipped(content: bytes, at: int, rng: random.Random) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


KINDS: Mapping[str, Callable[[bytes, int, random.Random], bytes]] = {
    "cut off": lambda content, at, rng: content[:at],
    "noise": _noise,
    "doubled": _doubled,
    "zeroed": _zeroed,
    "one bit": _flipped,
}
"""What is done to the bytes of a file at a place."""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Any damage; near the ends, where tables are, as often as anywhere."""
    at = rng.randrange(rng.choice([16, 200, len(content)]))
    at = rng.choice([at, len(content) - 1 - rng.randrange(400)])  # a zip file's table is at its end
    return rng.choice(list(KINDS.values()))(content, at, rng)


def parts(content: bytes, suffix: str) -> dict[str, range]:
    """The parts of a file in which damage means different things."""
    end = len(content)
    if suffix == ".safetensors":
        header = 8 + int.from_bytes(content[:8], "little")
        return {
            "header length": range(8),
            "header": range(8, header),
            "tensors": range(header, end - 64),
            "end": range(end - 64, end),
        }
    if suffix == ".pt":  # a zip file: the pickle first, a table of all members behind them
        second = content.index(b"PK\x03\x04", 4)
        table, last = content.index(b"PK\x01\x02", second), content.rindex(b"PK\x05\x06")
        return {
            "pickle": range(second),
            "tensors": range(second, table),
            "table": range(table, last),
            "end": range(last, end),
        }
    if suffix == ".jsonl":
        line, last = content.index(b"\n") + 1, content.rindex(b"\n", 0, end - 1) + 1
        return {"first line": range(line), "middle": range(line, last), "last line": range(last, end)}
    first, last = {".h5": (96, 400)}.get(suffix, (64, 64))  # the superblock of hdf5, its table of names
    return {"start": range(first), "middle": range(first, end - last), "end": range(end - last, end)}


def write_network(path: Path) -> Path:
    """A file of a small network, of any kind that is read."""
    model = sources.create("zoo:cifar_quick")
    if path.suffix != ".h5":
        return files.save_model(model, path, source="zoo:cifar_quick")
    with h5py.File(path, "w") as file:
        for name, value in model.state_dict().items():
            file.create_dataset(name, data=value.numpy())
    return path


# ------------------------------------------------------------------------------------------------ values


JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e400,
    "",
    "x\x1b[2J",
    [],
    {},
    [[]],
    {"a": []},
    10**400,
    "../../etc/passwd",
    ["x"],
)
"""What may stand in JSON where something else belongs."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with a key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


def with_junk(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one value of another type, or one missing."""
    changed = copy.deepcopy(value)
    container, key = rng.choice(list(places(changed)))
    if rng.random() < 0.2:
        del container[key]
    else:
        container[key] = rng.choice(JUNK)
    return changed


def sealed(path: Path, tensors: dict[str, Tensor], note: dict[str, str]) -> None:
    """Write a training state whose digest is right, whatever is in it."""
    save_file(tensors, path, metadata=note | {DIGEST: digest(tensors, note)})


# ------------------------------------------------------------------------------------------------ what comes of it


def outcome(read: Callable[[], Any]) -> str:
    """``loaded``, ``refused`` for an error of ours in one line, else the exception in words."""
    try:
        read()
    except ReparamError as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"
