"""Every registered block as a layer, for who writes a network by hand: ``reparam.layers.DOConv2d(1, 16, 3, stride=2)``.

A class is made of a block's declaration when it is asked for, own blocks included. Its name is the block's, each word
with a capital, and the number of dimensions: ``Acb2d``, ``Dbb1d``, ``MyBlock3d`` of ``my_block``. What a publication
calls its layer (``published=`` where the block is registered) stands for the same: ``DOConv2d``, and without a number
for two dimensions ``AsymConvBlock``, ``DiverseBranchBlock``.

A layer is what :func:`reparam.expand` puts in the place of ``nn.Conv2d``, or of the convolution and its batch norm: the
same modules, under the same names in the state dict.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import CONVS
from passes.blocks.kit.builder import Site
from passes.blocks.kit.layers import become
from passes.blocks.kit.registry import Block, BlockInfo, blocks
from passes.refusal import Refusal, RefusalError, ReparamError
from passes.training.build import build, signature, try_on_meta
from passes.training.discovery import Found, Norm
from passes.training.forms import Form
from reparam.api import collapse
from reparam.training import equivalent_conv, form_of

__all__ = ["BlockLayer", "LinearLayer", "fuse_and_load", "layer_class", "switch_to_deploy"]

_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NUMBERS = {0: "Linear", 1: "1d", 2: "2d", 3: "3d"}
"""How the names of layers end, by their number of dimensions."""
_TRIED: dict[Any, Refusal | None] = {}
"""Why a block does not apply to a geometry, or None, by all that decides it."""
_JOINED: dict[tuple[type, type], type[BlockLayer]] = {}
_CLASSES: dict[tuple[str, int], tuple[BlockInfo, type[BlockLayer]]] = {}


class BlockLayer(nn.Module):
    """One block as a layer; the classes of this module are made from it, see :func:`layer_class`.

    ``forward`` takes ``(N, in_channels, *sizes)``, as the convolution does that the layer stands for.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: those of
            ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        bias: of the convolution; by default there is one unless a norm follows.
        norm: the batch norm behind the convolution: True, False, a class, what makes one for a number of features (such
            as ``partial(nn.BatchNorm2d, eps=1e-3)``), or a module with ``out_channels`` features. By default it is
            there if the block normalises its branches. A block that leaves it behind the sum is ``conv`` and ``norm``
            in the state dict, as in an ``nn.Sequential`` of the two.
        init: ``"paper"``: the published initialisation; ``"preserve"``: the added branches start at zero.
        form: how it trains, see :func:`reparam.expand`; by default as the block says.
        online: the former name of ``form="online"`` and ``form="branches"``; it will go.
        options: of the block, by name; :func:`reparam.blocks` lists them.

    Raises :class:`ReparamError` where the block does not apply, with the reason.
    """

    _block: ClassVar[str]
    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: bool | Callable[[int], nn.Module] | nn.Module | None = None,
        init: str = "paper",
        form: str | Form | None = None,
        online: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name, block, n = type(self).__name__, Block(self._block, **options), self._dims - 1
        preserve = _preserves(self, init)
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        wanted = norm is not False
        if norm is None:
            wanted = _normalises(block, CONVS[n](*geometry, False, padding_mode, "meta"))
        bias = not wanted if bias is None else bias
        conv = CONVS[n](*geometry, bias, padding_mode, device, dtype)
        behind = _norm_of(name, _NORMS[n] if norm is None or isinstance(norm, bool) else norm, conv)
        _become(self, _built(name, block, conv, behind if wanted else None, preserve, form_of(form, online)))

    def equivalent_conv(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias of the convolution that this is in eval mode, see :func:`reparam.equivalent_conv`."""
        return equivalent_conv(self)

    def switch_to_deploy(self) -> nn.Module:
        """Become the plain convolution in place, as :func:`switch_to_deploy` does; returns this very object."""
        return _deploy(self, type(self).__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of the object is made on the spot; the two that it is made of can be found by their names.
        made = type(self)
        if not issubclass(made, _Joined):
            return super().__reduce_ex__(protocol)
        owner, base = made.__bases__[0], made.__bases__[2]
        return _empty, (owner, base), self.__getstate__()  # type: ignore[no-untyped-call]


class LinearLayer(BlockLayer):
    """A block in the place of a linear layer, for the blocks that take one: ``LoraLinear(64, 32, rank=4)``.

    ``forward`` takes ``(..., in_features)``.

    Args:
        in_features, out_features, bias, device, dtype: those of ``nn.Linear``.
        init, form, online, options: as of :class:`BlockLayer`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "paper",
        form: str | Form | None = None,
        online: bool | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        block = Block(self._block, **options)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        preserve, wanted = _preserves(self, init), form_of(form, online)
        _become(self, _built(type(self).__name__, block, linear, None, preserve, wanted))


def _norm_of(name: str, norm: Any, conv: _ConvNd) -> _BatchNorm:
    """The batch norm that a person gives, or what they give to make it with; on the convolution's device."""
    if not isinstance(norm, nn.Module) and callable(norm):
        try:
            norm = norm(conv.out_channels)
        except TypeError as error:  # a norm of another kind
            raise ReparamError(f"{name}: norm= takes a batch norm of {conv.out_channels} features: {error}") from error
        if isinstance(norm, nn.Module):
            norm = norm.to(conv.weight.device, conv.weight.dtype)
    fits = isinstance(norm, _BatchNorm) and norm.num_features == conv.out_channels
    if not fits or (isinstance(norm, _NORMS) and not isinstance(norm, _NORMS[len(conv.kernel_size) - 1])):
        stands = f"a batch norm of {conv.out_channels} features in {len(conv.kernel_size)} dimensions"
        raise ReparamError(f"{name}: norm= takes {stands}, got {norm!r}")
    assert isinstance(norm, _BatchNorm)
    return norm


def _preserves(layer: BlockLayer, init: str) -> bool:
    if init not in ("preserve", "paper"):
        raise ReparamError(f"{type(layer).__name__}: init is 'preserve' or 'paper', got {init!r}")
    return init == "preserve"


class _Joined:
    """Marks a class of a layer whose modules are those of a block."""


def _become(layer: BlockLayer, module: nn.Module) -> None:
    """Let a layer be a module that was built, and stay of its own class."""
    vars(layer).update(vars(module))
    layer.__class__ = _joined(type(layer), type(module))


def _joined(owner: type[BlockLayer], base: type[nn.Module]) -> type[BlockLayer]:
    if (owner, base) not in _JOINED:
        names = {"__module__": owner.__module__, "__doc__": owner.__doc__}
        _JOINED[owner, base] = type(owner.__name__, (owner, _Joined, base), names)
    return _JOINED[owner, base]


def _empty(owner: type[BlockLayer], base: type[nn.Module]) -> BlockLayer:
    made = _joined(owner, base)
    return made.__new__(made)


# ------------------------------------------------------------------ building


def _built(
    name: str, block: Block, conv: _ConvNd | nn.Linear, norm: _BatchNorm | None, preserve: bool, form: Form | None
) -> nn.Module:
    """What expand puts in the place of a convolution and its norm, or :class:`ReparamError` if it does not apply."""
    form = form or Form.meant(block)
    site = Site(conv, norm, preserve=preserve, online=form.online)
    key = signature(site, block, form), preserve, block.info.declare
    if key not in _TRIED:
        pair = nn.Sequential(OrderedDict(conv=conv, norm=norm or nn.Identity()))
        tried = try_on_meta(pair, Found("conv", conv, None if norm is None else Norm("norm")), block, preserve, form)
        _TRIED[key] = tried if isinstance(tried, Refusal) else None
    if (refusal := _TRIED[key]) is not None:
        raise ReparamError(f"{name}: {refusal.message}")
    built = build(name, site, block, form)
    if norm is None or site.norm_taken:
        return built
    return nn.Sequential(OrderedDict(conv=built, norm=norm))


def _normalises(block: Block, conv: _ConvNd) -> bool:
    """Whether a block takes the norm into its branches, or is nothing without one."""
    site = Site(conv, _NORMS[len(conv.kernel_size) - 1](conv.out_channels, device="meta"))
    try:
        block.branches(site)
        if not site.norm_taken:
            block.branches(Site(conv))
    except RefusalError:
        return not site.norm_taken
    return site.norm_taken


# ------------------------------------------------------------------ classes


def layer_class(block: str, dims: int = 2) -> type[BlockLayer]:
    """The layer of a registered block in 1, 2 or 3 dimensions, or 0 for a linear layer, if the block takes one.

    Raises :class:`ReparamError` for an unknown name.
    """
    info = Block(block).info
    if dims not in _NUMBERS or (dims == 0 and not info.linear):
        raise ReparamError(f"a layer of {block!r} has {'0, ' if info.linear else ''}1, 2 or 3 dimensions, got {dims!r}")
    return _class(info, dims)


def _class(info: BlockInfo, dims: int) -> type[BlockLayer]:
    """One class for each block and number of dimensions, until the block is registered anew."""
    known, made = _CLASSES.get((info.name, dims), (None, BlockLayer))
    if known is not info:
        made = _made(info, dims)
        _CLASSES[info.name, dims] = info, made
    return made


def _made(info: BlockInfo, dims: int) -> type[BlockLayer]:
    base, name = BlockLayer if dims else LinearLayer, f"{(*info.published, _camel(info.name))[0]}{_NUMBERS[dims]}"
    stock = f"Conv{dims}d" if dims else "Linear"
    doc = f"{info.summary}\n\nThe block {info.name!r} as a layer in nn.{stock}'s place; see :class:`{base.__name__}`."
    made = type(name, (base,), {"_block": info.name, "_dims": dims, "__module__": __name__, "__doc__": doc})
    own = inspect.signature(base).parameters
    if clash := sorted(own.keys() & info.options.keys()):
        raise ReparamError(f"block {info.name!r} has an option {clash[0]!r}, which a layer has already: rename it")
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(key, keyword, default=value) for key, value in info.options.items()]
    made.__signature__ = inspect.Signature([*list(own.values())[:-1], *options])  # type: ignore[attr-defined]
    return made


