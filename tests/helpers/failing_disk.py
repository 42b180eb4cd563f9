"""A disk that fails once."""

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class FailingDisk:
    """Counts what writes, syncs and renames below a folder, and lets the call of one number fail."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, fails_at: int = -1, code: int = errno.ENOSPC) -> None:
        self.folder, self.fails_at, self.code, self.calls = str(folder), fails_at, code, 0
        self.failed = False
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (os, "mkdir")):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))
        opened = builtins.open
        patch.setattr(builtins, "open", self._writing(opened))
        patch.setattr("io.open", self._writing(opened))

    def _count(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            self.failed = True
            raise OSError(self.code, os.strerror(self.code))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, int) or str(path).startswith(self.folder):
                self._count()
            return real(path, *args, **kwargs)

        return call

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            opened = real(file, mode, *args, **kwargs)
            if set(mode) & set("wax+") and str(file).startswith(self.folder):
                try:
                    self._count()
                except OSError:  # as the first write would raise, when the file is empty already
                    opened.close()
                    raise
            return opened

        return call
