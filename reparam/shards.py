"""Weights in several files, as Hugging Face writes large ones: an index says which tensor lies in which of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from reparam.disk import FileError

__all__ = ["is_index", "shard_of", "shards_of"]

LARGEST = 64 * 2**20
"""Bytes of an index."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def is_index(path: Path) -> bool:
    """Whether a file is named as an index is: ``model.safetensors.index.json``."""
    return path.name.endswith(".index.json")


def shard_of(path: Path) -> str:
    """What to read instead of a file that is one of several; empty if it is none, or if there is no index."""
    match = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{match[1]}{match[2]}.index.json") if match else path
    return str(index) if match and index.is_file() else ""


def shards_of(index: Path) -> dict[Path, set[str]]:
    """The files of an index, each with the names of its tensors. None is opened.

    Raises :class:`FileError` if it is not an index, or names a file outside of its own folder.
    """
    try:
        if index.stat().st_size > LARGEST:
            raise FileError(f"{index} is too large for an index: {index.stat().st_size / 2**20:.0f} MB")
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{index} cannot be read as an index of weights: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileError(f"{index} is no index of weights: it has no weight_map from tensors to files")
    found: dict[Path, set[str]] = {}
    for tensor, name in places.items():
        if Path(name).name != name or is_index(Path(name)):
            raise FileError(f"{index} places {tensor!r:.60} in {name!r:.60}; only files beside it are read")
        found.setdefault(index.with_name(name), set()).add(tensor)
    return found
