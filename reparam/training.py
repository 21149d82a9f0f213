"""The verbs around training: plan and expand a model, read a block's kernel, group parameters for the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from passes.algebra.conv_form import ConvForm
from passes.blocks.kit.layers import ChannelScale
from passes.expand import Plan, make_plan
from passes.refusal import RefusalError, ReparamError
from passes.training.equivalent import Reading
from passes.training.filters import Blocks, Where
from reparam.api import undisturbed

__all__ = ["equivalent_conv", "expand", "param_groups", "plan"]


def expand(
    model: nn.Module,
    block: Blocks,
    *,
    where: Where = None,
    init: str = "preserve",
    online: bool | None = None,
    example_inputs: Any = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Replace convolutions of ``model``, with the batch norm behind each, by training-time blocks.

    Linear layers too, by blocks that take them (``lora``).

    The result is the caller's own class, in the mode the model was in; :func:`reparam.collapse` brings it back, with
    ``like=model`` to the very structure it came from. Convolutions that cannot be replaced exactly are left alone;
    :func:`plan` says which and why. Where none gets a block, the result equals ``model`` and the log has a warning.
    New layers draw their numbers from torch's generator: the same seed gives the same weights.

    Args:
        model: any module; parts that torch.fx cannot trace are expanded inside.
        block: a name of :func:`reparam.blocks`, a :class:`reparam.Block` with options, or a mapping from patterns on
            layer paths to either; the first pattern that matches wins, and what matches none is left alone.
        where: which layers. Default: those that the block is meant for by its publication (``meant_for`` of
            :func:`reparam.blocks`); ``"all"``: every one that can have it (a layer of that name is ``["all"]``). Else a
            pattern (``"layer1.*"``; a module's path stands for all inside) or several, a predicate
            ``(path, conv) -> bool``, or filters such as ``{"kernel": 3, "depthwise": False}`` (also ``name``,
            ``groups``, ``stride``; a tuple is one shape, a list or range holds several). Filters that say nothing on
            names or kernels leave these as the block is meant.
        init: ``"preserve"``: the original layers are the main branch and every added branch starts at zero, so the
            model computes the same function in eval and in train mode. ``"paper"``: the published initialisation; the
            main branch keeps its kernel.
        online: train with one convolution per layer, its kernel computed in each forward; batch norms of branches
            become factors per channel. Default: as the block says (only ``orepa`` does).
        example_inputs: what to run the network on; a tuple for several arguments. They are made up if left out, and
            multiply-adds are then not counted per sample.
        verify: True: every kind of block is run against the layers that it replaces, and the network with all blocks
            against the original, on a copy, once in eval and once in train mode; every block has to be entered. A block
            that does not hold is taken back alone, with a warning. ``"folds"``: only the blocks by themselves. False:
            neither.
        strict: raise for a block that does not hold.
        inplace: edit ``model`` itself and return it. Original parameters stay the same objects, so an optimizer keeps
            them (it does not know the new ones); only ``doconv`` replaces the kernel by its own W, and
            ``lora(freeze=True)`` a layer's numbers by ones that are not trained.

    Raises:
        ReparamError: bad input, an unknown block, option or filter, a pattern that matches nothing (near names are
            listed). The model is then as it was.
        EquivalenceError: with ``strict`` a block does not hold; without, the network differs whatever is taken back.
    """
    planned = plan(
        model, block, where=where, init=init, online=online, example_inputs=example_inputs, verify=verify,
        strict=strict, inplace=inplace,
    )  # fmt: skip
    with undisturbed(model):
        return planned.apply()


def plan(
    model: nn.Module,
    block: Blocks,
    *,
    where: Where = None,
    init: str = "preserve",
    online: bool | None = None,
    example_inputs: Any = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
) -> Plan:
    """What :func:`expand` would do with the same arguments: a table when printed, ``.apply()`` does it.

    Nothing is touched. Each row is one convolution: its geometry, the block or the reason why it is left alone, and
    parameters and multiply-adds before, in training and after collapse; the latter per sample with ``example_inputs``
    (run in evaluation: a head that only trains counts none), else per output position. ``apply()`` may be called again
    for another model, and raises if the model's layers have been replaced in the meantime. Raises as :func:`expand`
    does.
    """
    with undisturbed(model):
        return make_plan(
            model,
            block,
            where=where,
            init=init,
            online=online,
            example_inputs=example_inputs,
            verify=verify,
            strict=strict,
            inplace=inplace,
        )


def equivalent_conv(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The kernel and bias of the one convolution (or linear layer) that ``module`` is in eval mode.

    Differentiable with respect to its parameters, for penalties on the kernel that will be deployed and for
    quantisation-aware training. Computed in float64 and given in the dtype of the module's parameters.

    Args:
        module: a block of an expanded model, or any module that is one convolution; of a layer that does more in its
            forward than convolve, what it convolves with.

    Returns:
        weight ``(out, in / groups, *kernel)``; bias ``(out,)``, or None where there is none.

    Raises:
        ReparamError: the module is not one convolution, with the reason.

    Source: Ding et al., "Diverse Branch Block" (CVPR 2021), sec. 3.2.
    """
    first = next(module.parameters(), None)
    if first is None:
        raise ReparamError(f"{type(module).__name__} has no parameters: it has no kernel")
    try:
        form = Reading(module).layer()
    except RefusalError as error:
        raise ReparamError(f"{type(module).__name__} is not one convolution: {error}") from error
    if isinstance(form, ConvForm) and any(u != 1 for u in form.up):
        raise ReparamError(f"{type(module).__name__} is a transposed convolution")
    bias = None if form.bias is None else form.bias.to(first.device, first.dtype)
    return form.weight.to(first.device, first.dtype), bias


def param_groups(model: nn.Module, weight_decay: float, *, decay_biases: bool = False) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: batch norms and factors per channel are never decayed.

    Frozen parameters are left out. For timm's factory: ``create_optimizer_v2(model, ..., param_group_fn=lambda m:
    reparam.param_groups(m, 1e-4))``.

    Args:
        model: expanded or plain.
        weight_decay: for kernels, and everything else that is not named below.
        decay_biases: whether biases are decayed too.
    """
    never: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            norm = isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, ChannelScale))
            if norm or (name == "bias" and not decay_biases):
                never[id(parameter)] = parameter
    decayed = [p for p in model.parameters() if p.requires_grad and id(p) not in never]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": list(never.values()), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
