"""The blocks in a file, found by the names of its tensors, and each as a module of ours that has its numbers.

A block is believed if every tensor of it is there, what is frozen is the constant that it has to be, and our module
computes, in float64, what the authors' own formula does.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passes.algebra.geometry import Geometry
from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import Block
from passes.refusal import RefusalError, ReparamError
from passes.training.build import build
from passes.training.equivalent import Reading
from passes.training.forms import Form
from reparam.disk import FileError
from reparam.published.formulas import frozen_identity
from reparam.published.grammar import BATCH_NORM, Grammar, Unit
from reparam.published.grammars import GRAMMARS
from reparam.untrusted import FLOATS

__all__ = ["Folded", "deviation", "find_units", "folded", "geometry_of", "module_of", "ours", "shortened"]

EXACT = 1e-10
"""Largest difference in float64, relative to the largest value, that is rounding."""
CONSTANTS = ("identity",)
"""Last words of our buffers that no file has, since they follow from the shapes."""


def shortened(items: Iterable[str], most: int = 5) -> str:
    """The first few of a list."""
    every = list(items)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def find_units(
    tensors: Mapping[str, Tensor], wanted: Block | str | None = None
) -> tuple[list[Unit], dict[str, Tensor]]:
    """The blocks of a file, in the order of their first tensors, and the tensors that are of none.

    Raises :class:`FileError`, listing the keys, if there is no block, or part of one.
    """
    name = wanted.name if isinstance(wanted, Block) else wanted
    grammars = [g for g in GRAMMARS if name is None or name in (g.name, g.block)]
    if not grammars:
        raise FileError(f"no published checkpoints of {name!r} are known; known: {', '.join(g.name for g in GRAMMARS)}")
    rest, units, wrong = dict(tensors), list[Unit](), list[str]()
    for grammar in grammars:
        for unit in _of(grammar, rest):
            for part in unit.tensors:
                del rest[unit.key(part)]
            wrong += _half(unit)
            wrong += [key for key in rest if any(key.startswith(unit.key(word)) for word in grammar.words)]
            units.append(unit)
    wrong += _collisions(units, rest)
    if wrong:
        raise FileError(f"the names of blocks are not whole: {shortened(dict.fromkeys(wrong))}")
    if not units:
        known = ", ".join(sorted({g.block or g.name for g in grammars}))
        raise FileError(f"no block of a known publication ({known}) among its names: {shortened(tensors)}")
    order = {key: i for i, key in enumerate(tensors)}
    return sorted(units, key=lambda unit: min(order[unit.key(part)] for part in unit.tensors)), rest


def _of(grammar: Grammar, tensors: Mapping[str, Tensor]) -> list[Unit]:
    """Every block of one grammar."""
    own, every = grammar.patterns
    paths = {match["path"] or "": None for key in tensors if (match := own.fullmatch(key))}
    parts: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for key, tensor in tensors.items():
        if (match := every.fullmatch(key)) and (match["path"] or "") in parts:
            parts[match["path"] or ""][match["part"]] = tensor
    units = []
    for path, found in parts.items():
        deployed = bool(grammar.deployed) and {f"{grammar.deployed}.bias"} <= found.keys() <= {
            f"{grammar.deployed}.{name}" for name in ("weight", "bias")
        }
        if deployed or grammar.fits(found):
            units.append(Unit(grammar, path, found, deployed))
    return units


def _collisions(units: list[Unit], rest: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands where another block does, or where its kernel and bias go."""
    held: dict[str, Unit] = {}
    for unit in units:
        first = unit.key(next(iter(unit.tensors)))
        yield from (f"{key} beside {first}" for name in ("weight", "bias") if (key := unit.key(name)) in rest)
        other = held.setdefault(unit.path, unit)
        if other is not unit:
            yield f"{first} beside {other.key(next(iter(other.tensors)))}"


def _half(unit: Unit) -> list[str]:
    """What a block lacks or has of both of its forms, as far as the names say."""
    grammar, t = unit.grammar, unit.tensors
    if unit.deployed:
        return [] if f"{grammar.deployed}.weight" in t else [f"{unit.key(grammar.deployed)}.weight is missing"]
    if grammar.main not in t:
        return [f"{unit.key(grammar.main)} is missing beside {unit.key(next(iter(t)))}"]
    odd = [f"{unit.key(part)} is of dtype {x.dtype}" for part, x in t.items() if _odd(part, x)]
    trained = {f"{grammar.deployed}.{name}" for name in ("weight", "bias")} - {part for part, _ in grammar.parts}
    both = [f"{unit.key(part)} beside {unit.key(grammar.main)}" for part in t if part in trained]
    return [*odd, *both]


