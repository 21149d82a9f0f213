"""Networks on disk: state dicts with a note of where the network came from, never pickled code.

``.safetensors`` files carry the note as string metadata; ``.pt`` / ``.pth`` files are dictionaries of tensors
(``{"state_dict": ..., "metadata": ...}``), read with ``torch.load(weights_only=True)`` and in no other way.
A note holds ``source`` (the spec that :func:`reparam.sources.create` builds), ``collapsed`` (``yes`` or ``no``),
``expanded`` (a :class:`reparam.recipe.Recipe` as JSON; absent from files of plain and collapsed networks), ``edits``
(what collapsing changed, as :mod:`passes.edits.text` writes it; absent from files of plain and expanded networks, and
from those of reparam before there were edits) and the versions of reparam and torch that wrote the file.
:mod:`reparam.saving` writes them, :mod:`reparam.rebuilding` makes networks of them.

``.h5`` / ``.hdf5`` files are read only: one data set per name, as the authors of ACNet and DBB published their weights.

Tensors that the model shares are stored once. The other names are kept in the metadata as ``name -> stored name``,
the convention of ``safetensors.torch.save_model``, so either library reads the files of the other.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reparam
from reparam.disk import FileError, check_writable, replace_file
from reparam.exhausted import was_exhausted
from reparam.fitting import misfit
from reparam.pickles import load_pickle
from reparam.rebuilding import shells, with_room
from reparam.recipe import Recipe, RecipeError
from reparam.saving import (
    NOTE,
    SAFE,
    TORCH,
    UNWRITTEN,
    check_target,
    safetensors_torch,
    save_model,
)
from reparam.shards import is_index, shards_of
from reparam.untrusted import ALLOWED, CODE, check_names, check_size, check_spec

__all__ = [
    "AVERAGED",
    "FileError",
    "StateFile",
    "cast_like",
    "check_target",
    "check_writable",
    "fill",
    "is_file_name",
    "load_into",
    "load_model",
    "load_state",
    "misfit",
    "rebuild",
    "replace_file",
    "save_model",
]

HDF5 = (".h5", ".hdf5")
READ_TORCH = (*TORCH, ".tar", ".ckpt", ".bin")
"""Suffixes of what ``torch.save`` wrote: timm's ``.pth.tar``, Lightning's ``.ckpt``, Hugging Face's ``.bin``."""
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
"""Keys under which training scripts put averaged weights beside those that they train."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "params", *AVERAGED)
"""Keys under which training scripts put the state dict inside a checkpoint, in the order they are tried."""
SUFFIXES = (*SAFE, *READ_TORCH, *HDF5)
PREFIXES = ("module.", "_orig_mod.")
"""What ``DataParallel`` (and averaged copies) and ``torch.compile`` put before every name."""


@dataclass(frozen=True)
class StateFile:
    """The content of a file.

    Args:
        tensors: by state-dict name.
        metadata: strings; empty for foreign files.
        key: under which key of a checkpoint the tensors were; empty if they are the file.
        others: further keys of that checkpoint that hold a state dict (an average of the weights, say).
        dropped: what stood before every name in the file and was taken off, ``module.`` for instance.
        allow_options: whether the file may ask for any network; else only for one with plain options.
        allow_code: whether its network may be code of its own, which is then run; else only where a person named it.
        path: of the file, for errors.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    key: str = ""
    others: tuple[str, ...] = ()
    dropped: str = ""
    allow_options: bool = False
    allow_code: bool = False
    path: str = ""

    @property
    def source(self) -> str:
        """The spec of the network, or an empty string.

        Raises :class:`FileError` if it has options that are not plain or is code, unless that is allowed.
        """
        spec = self.metadata.get("source", "")
        if spec:
            try:
                check_spec(spec, any_options=self.allow_options, any_code=self.allow_code)
            except FileError as error:
                raise FileError(f"{self.path}: {error}" if self.path else str(error)) from error
        return spec

    @property
    def collapsed(self) -> bool:
        """Whether these are the tensors of a collapsed network."""
        return self.metadata.get("collapsed") == "yes"

    @property
    def edits(self) -> str:
        """What made a collapsed network of its source, as JSON; empty if the file does not say."""
        text = self.metadata.get("edits", "")
        return "" if text.startswith(UNWRITTEN) else text

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample that the network was trained on, ``(C, H, W)`` for images; empty if the file does not say.

        Raises :class:`FileError` if the note says nonsense.
        """
        text = self.metadata.get("shape", "")
        sizes = text.split("x") if text else []
        if not all(size.isdecimal() and size.isascii() and len(size) < 10 for size in sizes):
            raise FileError(f"the file's note on the shape of a sample is damaged: {text!r:.40}")
        return tuple(map(int, sizes))

    @property
    def recipe(self) -> Recipe | None:
        """How the network was expanded, or None. Raises :class:`FileError` if the note on that is damaged."""
        text = self.metadata.get("expanded", "")
        try:
            return Recipe.from_text(text) if text else None
        except RecipeError as error:
            raise FileError(f"the file's network was expanded in a way that cannot be repeated: {error}") from error


def is_file_name(text: str) -> bool:
    """Whether ``text`` ends like a file that this module reads."""
    return Path(text).suffix.lower() in SUFFIXES


# -------------------------------------------------------------------------------------------- reading


def load_state(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    allow_options: bool | None = None,
    allow_code: bool | None = None,
) -> StateFile:
    """Read the tensors and the note of a file, on the CPU. No code from the file is ever run.

    Args:
        path: ends in one of :data:`SUFFIXES`, or is the index of several (``model.safetensors.index.json``).
        key: where a checkpoint holds its state dict; default: the first of the usual keys, or the only one. One that
            ends in a dot is what stands before the names of the network: ``student.``.
        allow_options: whether the file may ask for a network with any options of its constructor; see
            :mod:`reparam.untrusted`.
        allow_code: whether its network may be code that is run to build it.

    Raises:
        FileError: missing, of an unknown suffix, truncated, not a state dict, without ``key``, or readable only by
            unpickling; it unpacks to far more than its size, or points to other files; or the package that reads it is
            not installed.
    """
    source = Path(path)
    kind = source.suffix.lower()
    if kind == ".py":
        raise FileError(f"{source} is code: name the network in it, {source}:Net for example")
    if not is_file_name(str(source)) and not is_index(source):
        if source.is_dir():
            raise FileError(f"{source} is a folder: name a file in it")
        hint = (
            ": torch.export.load reads it, and reparam.collapse and verify take what that gives"
            if kind == ".pt2"
            else ""
        )
        raise FileError(f"{source}: unknown kind of file {kind!r}{hint or '; use ' + ', '.join(SUFFIXES)}")
    if not os.path.isfile(source):  # which is no error where one may not look
        raise FileError(f"{source}: no such file")
    prefix, key = (key, None) if key is not None and key.endswith(".") else ("", key)
    if kind not in READ_TORCH and key is not None:
        raise FileError(f"{source} is a plain list of tensors: it has no key {key!r}")
    try:
        if is_index(source):
            read = _load_shards(source)
        elif kind in READ_TORCH:
            read = _find_state(load_pickle(source), source, key)
        else:
            read = _load_safe(source) if kind in SAFE else _load_hdf5(source)
        read = _behind(read, prefix, source) if prefix else read
        check_names([*read.tensors, *read.others])
    except Exception as error:
        if was_exhausted(error):
            raise FileError(f"{source} needs more memory than there is, or is damaged") from error
        if not isinstance(error, FileError) or str(source) in str(error):
            raise
        raise FileError(f"{source}: {error}") from error
    return replace(
        read,
        allow_options=ALLOWED.get() if allow_options is None else allow_options,
        allow_code=CODE.get() if allow_code is None else allow_code,
        path=str(source),
    )


def _load_safe(path: Path) -> StateFile:
    """Read a ``.safetensors`` file, giving aliases back their names."""
    safetensors_torch(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise FileError(
            f"{path} is truncated or is not a safetensors file ({error}); write or download it again"
        ) from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    for name, stored in list(metadata.items()):
        if name not in NOTE and name not in tensors and stored in tensors:
            tensors[name] = tensors[stored]
            del metadata[name]
    return _state_file(tensors, metadata)


def _load_shards(index: Path) -> StateFile:
    """Read the files that an index names, each of which has to have what it says."""
    tensors: dict[str, Tensor] = {}
    for path, names in shards_of(index).items():
        found = load_state(path)
        held = {f"{found.dropped}{name}": value for name, value in found.tensors.items()}
        if held.keys() != names:
            raise FileError(f"{path} and {index.name} differ in {min(held.keys() ^ names)!r}: download both again")
        tensors |= held
    return _state_file(tensors, {})


def _load_hdf5(path: Path) -> StateFile:
    """Read a flat ``.hdf5`` file; a ``/`` in a name was written as ``+``, since HDF5 takes it for a folder."""
    try:
        h5py: Any = import_module("h5py")
    except ImportError as error:
        raise FileError(f"{path}: {path.suffix} files need the package h5py: pip install 'reparam[hdf5]'") from error
    try:
        with h5py.File(path, "r") as opened:
            links = [name for name in opened if not isinstance(opened.get(name, getlink=True), h5py.HardLink)]
            if links:
                raise FileError(f"{path}: {links[0]!r} is a link to another place, and none is followed")
            folders = [name for name, value in opened.items() if not isinstance(value, h5py.Dataset)]
            if folders or not len(opened):
                found = f"the folder {folders[0]!r}" if folders else "nothing"
                raise FileError(f"{path} holds {found}; only one data set per parameter is read, unlike Keras's")
            outside = [name for name, value in opened.items() if value.external or value.is_virtual]
            if outside:
                raise FileError(f"{path}: the numbers of {outside[0]!r} lie in another file, and none is opened")
            check_size(sum(value.nbytes for value in opened.values()), path.stat().st_size)
            arrays = {name.replace("+", "/"): value[()] for name, value in opened.items()}
    except (FileError, MemoryError):
        raise
    except Exception as error:  # of a damaged file h5py raises anything
        raise FileError(f"{path} is truncated or is not an HDF5 file ({error}); download it again") from error
    return _state_file({name: _from_array(path, name, array) for name, array in arrays.items()}, {})


def _from_array(path: Path, name: str, array: Any) -> Tensor:
    """A tensor of a numpy array or number, in the byte order of this machine."""
    import numpy as np  # h5py brings it; torch does without

    try:
        return torch.from_numpy(np.array(array, dtype=np.asarray(array).dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise FileError(f"{path}: {name!r} holds no numbers ({error}); only files of weights are read") from error


def _behind(content: StateFile, prefix: str, path: Path) -> StateFile:
    """The tensors whose names begin with ``prefix``, without it."""
    inside = {name[len(prefix) :]: value for name, value in content.tensors.items() if name.startswith(prefix)}
    if not inside:
        raise FileError(
            f"{path}: no tensor's name begins with {prefix!r}; the first is {next(iter(content.tensors))!r}"
        )
    return replace(content, tensors=inside, dropped=content.dropped + prefix)


def _find_state(content: Any, path: Path, key: str | None) -> StateFile:
    """The state dict in a loaded object: the object itself, or what a checkpoint has under ``key`` or a usual one."""
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}, not a state dict; store model.state_dict()")
    metadata = content.get("metadata")
    note = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
    inside = {name: value for name, value in content.items() if _is_state(value)}
    found = [name for name in WRAPPERS if name in inside]
    found += [name for name in inside if name not in found and name != "optimizer"]
    if key is not None and key not in found:
        have = f"it has {', '.join(map(repr, found))}" if found else "it has none"
        begin = any(name.startswith(f"{key}.") for state in (content, *inside.values()) for name in map(str, state))
        have += f"; what stands before names ends in a dot: {key}." if begin else ""
        raise FileError(f"{path} has no state dict under {key!r}; {have}")
    if key is None and _is_state(content):
        return _state_file(content, note)
    usual = next((name for name in WRAPPERS if name in found), found[0] if len(found) == 1 else None)
    chosen = usual if key is None else key
    if chosen is None:
        keys = ", ".join(repr(name) for name in list(content)[:5]) or "nothing"
        raise FileError(f"{path} is not a state dict: it holds {keys}; store model.state_dict()")
    others = tuple(str(name) for name in found if name != chosen)
    return _state_file(inside[chosen], note, str(chosen), others)


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _state_file(
    state: Mapping[Any, Tensor], note: dict[str, str], key: str = "", others: tuple[str, ...] = ()
) -> StateFile:
    """The tensors by name, without what wrappers put before every name; in files of our own nothing is a wrapper's."""
    named = {str(name): value for name, value in state.items()}
    if "reparam" in note:
        return StateFile(named, note, key, others)
    # AveragedModel counts its updates beside the module that it wraps.
    averaged = {name: value for name, value in named.items() if name != "n_averaged"}
    if all(name.startswith(PREFIXES) for name in averaged):
        named = averaged
    dropped = ""
    for prefix in PREFIXES * 2:
        if named and all(name.startswith(prefix) for name in named):
            named = {name[len(prefix) :]: value for name, value in named.items()}
            dropped += prefix
    return StateFile(named, note, key, others, dropped)


