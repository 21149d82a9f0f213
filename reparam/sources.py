"""Where networks come from: ``timm:repvgg_a0`` is the model ``repvgg_a0`` of the source ``timm``.

A source is any object with the two methods of :class:`Source`, announced under the entry point group
``reparam.sources``. Sources are found through package metadata and loaded on first use, so neither
``import reparam`` nor a listing imports timm or torchvision, and another package can add a source of its own.

A spec may carry keyword arguments of the model's constructor after commas, as Python literals:
``timm:resnet18,num_classes=10``. In the place of a source may stand a Python file or module of a person's own
(:mod:`reparam.own_code`): ``./net.py:Net,width=2``.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

from torch import nn

from reparam import ReparamError
from reparam.naming import UnknownNameError, literal, near, split_commas
from reparam.own_code import NAMED, Code, is_code, is_place, key

__all__ = [
    "Source",
    "UnknownNameError",
    "create",
    "is_named",
    "is_spec",
    "literal",
    "name_code",
    "names",
    "near",
    "parse",
    "runs_code",
    "same_place",
    "sources",
    "split",
    "split_commas",
    "takes",
    "with_option",
]

GROUP = "reparam.sources"
"""Entry point group; the name is the part of a spec before the colon, the value an instance of a source."""


class Source(Protocol):
    """A place that builds networks by name; import anything heavy inside the methods."""

    def names(self) -> Sequence[str]:
        """Every name that :meth:`create` accepts."""

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """Build ``name``; without ``pretrained`` nothing may be downloaded."""


def sources() -> tuple[str, ...]:
    """Names of the installed sources, sorted."""
    return tuple(sorted(set(metadata.entry_points(group=GROUP).names)))


def is_spec(text: str) -> bool:
    """Whether ``text`` has the form ``source:name`` (the source need not exist), or names a person's own code."""
    head, colon, tail = text.partition(":")
    # One letter before the colon is a drive, not a source; a separator means a path.
    return is_code(text) or (bool(colon and tail) and len(head) > 1 and head.replace("-", "_").isidentifier())


def split(spec: str) -> tuple[str, str]:
    """The source, file or module of a spec, and the name behind it with its options."""
    if not is_code(spec):
        source, _, name = spec.partition(":")
        return source, name
    source = split_commas(spec)[0].rpartition(":")[0]
    return source, spec[len(source) + 1 :]


def runs_code(source: str) -> bool:
    """Whether to build a network of ``source`` is to run a file or module that no source answers for."""
    return is_place(source) or (source not in sources() and Code(source).exists())


def is_named(spec: str) -> bool:
    """Whether a person has named the code of a spec, with whatever options, in this command or context."""
    source, name, _ = parse(spec)
    return key(source, name) in NAMED.get()


def name_code(spec: str) -> None:
    """A person names this network: if it is of their own code, that is imported, and files of it may be rebuilt."""
    if is_spec(spec) and runs_code(split(spec)[0]):
        source, name, _ = parse(spec)
        NAMED.set(NAMED.get() | {key(source, name)})
        Code(source).load()


def takes(spec: str, option: str) -> bool:
    """Whether a network may be given an option: known of a person's own code, and said of all others."""
    source, name, _ = parse(spec)
    loaded = _load(source)
    return loaded.takes(name, option) if isinstance(loaded, Code) else True


def names(source: str, pattern: str = "*") -> list[str]:
    """Models of one source whose name matches the shell ``pattern``, sorted.

    Raises:
        UnknownNameError: no such source.
        ReparamError: the source's package is not installed.
    """
    return sorted(fnmatch.filter(_names(source, _load(source)), pattern))


