"""Networks on disk: state dicts with a note of where the network came from, never pickled code.

``.safetensors`` files carry the note as string metadata; ``.pt`` / ``.pth`` files are dictionaries of tensors
(``{"state_dict": ..., "metadata": ...}``), read with ``torch.load(weights_only=True)`` and in no other way.
A note holds ``source`` (the spec that :func:`reparam.sources.create` builds), ``collapsed`` (``yes`` or ``no``),
``expanded`` (a :class:`reparam.recipe.Recipe` as JSON; absent from files of plain and collapsed networks) and the
versions of reparam and torch that wrote the file.

Tensors that the model shares are stored once. The other names are kept in the metadata as ``name -> stored name``,
the convention of ``safetensors.torch.save_model``, so either library reads the files of the other.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reparam import ReparamError
from reparam.recipe import Recipe, RecipeError

__all__ = ["FileError", "StateFile", "is_file_name", "load_into", "load_model", "load_state", "rebuild", "save_model"]

log = logging.getLogger(__name__)

SAFE = (".safetensors",)
TORCH = (".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Keys under which training scripts put the state dict inside a checkpoint, in the order they are tried."""
PREFIXES = ("module.", "_orig_mod.")
"""What ``DataParallel`` (and averaged copies) and ``torch.compile`` put before every name."""
NOTE = ("source", "collapsed", "expanded", "reparam", "torch")


class FileError(ReparamError):
    """A file that cannot be written, or that is not what it should be; the message names it and the fix."""


@dataclass(frozen=True)
class StateFile:
    """The content of a file.

    Args:
        tensors: by state-dict name.
        metadata: strings; empty for foreign files.
        key: under which key of a checkpoint the tensors were; empty if they are the file.
        others: further keys of that checkpoint that hold a state dict (an average of the weights, say).
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    key: str = ""
    others: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The spec of the network, or an empty string."""
        return self.metadata.get("source", "")

    @property
    def collapsed(self) -> bool:
        """Whether these are the tensors of a collapsed network."""
        return self.metadata.get("collapsed") == "yes"

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
    return Path(text).suffix.lower() in SAFE + TORCH


# -------------------------------------------------------------------------------------------- writing


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: str = "",
    collapsed: bool = False,
    expanded: Recipe | None = None,
) -> Path:
    """Write the model's state dict to ``path``, atomically: a reader sees the old file or the whole new one.

    Args:
        model: any module whose state is tensors, on any device.
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``; its folder must exist.
        source: the spec that rebuilds the network, kept for :func:`load_model`.
        collapsed: whether ``model`` is the result of ``collapse`` without ``like=``, which gives ``source`` itself.
        expanded: how ``model`` was expanded from ``source``; :func:`load_model` then expands it the same way.

    Raises:
        RecipeError: ``expanded`` holds what a file cannot, a predicate for instance.
        FileError: unknown suffix, a state that a file cannot hold (meta, sparse or quantised tensors, objects
            that are not tensors), or the file system refuses.
    """
    target = Path(path)
    kind = _suffix(target)
    tensors, aliases = _share(_plain_state(model, target))
    state = "yes" if collapsed else "no"
    # torch.__version__ is a class of its own, which the restricted unpickler refuses.
    note = {"source": source, "collapsed": state, "reparam": _version(), "torch": str(torch.__version__)}
    if expanded is not None:
        note["expanded"] = expanded.to_text()
    clash = sorted(set(NOTE) & set(aliases))
    if clash:
        raise FileError(f"{target}: the model has a shared tensor named {clash[0]!r}, which the file's note needs")
    if kind in SAFE:
        writer = _safetensors(target).save_file
        _write(target, lambda temporary: writer(tensors, temporary, metadata=note | aliases))
    else:
        # torch.save keeps views of one storage together, so shared tensors stay shared under all their names.
        whole = tensors | {name: tensors[stored] for name, stored in aliases.items()}
        _write(target, lambda temporary: torch.save({"state_dict": whole, "metadata": note}, temporary))
    log.info("wrote %s (%d tensors)", target, len(tensors))
    return target


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


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target, flush to the disk, rename; on any failure the target is as it was."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        # safetensors makes a private file; the permissions are to be those of any new file.
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            _flush(target.parent)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or a folder (which makes a rename inside it durable)."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------- reading


def load_state(path: str | os.PathLike[str], *, key: str | None = None) -> StateFile:
    """Read the tensors and the note of a file, on the CPU. No code from the file is ever run.

    Args:
        path: ``.safetensors``, ``.pt`` or ``.pth``.
        key: where a checkpoint holds its state dict; default: the first of the usual keys.

    Raises:
        FileError: missing, of an unknown suffix, truncated, not a state dict, without ``key``, or readable only by
            unpickling.
    """
    source = Path(path)
    kind = _suffix(source)
    if not source.is_file():
        raise FileError(f"{source}: no such file")
    if kind in TORCH:
        return _load_torch(source, key)
    if key is not None:
        raise FileError(f"{source} is a plain list of tensors: it has no key {key!r}")
    return _load_safe(source)


def _load_safe(path: Path) -> StateFile:
    """Read a ``.safetensors`` file, giving aliases back their names."""
    _safetensors(path)
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
    return StateFile(tensors, metadata)