# -------------------------------------------------------------------------------------------- rebuilding


def load_model(
    path: str | os.PathLike[str], *, allow_options: bool | None = None, allow_code: bool | None = None
) -> nn.Module:
    """Rebuild the network that a file of :func:`save_model` holds, in eval mode on the CPU.

    The network is built from the file's ``source``, expanded or collapsed as the file's network was, and given the
    file's tensors, strictly, in the file's own dtype. ``.train()`` makes an expanded one ready for training.

    Args:
        path: of the file.
        allow_options: whether the file may ask for a network with any options of its constructor, which may open
            paths and download; by default only plain ones of plain sizes are taken (:mod:`reparam.untrusted`).
        allow_code: whether its network may be a Python file or module, which is run to build it; by default only one
            that :func:`reparam.sources.create` was asked for in this context.

    Raises:
        FileError: the file does not say where the network comes from, or its tensors do not fit that network.
        UnknownNameError, ReparamError: from :func:`reparam.sources.create`.
    """
    return rebuild(load_state(path, allow_options=allow_options, allow_code=allow_code), path)


def rebuild(content: StateFile, path: str | os.PathLike[str]) -> nn.Module:
    """:func:`load_model` for a file that is already read; ``path`` is named in errors."""
    if not content.source:
        raise FileError(
            f"{path} does not say which network it is of; build the network yourself and give it the tensors of "
            "load_state(path), or on the command line name the network and pass this file with --weights"
        )
    problem = ""
    for model in shells(content, path):
        difference = misfit(model, content.tensors)
        if not difference:
            return load_into(model, content, path)
        problem = problem or difference
    made = content.metadata.get("reparam", "unknown")
    raise FileError(
        f"{path} does not fit {content.source}: {problem} (written by reparam {made}, this is {reparam.__version__})"
    )


