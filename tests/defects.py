"""Defects to plant, as data: a fragment of source that is there exactly once, and what stands there instead.

They are written in ``defects.txt``, each as a line ``== part: what is wrong then``, the fragment behind ``-`` and its
replacement behind ``+``; fragments may be parts of lines. A line behind ``#`` says why nothing can notice it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFECTS", "Defect", "place_of"]


@dataclass(frozen=True)
class Defect:
    """One change of one file.

    Args:
        part: of the compiler.
        name: what is wrong with it then; unique.
        old, new: the fragment and what takes its place.
        note: why the change has no effect, if it has none.
    """

    part: str
    name: str
    old: str
    new: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.part}: {self.name}"


def place_of(defect: Defect, root: Path) -> Path:
    """The one file of the compiler below ``root`` that holds the fragment, once; raises LookupError otherwise."""
    found = {}
    for package in ("passes", "reparam"):
        for path in sorted((root / package).rglob("*.py")):
            if count := path.read_text().count(defect.old):
                found[path] = count
    if list(found.values()) != [1]:
        places = ", ".join(f"{path.relative_to(root)} ({count})" for path, count in found.items()) or "nowhere"
        raise LookupError(f"{defect}: its fragment must stand once, and stands {places}")
    return next(iter(found))


def _read(text: str) -> tuple[Defect, ...]:
    found = []
    for entry in text.split("\n== ")[1:]:
        title, *lines = entry.splitlines()
        part, _, name = title.partition(": ")
        old, new, note = ("\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+#")
        found.append(Defect(part, name, old, new, note.strip()))
    return tuple(found)


DEFECTS = _read("\n" + (Path(__file__).parent / "defects.txt").read_text())
"""All of them."""
