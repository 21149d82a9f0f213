"""The modules that blocks are made of where torch has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry, Layer
from passes.algebra.told import Told
from passes.blocks.kit.kernel_conv import KernelConv
from passes.graph.within import Inside, Within, bare
from passes.refusal import Reason, RefusalError, ReparamError

__all__ = [
    "GEOMETRY",
    "BranchSum",
    "ChannelScale",
    "Every",
    "IdentityConv",
    "SilenceError",
    "SumBefore",
    "Times",
    "WindowMean",
    "become",
    "is_block",
    "silence",
    "stand_in",
]


class ChannelScale(nn.Module):
    """A trained factor per channel: ``y = weight * x + bias`` on dimension 1, the bias 0 at first and mostly not there.

    With one channel it is the same factor for all.
    """

    def __init__(self, channels: int, value: float, n: int, *, shift: bool = False, **placed: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, *(1,) * n), value, **placed))
        self.bias: Tensor | None
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y if self.bias is None else y + self.bias

    def silence(self) -> None:
        """Return zero, and take a gradient."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Times(nn.Module):
    """A fixed number as a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class IdentityConv(KernelConv):
    """A 1x1 convolution stored as identity + ``weight``, weight 0: decay pulls it to the identity (DBB, sec. 3.3)."""

    def __init__(self, conv: Layer) -> None:
        geometry = Geometry.of(conv)
        super().__init__(geometry, conv.bias)
        self.weight = conv.weight
        self.identity: Tensor
        self.register_buffer("identity", torch.empty_like(conv.weight, requires_grad=False))
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            size = conv.weight.shape[1]
            one = torch.eye(size, dtype=conv.weight.dtype, device=conv.weight.device).repeat(geometry.groups, 1)
            self.identity.copy_(one.reshape(conv.weight.shape))

    def kernel(self) -> Tensor:
        return self.weight + self.identity


class WindowMean(nn.AvgPool2d):
    """Average pooling, on a CPU as a depthwise convolution: oneDNN has a fast one, and PyTorch's pooling is not."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding)
        else:
            return self.mean(x, _pair(self.padding))

    def pads(self, padding: tuple[int, ...]) -> bool:
        """Whether it can pad so much by itself."""
        return all(2 * p <= k for p, k in zip(padding, _pair(self.kernel_size), strict=False))

    def mean(self, x: Tensor, padding: tuple[int, ...]) -> Tensor:
        """The mean with this padding in place of its own."""
        # Whoever only traces is shown what it is; in other dtypes a depthwise convolution is a loop over the channels.
        fast = isinstance(x, Tensor) and x.device.type == "cpu" and x.dtype == torch.float32 and _ONEDNN
        if not fast or x.dim() != 4 or torch._C._get_tracing_state() is not None:
            return F.avg_pool2d(x, self.kernel_size, self.stride, padding)
        kernel, channels = _pair(self.kernel_size), x.shape[1]
        weight = x.new_full((channels, 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
        return F.conv2d(x, weight, None, _pair(self.stride), padding, groups=channels)


_ONEDNN = torch.backends.mkldnn.is_available()


class Every(nn.Module):
    """Every ``stride``-th pixel of ``(N, C, *sizes)``, from the first."""

    def __init__(self, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = list(stride)  # TorchScript has no slices in a tuple

    def forward(self, x: Tensor) -> Tensor:
        s = self.stride
        if len(s) == 1:
            return x[:, :, :: s[0]]
        if len(s) == 2:
            return x[:, :, :: s[0], :: s[1]]
        return x[:, :, :: s[0], :: s[1], :: s[2]]

    def extra_repr(self) -> str:
        return "x".join(map(str, self.stride))


class SumBefore(nn.Module):
    """A layer behind the sum of modules over the same input.

    Args:
        modules: by name.
        name: of the layer.
        layer: what stands behind.
    """

    def __init__(self, modules: dict[str, nn.Module], name: str, layer: nn.Module) -> None:
        super().__init__()
        for each, module in {**modules, name: layer}.items():
            self.add_module(each, module)

    def forward(self, x: Tensor) -> Tensor:
        first, *others, layer = self.children()
        y = first(x)
        for other in others:
            y = y + other(x)
        behind: Tensor = layer(y)
        return behind


class BranchSum(Within):
    """The sum of all branches over the same input: a block in training.

    Args:
        block: the block with its options, for ``print(model)``.
        branches: modules by name, the main branch first.
        conv: the convolution that it stands for.
        layer, inside: the layer that it stands for, and where that convolves, if ``conv`` is only what a class with a
            forward of its own does in the middle of it.

    In eval mode, ``weight`` and ``bias`` are those of the convolution that it is, to be read and not to be written
    into; who assigns to one of them makes the block that convolution, as libraries do that fold a norm (``fuse()``).

    Attributes:
        form: how it trains; see :mod:`passes.training.forms`.
        folded: what runs in place of the branches, given the block and its input; None: they run themselves.
        reparam_layer: gives these numbers by name, and that convolution; None where they would tell something wrong.
        reparam_biased: whether the convolution has a bias.
        reparam_numbers: what it answers for itself.
    """

    form = "branches"
    reparam_layer = cast("Any", None)  # not annotated: TorchScript would look the type up
    reparam_biased = True
    reparam_numbers = ("weight", "bias")

    def __init__(
        self,
        block: str,
        branches: dict[str, nn.Module],
        conv: Layer,
        layer: _ConvNd | None = None,
        inside: Inside | None = None,
    ) -> None:
        super().__init__()
        stand_in(self, block, layer or conv)
        self.geometry = Geometry.of(conv)
        self.folded: Any = None
        self.reparam_biased = conv.reparam_biased if isinstance(conv, BranchSum) else conv.bias is not None
        for name, branch in branches.items():
            if hasattr(self, name):
                raise ReparamError(f"a branch of {block} cannot be named {name!r}: torch uses that name")
            self.add_module(name, branch)
        if layer is not None:
            self.around, self.inside = bare(layer), inside

    def branches(self) -> dict[str, nn.Module]:
        """Modules by name, the main branch first."""
        return {name: module for name, module in self._modules.items() if module is not None and name != "around"}

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.scripted(input)
        else:
            return Within.forward(self, input)

    def scripted(self, input: Tensor) -> Tensor:
        """The sum in words that TorchScript takes."""
        assert self.around is None, "TorchScript cannot stand in the middle of a forward: collapse first"
        assert self.form != "frozen" or not self.training, "in TorchScript norms would measure: .eval() first"
        y = input
        for i, branch in enumerate(self.children()):
            y = y + branch(input) if i else branch(input)
        return y

    def inner(self, input: Tensor) -> Tensor:
        y: Tensor = self.summed(input) if self.folded is None else self.folded(self, input)
        return y

    def summed(self, input: Tensor) -> Tensor:
        """What every branch gives, added up."""
        main, *others = self.branches().values()
        y: Tensor = main(input)
        for branch in others:
            y = y + branch(input)  # not in place: under vmap the first ones may be the same for all, and this one not
        return y

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        if self.folded is not None:
            return self.folded.numbers(self)  # type: ignore[no-any-return]
        (alone,) = self.branches().values()
        kernel = alone.kernel() if isinstance(alone, KernelConv) else alone.weight
        return kernel, alone.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name == "bias" and not self.reparam_biased and (self.training or self.reparam_layer is None):
            return None  # what surrounding code may ask of the layer that stood here
        if name in self.reparam_numbers:
            return self._read(name)[0][name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.reparam_numbers:
            super().__setattr__(name, value)
            return
        become(self, self._read(name)[1])
        setattr(self, name, nn.Parameter(value.detach().clone()) if isinstance(value, Told) else value)

    def _read(self, name: str) -> tuple[dict[str, Tensor | None], nn.Module]:
        """Weight and bias of the convolution that this is, and that convolution."""
        why = f"has its {name} in eval mode only" if self.reparam_layer is not None else f"has no {name} of its own"
        try:
            if not self.training and self.reparam_layer is not None:
                told: tuple[dict[str, Tensor | None], nn.Module] = self.reparam_layer(self)
                return told
        except RefusalError as error:
            why = f"is no one layer: {error}"
        raise AttributeError(
            f"the block {self.reparam_block} {why}: what a library folds or exports is the collapsed network, "
            "reparam.collapse(model, like=plain); reparam.equivalent_conv has its kernel"
        )

    def extra_repr(self) -> str:
        return f"block={self.reparam_block}" + ("" if self.form == "branches" else f", {self.form}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Out of a pickle, complete before the first forward: inside a trace of a network nothing can be recorded."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.folded is not None:
            self.folded.loaded(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BranchSum:
        """Move or cast; recorded code computes in one dtype."""
        super()._apply(fn, recurse)
        if self.folded is not None:
            self.folded.follows(self)
        return self


GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "output_padding", "in_features", "out_features",
)  # fmt: skip
"""Attributes that a block has from the convolution in whose place it stands."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def stand_in(module: nn.Module, block: str, conv: Any) -> None:
    """Give a block the attributes of the convolution that it stands for, which surrounding code may read."""
    for name in GEOMETRY:
        if hasattr(conv, name):
            setattr(module, name, getattr(conv, name))
    module.reparam_block = block  # type: ignore[assignment]


def become(module: nn.Module, layer: nn.Module) -> None:
    """Let a module be another layer from now on, for whoever holds it; its mode and its hooks stay."""
    kept = {name: value for name, value in vars(module).items() if name == "training" or "_hooks" in name}
    vars(module).clear()
    vars(module).update({**vars(layer), **kept})
    module.__class__ = type(layer)


def is_block(module: nn.Module) -> bool:
    """Whether a module is a block that was put in a convolution's place."""
    return isinstance(getattr(module, "reparam_block", None), str)


class SilenceError(ReparamError):
    """A branch of which it is not known how it starts at zero."""


def silence(branch: nn.Module) -> None:
    """Let a branch return zero while its last layer takes a gradient.

    Raises :class:`RefusalError` if it has nothing to train, and :class:`SilenceError` if its last layer is of a kind
    that is not known.
    """
    trained = [m for m in branch.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    if not trained:
        raise RefusalError(Reason.BLOCK, "a branch has nothing to train, so it cannot start at zero")
    last: Any = trained[-1]
    if hasattr(last, "silence"):
        last.silence()
        return
    if not isinstance(last, (_ConvNd, nn.Linear, _BatchNorm)):
        raise SilenceError(
            f"a branch ends in {type(last).__name__}, and init='preserve' does not know how to start that at zero: "
            "end it in a convolution or batch norm, or give it a method silence()"
        )
    for parameter in last.parameters(recurse=False):
        nn.init.zeros_(parameter)