def _odd(part: str, tensor: Tensor) -> bool:
    return not part.endswith("num_batches_tracked") and tensor.dtype not in FLOATS


# ------------------------------------------------------------------ our module


@contextmanager
def _of_a_file(unit: Unit) -> Iterator[None]:
    """Say what is wrong with tensors that may be missing, or of any shape."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{unit.path}: {error}") from error
    except KeyError as error:
        key = unit.key(str(error.args[0]))
        raise FileError(f"{unit.path} is {unit.grammar.said} in part: it misses {key}") from error
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise FileError(f"{unit.path}: the shapes of {unit.grammar.said} do not go together") from error


def geometry_of(unit: Unit) -> Geometry:
    """What the file says of a convolution; it pads by half of its kernel, and has no dilation."""
    with _of_a_file(unit):
        if unit.deployed:
            shape, groups = tuple(unit.tensors[f"{unit.grammar.deployed}.weight"].shape), 1
        else:
            shape, groups = unit.grammar.size(unit.tensors), unit.grammar.groups(unit.tensors)
        out, inputs, *kernel = shape
        if not kernel or min(shape) < 1 or groups < 1 or out % groups:
            raise ValueError(shape)
    pads, one = tuple(k // 2 for k in kernel), (1,) * len(kernel)
    # Where an identity branch could be and none is, the convolution strides.
    identity = unit.grammar.identity
    strides = identity and inputs * groups == out and f"{identity}.running_mean" not in unit.tensors
    return Geometry(
        inputs * groups, out, tuple(kernel), (2,) * len(kernel) if strides else one, pads, pads, one, groups, "zeros"
    )


def block_of(unit: Unit, asked: Block | None = None) -> Block | None:
    """The block of ours with its options; None for a plain convolution."""
    grammar = unit.grammar
    name = "" if unit.deployed else grammar.block if grammar.becomes is None else grammar.becomes(unit.tensors)
    if not name:
        return None
    given = asked.options if asked is not None and asked.name == name else {}
    return Block(name, **{**grammar.options(unit.tensors), **given})


@dataclass(frozen=True)
class Ours:
    """A block under our names: the block, the tensors behind its path, and those of the norm behind it."""

    block: Block | None
    tensors: dict[str, Tensor]
    norm: dict[str, Tensor]


def ours(unit: Unit, g: Geometry, asked: Block | None = None) -> Ours:
    """A block under our names. Raises :class:`FileError` where a frozen tensor is not what it has to be."""
    grammar, t = unit.grammar, unit.tensors
    if unit.deployed:
        return Ours(None, {name: t[f"{grammar.deployed}.{name}"] for name in ("weight", "bias")}, {})
    with _of_a_file(unit):
        constants = _constants(unit)
        block = block_of(unit, asked)
        found = grammar.ours(t, g, {} if block is None else block.options)
    for part, constant in constants.items():
        if not _is_constant(t[part], constant):
            raise FileError(f"{unit.key(part)} is frozen in {grammar.said}, and not the constant that it has to be")
    norm = {name[len("norm.") :]: found.pop(name) for name in list(found) if name.startswith("norm.")}
    return Ours(block, found, norm)


def _constants(unit: Unit) -> dict[str, Tensor]:
    """What frozen tensors have to be, in float64."""
    exact = {name: tensor.double() for name, tensor in unit.tensors.items()}
    found = {}
    for pattern, constant in unit.grammar.constants.items():
        for part in exact:
            if match := re.fullmatch(pattern, part):
                found[part] = constant(exact, match)
    return found


def _is_constant(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape == wanted.shape and torch.allclose(tensor.double(), wanted.double(), rtol=1e-3, atol=1e-7)


def module_of(unit: Unit, mine: Ours, g: Geometry) -> nn.Sequential:
    """The block with its numbers, in float64 and in evaluation, and the norm behind it.

    Raises :class:`FileError`, with the authors' names, where tensors are missing or of other shapes.
    """
    bias = "bias" in mine.tensors or unit.grammar.block == "ecb"
    made: Any = nn.Conv2d
    geometry = (g.in_channels, g.out_channels, g.kernel, g.stride, g.lead, g.dilation, g.groups)
    conv = made(*geometry, bias=bias, dtype=torch.float64, device="meta")
    norm = nn.BatchNorm2d(g.out_channels, dtype=torch.float64, device="meta")
    behind: nn.Module = nn.Identity()
    module: nn.Module = conv
    if mine.block is not None:
        site = Site(conv, None if bias or unit.grammar.name == "doconv" else norm)
        try:
            module = build(unit.path, site, mine.block, Form.meant(mine.block), recorded=False)
        except ReparamError as error:
            raise FileError(f"{unit.path}: {error}") from error
    if mine.norm:
        behind = norm
    whole = nn.Sequential(OrderedDict(conv=module, norm=behind)).eval()
    given = {f"conv.{name}": tensor for name, tensor in mine.tensors.items()}
    given |= {f"norm.{name}": tensor for name, tensor in mine.norm.items()}
    _fill(unit, whole, given)
    return whole


def _fill(unit: Unit, module: nn.Module, given: dict[str, Tensor]) -> None:
    """Load what a file has into a module without numbers, in float64."""
    state = module.state_dict()
    given = completed(state, given)
    lacks = [name for name in state if name not in given]
    more = [name for name in given if name not in state]
    odd = [name for name in state if name in given and given[name].shape != state[name].shape]
    if lacks or more or odd:
        parts = [("misses", lacks), ("has besides", more), ("has of other shapes", odd)]
        said = "; ".join(f"{verb} {shortened(_theirs(unit, names))}" for verb, names in parts if names)
        raise FileError(f"{unit.path} is {unit.grammar.said} in part: it {said}")
    module.load_state_dict({name: given[name].to(state[name].dtype) for name in state}, assign=True)


def completed(state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has, and what it does not have to say: our constants, counters, a norm without factor and shift."""
    found = dict(given)
    dtype = next((t.dtype for t in given.values() if t.is_floating_point()), torch.float32)
    for name, wanted in state.items():
        path, _, last = name.rpartition(".")
        beside = f"{path}.running_mean" in given
        pair = beside and not any(f"{path}.{each}" in given for each in ("weight", "bias"))
        if name in given:
            continue
        if last in CONSTANTS and wanted.dim() == 4:
            found[name] = frozen_identity(torch.empty(wanted.shape, dtype=dtype))
        elif last == "num_batches_tracked" and beside:
            found[name] = torch.zeros((), dtype=torch.long)
        elif pair and last in ("weight", "bias"):
            found[name] = torch.full(wanted.shape, 1.0 if last == "weight" else 0.0, dtype=dtype)
    return found


