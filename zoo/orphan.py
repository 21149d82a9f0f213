"""The server of processes ends with the run, also while it still loads the libraries, when it looks at nothing else."""

from __future__ import annotations

import os
import threading

__all__ = ["settled"]

_LOADED = threading.Event()
POLL = 0.2
"""Seconds between two looks at who the parent is."""


def settled() -> None:
    """The libraries are loaded: from now on the server sees itself when the run is gone."""
    _LOADED.set()
    _THREAD.join()  # a process may only be forked while no other thread is at work


def _watch(parent: int) -> None:
    while not _LOADED.wait(POLL):
        if os.getppid() != parent:
            os._exit(1)


_THREAD = threading.Thread(target=_watch, args=(os.getppid(),), name="orphan", daemon=True)
_THREAD.start()
