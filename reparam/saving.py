"""Writing networks to disk, in the format that :mod:`reparam.files` describes and reads: whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.edits.carried import made_by
from passes.edits.edit import Edit
from passes.edits.errors import EditError
from passes.edits.text import to_text
from reparam.disk import FileError, replace_file, told
from reparam.recipe import Recipe

__all__ = [
    "NOTE",
    "SAFE",
    "TORCH",
    "UNWRITTEN",
    "check_target",
    "safetensors_torch",
    "save_model",
]

log = logging.getLogger(__name__)

SAFE = (".safetensors",)
TORCH = (".pt", ".pth")
NOTE = ("source", "class", "collapsed", "edits", "parts", "expanded", "shape", "reparam", "torch")
"""Keys of the note; any other key of a ``.safetensors`` file's metadata may be the name of a shared tensor."""


UNWRITTEN = "not written: "
"""How the note on edits begins where a file cannot hold them; the reason follows."""


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: str = "",
    collapsed: bool = False,
    expanded: Recipe | None = None,
    shape: Sequence[int] = (),
    kind: str = "",
) -> Path:
    """Write the model's state dict to ``path``, atomically: a reader sees the old file or the whole new one.

    Args:
        model: any module whose state is tensors, on any device.
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``; its folder must exist.
        source: the spec that rebuilds the network, kept for :func:`reparam.files.load_model`.
        collapsed: whether ``model`` is the result of ``collapse`` without ``like=``, which gives ``source`` itself. The
            edits that made it are written down with it, so that it is read without folding anything.
        expanded: how ``model`` was expanded from ``source``; ``load_model`` then expands it the same way.
        shape: of one sample that the network was trained on, for images ``(C, H, W)``; empty if unknown.
        kind: name of the network's class, where no spec rebuilds it (:func:`reparam.save`); its edits are then kept.

    Raises:
        RecipeError: ``expanded`` holds what a file cannot, a predicate for instance.
        FileError: unknown suffix, a state that a file cannot hold (meta, sparse or quantised tensors, objects
            that are not tensors), or the file system refuses.
    """
    target = check_target(path)
    tensors, aliases = _share(_plain_state(model, target))
    state = "yes" if collapsed else "no"
    # torch.__version__ is a class of its own, which the restricted unpickler refuses.
    note = {"source": source, "collapsed": state, "reparam": _version(), "torch": str(torch.__version__)}
    if shape:
        note["shape"] = "x".join(map(str, shape))
    if expanded is not None:
        note["expanded"] = expanded.to_text()
    if kind:
        note["class"] = kind
    if (collapsed or kind) and (edits := made_by(model)) is not None:
        note["edits"] = _edits_text(edits, target)
    if kind:
        inside = {name: made_by(part) for name, part in model.named_modules() if name}
        parts = {name: _edits_text(edits, target) for name, edits in inside.items() if edits}
        note |= {"parts": json.dumps(parts)} if parts else {}
    clash = sorted(set(NOTE) & set(aliases))
    if clash:
        raise FileError(f"{target}: the model has a shared tensor named {clash[0]!r}, which the file's note needs")
    if target.suffix.lower() in SAFE:
        writer = safetensors_torch(target).save_file
        replace_file(target, lambda temporary: writer(tensors, temporary, metadata=note | aliases))
    else:
        # torch.save keeps views of one storage together, so shared tensors stay shared under all their names.
        whole = tensors | {name: tensors[stored] for name, stored in aliases.items()}
        replace_file(target, lambda temporary: _save_torch({"state_dict": whole, "metadata": note}, temporary))
    log.info("wrote %s (%d tensors)", target, len(tensors))
    return target


def _edits_text(edits: Iterable[Edit], target: Path) -> str:
    """The edits as JSON, or the reason why there are none: such a file is read by collapsing its source again."""
    try:
        return to_text(edits)
    except EditError as error:
        log.warning("%s can only be read by a version that folds the same: %s", target, error)
        return f"{UNWRITTEN}{error}"


def check_target(path: str | os.PathLike[str], also: Sequence[str] = ()) -> Path:
    """The path of a file that :func:`save_model` can write, asked before the work rather than after it.

    Args:
        path: of the file.
        also: what the caller writes by other means, to be named as well.

    Raises:
        FileError: a suffix that is read only, or unknown, or no such folder.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"{target} is a folder: name a file in it, {target / 'net.safetensors'} for example")
    if target.suffix.lower() not in SAFE + TORCH:
        kinds = ", ".join((*SAFE, *TORCH, *also))
        raise FileError(f"{target}: cannot write this kind of file, {target.suffix!r}; use {kinds}")
    with told(target):  # who may not look into a folder above it
        there = target.parent.is_dir()
    if not there:
        raise FileError(f"{target}: the folder {target.parent} does not exist")
    return target


def _save_torch(content: Any, path: Path) -> None:
    """``torch.save`` to a file of Python's: where the disk is full, torch's own does not say that it was."""
    with path.open("wb") as file:
        torch.save(content, file)


def safetensors_torch(path: Path) -> Any:
    """The module ``safetensors.torch``, or a message that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise FileError(
            f"{path}: .safetensors files need the package safetensors: pip install 'reparam[cli]' (or use .pt)"
        ) from error
    return safetensors.torch


def _plain_state(model: nn.Module, target: Path) -> dict[str, Tensor]:
    """The model's state dict on the CPU, refused if anything in it is not an ordinary dense tensor."""
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise FileError(f"{target}: state {name!r} is a {type(value).__name__}, not a tensor; it cannot be stored")
        if value.is_meta or value.is_quantized or value.layout is not torch.strided:
            raise FileError(
                f"{target}: state {name!r} is not an ordinary dense tensor with values; it cannot be stored"
            )
        # One tensor under two names is copied once, so that it is still one tensor after the copy.
        state[name] = seen.setdefault(id(value), value.detach().cpu())
    return state


def _share(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that share no memory and ``other name -> stored name``.

    Equal views of one memory become aliases; tensors that merely overlap are copied (their values are what counts).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        memory = value.untyped_storage().data_ptr()
        view = (memory, value.storage_offset(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        # torch.save would write the whole memory behind a slice of something larger.
        part = memory in storages or value.untyped_storage().nbytes() != value.nbytes
        storages.add(memory)
        tensors[name] = value.clone(memory_format=torch.contiguous_format) if part else value.contiguous()
    return tensors, aliases


def _version() -> str:
    from reparam import __version__

    return str(__version__)
