"""Data sets of the Hugging Face hub, through the package ``datasets``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_lora.data.record import Record

HUB = "hf:"

_BATCH = 1000  # rows that are read at once


def hub_records(path: str) -> Iterator[Record]:
    """The rows of a data set, which ``datasets`` maps into memory.

    Args:
        path: ``hf:<id>``, ``hf:<id>:<split>`` or ``hf:<id>:<split>:<configuration>``; the split is ``train`` where
            none is named. The id may be a folder on this machine, as ``datasets.load_dataset`` takes it.

    Raises:
        ImportError: If datasets is not installed.
        ValueError: If the path has more parts, or there is no such data set, split or configuration, or no way to it.
    """
    rows = _load(path)
    number = 0
    for batch in rows.iter(_BATCH):
        for values in zip(*batch.values()):
            number += 1
            yield Record(f"{path}, {rows.split} row {number}", dict(zip(batch, values)))


def hub_files(path: str) -> list[Path]:
    """The files in which ``datasets`` keeps the rows of a data set on this machine."""
    return [Path(file["filename"]) for file in _load(path).cache_files]


def _load(path: str) -> Any:
    name, split, configuration, *more = [*path.removeprefix(HUB).split(":"), "", ""]
    if not name or any(more):
        raise ValueError(f"Found path={path!r}, expected hf:<id>, hf:<id>:<split> or hf:<id>:<split>:<configuration>.")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ImportError(f"path={path!r} needs the package datasets. Run: pip install datasets") from None
    try:
        return load_dataset(name, configuration or None, split=split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error  # of a file that datasets cannot read, it says no more itself
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Found path={path!r} and no way to such a data set ({said}), expected one of the hub, which needs a "
            "network the first time, or a folder with data files. Correct the id, the split or the configuration, or "
            "connect."
        ) from None
