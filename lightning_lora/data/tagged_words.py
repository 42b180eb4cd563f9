"""Sentences whose words have a tag each."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED
from lightning_lora.data.from_files import Encoded, Paths
from lightning_lora.data.keys import unused_keys
from lightning_lora.data.labels import agreed_labels, label_indices
from lightning_lora.data.record import Record
from lightning_lora.data.special_tokens import around
from lightning_lora.data.texts import TextData

TaggedRow = dict[str, list[int]]


class TaggedWordsData(TextData):
    """Rows of ``{"tokens": ["...", ...], "tags": ["...", ...]}``, from JSON or Parquet.

    Words are tokenized with the spaces between them, as they stand in texts. The tag counts at the first token of its
    word and is ignored at the others. A word that the tokenizer knows nothing of, such as a control character, is its
    unknown token, so that each word has a tag in ``predict`` too; there, what is longer than ``max_length`` goes
    through the model in parts.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.TextData`.
        labels: Names of the tags, in the order of their indices. Default ``None``: the model's.
        tokens_field: Field of the words. Default ``tokens``.
        tags_field: Field of the tags. Default ``tags``.
        max_length: Longest row, in tokens; in training, longer ones lose their end. Default 256.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(
        self,
        path: Paths,
        pretrained: str | None = None,
        labels: list[str] | None = None,
        tokens_field: str = "tokens",
        tags_field: str = "tags",
        max_length: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        # Those of the model where none are given, from `setup` on.
        self.labels = labels or []
        self._given = labels
        self.tokens_field = tokens_field
        self.tags_field = tags_field
        self.max_length = max_length

    @property
    def class_counts(self) -> list[int]:
        """Training words of each tag, after ``setup``."""
        found = [label for row in self.train_rows or [] for label in row["labels"]]
        return [found.count(index) for index in range(len(self.labels))]

    def setup(self, stage: str) -> None:
        """Read, split and encode the files, once."""
        self.labels = agreed_labels(self._given, self.of_model("labels"))
        super().setup(stage)

    def encode(self, record: Record) -> Encoded:
        """Token ids of a row, and the tags at the first token of each word."""
        unused = unused_keys(record, {self.tokens_field, self.tags_field})
        words = self._words(record)
        tags = label_indices(record, self.tags_field, self.labels)
        if len(tags) != len(words):
            raise record.error(self.tags_field, f"a tag for each of the {len(words)} words", f"{len(tags)} tags")
        parts = self._parts(record, words, tags)
        return Encoded(parts[:1], len(parts) > 1, unused)

    def label(self, row: TaggedRow) -> str:
        """The tags of its words."""
        return " ".join(self.labels[label] for label in row["labels"] if label != IGNORED)

    def encode_predict(self, record: Record) -> list[TaggedRow]:
        """The parts of a row, with zeros for tags, since rows to predict have none."""
        words = self._words(record)
        return self._parts(record, words, [0] * len(words))

    def collate(self, rows: list[TaggedRow]) -> dict[str, Tensor]:
        """Pad rows on the right to the longest."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        labels = [row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in rows]
        return {**batch, "labels": torch.tensor(labels)}

    def collate_predict(self, rows: list[list[TaggedRow]]) -> dict[str, Any]:
        """All parts of all rows, and under ``"parts"`` how many each row has."""
        return {**self.collate([part for row in rows for part in row]), "parts": [len(row) for row in rows]}

    def _words(self, record: Record) -> list[str]:
        words = record.fields.get(self.tokens_field)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise record.error(self.tokens_field, "a list of words")
        return [word.strip() or word for word in words]

    def _parts(self, record: Record, words: list[str], tags: list[int]) -> list[TaggedRow]:
        """Rows of at most ``max_length`` tokens, each of whole words."""
        ids, owners = self._tokens(words)
        if missing := set(range(len(words))) - set(owners):
            unknown = self.tokenizer.unk_token
            if unknown is None:
                found = f"{words[min(missing)]!r}, which is no token"
                raise record.error(f"{self.tokens_field}[{min(missing)}]", "a word that the tokenizer knows", found)
            ids, owners = self._tokens([unknown if index in missing else word for index, word in enumerate(words)])
        room = self.max_length - sum(map(len, around(self.tokenizer)))
        parts: list[TaggedRow] = []
        start = 0
        while start < len(ids):
            end = min(start + room, len(ids))
            # Not inside a word, unless it fills a row alone.
            while end < len(ids) and end > start and owners[end] == owners[end - 1]:
                end -= 1
            end = end if end > start else min(start + room, len(ids))
            parts.append(self._row(ids[start:end], owners[start:end], owners[start - 1] if start else None, tags))
            start = end
        return parts

    def _tokens(self, words: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of the words with spaces between them, and the word that each belongs to."""
        found = self.tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True)
        starts = [0, *accumulate(len(word) + 1 for word in words[:-1])]
        # A token may begin at the space before its word.
        owners = [bisect_right(starts, max(end - 1, 0)) - 1 for _, end in found["offset_mapping"]]
        return list(found["input_ids"]), owners

    def _row(self, ids: list[int], owners: list[int], before: int | None, tags: list[int]) -> TaggedRow:
        front, back = around(self.tokenizer)
        labels = [tags[owner] if owner != previous else IGNORED for owner, previous in zip(owners, [before, *owners])]
        return {
            "input_ids": [*front, *ids, *back],
            "attention_mask": [1] * (len(front) + len(ids) + len(back)),
            "labels": [IGNORED] * len(front) + labels + [IGNORED] * len(back),
        }
