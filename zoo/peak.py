"""Peak memory of one collapse, measured in a process of its own: ``python -m zoo.peak timm:repvgg_a0 [--no-verify]``.

Prints one JSON object: ``model`` (bytes of the model's state) and ``peak`` (bytes above what the process held before).
"""

from __future__ import annotations

import gc
import json
import sys

import torch
from torch import nn

from zoo import memory

__all__ = ["main"]


def main(spec: str, verify: bool) -> None:
    """Build a network, collapse a small one first to load what a first use loads, then measure."""
    import reparam
    from reparam import sources

    torch.set_num_threads(1)
    # Imports and caches of a first use are no part of the answer.
    proof = "folds" if verify else False
    reparam.collapse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), verify=proof)
    model = sources.create(spec).eval()
    gc.collect()
    before = memory.reset()
    reparam.collapse(model, verify=proof)
    held = sum(value.nbytes for value in model.state_dict().values())
    json.dump({"model": held, "peak": max(memory.high_water() - before, 0)}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], verify="--no-verify" not in sys.argv)
