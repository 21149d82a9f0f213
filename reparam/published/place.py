"""The blocks of a file put into a network: as training blocks, folded into its convolutions, or under timm's names."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import reparam
from passes.algebra.geometry import Geometry
from passes.blocks.kit.registry import Block
from passes.proof.hold import Exact
from passes.restore import make_identity
from passes.training.discovery import Found, find_convs
from reparam import files
from reparam.disk import FileError
from reparam.published.grammar import Unit, normed, translated
from reparam.published.names import Side, placed
from reparam.published.units import completed, deviation, folded, geometry_of, module_of, ours, shortened
from reparam.rebuilding import generic
from reparam.recipe import Recipe

__all__ = ["Network", "Put", "put"]

_TIMM = {
    "repvgg": (
        *normed(("square.conv", "square.norm", "conv_kxk.conv", "conv_kxk.bn")),
        *normed(("point.conv", "point.norm", "conv_1x1.conv", "conv_1x1.bn")),
        ("identity.*", "identity.*"),
    ),
    "mobileone": (
        *normed(("conv{i}.conv", "conv{i}.norm", "conv_kxk.{i}.conv", "conv_kxk.{i}.bn")),
        *normed(("point.conv", "point.norm", "conv_scale.conv", "conv_scale.bn")),
        ("identity.*", "identity.*"),
    ),
}
"""What our blocks' tensors are called inside of timm's own modules."""
_DEPLOYED = "it is deployed, and has no branches to train"
_NATIVE = re.compile(r"(?P<block>.*)\.conv_kxk(\.0)?\.conv")
"""The first kernel of a module of timm's that is such a block itself."""


@dataclass(frozen=True)
class Network:
    """The network that a file is of: plain, or with timm's own blocks in it."""

    stock: nn.Module
    spec: str

    @staticmethod
    def of(like: str | nn.Module, create: Callable[[str], nn.Module]) -> Network:
        if isinstance(like, nn.Module):
            return Network(copy.deepcopy(like).eval(), "")
        return Network(create(like).eval(), like)


@dataclass(frozen=True)
class Put:
    """A network with the tensors of a file, and how it was made."""

    model: nn.Module
    recipe: Recipe | None
    collapsed: bool
    difference: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Placed:
    """Where things belong: modules of the file by their paths there, convolutions of the network by theirs."""

    paths: dict[str, str]
    convs: dict[str, Found]
    rest: dict[str, dict[str, Tensor]]
    native: frozenset[str]

    def norm(self, path: str) -> str:
        """The norm behind a convolution of the network, or nothing."""
        found = self.convs.get(path)
        return "" if found is None or found.norm is None else found.norm.path


def put(units: list[Unit], rest: Mapping[str, Tensor], network: Network, asked: Block | None, *, collapse: bool) -> Put:
    """Give a network the tensors of a file, all of them.

    Raises :class:`FileError` where one has no place, or a block is not what its authors compute.
    """
    try:
        where, said = _places(units, _modules(rest), network.stock)
    except FileError:  # no network but the authors' own has a norm beside its convolution under these very names
        where, said = _places(units, _paired(_modules(rest)), network.stock, explain=True)
    notes = (f"names: {said}",)
    if where.native:
        return _native(units, where, network, asked, notes, collapse=collapse)
    plain = collapse or units[0].deployed
    model, recipe, difference = (_plain if plain else _expanded)(units, where, network, asked)
    if plain and not collapse:
        return Put(model, recipe, False, difference, (f"{_DEPLOYED}: this is the plain network", *notes))
    return Put(model, recipe, False, difference, notes)


