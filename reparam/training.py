"""The verbs around training: plan and expand a model, read a block's kernel, group parameters for the optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from passes.algebra.conv_form import ConvForm
from passes.blocks.kit.layers import BranchSum, ChannelScale, is_block
from passes.budgeted import make_budgeted_plan
from passes.edits.carried import revise
from passes.edits.edit import Block as BlockEdit
from passes.expand import Plan, make_plan
from passes.graph.shards import check_whole
from passes.refusal import RefusalError, ReparamError
from passes.training.budget import Limits
from passes.training.equivalent import Reading
from passes.training.filters import Blocks, Forms, Where, is_auto
from passes.training.forms import Folded, Form
from passes.training.whole_batches import measure_again
from reparam.api import undisturbed

__all__ = ["equivalent_conv", "expand", "param_groups", "plan", "set_form", "update_statistics"]


def expand(
    model: nn.Module,
    block: Blocks | Plan,
    *,
    where: Where = None,
    init: str = "preserve",
    form: str | Form | Mapping[str, str | Form] | None = None,
    online: bool | None = None,
    budget: float | None = None,
    memory: float | None = None,
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
        block: a name of :func:`reparam.blocks`, with options as text (``"acb:gamma=1/3"``) or as a
            :class:`reparam.Block`, or a mapping from patterns on layer paths to any of these; the first pattern that
            matches wins, and what matches none is left alone. ``"auto:acb:gamma=1/3,dbb"``: a budget chooses of these.
            Or a :class:`reparam.Plan`, made for a network of the same layers: just its blocks in its forms.
        where: which layers. Default: those that the block is meant for by its publication (``meant_for`` of
            :func:`reparam.blocks`); ``"all"``: every one that can have it (a layer of that name is ``["all"]``). Else a
            pattern (``"layer1.*"``; a module's path stands for all inside) or several, a predicate
            ``(path, conv) -> bool``, or filters such as ``{"kernel": 3, "depthwise": False}`` (also ``name``,
            ``groups``, ``stride``; a tuple is one shape, a list or range holds several). Filters that say nothing on
            names or kernels leave these as the block is meant.
        init: ``"preserve"``: the original layers are the main branch and every added branch starts at zero, so the
            model computes the same function in eval and in train mode. ``"paper"``: the published initialisation; the
            main branch keeps its kernel.
        form: how the blocks train. ``"branches"``: every branch over the whole batch. ``"sampled"`` (``"sampled:
            fraction=1/4,rows=strided"``, or :class:`reparam.Form`): the branches run over a sample of the batch, an
            eighth by default, for the statistics of their norms; with these they are folded into one kernel, and one
            convolution runs over all of it. ``"frozen"``: norms as in evaluation, folded in every forward.
            ``"online"``: one convolution whose kernel is computed in every forward; batch norms of branches become
            factors per channel. Default: as the block says (``orepa`` trains online);
            :func:`set_form` changes it later. A mapping from patterns to forms is read like one of blocks.
        online: the former name of ``form="online"`` and ``form="branches"``; it will go.
        budget: so many plain training steps may a step (forward, backward, SGD with momentum) take, ``1.5`` for
            example, measured on ``example_inputs`` and the device at hand; on the CPU, process time of one thread.
            Layers get blocks in the order of kernel numbers for what the block adds, first in the cheapest form, then,
            while there is room, in the richest; ``form=None`` offers ``branches`` and ``sampled``. That orders by cost
            and capacity, not by proven accuracy. The plan says what was predicted and what was measured.
        memory: the same for the peak memory of a step, with or without a budget for its time.
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
        model, block, where=where, init=init, form=form, online=online, budget=budget, memory=memory,
        example_inputs=example_inputs, verify=verify, strict=strict, inplace=inplace,
    )  # fmt: skip
    with undisturbed(model):
        return planned.apply()


def plan(
    model: nn.Module,
    block: Blocks | Plan,
    *,
    where: Where = None,
    init: str = "preserve",
    form: str | Form | Mapping[str, str | Form] | None = None,
    online: bool | None = None,
    budget: float | None = None,
    memory: float | None = None,
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
    how: dict[str, Any] = {
        "where": where, "init": init, "example_inputs": example_inputs, "verify": verify, "strict": strict,
        "inplace": inplace,
    }  # fmt: skip
    forms: Forms = (
        {pattern: Form.of(each) for pattern, each in form.items()}
        if isinstance(form, Mapping)
        else form_of(form, online)
    )
    limits = None if budget is None and memory is None else Limits(budget, memory)
    if isinstance(block, Plan):
        if limits is not None or forms is not None or where is not None or init != "preserve":
            raise ReparamError("a plan says which layers get what: leave out where=, init=, form=, budget= and memory=")
        how |= block.arguments
    else:
        how |= {"block": block, "form": forms}
    with undisturbed(model):
        if limits is not None:
            return make_budgeted_plan(model, limits=limits, **how)
        if any(map(is_auto, block.values() if isinstance(block, Mapping) else [block])):
            raise ReparamError("auto chooses by what a training step costs: pass budget= or memory=")
        return make_plan(model, **how)


def form_of(form: str | Form | None, online: bool | None) -> Form | None:
    """The form that was asked for, by either name."""
    if online is None:
        return None if form is None else Form.of(form)
    if form is not None or not isinstance(online, bool):
        raise ReparamError(
            f"online= is the former name of form=, got online={online!r} and form={form!r}; leave it out"
        )
    wanted = "online" if online else "branches"
    warnings.warn(f"online={online} is now form={wanted!r}", DeprecationWarning, stacklevel=3)
    return Form(wanted)


def set_form(model: nn.Module, form: str | Form) -> nn.Module:
    """Let every block of ``model`` train in another form, in place; parameters, state dict and keys stay.

    Args:
        model: an expanded network.
        form: ``"branches"``, ``"sampled"`` or ``"frozen"``; see :func:`expand`. A block with one branch, and
            without a batch norm in it, is one convolution in each of them.

    Returns:
        ``model``.

    Raises:
        ReparamError: there is no block; a block was built online, which has factors instead of the branches' norms, or
            is to become so; a block whose branches cannot be read. Nothing is changed then.
    """
    wanted = Form.of(form)
    blocks = {path: module for path, module in _network(model).named_modules() if is_block(module)}
    if not blocks:
        raise ReparamError("there is no block in this network: reparam.expand puts them in")
    made = {}
    for path, module in blocks.items():
        if isinstance(module, BranchSum):
            if Form.of(module.form).online != wanted.online:
                raise ReparamError(
                    f"{path} was built as {module.form} and cannot train as {wanted}: online has factors, not "
                    "the norms of branches; collapse, and expand again"
                )
            try:
                made[path] = Folded(wanted, module)
                made[path].succeed(module.folded, module)
            except RefusalError as error:
                raise ReparamError(f"{path} cannot train as {wanted}: {error}") from error
    for path, folded in made.items():
        blocks[path].folded, blocks[path].form = folded, str(wanted)
    revise(model, lambda edit: replace(edit, form=str(wanted)) if isinstance(edit, BlockEdit) else edit)
    return model


def update_statistics(model: nn.Module, loader: Iterable[Any], device: torch.device | int | None = None) -> nn.Module:
    """Running statistics of whole batches, for networks that trained as ``sampled``; in place, before collapse.

    Every batch norm's statistics become the mean over all batches, with all branches running over whole batches, as by
    :func:`torch.optim.swa_utils.update_bn`. A norm that no batch reaches keeps its own. Nothing else changes.

    Args:
        model: the network; every module keeps its mode.
        loader: batches as the network takes them, mappings of keywords among them, or tuples and lists that begin with
            one.
        device: where batches are moved to; default: left where they are.

    Returns:
        ``model``.

    Raises:
        ReparamError: no norm keeps running statistics, there is no batch, one is none for this network, or statistics
            come out as NaN or infinity. All are as they were then, and so they are after an interrupt.
    """
    measure_again(_network(model), loader, device)
    return model


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
    first = next(_network(module).parameters(), None)
    if first is None:
        raise ReparamError(f"{type(module).__name__} has no parameters: it has no kernel")
    check_whole(module)
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

    Raises:
        ReparamError: ``weight_decay`` is no finite number from 0 on, which no optimizer looks at in a group.
    """
    number = isinstance(weight_decay, (int, float)) and not isinstance(weight_decay, bool)
    if not number or not 0 <= weight_decay < math.inf:
        raise ReparamError(f"weight_decay is a number from 0 on, 1e-4 for example, got {weight_decay!r}")
    never: dict[int, Tensor] = {}
    for module in _network(model).modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            norm = isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, ChannelScale))
            if norm or (name == "bias" and not decay_biases):
                never[id(parameter)] = parameter
    decayed = [p for p in model.parameters() if p.requires_grad and id(p) not in never]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": list(never.values()), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _network(model: Any) -> nn.Module:
    """``model``, which a person may have taken a state dict, a path or a generator for."""
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return model
