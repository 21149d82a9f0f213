"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["section"]


def section(title: str, header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    """A titled table, or nothing where there are no rows."""
    if not body:
        return []
    rows = [header, *body]
    widths = [min(max(len(row[i]) for row in rows), 70) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["", *([title] if title else []), lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
