"""The generators of random numbers that a forward may draw from: torch's, Python's and NumPy's.

They are the whole process's: while one thread seeds them, runs a network and restores them, another one must not.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["alone", "kept_generators", "states"]

_ONE = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time: the verbs look at what a forward does to the process, and put it back."""
    with _ONE:
        yield


@contextmanager
def kept_generators(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Give all generators their states back afterwards; of the GPUs, those of ``devices``."""
    with alone(), _restored(devices):
        yield


@contextmanager
def _restored(devices: Iterable[torch.device]) -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    main, others = torch.default_generator.get_state(), [torch.cuda.get_rng_state(i) for i in cuda]
    try:
        yield
    finally:
        torch.default_generator.set_state(main)
        random.setstate(python)
        if numpy is not None and arrays is not None:
            numpy.random.set_state(arrays)
        for i, state in zip(cuda, others, strict=True):
            torch.cuda.set_rng_state(state, i)


def states() -> tuple[Any, ...]:
    """The states of the generators that are not torch's, to be compared."""
    numpy: Any = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return (random.getstate(), *(part.tobytes() if hasattr(part, "tobytes") else part for part in state))
