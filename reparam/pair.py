"""Networks of any class to disk and back: the numbers, and as data what expanding or collapsing made of the class."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from passes.edits.carried import made_by
from passes.graph.generators import kept_generators
from passes.graph.shards import check_whole
from passes.portable import plain_class
from reparam import ReparamError
from reparam.files import FileError, load_into, load_state
from reparam.fitting import misfit
from reparam.rebuilding import edit_parts, shells
from reparam.saving import save_model

__all__ = ["load", "save"]


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a network, plain, expanded or collapsed, so that :func:`load` gives it back.

    The file has the numbers and the edits that made it of its class, as data and never as code; whole or not at all.

    Args:
        model: of any class, whose state is tensors, on any device.
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``; its folder must exist.

    Raises:
        ReparamError: it is sharded.
        FileError: an unknown suffix, a state that a file cannot hold, or the file system refuses.
    """
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_whole(model)
    edits = made_by(model)
    # What no text can hold (a function of the network's own in a new forward) is made by collapsing again.
    again = edits is not None and not any(type(edit).__name__ == "Block" for edit in edits)
    return save_model(model, path, collapsed=again, kind=plain_class(model).__qualname__)


def load(path: str | os.PathLike[str], plain: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The network that :func:`save` wrote, in eval mode on the CPU, in the dtypes of the file.

    Nothing is traced or folded, and no code of the file is run. ``.train()`` makes an expanded one ready for training.

    Args:
        path: of the file; one of the command line is read as well.
        plain: the network that it was expanded or collapsed from, of the same class and sizes, or what makes one. Its
            numbers do not count, and it is not changed.

    Raises:
        FileError: the file cannot be read, is of another class, or its tensors do not fit ``plain``.
    """
    if not callable(plain):  # as every module is
        raise ReparamError(f"plain= takes a network or what makes one, got {plain!r:.60}")
    content = load_state(path)
    held = content.metadata.get("class", "")

    def make() -> nn.Module:
        model = copy.deepcopy(plain) if isinstance(plain, nn.Module) else plain()
        if not isinstance(model, nn.Module):
            raise ReparamError(f"plain= takes a network or what makes one, got {type(model).__name__}")
        if made_by(model) is not None and made_by(model) != ():
            raise ReparamError("plain= takes the network as it was before it was expanded or collapsed")
        if held and type(model).__qualname__ != held:
            raise FileError(
                f"{path} is of the class {held}, and plain= is a {type(model).__qualname__}: give the plain network of "
                "that class, wrapped alike if it was saved in a wrapper"
            )
        return edit_parts(model.eval(), content, path)

    with kept_generators():
        problem = ""
        for model in shells(content, path, make):
            difference = misfit(model, content.tensors)
            if not difference:
                return load_into(model, content, path)
            problem = problem or difference
    raise FileError(f"{path} does not fit what it was made of {type(model).__name__}: {problem}")
