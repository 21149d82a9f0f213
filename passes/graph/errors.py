"""Why a forward is not read, as errors while it is traced and as the refusal that a person is told."""

from __future__ import annotations

import dis
import os
import traceback
from pathlib import Path

import torch
from torch import nn

from passes.refusal import Reason, Refusal

__all__ = ["NotCapturedError", "RejectedError", "first_line", "is_raised", "refusal_of", "said_in"]


class NotCapturedError(Exception):
    """Code does what a graph cannot say; the module around it becomes one opaque call."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RejectedError(Exception):
    """The forward raises an error of its own."""


def refusal_of(error: Exception) -> Refusal:
    """Why a module is not read, with the place in its code."""
    text = str(error).strip().splitlines()
    reason = error.reason if isinstance(error, NotCapturedError) else Reason.UNTRACEABLE
    at = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if _is_theirs(f.filename)), None)
    where = f" ({at.filename.rpartition('/')[2]}:{at.lineno})" if at is not None else ""
    if isinstance(error, NotCapturedError):
        return Refusal(reason, f"{text[0] if text else reason.value}"[:200] + where)
    return Refusal(reason, f"{reason.value}: {type(error).__name__}: {text[0] if text else ''}"[:200] + where)


def is_raised(error: Exception) -> bool:
    """Whether code of a person raises this, or asserts what does not hold."""
    if isinstance(error, NotCapturedError) or error.__traceback__ is None:
        return False
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    frame = at.tb_frame
    if frame.f_code is torch._assert.__code__:
        return True
    return _is_theirs(frame.f_code.co_filename) and dis.opname[frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def said_in(error: Exception) -> str:
    """The same, and in which layer of the network that was running."""
    run = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [module for module in run if isinstance(module, nn.Module)]
    names = {id(m): name for name, m in modules[0].named_modules()} if modules else {}
    inner = next((m for m in reversed(modules) if names.get(id(m))), None)
    if inner is None:
        return first_line(error)
    return f"{first_line(error)} (in {names[id(inner)]}, {type(inner).__name__})"


_OURS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
"""Folders of torch, and of what traces."""


def _is_theirs(filename: str) -> bool:
    return not filename.startswith((*_OURS, "<frozen"))
