"""What the data modules that read files share: splitting, counting, and loaders that can resume."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_lora.data.cache import default_cache
from lightning_lora.data.encoded import Encoded, EncodedRecords, Outcome, opened
from lightning_lora.data.encoding import encode_in_folder, encode_in_memory
from lightning_lora.data.files import Paths, read_records
from lightning_lora.data.json_rows import ChosenRows
from lightning_lora.data.keys import is_empty
from lightning_lora.data.record import BadRows, Record
from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader

_NAMED = 5  # rejected rows that are named, and those that something is said of
_MANY = 20_000  # records of which the rows are made in several processes, and kept for the next run


class FileData(L.LightningDataModule):
    """Rows of files, split into training and validation, or of two sets of files.

    A subclass says how a record becomes rows (:meth:`encode`) and how rows become a batch (:meth:`collate`). Nothing
    is left out in silence: the numbers of rows kept, truncated and rejected are printed, with the fields that are not
    used, and all rows that cannot be used are named before anything is learned. A record has no answer when it comes
    from ``predict_path``.

    Args:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, ``hf:<id>`` for a data set of the hub,
            ``shipped:<name>`` for a file that comes with the recipes, a list of these, or these with weights, such as
            ``{a.jsonl: 2, b.jsonl: 0.5}``: how often each row is learned in an epoch, where half of a time is half of
            the rows. See :func:`~lightning_lora.data.files.read_records`.
        val_path: The same to validate and test on. Default ``None``: rows of ``path``.
        val_fraction: Share of the rows of ``path`` held out where there is no ``val_path``, from 0 (none) to below 1.
            Which ones, the content of each row and ``seed`` say: rows that are added move none of the others, and equal
            ones are on one side. So the share is met in the mean; one row at least is on each side. Default 0.1.
        predict_path: What ``predict`` reads, with or without answers. Default ``None``: the rows held out.
        fields: Names of fields in the file by the names that are expected, such as ``{question: q, answer: a}``.
            Default ``None``.
        ignore: Fields that are not looked at. Default ``None``.
        on_error: What rows that cannot be used do: ``"stop"`` (default) the run, with the first 20 and their number, or
            ``"skip"``, which leaves them out and says so. Rows of ``predict_path`` always stop it.
        batch_size: Rows in a batch. Default 8.
        num_workers: Processes that load batches; 0 loads in the training process. Default 0.
        seed: Seed of the split and of the training order. Default 0.
        cache_dir: Folder where the rows of files with 20,000 records or more are kept for later runs with the same
            files, tokenizer and settings. Default ``None``: ``lightning_lora`` in the user's folder of caches.

    Raises:
        ValueError: If ``val_fraction`` or ``batch_size`` is out of range, or, in ``setup``, for rows that cannot be
            used or a file without two rows that differ.
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
        cache_dir: str | None = None,
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
        self.cache_dir = cache_dir
        self.train_rows: Sequence[Any] | None = None
        self.val_rows: Sequence[Any] = []
        self.predict_rows: list[Any] = []
        # Of them, the first that is predicted: those before it were, in an earlier run.
        self.predict_from = 0
        # The greatest token id of the rows and the most tokens in one, after ``setup``, by which a task makes sure that
        # its model can take them.
        self.highest_token = self.longest_row = -1
        self._learned: dict[str, Any] = {}

    def of_model(self, name: str) -> Any:
        """A setting of the model that is trained, where there is one of that name, else ``None``."""
        return getattr(getattr(self.trainer, "lightning_module", None), name, None)

    def prepare(self) -> None:
        """Load what encoding needs, such as a tokenizer."""

    def read(self, path: Paths, bad: BadRows) -> Iterable[Record]:
        """The records of files. Default: what :func:`~lightning_lora.data.files.read_records` reads."""
        return read_records(path, bad)

    def read_unlabelled(self, path: Paths, bad: BadRows) -> Iterable[Record]:
        """The records of ``predict_path``. Default: as in the other files."""
        return self.read(path, bad)

    def encode(self, record: Record) -> Encoded:
        """Turn a record into rows.

        Raises:
            ValueError: If a field is bad; the message names the file, the line and the field.
        """
        raise NotImplementedError

    def token_ids(self, row: Any) -> Iterable[list[int]]:
        """Token ids of each text in a row of :meth:`arrange`. Default: there are none."""
        return ()

    def learned(self, row: Any) -> Iterable[list[bool]]:
        """Which of these tokens are learned. Default: there are none."""
        return ()

    def label(self, row: Any) -> str | None:
        """What is learned of a row beside its tokens, to be shown. Default: nothing."""
        return None

    def remarks(self, row: Any) -> Iterable[str]:
        """What there is to say of a row of :meth:`encode`. Default: nothing."""
        return ()

    def encode_predict(self, record: Record) -> Any:
        """Turn a record of ``predict_path`` into what is batched for ``predict``. Default: its row, as in training.

        Raises:
            ValueError: As :meth:`encode`.
        """
        return self.encode(record).rows[0]

    def arrange(self, rows: ChosenRows) -> Sequence[Any]:
        """Bring the rows of one split into the form in which they are batched. Default: as they are."""
        return rows

    def collate(self, rows: list[Any]) -> Any:
        """Make a batch."""
        raise NotImplementedError

    def collate_predict(self, rows: list[Any]) -> Any:
        """Make a batch for ``predict``. Default: as for validation."""
        return self.collate(rows)

    def cache_name(self, path: Paths) -> str | None:
        """A name to keep the rows of files by, which changes with what they depend on. Default: they are not kept."""
        return None

    def content(self, record: Record, unused: Collection[str]) -> bytes:
        """What a record says, by which equal ones are found. Default: the fields that are used, as JSON."""
        said = {key: value for key, value in record.fields.items() if key not in unused and not is_empty(value)}
        return json.dumps(said, sort_keys=True, default=str).encode()

    def setup(self, stage: str) -> None:
        """Read, encode and split the files, once."""
        if stage == "predict" and self.predict_path is not None:
            bad = BadRows()
            records = self._seen(self.read_unlabelled(self.predict_path, bad))
            self.prepare()
            self.predict_rows = list(_each(self.encode_predict, records, bad))
            bad.report()
            return
        if stage != "predict" and self.train_rows is not None:
            return
        bad = BadRows(self.on_error)
        encoded = self.encoded(bad)
        bad.report()
        self.highest_token = max(each.highest for each in encoded)
        self.longest_row = max(each.longest for each in encoded)
        if self.val_path is None:
            read = held_out_of = encoded[0]
            train, held_out = self._split(read)
        else:
            read, held_out_of = encoded
            train, held_out = np.arange(len(read)), np.arange(len(held_out_of))
        if stage == "predict":
            places = {held_out_of.places[record] for record in held_out.tolist()}
            records = self._seen(self.read(self.val_path or self.path, BadRows("skip")))
            self.predict_rows = [self.encode_predict(record) for record in records if record.where in places]
            return
        if self.val_path is not None:
            _warn_of_rows_on_both_sides(read, held_out_of)
        train_rows = self._rows(read, train, self.path, "training")
        if len(held_out):
            self.val_rows = self._rows(held_out_of, held_out, self.val_path or self.path, "validation")
        self.train_rows = train_rows
        content = read.shares[train].tobytes() + read.weights[train].tobytes()
        self._learned = {"rows": len(train), "content": _digest(content)}

    def encoded(self, bad: BadRows) -> list[EncodedRecords]:
        """The records of the files to train on, and of those to validate on if there are any."""
        encoded = []
        for path, own, records in self._sources():
            folder, records = self._folder(path, records)
            if folder is None:
                encoded.append(encode_in_memory(records, self._look_at, own))
            elif folder.is_dir():
                found, own.errors = opened(folder)
                encoded.append(found)
                rank_zero_info(f"{_named(path)}: took the rows that were encoded before, in {folder}.")
            else:
                encoded.append(encode_in_folder(records, self._look_at, own, folder, _named(path)))
            bad.errors += own.errors
        return encoded

    def encode_large_files(self) -> None:
        """Encode the files whose rows are kept, where they are not kept yet.

        Raises:
            ValueError: If rows are bad and not to be skipped.
        """
        for path, own, records in self._sources():
            folder, records = self._folder(path, records)
            if folder is not None and not folder.is_dir():
                encode_in_folder(records, self._look_at, own, folder, _named(path))

    def _sources(self) -> list[tuple[Paths, BadRows, Iterator[Record]]]:
        """The paths to train and to validate on, where to note their bad rows, and their records, not read yet."""
        # All files are looked for before the tokenizer is loaded.
        sources = [
            (path, own := BadRows(self.on_error), self._seen(self.read(path, own)))
            for path in (self.path, self.val_path)
            if path is not None
        ]
        self.prepare()
        return sources

    def _folder(self, path: Paths, records: Iterator[Record]) -> tuple[Path | None, Iterator[Record]]:
        """Where the rows of records are kept if they are many, and all of the records."""
        first = list(islice(records, _MANY))
        name = self.cache_name(path) if len(first) == _MANY else None
        return None if name is None else Path(self.cache_dir or default_cache()) / name, chain(first, records)

    def _seen(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            record = record.renamed(self.fields)
            yield record._replace(fields=_without(record.fields, self.ignore)) if self.ignore else record

    def _look_at(self, record: Record) -> Outcome:
        found = self.encode(record)
        found = found._replace(remarks={*found.remarks, *(each for row in found.rows for each in self.remarks(row))})
        key = str(self.seed).encode() + self.content(record, found.unused)
        tokens = [list(self.token_ids(row)) for row in found.rows]
        return Outcome(record.where, _digest(key) / 2**64, record.weight, found, tokens)

    def _split(self, read: EncodedRecords) -> tuple[np.ndarray, np.ndarray]:
        """Records to train on and to validate on: a side is told by the content of a record and the seed alone."""
        if not self.val_fraction:
            return np.arange(len(read)), np.arange(0)
        shares = read.shares[read.counts > 0]
        lowest, highest = (shares.min(), shares.max()) if len(shares) else (0.0, 1.0)
        if lowest == highest:
            raise ValueError(
                f"{_named(self.path)}: found no two rows that differ, expected one at least to train on and one to "
                "validate on. Add rows, or set val_fraction to 0."
            )
        held_out = (read.shares == lowest) | ((read.shares < self.val_fraction) & (read.shares != highest))
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def _rows(self, read: EncodedRecords, records: np.ndarray, path: Paths, purpose: str) -> Sequence[Any]:
        """The rows to batch, once it is said what became of the records."""
        kept = records[read.counts[records] > 0]
        rank_zero_info(
            f"{_named(path)}, {purpose}: kept {len(kept)} rows, {read.truncated[kept].sum()} of them "
            f"truncated, and rejected {len(records) - len(kept)}."
        )
        for said, about in sorted(read.said_of(records).items()):
            rank_zero_info(f"{said}: {_first(read, about)}.")
        if unused := read.unused_in(records):
            names = ", ".join(map(repr, sorted(unused)))
            rank_zero_info(f"Left out the fields {names}, which {purpose} does not use.")
        if purpose == "training" and (read.weights[records] != 1).any():
            kept = np.repeat(kept, read.times[kept])
            rank_zero_info(f"By their weights, {len(kept)} are learned in an epoch.")
        if not len(kept):
            raise ValueError(
                f"{_named(path)}: no row for {purpose} is left, as it says above. Raise max_length, set overlong to "
                "'truncate', or correct the rows."
            )
        return self.arrange(ChosenRows(read.rows, read.lengths, read.rows_of(kept)))

    def state_dict(self) -> dict[str, Any]:
        """Which rows are learned, to tell if others are when the run resumes."""
        return self._learned

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so where a resumed run has other training rows than the one that it resumes."""
        trainer = self.trainer
        if trainer is not None and trainer.state.fn == "fit" and state_dict != self._learned:
            rank_zero_warn(
                f"The training rows are not those that the checkpoint was trained on: {self._learned.get('rows')} "
                f"records where there were {state_dict['rows']}, or others. In the epoch that goes on, some may be "
                "learned twice or not at all."
            )

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
        rows = self.predict_rows[self.predict_from :]
        return self._loader(rows, self.collate_predict) if rows else []

    def _loader(self, rows: Sequence[Any], collate: Any, sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return ResumableDataLoader(
            rows,  # type: ignore[arg-type]  # a sequence is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
        )


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def _warn_of_rows_on_both_sides(train: EncodedRecords, held_out: EncodedRecords) -> None:
    both = np.flatnonzero(np.isin(held_out.shares, train.shares))
    if len(both):
        rank_zero_warn(
            f"{len(both)} of the {len(held_out)} rows to validate on are learned too, so that what is measured on them "
            f"says little: {_first(held_out, both)}. Remove them from one side."
        )


def _first(read: EncodedRecords, records: np.ndarray) -> str:
    more = f" and {len(records) - _NAMED} more" if len(records) > _NAMED else ""
    return "; ".join(read.places[record] for record in records[:_NAMED].tolist()) + more


def _each(encode: Callable[[Record], Any], records: Iterable[Record], bad: BadRows) -> Iterator[Any]:
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
