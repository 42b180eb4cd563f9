"""How far a checkpoint's file is opened: its tensors and plain types, or the objects in it too, which can run code."""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lightning_lora.formats.pickled import require_modest
from lightning_lora.model.state_dict import CheckpointError

Objects = Literal["refuse", "skip", "open"]
_ZIP = b"PK\x03\x04"
_PICKLES_OF_OLD = 5  # that files of before PyTorch 1.6 begin with: who wrote it, what it holds, and what follows


class _Skipped:
    """Stands where a file has an object of a class that was not opened. It does nothing, whatever a file asks of it."""

    # Also what calling it, or making an object of it, gives: so there is one alone.
    def __new__(cls, *args: Any, **kwargs: Any) -> "_Skipped":
        return _SKIPPED

    def __call__(self, *args: Any, **kwargs: Any) -> "_Skipped":
        return self

    def __setstate__(self, state: Any) -> None:
        return


_SKIPPED: _Skipped = object.__new__(_Skipped)


class _HoldsObjects(pickle.UnpicklingError):
    """Of a file that holds more than tensors and plain types: their names."""


def path_or_url(path: str | Path) -> str | Path:
    """A path as a ``Path``, and a URL as it is, which ``Path`` would change."""
    return path if "://" in str(path) else Path(path)


def open_file(path: str | Path, objects: Objects) -> Any:
    """Read a file that ``torch.save`` wrote, onto the CPU.

    Args:
        path: The file.
        objects: What becomes of what is neither a tensor nor of a plain type. ``"refuse"`` is torch's
            ``weights_only=True``, and ``"open"`` its ``weights_only=False``, which runs what code the file asks for.
            ``"skip"`` leaves out such objects and runs nothing: torch's restricted reader reads the file, and finds
            for each name that it does not know one object that does nothing.
    """
    with _opened(path) as file:
        _require_intact(file)
        if objects == "open":
            return torch.load(file, map_location="cpu", weights_only=False)
        if objects == "refuse":
            return _without_objects(file)
        try:
            names = get_unsafe_globals_in_checkpoint(file)
        except ValueError as error:
            raise RuntimeError("torch.save did not write it, or did so before PyTorch 1.6.") from error
        file.seek(0)
        unknown: list[Any] = [(_SKIPPED, name) for name in names]
        # The class too, for only what has an allowed class may be given a state.
        with safe_globals([*unknown, (_Skipped, f"{__name__}._Skipped")]):
            return _without_objects(file)


def _without_objects(file: IO[bytes]) -> Any:
    _require_modest(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if names := _names_in(file):
            raise _HoldsObjects(", ".join(names)) from error
        raise


def _require_modest(file: IO[bytes]) -> None:
    """Require that what is about to be made takes no more memory and time than the file has bytes for."""
    if _is_zip(file):
        require_modest(torch._C.PyTorchFileReader(file).get_record("data.pkl"))
    else:
        require_modest(file.read(), pickles=_PICKLES_OF_OLD)
    file.seek(0)


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to read in any order, which not every server can do."""
    filesystem = get_filesystem(path)
    if isinstance(filesystem, LocalFileSystem):
        with filesystem.open(str(path), "rb") as file:
            yield file
    else:
        yield io.BytesIO(filesystem.cat_file(str(path)))


def open_part(path: str | Path, offset: int, length: int) -> Any:
    """The same for what ``torch.save`` wrote into a part of a larger file, without objects."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        part = io.BytesIO(file.read(length))
    _require_intact(part)
    return _without_objects(part)


def _require_intact(file: IO[bytes]) -> None:
    if _is_zip(file):
        try:
            with zipfile.ZipFile(file) as archive:
                _require_own_bytes(archive, file.seek(0, io.SEEK_END))
                # Files that are written without checksums have false ones.
                changed = archive.testzip() if torch.serialization.get_crc32_options() else None
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
            raise RuntimeError(f"its table of contents is damaged ({error}).") from error
        if changed is not None:
            raise RuntimeError(f"{changed!r} in it is not what was written: its checksum is another one.")
    file.seek(0)


def _is_zip(file: IO[bytes]) -> bool:
    """Whether torch takes a file for one of PyTorch 1.6 or later, without which it has no table of contents."""
    file.seek(0)
    start = file.read(len(_ZIP))
    file.seek(0)
    return start == _ZIP


def _require_own_bytes(archive: zipfile.ZipFile, size: int) -> None:
    """Require that no part of a file is packed, or shares its bytes with others."""
    parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise RuntimeError(f"{part.filename!r} in it is not what was written: it is packed.")
    if sum(part.file_size for part in parts) > size:
        raise RuntimeError("its parts are more than it has bytes.")


def is_skipped(value: Any) -> bool:
    """Whether this, or something in it, was left out."""
    if isinstance(value, dict):
        return any(map(is_skipped, value)) or any(map(is_skipped, value.values()))
    return any(map(is_skipped, value)) if isinstance(value, (list, tuple, set)) else value is _SKIPPED


@contextmanager
def readable(path: str | Path, way_out: str | None = None) -> Iterator[None]:
    """Turn what a damaged file, or one that holds more than was to be opened, raises into a CheckpointError.

    Args:
        path: The file.
        way_out: How the caller can have objects opened, if there is a way.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, CheckpointError):
        raise
    except Exception as error:  # of whatever kind a reader raises of what somebody else has written
        if objects := _objects_of(error, path):
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it holds more than tensors and plain types, namely {objects}, "
                "and what opening these runs is up to the file. If you trust where it comes from, "
                f"{f'give {way_out}, or ' if way_out else ''}name them to torch.serialization.add_safe_globals. "
                "Nothing was loaded."
            ) from error
        reason = (str(error).splitlines() or ["it ends early."])[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {reason} The file is damaged or cut short. Take another "
            "checkpoint. Nothing was loaded."
        ) from error


def _objects_of(error: Exception, path: str | Path) -> str:
    """Which objects were not to be opened, also where another reader than :func:`open_file` came to the file."""
    if isinstance(error, _HoldsObjects) or not isinstance(error, pickle.UnpicklingError):
        return str(error) if isinstance(error, _HoldsObjects) else ""
    with suppress(OSError), _opened(path) as file:
        return ", ".join(_names_in(file))
    return ""


def _names_in(file: IO[bytes]) -> list[str]:
    """The names that a file has beside those of tensors and plain types."""
    file.seek(0)
    try:
        found = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # a damaged file may break anywhere
        return []
    return sorted(name for name in found if re.fullmatch(r"[\w.]+", name))