def _theirs(unit: Unit, names: Sequence[str]) -> list[str]:
    """What the authors call tensors of ours, as far as they have a name for them."""
    table = {template.partition("{")[0].removesuffix("*"): part for part, template in unit.grammar.parts if template}
    found = []
    for name in names:
        bare = name.partition(".")[2]
        part = next((part for ours, part in table.items() if ours and bare.startswith(ours)), bare)
        last = bare.rpartition(".")[2]
        found.append(unit.key(part.replace("*", last if last in BATCH_NORM else "*")))
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------ the proof


@dataclass(frozen=True)
class Folded:
    """Kernel and bias of a block in float64, and how far our module is from the authors' formula."""

    weight: Tensor
    bias: Tensor | None
    difference: float


def folded(unit: Unit, asked: Block | None = None, g: Geometry | None = None) -> Folded:
    """The one convolution that a block is. Raises :class:`FileError` if it is none, or not the authors'."""
    g = g or geometry_of(unit)
    mine = ours(unit, g, asked)
    if unit.deployed:
        return Folded(mine.tensors["weight"].double(), mine.tensors["bias"].double(), 0.0)
    module = module_of(unit, mine, g)
    difference = deviation(unit, module, g, mine.block)
    try:
        form = Reading(module).form()
    except RefusalError as error:
        raise FileError(f"{unit.path} does not fold: {error}") from error
    return Folded(form.weight.detach(), None if form.bias is None else form.bias.detach(), difference)


def deviation(unit: Unit, module: nn.Module, g: Geometry, block: Block | None) -> float:
    """How far a module is from the authors' formula on a random input, in float64, relative to the largest value.

    Raises :class:`FileError` if that is more than rounding.
    """
    exact = copy.deepcopy(module).double().eval()
    sizes = [d * (k - 1) + 3 * s for k, d, s in zip(g.kernel, g.dilation, g.stride, strict=True)]
    random = torch.Generator().manual_seed(0)
    x = torch.randn((2, g.in_channels, *sizes), generator=random, dtype=torch.float64)
    # A frozen 1/9 is rounded in the file, and no rounding is left in ours.
    t = {name: tensor.double() for name, tensor in unit.tensors.items()} | _constants(unit)
    with torch.no_grad(), _of_a_file(unit):
        wanted = unit.grammar.forward(t, x, g, {} if block is None else block.options)
        got = exact(x)
    gap = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not gap <= EXACT:
        raise FileError(f"{unit.path} is not what the authors of {unit.grammar.said} compute: off by {gap:.1e}")
    return gap
