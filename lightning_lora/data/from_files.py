"""What the data modules that read files share: splitting, counting, and loaders that can resume."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_lora.data.files import Record, read_records
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader


class Encoded(NamedTuple):
    """What became of a record.

    Args:
        row: What the loader yields in batches, ``None`` if the record is rejected.
        truncated: Whether a part of it had to be left out.
    """

    row: Any
    truncated: bool = False


class FileData(L.LightningDataModule):
    """Rows of one file, split into training and validation, or of two files.

    A subclass says how a record becomes a row (:meth:`encode`) and how rows become a batch (:meth:`collate`). Nothing
    is left out in silence: the numbers of rows kept, truncated and rejected are printed. A record has no answer when it
    comes from ``predict_path``.

    Args:
        path: A ``.jsonl``, ``.csv`` or ``.parquet`` file, or ``shipped:<name>`` for one that comes with the recipes.
        val_path: A second file to validate and test on. Default ``None``: rows of ``path``.
        val_fraction: Share of the rows of ``path`` held out where there is no ``val_path``, from 0 (none) to below 1.
            Default 0.1.
        predict_path: The file that ``predict`` reads, with or without answers. Default ``None``: the rows held out.
        batch_size: Rows in a batch. Default 8.
        num_workers: Processes that load batches; 0 loads in the training process. Default 0.
        seed: Seed of the split and of the training order. Default 0.

    Raises:
        ValueError: If ``val_fraction`` or ``batch_size`` is out of range, or, in ``setup``, for a row that cannot be
            used or a file too small to split.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        predict_path: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"Found val_fraction={val_fraction}, expected at least 0 and less than 1, such as 0.1.")
        if batch_size < 1:
            raise ValueError(f"Found batch_size={batch_size}, expected at least 1.")
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.predict_path = predict_path
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_rows: list[Any] | None = None
        self.val_rows: list[Any] = []
        self.predict_records: list[Record] = []

    def prepare(self) -> None:
        """Load what encoding needs, such as a tokenizer."""

    def read(self, path: str) -> list[Record]:
        """All records of a file. Default: a JSONL, CSV or Parquet file."""
        return read_records(path)

    def read_unlabelled(self, path: str) -> list[Record]:
        """All records of ``predict_path``. Default: as in the other files."""
        return self.read(path)

    def encode(self, record: Record) -> Encoded:
        """Turn a record into a row.

        Raises:
            ValueError: If a field is bad; the message names the file, the line and the field.
        """
        raise NotImplementedError

    def arrange(self, rows: list[Any]) -> list[Any]:
        """Bring the rows of one split into the form in which they are batched. Default: as they are."""
        return rows

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch."""
        raise NotImplementedError

    def collate_predict(self, records: list[Record]) -> Any:
        """Make a batch for ``predict``. Default: as for validation."""
        return self.collate([self.encode(record).row for record in records])

    def setup(self, stage: str) -> None:
        """Read, split and encode the files, once."""
        if stage == "predict" and self.predict_path is not None:
            self.predict_records = self.read_unlabelled(self.predict_path)
            self.prepare()
            return
        if self.train_rows is not None:
            return
        train, self.predict_records = self._split()
        held_out = self.predict_records
        self.prepare()
        train_rows = self._encode(train, self.path, "training")
        if held_out:
            self.val_rows = self.arrange(self._encode(held_out, self.val_path or self.path, "validation"))
        self.train_rows = self.arrange(train_rows)

    def _split(self) -> tuple[list[Record], list[Record]]:
        records = self.read(self.path)
        if self.val_path is not None:
            return records, self.read(self.val_path)
        count = max(1, round(self.val_fraction * len(records))) if self.val_fraction else 0
        if len(records) <= count:
            raise ValueError(
                f"{self.path}: found {len(records)} rows, expected more than the {count} held out for validation. "
                "Add rows, or lower val_fraction."
            )
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [records[index] for index in order[count:]], [records[index] for index in order[:count]]

    def _encode(self, records: list[Record], path: str, purpose: str) -> list[Any]:
        encoded = [self.encode(record) for record in records]
        rows = [found.row for found in encoded if found.row is not None]
        truncated = sum(found.truncated for found in encoded if found.row is not None)
        rank_zero_info(
            f"{path}, {purpose}: kept {len(rows)} rows, {truncated} of them truncated, and rejected "
            f"{len(records) - len(rows)}."
        )
        if not rows:
            raise ValueError(
                f"{path}: all {len(records)} rows for {purpose} were rejected as too long. Raise max_length, or set "
                "overlong to 'truncate'."
            )
        return rows

    def train_dataloader(self) -> DataLoader[Any]:
        """The training rows, in an order of their own that ``seed`` fixes."""
        rows = self.train_rows or []
        return self._loader(rows, self.collate, EpochSampler(len(rows), self.seed))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The rows held out, or no loader when there are none."""
        return self._loader(self.val_rows, self.collate) if self.val_rows else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The same rows as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The rows of ``predict_path``, or those held out."""
        return self._loader(self.predict_records, self.collate_predict) if self.predict_records else []

    def _loader(self, rows: list[Any], collate: Any, sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return ResumableDataLoader(
            rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
        )
