"""Resident memory of a process, from the system: Python's own tools do not see torch's.

Pages of files are left out: those are the code of libraries, which a process gets as it first uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["Peak", "high_water", "reset", "resident", "return_freed"]

PAGE = os.sysconf("SC_PAGE_SIZE")
M_MMAP_THRESHOLD = -3
"""glibc's number for the size from which memory is taken from the system, and given back, piece by piece."""
LARGE, LARGEST = 512 << 10, 32 << 20
"""Bytes: a size that few tensors of small networks have, and the largest that glibc takes."""


def resident(pid: int | str = "self") -> int:
    """Bytes that a process holds now; 0 if that cannot be told, or if it is gone."""
    try:
        _, held, of_files, *_ = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
        return (int(held) - int(of_files)) * PAGE
    except (OSError, ValueError):
        return 0


def reset() -> int:
    """Begin a new high-water mark of this process, and return the bytes that it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return high_water()  # elsewhere the mark cannot be lowered
    return resident()


def high_water() -> int:
    """Bytes that this process held at most since the last :func:`reset`, if it loaded no code since it did."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        fields = dict(line.partition(":")[::2] for line in lines)
        most, of_files = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile"))
        return most - of_files
    except (OSError, KeyError):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def return_freed(at_once: bool) -> None:
    """Give freed memory back to the system now, and from now on that of every tensor as soon as it is freed, or not.

    glibc otherwise keeps what is freed, and the next stage comes on top of it. Asking the system each time costs up to
    half of the speed, so this is for large networks, and not while they are timed.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE if at_once else LARGEST)
        library.malloc_trim(0)


class Peak:
    """The memory of training: what came on top of all that the process held at the beginning, and what it held itself.

    Args:
        device: of the training.
        held: bytes that the training holds now.
    """

    def __init__(self, device: torch.device, held: int) -> None:
        self.device, self.held = device, held
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            return_freed(at_once=False)  # or freed memory of what ran before would hide what comes
            self.before = reset()

    def bytes(self) -> int:
        """Bytes that were held at most since then."""
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else high_water()
        return max(most - self.before, 0) + self.held
