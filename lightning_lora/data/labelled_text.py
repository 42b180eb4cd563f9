"""Texts with a label each."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.keys import unused_keys
from lightning_lora.data.labels import (
    REGRESSION,
    SINGLE_LABEL,
    ProblemType,
    agreed_labels,
    label_index,
    multi_hot,
    numbers,
)
from lightning_lora.data.record import Record
from lightning_lora.data.texts import TextData


class LabelledTextData(TextData):
    """Rows with a text, or a pair of texts, and a label, from files of all kinds.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.TextData`.
        labels: Names of the classes, in the order of their indices, or of the numbers that are regressed. Default
            ``None``: the model's. A row holds a name or an index, several, or numbers; see
            :func:`~lightning_lora.data.labels.label_index`, :func:`~lightning_lora.data.labels.multi_hot` and
            :func:`~lightning_lora.data.labels.numbers`.
        text_field: Field of the text. Default ``text``.
        pair_field: Field of the second text, for tasks about two. Default ``None``.
        label_field: Field of the label. Default ``label``.
        max_length: Longest row, in tokens; longer ones lose their end. Default 128.
        problem_type: What rows hold, as transformers calls it: ``single_label_classification``,
            ``multi_label_classification`` or ``regression``. Default ``None``: the model's, or the first.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(
        self,
        path: Paths,
        pretrained: str | None = None,
        labels: list[str] | None = None,
        text_field: str = "text",
        pair_field: str | None = None,
        label_field: str = "label",
        max_length: int = 128,
        problem_type: ProblemType | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        # Those of the model where none are given, from `setup` on.
        self.labels = labels or []
        self._given = labels
        self.text_field = text_field
        self.pair_field = pair_field
        self.label_field = label_field
        self.max_length = max_length
        self.problem_type = problem_type

    @property
    def class_counts(self) -> list[int]:
        """Training rows of each class, after ``setup``."""
        counts = Counter[int]()
        for row in self.train_rows or []:
            found = row["labels"]
            single = self.problem_type == SINGLE_LABEL
            counts.update([found] if single else [index for index, on in enumerate(found) if on == 1])
        return [counts[index] for index in range(len(self.labels))]

    def prepare(self) -> None:
        """Take from the model what is not set, and load the tokenizer."""
        super().prepare()
        self.labels = agreed_labels(self._given, self.of_model("labels"))
        of_model = self.of_model("problem_type")
        if None not in (self.problem_type, of_model) and self.problem_type != of_model:
            raise ValueError(
                f"Found data.problem_type={self.problem_type!r} and model.problem_type={of_model!r}, expected the "
                "same. Leave out data.problem_type, which is then the model's."
            )
        self.problem_type = self.problem_type or of_model or SINGLE_LABEL

    def setup(self, stage: str) -> None:
        """Read, split and encode the files, once, and say how many rows each class has."""
        new = self.train_rows is None
        super().setup(stage)
        if new and self.train_rows is not None:
            if self.problem_type == REGRESSION:
                columns = zip(self.labels, zip(*(row["labels"] for row in self.train_rows)))
                ranges = (f"{name} from {min(found):g} to {max(found):g}" for name, found in columns)
                rank_zero_info(f"Training values: {', '.join(ranges)}.")
                return
            counts = ", ".join(f"{label} {count}" for label, count in zip(self.labels, self.class_counts))
            rank_zero_info(f"Training rows by label: {counts}.")

    def encode(self, record: Record) -> Encoded:
        """Token ids and label of a row."""
        used = {self.text_field, self.label_field, self.pair_field or self.text_field}
        read: Callable[[Record, str, list[str]], Any] = label_index
        if self.problem_type != SINGLE_LABEL:
            read = numbers if self.problem_type == REGRESSION else multi_hot
            used |= set() if self.label_field in record.fields else {*self.labels}
        unused = unused_keys(record, used)
        ids, truncated = self._tokenize(record)
        return Encoded([{**ids, "labels": read(record, self.label_field, self.labels)}], truncated, unused)

    def learned(self, row: dict[str, Any]) -> Iterator[list[bool]]:
        """None of the tokens are."""
        yield [False] * len(row["input_ids"])

    def label(self, row: dict[str, Any]) -> str:
        """The name of its label, those of its labels, or its numbers."""
        found = row["labels"]
        if self.problem_type == SINGLE_LABEL:
            return str(self.labels[found])
        if self.problem_type == REGRESSION:
            return ", ".join(f"{name} {value:g}" for name, value in zip(self.labels, found))
        return ", ".join(name for name, on in zip(self.labels, found) if on)

    def encode_predict(self, record: Record) -> dict[str, list[int]]:
        """Token ids of a row without label."""
        return self._tokenize(record)[0]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad rows to the longest."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def collate_predict(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """The same without labels."""
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))

    def _tokenize(self, record: Record) -> tuple[dict[str, list[int]], bool]:
        texts = [record.text(field) for field in (self.text_field, self.pair_field) if field is not None]
        ids = dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))
        full = len(ids["input_ids"]) == self.max_length and len(self.tokenizer(*texts)["input_ids"]) > self.max_length
        return ids, full
