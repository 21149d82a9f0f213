"""Peak memory of one collapse, measured in a process of its own: ``python -m zoo.peak timm:repvgg_a0 [--no-verify]``.

Python's own tools do not see torch's memory, so this reads the process's high-water mark from the system. Prints
one JSON object: ``model`` (bytes of the model's state) and ``peak`` (bytes above what the process held before).
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

__all__ = ["main"]

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def main(spec: str, verify: bool) -> None:
    """Build a network, collapse a small one first to load what a first use loads, then measure."""
    import reparam
    from reparam import sources

    torch.set_num_threads(1)
    # Imports and caches of a first use are no part of the answer.
    reparam.collapse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), verify=verify)
    model = sources.create(spec).eval()
    gc.collect()
    before = _reset()
    reparam.collapse(model, verify=verify)
    held = sum(value.nbytes for value in model.state_dict().values())
    json.dump({"model": held, "peak": max(_high_water() - before, 0)}, sys.stdout)


def _reset() -> int:
    """Set the high-water mark to what is held now, and return that in bytes."""
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        # Elsewhere the mark cannot be lowered: building the network then hides part of the collapse.
        return _high_water()
    return _status("VmRSS")


def _high_water() -> int:
    if STATUS.exists():
        return _status("VmHWM")
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _status(key: str) -> int:
    """A field of the process's status, in bytes."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main(sys.argv[1], verify="--no-verify" not in sys.argv)
