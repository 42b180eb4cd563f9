"""Sentences whose words have a tag each."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.labels import label_indices
from lightning_lora.data.texts import TextData


class TaggedWordsData(TextData):
    """Rows of ``{"tokens": ["...", ...], "tags": ["...", ...]}``, from JSONL or Parquet.

    The tag counts at the first token of its word and is ignored at the others.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: Checkpoint whose tokenizer is used, the same as the model's.
        labels: Names of the tags, in the order of their indices.
        tokens_field: Field of the words. Default ``tokens``.
        tags_field: Field of the tags. Default ``tags``.
        max_length: Longest row, in tokens; longer ones lose their end. Default 256.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(
        self,
        path: str,
        pretrained: str,
        labels: list[str],
        tokens_field: str = "tokens",
        tags_field: str = "tags",
        max_length: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        self.labels = labels
        self.tokens_field = tokens_field
        self.tags_field = tags_field
        self.max_length = max_length

    @property
    def class_counts(self) -> list[int]:
        """Training words of each tag, after ``setup``."""
        found = [label for row in self.train_rows or [] for label in row["labels"]]
        return [found.count(index) for index in range(len(self.labels))]

    def encode(self, record: Record) -> Encoded:
        """Token ids of a row, and the tags at the first token of each word."""
        words = self._words(record)
        tags = label_indices(record, self.tags_field, self.labels)
        if len(tags) != len(words):
            raise record.error(self.tags_field, f"a tag for each of the {len(words)} words", f"{len(tags)} tags")
        return self._encode_words(words, tags)

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad rows on the right to the longest."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        labels = [row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in rows]
        return {**batch, "labels": torch.tensor(labels)}

    def collate_predict(self, records: list[Record]) -> dict[str, Tensor]:
        """The same, with zeros for tags, since rows to predict have none."""
        words = [self._words(record) for record in records]
        return self.collate([self._encode_words(row, [0] * len(row)).row for row in words])

    def _words(self, record: Record) -> list[str]:
        words = record.fields.get(self.tokens_field)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise record.error(self.tokens_field, "a list of words")
        return words

    def _encode_words(self, words: list[str], tags: list[int]) -> Encoded:
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        owners = encoded.word_ids()
        first = [owner is not None and owner != before for owner, before in zip(owners, [None, *owners])]
        labels = [tags[owner] if starts else IGNORED for owner, starts in zip(owners, first)]
        return Encoded({**encoded, "labels": labels}, sum(first) < len(words))
