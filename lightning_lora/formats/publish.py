"""Files that are there in full or not at all: written under another name beside their own, and then renamed."""

import ctypes
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

_STALE = 3600.0  # seconds
_IS_WINDOWS = os.name == "nt"
_AT_CWD, _EXCHANGE = -100, 2  # renameat2(2): AT_FDCWD, RENAME_EXCHANGE


def partial_path(target: Path) -> Path:
    """The name under which this process writes something, once what killed processes have left of it is removed.

    It is no other process's, so that two runs may write to one place, and one that Lightning takes for no checkpoint.
    """
    host, name = socket.gethostname(), _short(target.name)
    for path in target.parent.glob(f".{escape(name)}.*.partial"):
        with suppress(OSError):  # another process may remove it meanwhile
            if _is_left_behind(path, host):
                remove(path)
    return target.with_name(f".{name}.{host}-{os.getpid()}.partial")


def _short(name: str) -> str:
    """A name with room for what is added to it: file systems have 255 bytes."""
    return name if len(os.fsencode(name)) <= 150 else hashlib.sha256(os.fsencode(name)).hexdigest()


def _is_left_behind(path: Path, host: str) -> bool:
    """Whether the process that wrote this is gone: one of this machine, or, elsewhere, one that no longer writes."""
    writer, _, number = path.name.removesuffix(".partial").rpartition("-")
    if not writer.endswith(f".{host}") or not number.isdecimal() or _IS_WINDOWS:
        return time.time() - path.stat().st_mtime > _STALE
    try:
        os.kill(int(number), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return int(number) == os.getpid()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it is there in full, or is as it was before.

    Args:
        path: The file; its directory is made if it is not there.

    Yields:
        The name to write it under.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        publish(partial, path)
    finally:
        remove(partial)


def is_unfinished(directory: Path) -> bool:
    """Whether a directory is not what a write has left that came to its end: a part, or one that has parts in it."""
    return fnmatch(directory.resolve().name, ".*.partial") or any(directory.glob(".*.partial"))


@contextmanager
def whole_directory(directory: Path, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write the files of a directory so that it has all of them, or is as it was before.

    Files there that are not written anew stay, but for those of an earlier write that belong to the others.

    Args:
        directory: Where they belong; made if it is not there.
        stale: Names of files that would be left over of an earlier write, as globs.

    Yields:
        An empty directory to write them into.
    """
    target = Path(os.path.realpath(directory))
    # A directory that cannot be renamed, as a mounted one or the current one cannot be, takes one file after the other.
    is_movable = not target.is_mount() and not Path.cwd().is_relative_to(target)
    parent = next(each for each in target.parents if each.exists())
    by_file = target.is_dir() and not (is_movable and os.access(parent, os.W_OK))
    partial = partial_path(target / "files" if by_file else target)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        if target.is_dir():
            shutil.copymode(target, partial)
        yield partial
        left_over = [path for path in _others(target, partial) if any(fnmatch(path.name, glob) for glob in stale)]
        if by_file:
            for path in sorted(partial.iterdir()):
                publish(path, target / path.name)
            for path in left_over:
                remove(path)
        else:
            for path in [path for path in _others(target, partial) if path not in left_over]:
                _take_along(path, partial / path.name)
            publish(partial, target)
    finally:
        remove(partial)


def _others(target: Path, partial: Path) -> list[Path]:
    """What is in a directory and not in the one that takes its place."""
    there = sorted(target.iterdir()) if target.is_dir() else []
    return [path for path in there if path != partial and not os.path.lexists(partial / path.name)]


def _take_along(path: Path, new: Path) -> None:
    """Have a file or directory under a second name, without copying its content where the file system can."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, new, symlinks=True, copy_function=_link)
    else:
        _link(path, new)


def _link(path: str | Path, new: str | Path) -> None:
    try:
        os.link(path, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, new, follow_symlinks=False)


def publish(partial: Path, target: Path) -> None:
    """Put a file or directory that is complete in the place of another, once it is on the disk.

    A file is replaced in one step, and on Linux a directory too. Elsewhere the old one is set aside as
    ``.<name>.previous`` for the moment between two renames, and then removed.
    """
    for path in (partial, *partial.rglob("*")):
        _flush(path)
    if not partial.is_dir():
        os.replace(partial, target)
    elif not _rename_to_free(partial, target):
        if not _exchange(partial, target):
            previous = target.with_name(f".{_short(target.name)}.previous")
            remove(previous)
            os.replace(target, previous)
            os.replace(partial, target)
            remove(previous)
        remove(partial)  # the old one, if they were exchanged
    _flush(target.parent)


def write_text(text: str, target: Path) -> None:
    """Write a text file in UTF-8, with the directory that it is in."""
    with whole_file(target) as new:
        new.write_text(text, encoding="utf-8")


def _rename_to_free(partial: Path, target: Path) -> bool:
    """Give a directory its name, if nothing has it."""
    if os.path.lexists(target):
        return False
    try:
        os.rename(partial, target)
    except OSError:
        if not os.path.lexists(target):  # else another process was faster
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step, where the system can do that."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, or none that loads
        rename: int = ctypes.CDLL(None).renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE)
        return rename == 0
    return False


def remove(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and _IS_WINDOWS):  # where a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDWR if _IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
