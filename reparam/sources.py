"""Where networks come from: ``timm:repvgg_a0`` is the model ``repvgg_a0`` of the source ``timm``.

A source is any object with the two methods of :class:`Source`, announced under the entry point group
``reparam.sources``. Sources are found through package metadata and loaded on first use, so neither
``import reparam`` nor a listing imports timm or torchvision, and another package can add a source of its own.

A spec may carry keyword arguments of the model's constructor after commas, as Python literals:
``timm:resnet18,num_classes=10``.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

from torch import nn

from reparam import ReparamError

__all__ = [
    "Source",
    "UnknownNameError",
    "create",
    "is_spec",
    "literal",
    "names",
    "near",
    "parse",
    "sources",
    "split_commas",
]

GROUP = "reparam.sources"
"""Entry point group; the name is the part of a spec before the colon, the value an instance of a source."""

SUGGESTIONS = 5
"""Near names that an error message lists."""


class Source(Protocol):
    """A place that builds networks by name; import anything heavy inside the methods."""

    def names(self) -> Sequence[str]:
        """Every name that :meth:`create` accepts."""

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """Build ``name``; without ``pretrained`` nothing may be downloaded."""


class UnknownNameError(ReparamError):
    """A spec that is not of the form ``source:name``, or that names an unknown source or model."""


def sources() -> tuple[str, ...]:
    """Names of the installed sources, sorted."""
    return tuple(sorted(set(metadata.entry_points(group=GROUP).names)))


def is_spec(text: str) -> bool:
    """Whether ``text`` has the form ``source:name`` (the source need not exist)."""
    head, colon, tail = text.partition(":")
    # One letter before the colon is a drive, not a source; a separator means a path.
    return bool(colon and tail) and len(head) > 1 and head.replace("-", "_").isidentifier()


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
        spec: for example ``timm:repvgg_a0`` or ``torchvision:resnet18,num_classes=10``.
        pretrained: also load (download, where they are not cached) the source's trained weights.

    Raises:
        UnknownNameError: malformed spec, unknown source or unknown model; near names are suggested.
        ReparamError: the source's package is not installed, or it could not build the model.
    """
    source, name, options = parse(spec)
    loaded = _load(source)
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


def parse(spec: str) -> tuple[str, str, dict[str, Any]]:
    """Split ``source:name,key=value`` into its three parts. Raises :class:`UnknownNameError` if it is malformed."""
    if not is_spec(spec):
        raise UnknownNameError(f"{spec!r} is not of the form source:name, for example timm:repvgg_a0")
    source, _, rest = spec.partition(":")
    name, *pairs = split_commas(rest)
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UnknownNameError(f"{pair!r} in {spec!r} is not of the form key=value")
        options[key.strip()] = literal(value.strip())
    if "pretrained" in options:
        raise UnknownNameError(f"{spec!r}: ask for trained weights with the argument `pretrained`, not in the name")
    return source, name, options


def split_commas(text: str) -> list[str]:
    """Split at the commas that stand outside brackets, so that ``img_size=(96,96)`` stays whole."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def literal(text: str) -> Any:
    """A Python literal (number, tuple, True, None, quoted string), or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # nested beyond what Python's parser takes
        return text


def _load(source: str) -> Source:
    """The source object behind a name; errors say what is known, or what to install."""
    found = metadata.entry_points(group=GROUP, name=source)
    if not found:
        known = sources()
        listing = f"; known sources: {', '.join(known)}" if known else "; no source is installed"
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


def near(name: str, known: Sequence[str]) -> str:
    """``; did you mean a, b?`` with the nearest known names, or nothing."""
    found = difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0.6)
    found += [other for other in known if name and other.startswith(name) and other not in found]
    return f"; did you mean {', '.join(found[:SUGGESTIONS])}?" if found else ""
