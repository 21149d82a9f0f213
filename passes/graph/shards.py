"""Networks of which each process holds a part: what reads numbers would wait for the others, or read a part alone."""

from __future__ import annotations

from torch import Tensor, nn

from passes.graph.walk import named_of
from passes.refusal import ReparamError

__all__ = ["check_whole"]


def check_whole(model: nn.Module) -> None:
    """Raise :class:`ReparamError` at once, and so on every rank, if a model is sharded (FSDP, tensor parallelism).

    After a forward FSDP2 may hold whole weights for a while: then its modules say so.
    """
    held, inside = [*model.named_parameters(), *model.named_buffers()], named_of(model)
    kinds = {kind for kind in {type(t) for _, t in held} if _is_kind_of_shard(kind)}
    sharding = {kind for kind in {type(m) for _, m in inside} if _shards(kind)}
    tensors = (name for name, t in held if type(t) in kinds or getattr(t, "_is_flat_param", False))
    modules = (name or type(model).__name__ for name, m in inside if type(m) in sharding)
    name = next((each for found in (tensors, modules) for each in found), None)
    if name is not None:
        raise ReparamError(
            f"{name} is a part of what several processes hold (FSDP): take the whole state dict, "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict on every rank, into the network as it was, and give that"
        )


def _is_kind_of_shard(kind: type[Tensor]) -> bool:
    """A tensor of FSDP2 or tensor parallelism, or the flat parameter of the first FSDP."""
    names = {f"{base.__module__}.{base.__name__}" for base in kind.__mro__}
    return any(
        name.startswith("torch.distributed.") and name.endswith((".DTensor", ".FlatParameter")) for name in names
    )


def _shards(kind: type[nn.Module]) -> bool:
    return any(base.__module__.startswith("torch.distributed.fsdp") for base in kind.__mro__)
