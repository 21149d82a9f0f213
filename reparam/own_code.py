"""Networks of a person's own code: ``./net.py:Net`` or ``package.models:build,width=2``, what a file or module has.

The current folder counts, and a file finds what lies beside it, as when Python is run there. Naming such a network runs
its code, so only a person can name one: what a file asks for is refused (:mod:`reparam.untrusted`), unless it is the
callable that the person has named as well.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import zlib
from collections.abc import Sequence
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from reparam import ReparamError
from reparam.naming import UnknownNameError, near, split_commas

__all__ = ["NAMED", "Code", "is_code", "is_place", "key"]

NAMED: ContextVar[frozenset[tuple[str, str]]] = ContextVar("named_code", default=frozenset())
"""Place and callable of each network of a person's own code that was named, in this command or in this context."""
LISTED = 12
"""Names that an error message lists."""


def is_place(text: str) -> bool:
    """Whether ``text`` is written as a Python file or as a dotted module path; a single word may be a source."""
    return text.endswith(".py") or (text.count(".") > 0 and _dotted(text))


def is_code(spec: str) -> bool:
    """Whether ``spec`` is a file or a dotted module path with a callable behind a colon; nothing is imported."""
    place, colon, name = split_commas(spec)[0].rpartition(":")
    return bool(colon) and is_place(place) and _dotted(name)


def _dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


class Code:
    """A file or module as a source of networks; see :class:`reparam.sources.Source`.

    Args:
        place: path of a ``.py`` file, or a dotted module path.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def __str__(self) -> str:
        return self.place

    def exists(self) -> bool:
        """Whether there is such a file or module, asked without running it."""
        if self.place.endswith(".py"):
            return os.path.isfile(self.place)
        top = self.place.partition(".")[0]
        return top in sys.modules or PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is not None

    def names(self) -> Sequence[str]:
        """Modules and functions that the code defines, for people who look for one."""
        module = self.load()
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        return tuple(name for name, value in public.items() if isinstance(value, nn.Module) or _defines(module, value))

    def takes(self, name: str, option: str) -> bool:
        """Whether the callable ``name`` takes the keyword argument ``option``."""
        value = self.find(name)
        try:
            parameters = inspect.signature(value).parameters
        except (TypeError, ValueError):  # code that shows none
            return False
        return not isinstance(value, nn.Module) and (
            option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        )

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """Call ``name`` with the options; a network that stands there ready is copied.

        Raises:
            UnknownNameError: there is no such callable, or it does not take these options; both are told.
            ReparamError: the code cannot be imported, fails, or makes something else.
        """
        NAMED.set(NAMED.get() | {key(self.place, name)})
        value = self.find(name)
        if pretrained:
            if not self.takes(name, "pretrained"):
                raise ReparamError(f"{self}:{name} has no option pretrained; give it trained weights with --weights")
            options["pretrained"] = True
        if isinstance(value, nn.Module):
            if options:
                raise UnknownNameError(f"{self}:{name} is a network already, and takes no options")
            return copy.deepcopy(value)
        _check_options(f"{self}:{name}", value, options)
        try:
            made = value(**options)
        except ReparamError:
            raise
        except Exception as error:  # it is a person's own code
            raise ReparamError(f"{self}:{name} failed: {type(error).__name__}: {error}") from error
        if not isinstance(made, nn.Module):
            raise ReparamError(f"{self}:{name} made a {type(made).__name__}, and not a torch.nn.Module")
        return made

    def find(self, name: str) -> Any:
        """What the code has under a dotted name. Raises :class:`UnknownNameError`, listing what it has."""
        value: Any = self.load()
        for part in name.split("."):
            if not hasattr(value, part):
                known = self.names()
                inside = [module.name for module in pkgutil.iter_modules(getattr(self.load(), "__path__", []))]
                more = f"; modules in it: {_listed(inside)}" if inside else ""
                raise UnknownNameError(f"{self} has no {name!r}{near(name, known)}; it has {_listed(known)}{more}")
            value = getattr(value, part)
        if not callable(value):
            raise UnknownNameError(f"{self}:{name} is a {type(value).__name__}, and nothing that makes a network")
        return value

    def load(self) -> ModuleType:
        """Import the code. Raises :class:`ReparamError` if there is none (with what is), or if it fails."""
        importlib.invalidate_caches()
        try:
            return _load_file(self.place) if self.place.endswith(".py") else _load_module(self.place)
        except ReparamError:
            raise
        except SystemExit as error:
            raise ReparamError(f'{self} ends Python; put its script under `if __name__ == "__main__":`') from error
        except Exception as error:  # it is a person's own code
            raise ReparamError(f"{self} cannot be imported: {type(error).__name__}: {error}") from error


def key(place: str, name: str) -> tuple[str, str]:
    """Place and callable in one form, however a path is written."""
    return (os.path.realpath(place) if place.endswith(".py") else place, name)


def _defines(module: ModuleType, value: Any) -> bool:
    kind = inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, nn.Module))
    return kind and value.__module__ == module.__name__


def _check_options(what: str, value: Any, options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # code that shows none
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UnknownNameError(f"{what} takes {signature}: {error}; options stand after commas: ,width=2") from error


# ------------------------------------------------------------------------------------------------- importing


def _search(folder: str | os.PathLike[str]) -> None:
    """Let imports look into a folder first, as Python does for the script that it runs."""
    if os.fspath(folder) not in sys.path:
        sys.path.insert(0, os.fspath(folder))


def _load_module(place: str) -> ModuleType:
    here = os.getcwd()
    _search(here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
            raise  # one that the code itself imports
        above, _, last = error.name.rpartition(".")
        inside = getattr(sys.modules.get(above), "__path__", [])
        beside = sorted(module.name for module in pkgutil.iter_modules(inside if above else [here]))
        where = above or f"none is installed, and the folder {here}"
        guess = near(last, beside)
        raise UnknownNameError(f"no module {error.name!r}{guess}; {where} has {_listed(beside)}") from error


def _load_file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        beside = sorted(each.name for each in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UnknownNameError(f"no file {place}{near(path.name, beside)}; {path.parent} has {_listed(beside)}")
    root, parts = path.parent, [] if path.stem == "__init__" else [path.stem]
    while (root / "__init__.py").is_file():  # a module of a package, which may import others of it
        root, parts = root.parent, [root.name, *parts]
    top = root / parts[0] / "__init__.py" if path.parent != root else path
    _search(path.parent)
    _search(root)
    held = sys.modules.get(parts[0])
    if (held is None and "." not in path.stem) or _file_of(held) == top:
        module = importlib.import_module(".".join(parts))
        if _file_of(module) == path:
            return module
    return _load_alone(path)


def _load_alone(path: Path) -> ModuleType:
    """A file whose name another module has already, under a name of its own."""
    name = f"{path.stem}_{zlib.crc32(os.fsencode(path)):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "") if names else "none"
