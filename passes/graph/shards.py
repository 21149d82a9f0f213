"""Networks of which each process holds a part: what reads numbers would wait for the others, or read a part alone."""

from __future__ import annotations

from torch import Tensor, nn

from passes.refusal import ReparamError

__all__ = ["check_whole"]


def check_whole(model: nn.Module) -> None:
    """Raise :class:`ReparamError` at once, and so on every rank, if a model is sharded (FSDP, tensor parallelism).

    After a forward FSDP2 may hold whole weights for a while: then its modules say so.
    """
    tensors = (name for name, t in (*model.named_parameters(), *model.named_buffers()) if _is_shard(t))
    modules = (name or type(model).__name__ for name, m in model.named_modules() if _shards(m))
    name = next((each for found in (tensors, modules) for each in found), None)
    if name is not None:
        raise ReparamError(
            f"{name} is a part of what several processes hold (FSDP): take the whole state dict, "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict on every rank, into the network as it was, and give that"
        )


def _is_shard(tensor: Tensor) -> bool:
    """A tensor of FSDP2 or tensor parallelism, or the flat parameter of the first FSDP."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(tensor).__mro__}
    return getattr(tensor, "_is_flat_param", False) or any(
        name.startswith("torch.distributed.") and name.endswith((".DTensor", ".FlatParameter")) for name in names
    )


def _shards(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(module).__mro__)
