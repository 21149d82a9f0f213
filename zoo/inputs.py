"""An input for any network of the zoo, as small as the network takes it, and how to run the network on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passes.graph.inputs import USUAL, declared_shape, input_count, likely_shapes

__all__ = ["View", "find_view", "native_view"]


@dataclass(frozen=True)
class View:
    """The shape of one sample's inputs, and which part of the network is run on them.

    Args:
        shape: of each input of one sample, without the batch.
        outputs: ``"whole"``: what the network returns; ``"features"``: a detector's feature maps and what its head
            makes of them (its boxes are a selection, and empty in an untrained network).
        count: of the inputs; optical flow is that of two images.
    """

    shape: tuple[int, ...]
    outputs: str = "whole"
    count: int = 1

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random numbers, float32, the same for the same seed; no two inputs are alike."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn((batch, *self.shape), generator=generator) for _ in range(self.count))

    @torch.no_grad()
    def run(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """All tensors that come out, whatever they are nested in; a network's own random choices are the same ones."""
        torch.manual_seed(0)
        result = model(*inputs) if self.outputs == "whole" else _features(model, *inputs)
        return [value for value in tree_leaves(_plain(result)) if isinstance(value, Tensor)]


def find_view(model: nn.Module) -> tuple[View | None, str]:
    """The cheapest view of ``model`` that works, in eval mode; or None and why there is none."""
    tried = ""
    for view in _views(model):
        try:
            results = view.run(model, view.inputs(1))
        # Any exception means that the network does not take this input.
        except Exception as error:
            tried = tried or f"{view.shape}: {type(error).__name__}: {error}".splitlines()[0]
            continue
        if any(value.numel() and value.is_floating_point() for value in results):
            return view, ""
        tried = tried or f"{view.shape}: it returns no numbers"
    return None, f"no input could be made for it ({tried})"


def native_view(model: nn.Module, view: View) -> View:
    """The view at the size that the network is made for, for its latency; ``view`` itself where that is not known."""
    shape = declared_shape(model)
    if shape is None and len(view.shape) > 1:
        shape = (view.shape[0], *USUAL[len(view.shape) - 1])
    return view if shape is None else replace(view, shape=shape)


def _views(model: nn.Module) -> Iterator[View]:
    # A segmentation network has a backbone too; only a detector has the transform that puts images into a batch.
    detector = isinstance(getattr(model, "backbone", None), nn.Module) and hasattr(model, "transform")
    for outputs in ("features", "whole") if detector else ("whole",):
        for shape in dict.fromkeys([*likely_shapes(model), (3, 224, 224)]):
            yield View(shape, outputs, input_count(model))


def _features(model: Any, x: Tensor) -> Any:
    features = list(model.backbone(x).values())
    head = getattr(model, "head", None) or getattr(getattr(model, "rpn", None), "head", None)
    return [features, head(features) if head is not None else ()]


def _plain(result: Any) -> Any:
    """Mappings of other packages are no mappings to torch's trees."""
    if isinstance(result, Mapping):
        return {str(key): _plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_plain(value) for value in result]
    return result
