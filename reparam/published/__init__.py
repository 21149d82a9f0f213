"""Checkpoints that the authors of blocks published, or that their code writes.

Of ACNet, DBB, DO-Conv, RepVGG, MobileOne, OREPA, UniRepLKNet and ECB. What a file holds is found in the names of its
tensors. Each block is compared, in float64, with its authors' own formula (:mod:`reparam.published.formulas`) before
anything is returned. The published code pads behind an inner norm with what
that makes of zero; ours pads in front of it: folded, and so in evaluation, both are the same.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from passes.blocks.kit.registry import Block
from passes.training.discovery import find_convs
from reparam import files, sources
from reparam.disk import FileError
from reparam.published import order
from reparam.published.grammar import Unit
from reparam.published.place import Network, put
from reparam.published.units import find_units, folded
from reparam.recipe import Recipe, parse_block

__all__ = ["Imported", "import_checkpoint"]


@dataclass(frozen=True)
class Imported:
    """A checkpoint under our names; ``str`` of it says what was found and how far it is proven.

    Args:
        tensors: the state dict: of ``model``, or without one with ``weight`` and ``bias`` in the place of each block.
        model: in evaluation mode; None without ``like``.
        source: the spec of ``like``; empty if that was a module, or absent.
        recipe: how ``model`` was expanded from it; None if it was not.
        collapsed: whether ``model`` is that network collapsed, and so no longer of its architecture.
        blocks: how many of each kind the file has, deployed ones included.
        difference: the largest one between a block and its authors' formula in float64, relative to the largest value.
        notes: what else a person should know.
    """

    tensors: dict[str, Tensor]
    model: nn.Module | None
    source: str
    recipe: Recipe | None
    collapsed: bool
    blocks: dict[str, int]
    difference: float
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what was imported, as :func:`reparam.files.save_model` does."""
        model = _States(self.tensors) if self.model is None else self.model
        return files.save_model(model, path, source=self.source, collapsed=self.collapsed, expanded=self.recipe)

    def __str__(self) -> str:
        found = [f"{number} x {said}" for said, number in self.blocks.items()]
        proof = f"compared with the authors' formulas in float64: at most {self.difference:.1e} apart"
        return "\n".join([*found, proof, *self.notes])


class _States(nn.Module):
    """Holds tensors under any names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        return self._tensors


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    block: str | Block | None = None,
    like: str | nn.Module | None = None,
    collapse: bool = False,
    key: str | None = None,
) -> Imported:
    """Read a published checkpoint: as an expanded network to go on training, the plain network, or a plain state dict.

    Args:
        path: any kind of file that :func:`reparam.files.load_state` reads, wrappers included.
        block: the grammar to look for; by default all. Options are those of our block, for what no file says:
            ``"ecb:identity=true"``.
        like: the plain network, as a spec or a module; every tensor of the file has to find its place in it. Or timm's
            RepVGG and MobileOne, which hold such blocks themselves. Without it every block becomes ``PATH.weight`` and
            ``PATH.bias``, all other tensors staying as they are.
        collapse: give the plain network (timm's networks collapsed) instead of the expanded one.
        key: where in the checkpoint the state dict is.

    Raises:
        FileError: it has no block, or part of one; frozen tensors are other than they have to be; names do not map to
            ``like``, or in more than one way; a block is not what its authors compute. The message lists the keys.
        UnknownNameError, ReparamError: as :func:`reparam.sources.create` does.
    """
    asked = parse_block(block) if isinstance(block, str) and ":" in block else block
    try:
        content = files.load_state(path, key=key)
        if "reparam" in content.metadata:
            raise FileError(
                "it is a file of this package, and has our names already; `collapse`, `verify` and "
                "`reparam.files.load_model` read it"
            )
        network = Network.of(like, sources.create) if like is not None else None
        return _imported(replace(content, tensors=_clean(content.tensors)), asked, network, collapse)
    except FileError as error:
        raise error if str(path) in str(error) else FileError(f"{path}: {error}") from error


def _imported(content: files.StateFile, asked: str | Block | None, network: Network | None, collapse: bool) -> Imported:
    tensors, notes = content.tensors, list[str]()
    if order.is_by_order(tensors):
        if network is None:
            raise FileError("its tensors have no names, only an order: say of which network they are, with like")
        convs = {c.path: tuple(c.conv.weight.shape) for c in find_convs(network.stock) if c.norm is not None}
        tensors = order.named(tensors, convs)
        notes.append("tensors by order: matched with the network's convolutions")
    units, rest = find_units(tensors, asked)
    if any(unit.grammar.name in ("doconv_tensorflow", "doconv_gluon") for unit in units):
        rest = _torch_layout(rest)
    deployed = sum(unit.deployed for unit in units)
    if deployed not in (0, len(units)):
        these = next(unit for unit in units if unit.deployed)
        raise FileError(
            f"{deployed} of its {len(units)} blocks are deployed, the first is {these.path}, others are not"
        )
    said = Counter(unit.grammar.said + (", deployed" if unit.deployed else "") for unit in units)
    options = asked if isinstance(asked, Block) else None
    notes += _unsaid(units, options)
    if content.others:
        notes.append(f"read from {content.key!r} of the checkpoint; it also has {', '.join(content.others)}")
    if network is None:
        plain, difference = dict(rest), 0.0
        for unit in units:
            found = folded(unit, options)
            dtype = next(t.dtype for t in unit.tensors.values() if t.is_floating_point())
            plain[unit.key("weight")] = found.weight.to(dtype)
            if found.bias is not None:
                plain[unit.key("bias")] = found.bias.to(dtype)
            difference = max(difference, found.difference)
        return Imported(plain, None, "", None, False, dict(said), difference, tuple(notes))
    done = put(units, rest, network, options, collapse=collapse)
    notes += done.notes
    state = done.model.state_dict()
    return Imported(
        state, done.model, network.spec, done.recipe, done.collapsed, dict(said), done.difference, tuple(notes)
    )


def _unsaid(units: list[Unit], asked: Block | None) -> Iterator[str]:
    """What a block is taken to be where no file says it and nobody did."""
    for grammar in {unit.grammar.name: unit.grammar for unit in units if not unit.deployed}.values():
        if grammar.unsaid and (asked is None or grammar.unsaid not in asked.options):
            yield (
                f"whether its {grammar.block} blocks have the option {grammar.unsaid}, no file says: taken to have the "
                f"default; else --block {grammar.block}:{grammar.unsaid}=true"
            )


def _clean(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with dots, as TensorFlow does not write them, without what ACNet's code stores beside its tensors."""
    return {re.sub(r":\d+$", "", name).replace("/", "."): t for name, t in tensors.items() if name != "deps"}


_WORDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def _torch_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """TensorFlow's and Gluon's names of norms, and TensorFlow's kernels ``(h, w, in, out)`` and ``(in, out)``."""
    found = {}
    for name, tensor in tensors.items():
        path, dot, last = name.rpartition(".")
        if last == "kernel":
            if tensor.dim() == 3 and tensor.shape[0] == 1:  # DO-Conv of a single tap
                tensor = tensor[:, None]
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(tensor.dim(), tuple(range(tensor.dim())))
            found[f"{path}{dot}weight"] = tensor.permute(axes)
        else:
            found[f"{path}{dot}{_WORDS.get(last, last)}"] = tensor
    return found
