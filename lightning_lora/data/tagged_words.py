"""Sentences whose words have a tag each."""

from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED
from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.keys import unused_keys
from lightning_lora.data.labels import agreed_labels, label_indices
from lightning_lora.data.record import Record
from lightning_lora.data.spans import FIELDS, Span, spans_in, tags_of, words_in
from lightning_lora.data.special_tokens import around
from lightning_lora.data.texts import TextData

TaggedRow = dict[str, list[int]]

TEXT = "text"


class Words(NamedTuple):
    """The words of a row.

    Args:
        texts: As they stand.
        behind: What stands behind each, such as a space.
        places: Where they begin and end in the row's text, if it has one.
    """

    texts: list[str]
    behind: list[str]
    places: list[tuple[int, int]] | None


class TaggedWordsData(TextData):
    """Rows of ``{"tokens": ["...", ...], "tags": ["...", ...]}``, or of a text with spans, from JSON, Parquet or CoNLL.

    Spans are ``{"text": "...", "spans": [[start, end, label], ...]}``, also under ``entities`` or ``label``. Words are
    then those of :func:`~lightning_lora.data.spans.words_in`, and the names of the tags ``O`` and ``B-`` and ``I-`` of
    the spans' labels, or these alone.

    Words are tokenized with what is between them, as they stand in texts. The tag counts at the first token of its word
    and is ignored at the others. A word that the tokenizer knows nothing of, such as a control character, is its
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
        counts = Counter(label for row in self.train_rows or [] for label in row["labels"])
        return [counts[index] for index in range(len(self.labels))]

    def prepare(self) -> None:
        """Take the labels from the model if they are not set, and load the tokenizer."""
        self.labels = agreed_labels(self._given, self.of_model("labels"))
        super().prepare()

    def encode(self, record: Record) -> Encoded:
        """Token ids of a row, and the tags at the first token of each word."""
        if self._is_text(record):
            field = next((field for field in FIELDS if field in record.fields), FIELDS[0])
            unused = unused_keys(record, {TEXT, field})
            spans = spans_in(record, record.text(TEXT), field)
            words = self._words(record, spans)
            named = Record(record.where, {field: tags_of(words.places or [], spans, self.labels)}, record.names)
            tags = label_indices(named, field, self.labels)
        else:
            unused = unused_keys(record, {self.tokens_field, self.tags_field})
            words = self._words(record)
            tags = label_indices(record, self.tags_field, self.labels)
            if len(tags) != len(words.texts):
                expected = f"a tag for each of the {len(words.texts)} words"
                raise record.error(self.tags_field, expected, f"{len(tags)} tags")
        parts = self._parts(record, words, tags)
        return Encoded(parts[:1], len(parts) > 1, unused)

    def label(self, row: TaggedRow) -> str:
        """The tags of its words."""
        return " ".join(self.labels[label] for label in row["labels"] if label != IGNORED)

    def encode_predict(self, record: Record) -> tuple[list[TaggedRow], list[tuple[int, int]] | None]:
        """The parts of a row, with zeros for tags, since rows to predict have none, and where a text has its words."""
        words = self._words(record)
        return self._parts(record, words, [0] * len(words.texts)), words.places

    def collate(self, rows: list[TaggedRow]) -> dict[str, Tensor]:
        """Pad rows on the right to the longest."""
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        length = batch["input_ids"].shape[1]
        labels = [row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in rows]
        return {**batch, "labels": torch.tensor(labels)}

    def collate_predict(self, rows: list[tuple[list[TaggedRow], list[tuple[int, int]] | None]]) -> dict[str, Any]:
        """All parts of all rows, with how many each has (``"parts"``) and where its text has words (``"words"``)."""
        parts = [part for row, _ in rows for part in row]
        return {**self.collate(parts), "parts": [len(row) for row, _ in rows], "words": [words for _, words in rows]}

    def _is_text(self, record: Record) -> bool:
        return self.tokens_field not in record.fields and TEXT in record.fields

    def _words(self, record: Record, spans: list[Span] | None = None) -> Words:
        if self._is_text(record):
            return self._words_of_text(record, words_in(record.text(TEXT), spans or []))
        words = record.fields.get(self.tokens_field)
        if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
            raise record.error(self.tokens_field, "a list of words")
        return Words([word.strip() or word for word in words], [" "] * len(words), None)

    def _words_of_text(self, record: Record, places: list[tuple[int, int]]) -> Words:
        text = record.fields[TEXT]
        starts = [start for start, _ in places]
        behind = [text[end:start] for (_, end), start in zip(places, [*starts[1:], len(text)])]
        words = Words([text[start:end] for start, end in places], behind, places)
        with_tokens = sorted(set(self._tokens(words)[1]))
        if not with_tokens:
            raise record.error(TEXT, "a text with a word that the tokenizer knows")
        if len(with_tokens) == len(places):
            return words
        # Others are parts of a token whose last character is of a later word, such as "'s".
        kept = [places[index] for index in with_tokens]
        return self._words_of_text(record, [(starts[0], kept[0][1]), *kept[1:]])

    def _parts(self, record: Record, words: Words, tags: list[int]) -> list[TaggedRow]:
        """Rows of at most ``max_length`` tokens, each of whole words."""
        ids, owners = self._tokens(words)
        if missing := set(range(len(words.texts))) - set(owners):
            unknown = self.tokenizer.unk_token
            if unknown is None:
                found = f"{words.texts[min(missing)]!r}, which is no token"
                raise record.error(f"{self.tokens_field}[{min(missing)}]", "a word that the tokenizer knows", found)
            known = [unknown if index in missing else word for index, word in enumerate(words.texts)]
            ids, owners = self._tokens(words._replace(texts=known))
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

    def _tokens(self, words: Words) -> tuple[list[int], list[int]]:
        """Token ids of the words with what is between them, and the word that each belongs to."""
        pieces = [word + behind for word, behind in zip(words.texts, words.behind)]
        text = "".join(pieces).rstrip()
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [0, *accumulate(map(len, pieces[:-1]))]
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
