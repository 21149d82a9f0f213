"""Running statistics over whole batches: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.blocks.kit.layers import BranchSum
from passes.graph.errors import said_in
from passes.graph.inputs import as_call, tensors_in
from passes.graph.modes import kept_modes
from passes.refusal import ReparamError

__all__ = ["measure_again"]


def measure_again(model: nn.Module, loader: Iterable[Any], device: torch.device | int | None) -> None:
    """Let every batch norm's running statistics be the mean over all batches, in training mode.

    A norm that no batch reaches keeps its own. Raises :class:`ReparamError`, with everything as it was, where there is
    no norm or no batch, a batch is none for this model, or a statistic is not finite.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    norms = {name: norm for name, norm in norms.items() if norm.track_running_stats}
    if not norms:
        raise ReparamError(
            "no batch norm of this network keeps running statistics: there is nothing to update; "
            "where collapse has folded them, update the network that it was made of"
        )
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not isinstance(loader, Iterable):
        raise ReparamError(f"loader gives batches, as a DataLoader or [batch] does, got {type(loader).__name__}")
    count = 0
    with kept_modes(model, training=None), _whole(model), torch.no_grad():
        model.train()
        moving = {name: norm for name, norm in norms.items() if norm.training}  # a model's own train() may keep some
        with _averaged(moving):
            for batch in loader:
                _run(model, batch, device, count)
                count += 1
            if not count:
                raise ReparamError("loader gives no batch: the running statistics are as they were")
            for name, norm in moving.items():
                if not all(bool(s.isfinite().all()) for s in norm.buffers(recurse=False)):
                    raise ReparamError(
                        f"{name}: its statistics over {count} batches are not finite, and all are as they were; "
                        "look for NaN or infinity in the batches and weights"
                    )


def _run(model: nn.Module, batch: Any, device: torch.device | int | None, number: int) -> None:
    """One forward on a batch, or on what a batch with labels begins with."""
    inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not all(tensor.numel() for tensor in tensors_in(inputs)):
        raise ReparamError(f"batch {number} of loader holds no sample; the running statistics are as they were")
    try:
        args, kwargs = as_call(inputs, model) if isinstance(inputs, Mapping) else ((inputs,), {})
        if device is not None:
            args = tuple(arg.to(device) if hasattr(arg, "to") else arg for arg in args)
            kwargs = {key: arg.to(device) if hasattr(arg, "to") else arg for key, arg in kwargs.items()}
        model(*args, **kwargs)
    # The model is user code: whatever it raises means that it does not take this batch.
    except Exception as error:
        said = said_in(error).replace("example_inputs has", "it has")
        raise ReparamError(
            f"batch {number} of loader, a {type(batch).__name__}, is none for this model, and the running statistics "
            f"are as they were: {said}; a batch is what the model takes, or a tuple that begins with it"
        ) from error


@contextmanager
def _averaged(norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Let norms average over their calls inside; what is raised, be it by who interrupts, leaves them as they were."""
    held = [(norm, norm.momentum, dict(norm._buffers), _numbers(norm)) for norm in norms.values()]
    try:
        for norm, _, buffers, _ in held:
            if buffers.get("num_batches_tracked") is None:
                norm.num_batches_tracked = torch.tensor(0, device=norm.running_mean.device)  # type: ignore[union-attr]
            norm.reset_running_stats()
            norm.momentum = None
        begun = [_numbers(norm) for norm in norms.values()]
        yield
        for (norm, *_, before), reset in zip(held, begun, strict=True):
            if all(torch.equal(t, reset[name]) for name, t in norm.named_buffers(recurse=False)):  # no batch came here
                _restore(norm, before)
    except BaseException:
        for norm, *_, before in held:
            _restore(norm, before)
        raise
    finally:
        for norm, momentum, buffers, _ in held:
            norm.momentum = momentum
            norm._buffers.update(buffers)


def _numbers(norm: _BatchNorm) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}


def _restore(norm: _BatchNorm, numbers: Mapping[str, Tensor]) -> None:
    for name, number in numbers.items():
        norm.get_buffer(name).copy_(number)


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Let the branches of every block run over whole batches, and their statistics count as such at the end."""
    folded = [(module, module.folded) for module in model.modules() if isinstance(module, BranchSum)]
    for module, _ in folded:
        if module.form != "online":
            module.folded = None
    try:
        yield
    except BaseException:
        for module, held in folded:
            module.folded = held
        raise
    for module, held in folded:
        module.folded = held
        if held is not None:
            held.note_statistics(module)