def _camel(name: str) -> str:
    words = name.replace("-", "_").replace(" ", "_").split("_")
    return "".join(word[:1].upper() + word[1:] for word in words)


def _names(info: BlockInfo) -> dict[str, int]:
    """The names of a block's layers, each with its number of dimensions."""
    words = (_camel(info.name), *info.published)
    numbers = {n: text for n, text in _NUMBERS.items() if n or info.linear}
    return {f"{word}{text}": n for word in words for n, text in numbers.items()} | dict.fromkeys(info.published, 2)


def __getattr__(name: str) -> type[BlockLayer]:
    found = [(info, dims) for info in blocks().values() for known, dims in _names(info).items() if known == name]
    if len(found) == 1:
        return _class(*found[0])
    if found:
        every = " and ".join(repr(info.name) for info, _ in found)
        raise AttributeError(f"{name} is the layer of the blocks {every}: use layer_class(block, dims)")
    known = ", ".join(f"{_camel(block)}2d" for block in blocks())
    lower = {other.lower(): other for info in blocks().values() for other in _names(info)}
    close = ", ".join(lower[other] for other in difflib.get_close_matches(name.lower(), lower, n=3))
    raise AttributeError(
        f"there is no layer {name!r}; there are {known}, each with 1d and 3d as well, and those of blocks of your own "
        f"once the module that registers them is imported{f'; did you mean {close}?' if close else ''}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for info in blocks().values() for name in _names(info))})


# ------------------------------------------------------------------ deploying


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Make every layer of this module that is in ``model``, or is ``model``, the plain convolution, in place.

    What else holds a layer holds the convolution from then on, as it is the same object. Each fold is proven in float64
    (:func:`reparam.collapse`); batch norms outside of the layers stay. A layer that does not fold raises
    :class:`ReparamError`, and those before it are plain by then.
    """
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in list(model.named_modules()):
        if isinstance(module, BlockLayer):
            _deploy(module, path or type(module).__name__)
    return model


def _deploy(layer: BlockLayer, name: str) -> nn.Module:
    folded = collapse(nn.Sequential(layer), verify="folds")
    left = [module for module in folded.modules() if not isinstance(module, (nn.Sequential, nn.Identity))]
    if len(left) != 1 or not isinstance(left[0], (_ConvNd, nn.Linear)):
        raise ReparamError(f"{name} does not fold into one layer; reparam.explain says why")
    become(layer, left[0])
    return layer


def fuse_and_load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a training checkpoint into a network for deployment, in place: what ACNet announces under this name.

    Args:
        model: built of the layers of this module, whose own checkpoint is loaded strictly and which then become plain;
            or the plain network, given a checkpoint that the authors of a block published
            (:func:`reparam.import_checkpoint`).
        path: of the checkpoint.

    Raises :class:`ReparamError` if it does not fit; the model is then as it was.
    """
    from reparam import files, published

    if any(isinstance(module, BlockLayer) for module in model.modules()):
        content = files.load_state(path)
        if problem := files.misfit(model, content.tensors):
            raise ReparamError(f"{path} does not fit the network: {problem}")
        files.fill(model, content.tensors)
        return switch_to_deploy(model)
    imported = published.import_checkpoint(path, like=model, collapse=True)
    model.load_state_dict(imported.tensors)
    return model
