"""The folder of a run: one at a time writes into it, and what is written survives ``kill -9`` and loss of power.

The journal is JSON lines (the format is in :mod:`zoo.outcome`), each appended and synced before the next model is
counted as done. A last line that is torn was never counted: it is recognised and cut off when the next run opens the
folder, and passed over when the folder is only read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from passes.edits.typed import fits
from reparam import ReparamError
from reparam.disk import reason_of
from zoo.outcome import Outcome, from_json, refuse_constant

__all__ = ["Folder", "Journal", "JournalError", "read"]

log = logging.getLogger("reparam.zoo")


class JournalError(ReparamError):
    """A run folder that is in use, damaged or full; the message names it and the fix."""


@dataclass(frozen=True)
class Folder:
    """Where the files of a run are."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def running(self) -> Path:
        """What running processes write to the terminal, one file each; empty between runs."""
        return self.path / "running"

    def of(self, source: str, name: str, suffix: str) -> Path:
        """The file of one model; a name that is no file name (``hf-hub:...``) is quoted."""
        return self.models / quote(source, safe="") / f"{quote(name, safe=',= ()')}{suffix}"


@dataclass
class Content:
    """What a journal holds: runs as they were begun, outcomes by spec (the last of each), how many lines were torn."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0
    torn: int = 0


def read(path: str | os.PathLike[str]) -> Content:
    """Read the journal of the run folder ``path``, which may be in use.

    Raises:
        JournalError: there is none, it cannot be read, or a line other than the last is damaged.
    """
    return _parse(Folder(Path(path)).journal)[0]


def _parse(path: Path) -> tuple[Content, int]:
    """The content of a journal, and how many bytes of the file are whole lines."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise JournalError(f"{path.parent} is not the folder of a run: it has no {path.name}") from error
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror or error}") from error
    content, whole = Content(), 0
    lines = data.splitlines(keepends=True)
    for index, line in enumerate(lines):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            _take(content, json.loads(line, parse_constant=refuse_constant))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # After a loss of power the end of a file may be a torn line, or zeros that were never written.
            if index < len(lines) - 1:
                raise JournalError(f"{path}: line {index + 1} is damaged ({error}); remove that line") from error
            content.torn += 1
            break
        whole += len(line)
    return content, whole


def _take(content: Content, line: Mapping[str, Any]) -> None:
    match line["record"]:
        case "run":
            content.runs.append(_run(line))
        case "outcome":
            outcome = from_json(line)
            content.outcomes[outcome.spec] = outcome
        case "end":
            content.seconds += float(line["seconds"])


_RUN: dict[str, tuple[Any, Any]] = {
    "started": (str, ""),
    "specs": (list[str], []),
    "settings": (dict[str, Any], {}),
    "limits": (dict[str, Any], {}),
    "command": (list[str], []),
    "versions": (dict[str, str], {}),
    "machine": (str, ""),
    "done_before": (int, 0),
}
"""What the line of a run holds: its type, and what it is where it is missing."""


def _run(line: Mapping[str, Any]) -> dict[str, Any]:
    run = {key: line.get(key, missing) for key, (_, missing) in _RUN.items()}
    for key, value in run.items():
        if not fits(value, _RUN[key][0]):
            raise ValueError(f"{key} cannot be {value!r:.40}")
    return run


class Journal:
    """The journal of a run folder, open for appending; a context manager that holds the folder's lock.

    Args:
        path: the folder; made if it is not there.

    Raises:
        JournalError: another run has the folder, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = Folder(Path(path))
        self.content = Content()
        self._lock = -1
        self._file = -1

    def __enter__(self) -> Journal:
        try:
            self.folder.models.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._open()
            self._sweep()
        except OSError as error:
            self.close()
            raise JournalError(f"{self.folder.path} cannot be written: {reason_of(error)}") from error
        except JournalError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder free."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def append(self, record: str, values: Mapping[str, Any]) -> None:
        """Append one line and sync it.

        Raises:
            JournalError: the disk is full, for instance; the journal is then as it was before.
        """
        line = json.dumps({"record": record} | dict(values), allow_nan=False, ensure_ascii=False) + "\n"
        size = os.fstat(self._file).st_size
        try:
            left = line.encode()
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise JournalError(
                f"{self.folder.journal} cannot be written ({error.strerror or error}); what was finished before is "
                "kept: make room and go on with --resume"
            ) from error

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # The system gives this lock free when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 64, 0).decode(errors="replace").strip() or "unknown"
            raise JournalError(
                f"{self.folder.path} is in use by another run (process {holder}); wait for it or use another folder"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _open(self) -> None:
        path = self.folder.journal
        fresh = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.content, whole = _parse(path)
        if self.content.torn:
            log.warning("%s: the last line is torn, as after a crash; it is dropped", path)
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        if fresh:
            _sync_folder(self.folder.path)

    def _sweep(self) -> None:
        """Remove what processes of a killed run were writing beside their files."""
        for path in _leftovers(self.folder):
            path.unlink(missing_ok=True)


def _leftovers(folder: Folder) -> Iterator[Path]:
    yield from folder.models.rglob(".*.tmp")
    if folder.running.is_dir():
        yield from folder.running.iterdir()


def _sync_folder(path: Path) -> None:
    """Make a new name in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
