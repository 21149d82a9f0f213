"""One block in the place of one convolution: built, read on the meta device, and seen to keep the function.

A block is tried without numbers first: it must fold, by the laws of :mod:`passes.algebra.conv_form`, into just the
convolution that it replaces.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.lowering import target_of
from passes.blocks.kit.builder import Site
from passes.blocks.kit.kernel_conv import KernelConv
from passes.blocks.kit.layers import BranchSum, silence, stand_in
from passes.blocks.kit.registry import Block
from passes.blocks.kit.transposed import site_at
from passes.edits.edit import Block as BlockEdit
from passes.fold.methods import classes_of, folded_from_outside
from passes.graph.copies import deep_copy
from passes.graph.leaf import inherits_forward, without_hooks
from passes.graph.modes import kept_modes
from passes.graph.weights import weight_like, weight_maker, weight_sources
from passes.graph.within import Inner, Within
from passes.refusal import Reason, Refusal, RefusalError, ReparamError
from passes.training.discovery import Found, Norm, plain_norm
from passes.training.equivalent import Reading, plain_layer
from passes.training.forms import Form, scales_for_norms, train_as
from passes.training.inside import inside_of, is_steady, plain_conv, sizes_for

__all__ = ["Cost", "answers_for", "build", "check_preserved", "rebuilt", "signature", "site_of", "try_on_meta"]


@dataclass(frozen=True)
class Cost:
    """What a layer holds and does: before, while training, and after collapse.

    ``multiply_adds`` are per sample if the plan was given example inputs, else per output position; batch norms and
    sums of branches count one for each value.
    """

    parameters: tuple[int, int, int]
    multiply_adds: tuple[float, float, float]


def site_of(model: nn.Module, found: Found, preserve: bool, form: Form) -> Site:
    """A convolution that was found, and its norm, as they stand in ``model``."""
    conv = without_hooks(model.get_submodule(found.path))  # they go on as those of the block
    assert isinstance(conv, (_ConvNd, nn.Linear))
    norm = None
    if found.norm is not None:
        held = model.get_submodule(found.norm.path)
        assert isinstance(held, _BatchNorm)
        norm = plain_norm(held, weight_like(conv).dim() - 2)
    options: dict[str, Any] = {"preserve": preserve, "online": form.online, "norms": found.norms}
    if found.inside is None:
        return site_at(conv, norm, **options)
    assert isinstance(conv, _ConvNd)
    return Site(plain_conv(conv, found.inside), norm, layer=conv, inside=found.inside, **options)


def build(layer: str, site: Site, block: Block, form: Form, *, recorded: bool = True) -> nn.Module:
    """The block for one convolution, in its dtype, on its device, as trainable as it is.

    Without ``recorded``, it is left as the sum of branches that its kernel is recorded from, whatever its form.
    """
    conv, norm = site.conv, site.norm
    own = {id(p) for m in (conv, norm) if m is not None for p in m.parameters()}
    try:
        branches = block.branches(site)
    except (RefusalError, ReparamError):
        raise
    # A block is user code, and so are its options.
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ReparamError(f"{layer}: {block} cannot be built, {type(error).__name__}: {why}") from error
    _check_one_kernel(site, branches)
    _check_made(site, block, branches)
    others = list(branches.values())[1:]
    if site.preserve:
        for branch in others:
            silence(branch)
    if form.online:
        branches = {name: scales_for_norms(branch, site.n) for name, branch in branches.items()}
    layout = target_of([site.like])
    whole = {m for each in (conv, norm) if each is not None for m in each.modules()}
    for branch in branches.values():
        for module in branch.modules():
            if module not in whole:
                module.training = conv.training if norm is None else norm.training
        for parameter in branch.parameters():
            if id(parameter) in own:
                continue
            if not site.like.requires_grad and not block.info.adapter:
                parameter.requires_grad_(False)
            if layout.channels_last and parameter.dim() == site.like.dim() and parameter.dim() in (4, 5):
                last = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=last)
    computed = site.inside is not None and site.inside.computed
    recorded = recorded or (computed and form.online)
    if len(branches) == 1 and site.layer is None and not (recorded and form.online):
        (alone,) = branches.values()
        stand_in(alone, str(block), conv)
        return alone
    module = BranchSum(str(block), branches, conv, site.layer, site.inside)
    module.training = conv.training
    module.reparam_layer = plain_layer if site.layer is None else None
    if recorded:
        train_as(module, form)
    return module


def _check_one_kernel(site: Site, branches: dict[str, nn.Module]) -> None:
    """A layer that computes with its weight is given a kernel, in whose place no sum of maps can stand."""
    if site.inside is None or not site.inside.computed or site.online:
        return
    if len(branches) > 1 or not all(isinstance(branch, (KernelConv, _ConvNd)) for branch in branches.values()):
        raise RefusalError(
            Reason.ONE_KERNEL,
            f"{type(site.layer).__name__} computes the kernel that it convolves with from its weight, which no sum of "
            "branches goes through: a block that is one kernel does (doconv, or any with form='online')",
        )


def _check_made(site: Site, block: Block, branches: dict[str, nn.Module]) -> None:
    """A weight that is computed in each call stays so: its layer has to be a branch, as it is."""
    if (maker := weight_maker(site.conv)) is None:
        return
    inside = (module for branch in branches.values() for module in branch.modules())
    if not any(isinstance(module, (_ConvNd, nn.Linear)) and weight_maker(module) for module in inside):
        told = f"{maker} computes its weight in each call, and {block} starts from a weight that is a parameter"
        raise RefusalError(Reason.COMPUTED, f"{told}: make that permanent first, or take a block that adds branches")


def _check_steady(site: Site, form: Form) -> None:
    """One kernel takes the place of all branches only where it is the same one in training, each time."""
    maker = weight_maker(site.conv)
    if maker is not None and form.name != "branches" and not is_steady(site.conv):
        told = f"{maker} computes another weight in training than in evaluation, and form={form.name!r} one for both"
        raise RefusalError(Reason.COMPUTED, told)


def rebuilt(model: nn.Module, edit: BlockEdit) -> nn.Module:
    """The block that an edit puts in the place of a convolution of ``model``."""
    conv = model.get_submodule(edit.path)
    if not isinstance(conv, (_ConvNd, nn.Linear)):
        raise ReparamError(f"{edit.path} is no convolution and no linear layer, so it cannot get a block")
    inside = inside_of(conv) if isinstance(conv, _ConvNd) and not inherits_forward(conv) else None
    norm = Norm(edit.norm, edit.rest) if edit.norm else None
    found = Found(edit.path, conv, norm, inside=inside, again=not edit.norms)
    form = Form.of(edit.form)
    site = site_of(model, found, edit.preserve, form)
    made = build(edit.path, site, Block(edit.block, **dict(edit.options)), form)
    if site.norm_taken and edit.norm:
        answers_for(model, edit.norm, made, classes_of(model.modules()))
    return made


def answers_for(model: nn.Module, norm: str, block: nn.Module, running: frozenset[type]) -> bool:
    """Whether what a norm leaves, when it moves into a block, answers as a norm; if not, the block tells no weight.

    ``running`` are the classes of all modules.
    """
    answering = folded_from_outside(model, norm, running)
    if not answering and isinstance(block, BranchSum):
        block.reparam_layer = None
    return answering


def try_on_meta(model: nn.Module, found: Found, block: Block, preserve: bool, form: Form) -> Cost | Refusal:
    """Build the block without numbers and fold it: what it costs, or why it cannot be used here."""
    real = site_of(model, found, preserve, form)
    norm_on_meta = None if real.norm is None else _on_meta(real.norm)
    bare = _on_meta(real.conv)
    options: dict[str, Any] = {"preserve": preserve, "online": form.online, "norms": found.norms}
    if real.layer is None:
        site = site_at(bare, norm_on_meta, **options)
    else:
        site = Site(bare, norm_on_meta, layer=real.layer, inside=real.inside, **options)
    try:
        _check_steady(real, form)
        built = build(found.path, site, block, Form(), recorded=False)
        # What a class of its own does around its convolution is left out: it is the same before and after.
        reading = Reading(Inner(built) if isinstance(built, Within) else built)
        folded = reading.form(None)
    except RefusalError as error:
        return Refusal(error.refusal.reason, error.refusal.message)
    if not site.geometry.matches(folded):
        return Refusal(Reason.BLOCK, f"{block} folds into another geometry than {site.geometry}")
    if folded.bias is not None and not site.shift:
        return Refusal(Reason.BLOCK, f"{block} would leave a bias, and no layer here can take it")
    conv = site.like.numel()
    bias = site.out_channels if site.shift else 0
    norm = 0 if site.norm is None else sum(p.numel() for p in site.norm.parameters())
    own = sum(p.numel() for p in weight_sources(site.conv))
    before = own + (0 if site.conv.bias is None else site.out_channels) + norm
    training = sum(p.numel() for p in built.parameters()) + (0 if site.norm_taken else norm)
    each = conv / (math.prod(site.stride) if site.geometry.transposed else 1)
    normed = each + (0 if site.norm is None or not (site.norm_taken or form.online) else site.out_channels)
    share = {"branches": 1.0, "sampled": form.fraction}.get(form.name, 0.0)
    positions = (normed, (0.0 if share == 1 else normed) + share * reading.multiply_adds(), each)
    return Cost((before, training, conv + bias), positions)


def _on_meta(module: Any) -> Any:
    """The same layer without numbers."""
    if weight_maker(module) is not None:
        return deep_copy(module).to("meta")
    bare = copy.copy(module)
    for table in ("_parameters", "_buffers"):
        tensors = {}
        for name, tensor in module.__dict__[table].items():
            empty = None if tensor is None else torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(empty, tensor.requires_grad) if is_parameter and empty is not None else empty
        bare.__dict__[table] = tensors
    return bare


def signature(site: Site, block: Block, form: Form) -> Any:
    """What decides whether and how a block fits: equal for layers that need to be tried only once."""
    norm = site.norm
    kind = None if norm is None else (type(norm), norm.affine, norm.eps, norm.momentum)
    around = None if site.layer is None else (type(site.layer), site.inside)
    return block, site.geometry, kind, site.conv.bias is None, site.shift, site.norms, form, site.like.dtype, around


def check_preserved(layer: str, site: Site, module: nn.Module) -> None:
    """Run the block and the layers that it replaces on the smallest random input that every tap reads.

    A layer with a forward of its own runs on several sizes. On the meta device there is nothing to compare.
    """
    g, weight = site.geometry, site.like
    if weight.is_meta:
        return
    reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel, strict=True)]
    pads = [sorted(pair) for pair in zip(g.lead, g.trail, strict=True)]
    least = tuple(max(r - p[0], p[1] + 1) + s for r, p, s in zip(reach, pads, g.stride, strict=True))
    if g.transposed:  # as many of the pixels that are so far apart
        least = tuple(size // s + 2 for size, s in zip(least, g.stride, strict=True))
    random = torch.Generator().manual_seed(0)
    own: Any = site.layer or site.conv
    for sizes in [least] if site.layer is None else sizes_for(site.layer):
        x = torch.randn((1, g.in_channels, *sizes), generator=random, device="cpu").to(weight)
        with kept_modes(own, module), torch.no_grad():
            wanted = own(x)
            if site.norm_taken and site.norm is not None:
                wanted = site.norm(wanted)
            got = module(x)
        allowed = torch.finfo(weight.dtype).eps ** 0.5 * max(float(wanted.abs().max()), 1.0)
        gap = float((got - wanted).abs().max())
        if not gap <= allowed:
            raise ReparamError(
                f"{layer}: {module.reparam_block} does not start as the function that it replaces (off by {gap:.3g}); "
                "let every added branch end in a convolution, a batch norm or a module with silence(), or pass "
                "init='paper'"
            )
