"""What is wrong with an edit."""

from __future__ import annotations

__all__ = ["EditError"]


class EditError(ValueError):
    """An edit that cannot be made, written down or read; the message says which and why."""