def _modules(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by module."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        found.setdefault(path, {})[last] = tensor
    return found


def _paired(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """A convolution ``conv`` and its norm ``bn``, as all of the authors call them, as one module."""
    order = list(found)
    for path in order:
        stem, _, last = path.rpartition(".")
        norm = found.get(f"{stem}.bn", {})
        if last == "conv" and "running_mean" in norm and len(norm["running_mean"]) == len(found[path]["weight"]):
            if order.index(path) > order.index(f"{stem}.bn") and order != sorted(order):
                continue  # registered in front of the convolution, as in ACNet's wide residual networks
            found[stem] = found.get(stem, {}) | found.pop(path)
            found[stem] |= {f"bn.{name}": tensor for name, tensor in found.pop(f"{stem}.bn").items()}
        elif last == "conv" and stem not in found and {"weight", "bias"} == found[path].keys():
            found[stem] = found.pop(path)  # deployed by DBB's and OREPA's code
    return found


def _shape(module: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(next(iter([module["weight"]] if "weight" in module else module.values())).shape)


def _places(
    units: list[Unit], rest: dict[str, dict[str, Tensor]], stock: nn.Module, *, explain: bool = False
) -> tuple[_Placed, str]:
    theirs = {path: _shape(module) for path, module in _modules(stock.state_dict()).items()}
    shapes = {unit.path: _kernel_shape(unit, theirs) for unit in units} | {path: _shape(m) for path, m in rest.items()}
    brings = {unit.path: "" for unit in units if unit.deployed or any("running_mean" in part for part in unit.tensors)}
    brings |= {path: "" for path, module in rest.items() if "bn.running_mean" in module or _bare(module, units)}
    convs = {found.path: found for found in find_convs(stock)}
    native: dict[str, str] = {}
    if any(unit.grammar.block in _TIMM for unit in units):
        native = {match["block"]: path for path in theirs if (match := _NATIVE.fullmatch(path))}
    inside = re.compile(r"\.(conv_kxk|conv_1x1|conv_scale|identity)(\.|$)")
    own = {
        path: shape
        for path, shape in theirs.items()
        if not any(path.startswith(f"{block}.") and inside.match(path, len(block)) for block in native)
    }
    own |= {block: theirs[path] for block, path in native.items()}
    norms = {path: found.norm.path for path, found in convs.items() if found.norm is not None}
    paths, said = placed(Side(shapes, brings), Side(own, norms), explain=explain)
    return _Placed(paths, convs, rest, frozenset(native)), said


def _bare(module: Mapping[str, Tensor], units: list[Unit]) -> bool:
    """A convolution with a bias in a file that is deployed: its norm is folded."""
    return units[0].deployed and {"weight", "bias"} == module.keys() and module["weight"].dim() > 2


def _kernel_shape(unit: Unit, theirs: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """``(out, in / groups, *size)`` of a block's kernel; of the network's where the file does not say its size."""
    name, grammar = f"{unit.grammar.deployed}.weight", unit.grammar
    if unit.deployed:
        return tuple(unit.tensors[name].shape)
    if grammar.taps is not None and grammar.main in unit.tensors:
        out, inputs, taps = grammar.taps(unit.tensors)
        fits = {p: s for p, s in theirs.items() if s[:2] == (out, inputs) and math.prod(s[2:]) == taps}
        if unit.path in fits or len(set(fits.values())) == 1:
            return fits.get(unit.path, next(iter(fits.values())))
    g = geometry_of(unit)
    return g.out_channels, g.in_channels // g.groups, *g.kernel


def _others(where: _Placed) -> dict[str, Tensor]:
    """The tensors of no block under the network's names."""
    found = {}
    for path, module in where.rest.items():
        to = where.paths[path]
        for name, tensor in module.items():
            behind = name.startswith("bn.")
            if behind and not where.norm(to):
                raise FileError(f"{path} has a norm behind it, and the network's {to} has none")
            found[f"{where.norm(to)}.{name[3:]}" if behind else f"{to}.{name}".lstrip(".")] = tensor
    return found


# ------------------------------------------------------------------ as training blocks


def _expanded(
    units: list[Unit], where: _Placed, network: Network, asked: Block | None
) -> tuple[nn.Module, Recipe | None, float]:
    blocks, state = dict[str, Block](), _others(where)
    norms: dict[str, str] = {}
    for unit in units:
        to = where.paths[unit.path]
        mine = ours(unit, _geometry(network.stock, to), asked)
        inner = any(name.endswith("running_mean") for name in mine.tensors)
        norm = where.norm(to)
        if inner and (mine.norm or any(key.startswith(f"{norm}.") for key in state if norm)):
            raise FileError(
                f"{unit.path} has norms inside and one more behind it, and expanding takes that of {to} inside: import "
                "it with --collapse (collapse=True)"
            )
        if inner and not norm:
            raise FileError(
                f"{unit.path} has norms inside, and the network's {to} has none behind it that its block would take: "
                "import it with --collapse (collapse=True)"
            )
        if mine.norm and not norm:
            raise FileError(f"{unit.path} has a norm behind it, and the network's {to} has none")
        if mine.block is not None:
            blocks[to] = mine.block
        norms[unit.path] = norm if mine.norm else ""
        state |= {f"{to}.{name}": tensor for name, tensor in mine.tensors.items()}
        state |= {f"{norm}.{name}": tensor for name, tensor in mine.norm.items()}
    recipe, model = None, network.stock
    if blocks:
        every = set(map(str, blocks.values()))
        recipe = Recipe(next(iter(blocks.values())) if len(every) == 1 else blocks, where=list(blocks))
        planned = recipe.plan(network.stock)
        left = [str(row.refusal) for row in planned.rows if row.layer in blocks and row.refusal is not None]
        if left:
            raise FileError(f"the network's convolutions do not take the blocks: {shortened(left)}")
        model = planned.apply()
    try:
        _load(model, state)
    except FileError:
        for unit in units:  # what is wrong with a block is said in its authors' names
            g = _geometry(network.stock, where.paths[unit.path])
            module_of(unit, ours(unit, g, asked), g)
        raise
    difference = 0.0
    for unit in units:
        to = where.paths[unit.path]
        behind = [model.get_submodule(norms[unit.path])] if norms[unit.path] else []
        module = nn.Sequential(model.get_submodule(to), *behind)
        difference = max(difference, deviation(unit, module, _geometry(network.stock, to), blocks.get(to)))
    return model, recipe, difference


def _geometry(model: nn.Module, path: str) -> Geometry:
    conv = model.get_submodule(path)
    if not isinstance(conv, _ConvNd):
        raise FileError(f"the network's {path} is a {type(conv).__name__}, and the file has a convolution there")
    return Geometry.of(conv)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strictly, in the dtype of the file."""
    full = completed(model.state_dict(), state)
    files.load_into(model, files.StateFile(full), "the file")


# ------------------------------------------------------------------ folded


def _plain(
    units: list[Unit], where: _Placed, network: Network, asked: Block | None
) -> tuple[nn.Module, Recipe | None, float]:
    model, state, difference = copy.deepcopy(network.stock), _others(where), 0.0
    bare = {path: m for path, m in where.rest.items() if _bare(m, units) and where.norm(where.paths[path])}
    numbers: list[tuple[str, Tensor, Tensor | None, torch.dtype]]
    numbers = [(where.paths[path], m["weight"], m["bias"], m["weight"].dtype) for path, m in bare.items()]
    for unit in units:
        to = where.paths[unit.path]
        found = folded(unit, asked, None if unit.deployed else _geometry(network.stock, to))
        dtype = next(t.dtype for t in unit.tensors.values() if t.is_floating_point())
        numbers.append((to, found.weight, found.bias, dtype))
        difference = max(difference, found.difference)
    for to, weight, bias, dtype in numbers:
        norm = where.norm(to)
        given = any(key.startswith(f"{norm}.") for key in state if norm)
        state[f"{to}.weight"] = weight.to(dtype)
        state.pop(f"{to}.bias", None)
        if norm and not given:
            state |= _identity(model.get_submodule(norm), norm, dtype)
        conv = model.get_submodule(to)
        shift = torch.zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
        if getattr(conv, "bias", None) is not None:
            state[f"{to}.bias"] = shift
        elif norm and not given and f"{norm}.bias" in state:
            state[f"{norm}.bias"] = shift
        elif bool(shift.any()):
            raise FileError(f"{to} has a bias once it is folded, and the network has no place for it")
    _load(model, state)
    return model, None, difference


def _identity(norm: nn.Module, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a norm that returns its input exactly."""
    same = copy.deepcopy(norm).to(dtype)
    with torch.no_grad():
        make_identity(same, Exact(keep=False))
    return {f"{path}.{name}": tensor for name, tensor in same.state_dict().items()}


# ------------------------------------------------------------------ timm's own blocks


def _native(
    units: list[Unit], where: _Placed, network: Network, asked: Block | None, notes: tuple[str, ...], *, collapse: bool
) -> Put:
    if units[0].deployed:
        shell = reparam.collapse(generic(network.stock), verify=False)
        state = _others(where)
        for unit in units:
            conv = _only_conv(shell, where.paths[unit.path])
            state |= {f"{conv}.{name}": unit.tensors[f"{unit.grammar.deployed}.{name}"] for name in ("weight", "bias")}
        _load(shell, state)
        return Put(shell, None, True, 0.0, (f"{_DEPLOYED}: this is the network collapsed", *notes))
    state = _others(where)
    for unit in units:
        to = where.paths[unit.path]
        if to not in where.native:
            raise FileError(f"the network's {to} is no block of timm's, though others are")
        mine = ours(unit, geometry_of(unit), asked).tensors
        state |= {f"{to}.{name}": t for name, t in translated(_TIMM[unit.grammar.block], mine).items()}
    _load(network.stock, state)
    difference = _compared(units, where, network.stock, asked)
    model = reparam.collapse(network.stock) if collapse else network.stock
    return Put(model, None, collapse, difference, notes)


def _only_conv(model: nn.Module, path: str) -> str:
    block = model.get_submodule(path)
    convs = [
        name for name, module in block.named_modules() if isinstance(module, _ConvNd) and ".attn" not in f".{name}"
    ]
    if len(convs) != 1:
        raise FileError(f"the network's {path} does not collapse into one convolution")
    return f"{path}.{convs[0]}" if convs[0] else path


def _compared(units: list[Unit], where: _Placed, model: nn.Module, asked: Block | None) -> float:
    """How far the network's blocks are from what their authors compute: by the numbers that they collapse into."""
    exact = reparam.collapse(copy.deepcopy(model).double(), verify=False)
    difference = 0.0
    for unit in units:
        found = folded(unit, asked)
        conv = exact.get_submodule(_only_conv(exact, where.paths[unit.path]))
        for got, wanted in ((conv.weight, found.weight), (conv.bias, found.bias)):
            assert isinstance(got, Tensor) and wanted is not None  # noqa: PT018
            gap = float((got.detach() - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not gap <= 1e-10:
                raise FileError(f"{unit.path} is not what its authors compute, under timm's names: off by {gap:.1e}")
            difference = max(difference, found.difference, gap)
    return difference
