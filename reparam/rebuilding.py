"""From the note of a file to the network that it is of, without its numbers.

A collapsed network is its source with the file's edits made to it: nothing is traced or folded, so a version that folds
more reads the files of one that folded less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from passes.edits.apply import apply
from passes.edits.carried import remember
from passes.edits.errors import EditError
from passes.edits.text import from_text
from passes.training.build import rebuilt
from reparam import ReparamError
from reparam.disk import FileError

if TYPE_CHECKING:
    from reparam.files import StateFile

__all__ = ["edit_parts", "generic", "shells", "with_room"]


def shells(
    content: StateFile, path: str | os.PathLike[str], plain: Callable[[], nn.Module] | None = None
) -> Iterator[nn.Module]:
    """Networks whose state dict the file may have, the likeliest first; ``path`` is named in errors.

    ``plain`` makes the network that the file's was made of, in eval mode; by default the file's source does.
    """
    from reparam import collapse, sources

    make = plain or (lambda: sources.create(content.source).eval())
    model = make()
    recipe = content.recipe
    if content.edits:
        yield _edited(model, content.edits, path)
        return
    if not content.collapsed:
        yield model if recipe is None else recipe.expand(model)
        return
    # A file of before edits were written, or of edits that no file can hold: the source is collapsed again. Which folds
    # are exact depends on the numbers (a bias that is zero, a kernel that is block-diagonal), and those of the file are
    # not the ones a new network starts with: trained numbers are as good as random ones.
    yield collapse(generic(model), verify=False)
    yield collapse(make(), verify=False)
    yield collapse(generic(make()), norms="affine", verify=False)


def _edited(model: nn.Module, text: str, path: str | os.PathLike[str]) -> nn.Module:
    """The network that the edits of a file make of its source; new layers are on the meta device."""
    try:
        edits = from_text(text)
        apply(model, edits, build_block=rebuilt)
        remember(model, edits)
    # A file may say anything, and constructors, fx and the class itself may raise anything of it.
    except Exception as error:
        first = str(error).partition("\n")[0]
        why = first if isinstance(error, (EditError, ReparamError)) else f"{type(error).__name__}: {first}"
        raise FileError(f"{path}: the note on what was made of the network is damaged: {why}") from error
    return model


def edit_parts(model: nn.Module, content: StateFile, path: str | os.PathLike[str]) -> nn.Module:
    """Make the edits of modules inside of the network, each as a network of its own: a trainer's ``net``, say."""
    text = content.metadata.get("parts", "{}")
    try:
        parts = {name: (model.get_submodule(name), edits) for name, edits in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: the note on parts of the network is damaged, or names none: {error}") from error
    for part, edits in parts.values():
        _edited(part, str(edits), path)
    return model


def with_room(model: nn.Module) -> nn.Module:
    """Give the layers that were made without numbers room for them."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cpu"))
    return model


def generic(model: nn.Module) -> nn.Module:
    """Fill every floating-point state with positive random numbers, so that no two of them agree by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model
