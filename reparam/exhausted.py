"""Whether an exception, or what a process wrote last, says that memory ran out: each library has words of its own."""

from __future__ import annotations

import re

__all__ = ["WORDS", "says_exhausted", "was_exhausted"]

WORDS = "out of memory: the system gives no more; take a smaller network, or a machine or limit with more memory"
SIGNS = re.compile(
    r"MemoryError|bad_alloc|out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|\(os error 12\)|unable to mmap|can't start new thread",
    re.IGNORECASE,
)
"""Of Python and numpy, C++, CUDA, torch on the CPU, C, torch on other systems, Rust; torch's files and threads."""


def was_exhausted(error: BaseException | None) -> bool:
    """Whether memory ran out in an exception, or in what it was raised from."""
    while error is not None:
        if isinstance(error, MemoryError) or says_exhausted(f"{type(error).__name__}: {error}"):
            return True
        error = error.__cause__
    return False


def says_exhausted(text: str) -> bool:
    """Whether a text, such as the end of what a process wrote, speaks of it."""
    return SIGNS.search(text) is not None
