"""Checkpoints of other programs: which file of a folder is which architecture, and how its names fit the network.

A file or folder is named for its architecture, with or without a tag: ``resnet50.safetensors``,
``resnet50.a1_in1k.safetensors``, ``resnet50-0676ba61.pth``, ``resnet50/model.safetensors``; or a ``config.json`` beside
the file says ``"architecture": "resnet50"``, as on the Hugging Face hub. Safetensors come first; other files are read
with ``weights_only=True`` and in no other way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from reparam import ReparamError
from reparam.files import FileError, StateFile, is_file_name, load_into, load_state
from reparam.fitting import fitted
from zoo.job import Ended
from zoo.outcome import Refused

__all__ = ["UNTRAINED", "Shelf", "fill", "find_checkpoints", "is_trained", "no_weights"]

GENERIC = ("model", "pytorch_model", "open_clip_pytorch_model", "checkpoint", "model_best", "weights")
"""Names of files that say nothing; the folder's name or its ``config.json`` does."""
OFFLINE = ("ConnectionError", "ConnectError", "URLError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "gaierror")
"""Errors of download libraries that mean that there is no network, by name: none of the libraries is imported here."""
NO_WEIGHTS = ("No pretrained", "Invalid pretrained config", "no weights")
"""What sources say of an architecture that nobody has trained."""
UNTRAINED = "its source has no trained weights for it"


@dataclass(frozen=True)
class Shelf:
    """The checkpoints of a folder: file by architecture, and files that are of none."""

    files: Mapping[str, Path]
    strangers: tuple[Path, ...]


def find_checkpoints(folder: str | os.PathLike[str], known: Sequence[str]) -> Shelf:
    """Look through ``folder`` and the folders in it for checkpoints of the architectures ``known``.

    Raises:
        FileError: it is not a folder, or cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileError(f"{root} is not a folder of checkpoints")
    names, found, strangers = set(known), {}, []
    try:
        paths = sorted(p for depth in ("*", "*/*") for p in root.glob(depth) if p.is_file() and is_file_name(p.name))
    except OSError as error:
        raise FileError(f"{root} cannot be read: {error.strerror or error}") from error
    for path in sorted(paths, key=lambda p: (p.suffix != ".safetensors", len(p.name), str(p))):
        architecture = next((name for name in _names(path, root) if name in names), None)
        if architecture is None:
            strangers.append(path)
        else:
            found.setdefault(architecture, path)
    return Shelf(found, tuple(strangers))


def fill(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Give ``model`` the tensors of a checkpoint, strictly; returns what was done to their names, in sentences.

    Raises:
        FileError: unreadable, not a state dict, or of another network; says what is missing.
    """
    content = load_state(path)
    found = fitted(model, content.tensors)
    load_into(
        model, content if found is None else replace(content, tensors=found.tensors), path
    )  # says what does not fit
    return _wrapper_notes(content) + list(found.notes if found is not None else ())


def _names(path: Path, root: Path) -> Iterator[str]:
    """Architectures that a file may be of, by its folder's ``config.json``, its own name, and its folder's name."""
    config = path.parent / "config.json"
    if config.is_file():
        try:
            content: Any = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if isinstance(content, dict) and isinstance(content.get("architecture"), str):
            yield content["architecture"]
    stem = path.name[: -len(path.suffix)]
    if stem not in GENERIC:
        yield from _shortened(stem)
    if path.parent != root:
        yield from _shortened(path.parent.name)


def _shortened(stem: str) -> Iterator[str]:
    """The name itself, then without the tag behind a dot, then without the hash behind a dash."""
    yield stem
    yield stem.partition(".")[0]
    yield re.sub(r"-[0-9a-f]{8}$", "", stem)


def _wrapper_notes(content: StateFile) -> list[str]:
    notes = []
    if content.key:
        others = f"; it also holds {', '.join(map(repr, content.others))}" if content.others else ""
        notes.append(f"took the state dict under {content.key!r}{others}")
    if content.dropped:
        notes.append(f"dropped the prefix {content.dropped!r}")
    return notes


def no_weights(spec: str, error: ReparamError) -> Exception:
    """What stands behind trained weights that were not to be had."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if names & set(OFFLINE):
        return ReparamError(
            f"no network access: the trained weights of {spec} are not in the local cache and cannot be downloaded"
        )
    if any(word in str(link) for link in chain for word in NO_WEIGHTS):
        return Ended(Refused, reason=UNTRAINED)
    return error


def is_trained(model: nn.Module) -> bool:
    """Whether weights were loaded: timm only warns where it knows of none, and keeps the random ones."""
    config = getattr(model, "pretrained_cfg", None)
    places = ("url", "file", "hf_hub_id", "state_dict")
    return not isinstance(config, Mapping) or any(config.get(place) for place in places)
