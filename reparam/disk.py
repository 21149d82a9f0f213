"""Files are written whole or not at all; where that fails, one line names the file, the reason and the fix."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reparam import ReparamError
from reparam.exhausted import causes

__all__ = [
    "FileError", "beside", "check_writable", "make_folder", "move_file", "reason_of", "replace_file", "scratch_folder",
    "sweep", "told",
]  # fmt: skip

FULL = "make room there, or write to another disk"
FIXES: dict[int, str] = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: "write to a disk that is not read-only",
    errno.EACCES: "write where you have the right to, or ask for it",
    errno.EPERM: "write where you have the right to, or ask for it",
    errno.EISDIR: "it is a folder; give the file another name",
    errno.EEXIST: "there is a file of that name; give another one",
    errno.ENOTDIR: "a part of its path is a file; give another path",
    errno.ENAMETOOLONG: "give it a shorter name",
}
OTHERWISE = "check the disk, or write to another one"


class FileError(ReparamError):
    """A file that cannot be written, or that is not what it should be; the message names it and the fix."""


def replace_file(target: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target, flush to the disk, rename; on any failure the target is as it was.

    Args:
        target: its folder must exist.
        write: given the path of an empty file, fills it.

    Raises:
        FileError: the file system refuses.
    """
    sweep(target)
    temporary = beside(target)
    with told(target):
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            # safetensors makes a private file; the permissions are to be those of any new file.
            temporary.chmod(mode)
            _flush(temporary)
            move_file(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # which a read-only disk refuses even if it is not there


def beside(target: Path) -> Path:
    """Where to write what is to become ``target``: a hidden name that says whose it is."""
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what is to be looked at before it gets that name. Raises :class:`FileError`."""
    sweep(target)
    folder = beside(target)
    with told(target):
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(target: Path) -> None:
    """Remove what processes that were killed have left beside ``target``."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        words = path.name.removesuffix(".tmp").split(".")
        if words[-2].isdecimal() and not _is_alive(int(words[-2])):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's
        return True
    return True


def move_file(source: Path, target: Path) -> None:
    """Rename a file of the same disk over another, durably. Raises :class:`FileError`."""
    with told(target):
        os.replace(source, target)
        if os.name == "posix":
            _flush(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there, and those above it. Raises :class:`FileError`."""
    with told(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(target: Path) -> None:
    """Ask before the work whether a file can be written at all. Raises :class:`FileError`."""
    with told(target):
        if not os.access(target.parent, os.W_OK):
            read_only = os.statvfs(target.parent).f_flag & os.ST_RDONLY if os.name == "posix" else False
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise :class:`FileError` for what the file system refuses inside, where ``path`` is being written."""
    try:
        yield
    except ReparamError:
        raise
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise FileError(f"{path} cannot be written: {reason_of(cause)}") from error


def reason_of(error: OSError) -> str:
    """What a file system says, and what can be done."""
    return f"{error.strerror or error}; {FIXES.get(error.errno or 0, OTHERWISE)}"


def _cause(error: BaseException) -> OSError | None:
    """The refusal of the file system behind an exception: libraries that write wrap it into classes of their own."""
    for each in causes(error):
        if isinstance(each, OSError):
            return each
        if number := re.search(r"\(os error (\d+)\)", str(each)):  # safetensors, which is written in Rust
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def _flush(path: Path) -> None:
    """Flush a file, or a folder (which makes a rename inside it durable)."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
