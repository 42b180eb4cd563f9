"""What the data modules that read files share: splitting, counting, and loaders that can resume."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_lora.data.files import read_records
from lightning_lora.data.record import BadRows, Record
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader

Paths = str | list[str]

_NAMED = 5  # rejected rows that are named, and those that something is said of


class Encoded(NamedTuple):
    """What became of a record.

    Args:
        rows: What the loader yields in batches, mostly one; none if the record is rejected.
        truncated: Whether a part of it had to be left out.
        unused: Fields of the record that are left out.
        reason: Why it is rejected, if it is.
        remarks: What else there is to say of it.
    """

    rows: list[Any]
    truncated: bool = False
    unused: Collection[str] = ()
    reason: str = "too long"
    remarks: Collection[str] = ()


class FileData(L.LightningDataModule):
    """Rows of files, split into training and validation, or of two sets of files.

    A subclass says how a record becomes rows (:meth:`encode`) and how rows become a batch (:meth:`collate`). Nothing
    is left out in silence: the numbers of rows kept, truncated and rejected are printed, with the fields that are not
    used, and all rows that cannot be used are named before anything is learned. A record has no answer when it comes
    from ``predict_path``.

    Args:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, ``hf:<id>`` for a data set of the hub,
            ``shipped:<name>`` for a file that comes with the recipes, or a list of these. See
            :func:`~lightning_lora.data.files.read_records`.
        val_path: The same to validate and test on. Default ``None``: rows of ``path``.
        val_fraction: Share of the rows of ``path`` held out where there is no ``val_path``, from 0 (none) to below 1.
            Default 0.1.
        predict_path: What ``predict`` reads, with or without answers. Default ``None``: the rows held out.
        fields: Names of fields in the file by the names that are expected, such as ``{question: q, answer: a}``.
            Default ``None``.
        ignore: Fields that are not looked at. Default ``None``.
        on_error: What rows that cannot be used do: ``"stop"`` (default) the run, with the first 20 and their number, or
            ``"skip"``, which leaves them out and says so. Rows of ``predict_path`` always stop it.
        batch_size: Rows in a batch. Default 8.
        num_workers: Processes that load batches; 0 loads in the training process. Default 0.
        seed: Seed of the split and of the training order. Default 0.

    Raises:
        ValueError: If ``val_fraction`` or ``batch_size`` is out of range, or, in ``setup``, for rows that cannot be
            used or a file too small to split.
    """

    def __init__(
        self,
        path: Paths,
        val_path: Paths | None = None,
        val_fraction: float = 0.1,
        predict_path: Paths | None = None,
        fields: dict[str, str] | None = None,
        ignore: list[str] | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"Found val_fraction={val_fraction}, expected at least 0 and less than 1, such as 0.1.")
        if batch_size < 1:
            raise ValueError(f"Found batch_size={batch_size}, expected at least 1.")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"Found on_error={on_error!r}, expected 'stop' or 'skip'.")
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.predict_path = predict_path
        self.fields = fields or {}
        self.ignore = ignore or []
        self.on_error = on_error
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_rows: list[Any] | None = None
        self.val_rows: list[Any] = []
        self.predict_rows: list[Any] = []

    def of_model(self, name: str) -> Any:
        """A setting of the model that is trained, where there is one of that name, else ``None``."""
        return getattr(getattr(self.trainer, "lightning_module", None), name, None)

    def prepare(self) -> None:
        """Load what encoding needs, such as a tokenizer."""

    def read(self, path: Paths, bad: BadRows) -> list[Record]:
        """All records of files. Default: what :func:`~lightning_lora.data.files.read_records` reads."""
        return read_records(path, bad)

    def read_unlabelled(self, path: Paths, bad: BadRows) -> list[Record]:
        """All records of ``predict_path``. Default: as in the other files."""
        return self.read(path, bad)

    def encode(self, record: Record) -> Encoded:
        """Turn a record into rows.

        Raises:
            ValueError: If a field is bad; the message names the file, the line and the field.
        """
        raise NotImplementedError

    def remarks(self, row: Any) -> Iterable[str]:
        """What there is to say of a row of :meth:`encode`. Default: nothing."""
        return ()

    def encode_predict(self, record: Record) -> Any:
        """Turn a record of ``predict_path`` into what is batched for ``predict``. Default: its row, as in training.

        Raises:
            ValueError: As :meth:`encode`.
        """
        return self.encode(record).rows[0]

    def arrange(self, rows: list[Any]) -> list[Any]:
        """Bring the rows of one split into the form in which they are batched. Default: as they are."""
        return rows

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch."""
        raise NotImplementedError

    def collate_predict(self, rows: list[Any]) -> Any:
        """Make a batch for ``predict``. Default: as for validation."""
        return self.collate(rows)

    def setup(self, stage: str) -> None:
        """Read, split and encode the files, once."""
        bad = BadRows(self.on_error)
        if stage == "predict":
            bad = BadRows()
            records = self._split(bad)[1] if self.predict_path is None else self._read_predict(self.predict_path, bad)
            self.prepare()
            self.predict_rows = list(_each(self.encode_predict, records, bad))
            bad.report()
            return
        if self.train_rows is not None:
            return
        train, held_out = self._split(bad)
        self.prepare()
        train_rows, said = self._encode(train, self.path, "training", bad)
        val_rows, also = self._encode(held_out, self.val_path or self.path, "validation", bad)
        bad.report()
        for line in [*said, *(also if held_out else [])]:
            rank_zero_info(line)
        for rows, path, purpose in ((train_rows, self.path, "training"), (val_rows, self.val_path, "validation")):
            if not rows and (purpose == "training" or held_out):
                raise ValueError(
                    f"{_named(path or self.path)}: no row for {purpose} is left, as it says above. Raise max_length, "
                    "set overlong to 'truncate', or correct the rows."
                )
        self.val_rows = self.arrange(val_rows) if val_rows else []
        self.train_rows = self.arrange(train_rows)

    def _read(self, path: Paths, bad: BadRows) -> list[Record]:
        return [self._seen(record) for record in self.read(path, bad)]

    def _read_predict(self, path: Paths, bad: BadRows) -> list[Record]:
        return [self._seen(record) for record in self.read_unlabelled(path, bad)]

    def _seen(self, record: Record) -> Record:
        record = record.renamed(self.fields)
        if not self.ignore:
            return record
        return record._replace(fields=_without(record.fields, self.ignore))

    def _split(self, bad: BadRows) -> tuple[list[Record], list[Record]]:
        records = self._read(self.path, bad)
        if self.val_path is not None:
            return records, self._read(self.val_path, bad)
        count = max(1, round(self.val_fraction * len(records))) if self.val_fraction else 0
        if len(records) <= count:
            bad.report()
            raise ValueError(
                f"{_named(self.path)}: found {len(records)} rows, expected more than the {count} held out for "
                "validation. Add rows, or lower val_fraction."
            )
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [records[index] for index in order[count:]], [records[index] for index in order[:count]]

    def _encode(self, records: list[Record], path: Paths, purpose: str, bad: BadRows) -> tuple[list[Any], list[str]]:
        """The rows of records, and what there is to say of them."""
        rows: list[Any] = []
        rejected: dict[str, list[str]] = {}
        remarks: dict[str, list[str]] = {}
        unused: set[str] = set()
        kept = truncated = 0
        for record, found in _each(lambda record: (record, self.encode(record)), records, bad):
            rows += found.rows
            kept += bool(found.rows)
            truncated += bool(found.rows) and found.truncated
            unused |= set(found.unused)
            if not found.rows:
                rejected.setdefault(found.reason, []).append(record.where)
            for remark in {*found.remarks, *(each for row in found.rows for each in self.remarks(row))}:
                remarks.setdefault(remark, []).append(record.where)
        said = [
            f"{_named(path)}, {purpose}: kept {kept} rows, {truncated} of them truncated, and rejected "
            f"{sum(map(len, rejected.values()))}."
        ]
        said += [f"Rejected as {reason}: {_first(places)}." for reason, places in rejected.items()]
        said += [f"{remark}: {_first(places)}." for remark, places in sorted(remarks.items())]
        if unused:
            said.append(f"Left out the fields {', '.join(map(repr, sorted(unused)))}, which {purpose} does not use.")
        return rows, said

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
        return self._loader(self.predict_rows, self.collate_predict) if self.predict_rows else []

    def _loader(self, rows: list[Any], collate: Any, sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return ResumableDataLoader(
            rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
        )


def _first(places: list[str]) -> str:
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return "; ".join(places[:_NAMED]) + more


def _each(encode: Callable[[Record], Any], records: Iterable[Record], bad: BadRows) -> Iterable[Any]:
    for record in records:
        try:
            yield encode(record)
        except ValueError as error:
            bad.add(error)


def _without(fields: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A row without the fields of these names, and its messages without such keys."""

    def kept(item: Any) -> Any:
        return {key: value for key, value in item.items() if key not in names} if isinstance(item, dict) else item

    return {
        field: [kept(item) for item in value] if isinstance(value, list) else value
        for field, value in kept(fields).items()
    }


def _named(path: Paths) -> str:
    return path if isinstance(path, str) else ", ".join(path)