def create(spec: str, *, pretrained: bool = False) -> nn.Module:
    """Build the network that ``spec`` (``source:name[,key=value...]``) names.

    Args:
        spec: for example ``timm:repvgg_a0``, ``torchvision:resnet18,num_classes=10`` or ``./net.py:Net``.
        pretrained: also load (download, where they are not cached) the source's trained weights.

    Raises:
        UnknownNameError: malformed spec, unknown source or unknown model; near names are suggested.
        ReparamError: the source's package is not installed, or it could not build the model.
    """
    source, name, options = parse(spec)
    loaded = _load(source)
    if isinstance(loaded, Code):
        return loaded.create(name, pretrained=pretrained, **options)
    known = _names(source, loaded)
    # A name with a colon of its own (``hf-hub:...``) is the source's business: it is in no list.
    if name not in known and ":" not in name:
        raise UnknownNameError(f"unknown network {name!r} in source {source!r}{near(name, known)}")
    try:
        return loaded.create(name, pretrained=pretrained, **options)
    except ReparamError:
        raise
    except ImportError as error:
        raise _not_installed(source, error) from error
    # A source runs a model library and its downloads, which may fail in any way; the name is what the user can act on.
    except Exception as error:
        what = " with pretrained weights" if pretrained else ""
        raise ReparamError(f"{source} could not build {name!r}{what}: {type(error).__name__}: {error}") from error


def same_place(spec: str, other: str) -> bool:
    """Whether two specs name the same network, options aside, however the path of a file is written."""
    return key(*parse(spec)[:2]) == key(*parse(other)[:2])


def with_option(spec: str, option: str, value: object) -> str:
    """The spec with one option set, in the place of what it says of that."""
    source, rest = split(spec)
    name, *pairs = split_commas(rest)
    kept = [pair for pair in pairs if pair.partition("=")[0].strip() != option]
    return f"{source}:{','.join([name, *kept, f'{option}={value!r}'])}"


def parse(spec: str) -> tuple[str, str, dict[str, Any]]:
    """Split ``source:name,key=value`` into its three parts. Raises :class:`UnknownNameError` if it is malformed."""
    if not is_spec(spec):
        raise UnknownNameError(
            f"{spec!r} is not of the form source:name, for example timm:repvgg_a0 or ./net.py:Net for code of your own"
            f"{_meant(spec)}"
        )
    source, rest = split(spec)
    name, *pairs = split_commas(rest)
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals or not option.strip().isidentifier():
            raise UnknownNameError(f"{pair!r} in {spec!r} is not of the form key=value")
        if option.strip() in options:
            raise UnknownNameError(f"{spec!r} says {option.strip()} twice")
        options[option.strip()] = literal(value.strip())
    if "pretrained" in options:
        raise UnknownNameError(f"{spec!r}: ask for trained weights with the argument `pretrained`, not in the name")
    return source, name, options


def _meant(text: str) -> str:
    """What a person may have meant who names a folder, or a network without its source."""
    if os.path.isdir(text):
        best = os.path.join(text, "best.safetensors")
        return f"; it is a folder: name {best if os.path.isfile(best) else 'a file in it'}"
    name = split_commas(text)[0] if text else ""
    found = []
    for source in sources():
        try:
            found += [f"{source}:{text}"] if name in _load(source).names() else []
        # A source that cannot be loaded suggests nothing.
        except Exception:
            continue
    return f"; did you mean {', '.join(found)}?" if found else ""


def _load(source: str) -> Source | Code:
    """The source object behind a name; errors say what is known, or what to install."""
    if runs_code(source):
        return Code(source)
    found = metadata.entry_points(group=GROUP, name=source)
    if not found:
        known = sources()
        listing = f"; known sources: {', '.join(known)}" if known else "; no source is installed"
        listing += f"; nor is there a module of that name, installed or in the folder {os.getcwd()}"
        raise UnknownNameError(f"unknown source {source!r}{near(source, known)}{listing}")
    try:
        loaded: Source = next(iter(found)).load()
    except ImportError as error:
        raise _not_installed(source, error) from error
    return loaded


def _names(source: str, loaded: Source) -> Sequence[str]:
    """The source's own list; building it is what first imports the source's package."""
    try:
        return loaded.names()
    except ImportError as error:
        raise _not_installed(source, error) from error


def _not_installed(source: str, error: ImportError) -> ReparamError:
    return ReparamError(f"source {source!r} is not available ({error}); install it with: pip install 'reparam[zoo]'")
