"""Data sets of the Hugging Face hub, through the package ``datasets``."""

from collections.abc import Iterator

from lightning_lora.data.record import Record

HUB = "hf:"


def hub_records(path: str) -> Iterator[Record]:
    """The rows of a data set.

    Args:
        path: ``hf:<id>``, ``hf:<id>:<split>`` or ``hf:<id>:<split>:<configuration>``; the split is ``train`` where
            none is named. The id may be a folder on this machine, as ``datasets.load_dataset`` takes it.

    Raises:
        ImportError: If datasets is not installed.
        ValueError: If the path has more parts, or there is no such data set, split or configuration.
    """
    name, split, configuration, *more = [*path.removeprefix(HUB).split(":"), "", ""]
    if not name or any(more):
        raise ValueError(f"Found path={path!r}, expected hf:<id>, hf:<id>:<split> or hf:<id>:<split>:<configuration>.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"path={path!r} needs the package datasets. Run: pip install datasets") from None
    split = split or "train"
    rows = load_dataset(name, configuration or None, split=split)
    for number, fields in enumerate(rows, start=1):
        yield Record(f"{path}, {split} row {number}", fields)