def load_into(model: nn.Module, content: StateFile, path: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the tensors of a file, strictly and in the file's dtype; returns it in eval mode.

    Raises:
        FileError: names or shapes differ; the message names the first.
    """
    problem = misfit(model, content.tensors)
    if problem:
        raise FileError(f"{path} does not fit the network: {problem}")
    cast_like(with_room(model), content.tensors)
    fill(model, content.tensors)
    return model.eval()


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load a state dict strictly, of which only the tensors are known.

    A layer may ask for the version of the state dict that its library wrote (torchvision's MNASNet raises without one).
    Such a file is taken to be of the version that is installed; torch's own layers read any.
    """
    state: Any = OrderedDict(tensors)
    own = {path: module for path, module in model.named_modules() if not _says(type(module)).startswith("torch.")}
    versions = {path: {"version": module._version} for path, module in own.items()}
    state._metadata = getattr(tensors, "_metadata", None) or versions
    model.load_state_dict(state, strict=True, assign=assign)


def _says(kind: type[nn.Module]) -> str:
    """The Python module of the class that says of which version the state dict of ``kind`` is."""
    return next(base for base in kind.__mro__ if "_version" in vars(base)).__module__


def cast_like(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Cast the model, in place, to the dtypes of ``tensors``, where it has tensors of those names."""
    own = model.state_dict(keep_vars=True)
    dtypes = {tensors[name].dtype for name, value in own.items() if name in tensors and value.is_floating_point()}
    if len(dtypes) == 1:
        return model.to(dtypes.pop())  # also what is in no state dict, and the kernels that blocks compute
    for name, value in own.items():
        if name in tensors and value.is_floating_point() and tensors[name].dtype != value.dtype:
            value.data = value.data.to(tensors[name].dtype)
    return model