def _load_torch(path: Path, key: str | None) -> StateFile:
    """Read a ``.pt`` file through the restricted unpickler, and find the state dict in it."""
    try:
        with warnings.catch_warnings():
            # It warns of pickles that torch did not write before it refuses them, which is error enough.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise FileError(f"{path} is not a PyTorch file, or is damaged; write or download it again") from error
        raise FileError(
            f"{path} holds more than tensors and would have to be unpickled, which can run any code. Where you trust "
            "it, load it yourself and store only its weights: torch.save(model.state_dict(), ...)"
        ) from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(
            f"{path} is truncated or is not a PyTorch file ({first}); write or download it again"
        ) from error
    return _find_state(content, path, key)


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
        raise FileError(f"{path} has no state dict under {key!r}; {have}")
    if key is None and _is_state(content):
        return StateFile(_names_of(content, note), note)
    chosen = key if key is not None else next((name for name in WRAPPERS if name in found), None)
    if chosen is None:
        keys = ", ".join(repr(name) for name in list(content)[:5]) or "nothing"
        raise FileError(f"{path} is not a state dict: it holds {keys}; store model.state_dict()")
    others = tuple(str(name) for name in found if name != chosen)
    return StateFile(_names_of(inside[chosen], note), note, str(chosen), others)


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _names_of(state: dict[Any, Tensor], note: dict[str, str]) -> dict[str, Tensor]:
    """The tensors by name, without what wrappers put before every name; in files of our own nothing is a wrapper's."""
    named = {str(name): value for name, value in state.items()}
    if "reparam" in note:
        return named
    # AveragedModel counts its updates beside the module that it wraps.
    averaged = {name: value for name, value in named.items() if name != "n_averaged"}
    if all(name.startswith(PREFIXES) for name in averaged):
        named = averaged
    for prefix in PREFIXES * 2:
        if named and all(name.startswith(prefix) for name in named):
            named = {name[len(prefix) :]: value for name, value in named.items()}
    return named


# -------------------------------------------------------------------------------------------- rebuilding


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the network that a file of :func:`save_model` holds, in eval mode on the CPU.

    The network is built from the file's ``source``, expanded or collapsed as the file's network was, and given the
    file's tensors, strictly, in the file's own dtype. ``.train()`` makes an expanded one ready for training.

    Raises:
        FileError: the file does not say where the network comes from, or its tensors do not fit that network.
        UnknownNameError, ReparamError: from :func:`reparam.sources.create`.
    """
    return rebuild(load_state(path), path)


def rebuild(content: StateFile, path: str | os.PathLike[str]) -> nn.Module:
    """:func:`load_model` for a file that is already read; ``path`` is named in errors."""
    if not content.source:
        raise FileError(
            f"{path} does not say which network it is of; build the network yourself and give it the tensors of "
            "load_state(path), or on the command line name the network and pass this file with --weights"
        )
    problem = ""
    for model in _shells(content):
        difference = misfit(model, content.tensors)
        if not difference:
            return load_into(model, content, path)
        problem = problem or difference
    made = content.metadata.get("reparam", "unknown")
    raise FileError(
        f"{path} does not fit {content.source}: {problem} (written by reparam {made}, this is {_version()})"
    )


def load_into(model: nn.Module, content: StateFile, path: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the tensors of a file, strictly and in the file's dtype; returns it in eval mode.

    Raises:
        FileError: names or shapes differ; the message names the first.
    """
    problem = misfit(model, content.tensors)
    if problem:
        raise FileError(f"{path} does not fit the network: {problem}")
    cast_like(model, content.tensors)
    model.load_state_dict(content.tensors, strict=True)
    return model.eval()


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


def misfit(model: nn.Module, tensors: dict[str, Tensor]) -> str:
    """The first differences between a model's state dict and ``tensors`` in words, or an empty string."""
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    extra = [name for name in tensors if name not in state]
    lacks = f"{len(missing)} tensors are missing from the file, the first is {missing[0]!r}" if missing else ""
    more = f"{len(extra)} tensors of the file have no place in the network, the first is {extra[0]!r}" if extra else ""
    if lacks or more:
        return "; ".join(filter(None, (lacks, more)))
    for name, value in state.items():
        if value.shape != tensors[name].shape:
            return f"{name!r} is {tuple(tensors[name].shape)} in the file and {tuple(value.shape)} in the network"
    return ""


def _shells(content: StateFile) -> Iterator[nn.Module]:
    """Networks whose state dict the file may have, the likeliest first."""
    from reparam import collapse, sources

    model = sources.create(content.source).eval()
    recipe = content.recipe
    if not content.collapsed:
        yield model if recipe is None else recipe.expand(model)
        return
    # Which folds are exact depends on the numbers (a bias that is zero, a kernel that is block-diagonal), and those
    # of the file are not the ones a new network starts with: trained numbers are as good as random ones.
    yield collapse(_generic(model), verify=False)
    yield collapse(sources.create(content.source).eval(), verify=False)


def _generic(model: nn.Module) -> nn.Module:
    """Fill every floating-point state with positive random numbers, so that no two of them agree by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


# -------------------------------------------------------------------------------------------- helpers


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SAFE + TORCH:
        raise FileError(f"{path}: unknown kind of file {suffix!r}; use {', '.join(SAFE + TORCH)}")
    return suffix


def _safetensors(path: Path) -> Any:
    """The module ``safetensors.torch``, or a message that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise FileError(
            f"{path}: .safetensors files need the package safetensors: pip install 'reparam[cli]' (or use .pt)"
        ) from error
    return safetensors.torch


def _version() -> str:
    from reparam import __version__

    return str(__version__)
