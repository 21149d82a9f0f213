"""Low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, sec. 4.1)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.layers import Times
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["lora"]


@block("lora", meant={"kernel": 1}, linear=True, adapter=True)
def lora(
    conv: Site, *, rank: int = 4, alpha: float | None = None, freeze: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Low-rank adapter for linear layers and 1x1 convolutions: W x + (alpha / rank) B A x, B zero at first.

    A has the layer's kernel and gives ``rank`` channels (of each group), B is pointwise. ``alpha`` is ``rank`` by
    default. ``freeze`` trains the adapter only; adapters of layers that are frozen already are trained as well.
    """
    if rank < 1:
        raise ReparamError(f"block 'lora': rank is at least 1, got {rank}")
    narrow = rank * conv.groups
    yield "main", conv.main(norm=False, frozen=freeze)
    down, up = conv.parallel(conv.kernel, channels=narrow, norm=False), conv.mixed(narrow)
    nn.init.zeros_(up.weight)
    yield "adapter", conv.row(down=down, times=Times((rank if alpha is None else alpha) / rank), up=up)
