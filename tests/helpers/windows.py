"""What Windows forbids of files, and Linux does not: a stand-in that lets no such thing pass unseen."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_below: Path | None = None


@contextmanager
def windows_below(directory: Path) -> Iterator[None]:
    """Raise what Windows would, within this context, for files in a directory.

    That are names it has no room for, files that are replaced or removed while this process has them open or mapped
    into memory, directories that are opened, and symbolic links.
    """
    global _below
    _below = Path(os.path.realpath(directory))
    try:
        yield
    finally:
        _below = None


def _is_below(path: Any) -> bool:
    if _below is None or isinstance(path, int) or path is None:
        return False
    return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(_below)


def _require_name(path: Any) -> None:
    assert _below is not None
    for part in PurePath(os.path.abspath(os.fsdecode(path))).relative_to(_below).parts:
        if re.search(r'[<>:"|?*\\\x00-\x1f]', part) or part[-1] in ". " or _RESERVED.fullmatch(part):
            raise OSError(22, "Windows has no such names", os.fsdecode(path))


def _require_unused(path: Any) -> None:
    own = os.path.realpath(os.fsdecode(path))
    used = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps") as maps:
        used |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count(" ") > 5 and "/" in line}
    for each in used:
        if each == own or each.startswith(own + os.sep):
            raise PermissionError(13, f"Windows lets nothing happen to a file that is in use ({each})", own)


def _is_called_by(file: str) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == file


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _below is None:
        return
    if event in ("open", "os.mkdir", "os.rename", "os.link") and _is_below(args[0]):
        _require_name(args[0])
    # shutil opens directories to remove them, where the system has that; elsewhere it goes by paths.
    if event == "open" and _is_below(args[0]) and os.path.isdir(args[0]) and not _is_called_by(shutil.__file__):
        raise PermissionError(13, "Windows opens no directories", os.fsdecode(args[0]))
    if event == "os.rename" and _is_below(args[1]):
        _require_name(args[1])
        _require_unused(args[1])
    if event in ("os.rename", "os.remove", "os.rmdir") and _is_below(args[0]):
        _require_unused(args[0])
    if event == "os.symlink" and _is_below(args[1]):
        raise OSError(22, "Windows makes no symbolic links without a privilege", os.fsdecode(args[1]))


sys.addaudithook(_watch)
