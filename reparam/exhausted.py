"""Whether an exception, or what a process wrote last, says that memory ran out: each library has words of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["WORDS", "causes", "says_exhausted", "was_exhausted"]

WORDS = "out of memory: the system gives no more; take a smaller network, or a machine or limit with more memory"
SIGNS = re.compile(
    r"MemoryError|bad_alloc|out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|\(os error 12\)|unable to mmap|can't start new thread|could not create a (primitive|memory)",
    re.IGNORECASE,
)
"""Of Python and numpy, C++, CUDA, torch on the CPU, C, torch on other systems, Rust; torch's files, threads,
oneDNN, which gives no reason and hardly has another."""


def was_exhausted(error: BaseException | None) -> bool:
    """Whether memory ran out in an exception, or in what it was raised from."""
    return any(isinstance(e, MemoryError) or says_exhausted(f"{type(e).__name__}: {e}") for e in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and what it came of, each once: ``raise error from error`` makes it its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def says_exhausted(text: str) -> bool:
    """Whether a text, such as the end of what a process wrote, speaks of it."""
    return SIGNS.search(text) is not None
