"""Pairs of texts that belong together, for sentence embeddings."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.keys import is_empty, unused_keys
from lightning_lora.data.record import Record
from lightning_lora.data.texts import TextData

TEXTS = ("anchor", "positive", "negative")
# A measure of similarity is for other losses, and these are further texts that a pair does not belong with.
_MEANINGFUL = ("label", "score", "similarity", "negatives", *(f"negative_{number}" for number in range(10)))


class SentencePairData(TextData):
    """Rows of an ``anchor`` and a ``positive``, which belong together, such as a question and its answer.

    A row may have a ``negative`` too, a text that is near to the anchor and does not belong to it. Files are of all
    kinds, and ``fields`` tells other names, such as ``{anchor: question, positive: answer}``. ``predict`` takes the
    ``text`` of a row, or its ``anchor``.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.TextData`.
        max_length: Longest text, in tokens; longer ones lose their end. Default 128.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(self, path: Paths, pretrained: str | None = None, max_length: int = 128, **options: Any) -> None:
        super().__init__(path, pretrained, **options)
        self.max_length = max_length

    def encode(self, record: Record) -> Encoded:
        """Token ids of the anchor, the positive, and the negative if there is one."""
        unused = unused_keys(record, TEXTS, _MEANINGFUL)
        there = [field for field in TEXTS if field != "negative" or not is_empty(record.fields.get(field))]
        texts = [record.text(field) for field in there]
        if texts[1:].count(texts[1]) > 1:
            raise record.error("negative", "another text than 'positive'", "the same")
        found = [self.cut(self.max_length, text=text) for text in texts]
        return Encoded([[ids for ids, _ in found]], any(cut for _, cut in found), unused)

    def token_ids(self, row: list[list[int]]) -> Iterator[list[int]]:
        """Those of each text."""
        yield from row

    def learned(self, row: list[list[int]]) -> Iterator[list[bool]]:
        """None of the tokens are."""
        yield from ([False] * len(ids) for ids in row)

    def encode_predict(self, record: Record) -> tuple[list[int], str]:
        """Token ids of a text, and the text."""
        text = record.text("text" if "text" in record.fields else "anchor")
        return self.cut(self.max_length, text=text)[0], text

    def collate(self, rows: list[list[list[int]]]) -> dict[str, Any]:
        """The anchors of all rows, then their positives, then the negatives that there are, padded to the longest.

        Under ``"rows"`` is the number of rows, and under ``"keys"``, of shape ``(texts,)``, a number for each text, the
        same for the same text.
        """
        texts = [row[index] for index in range(len(TEXTS)) for row in rows if index < len(row)]
        return {**self._padded(texts), "keys": torch.tensor([_key(ids) for ids in texts]), "rows": len(rows)}

    def collate_predict(self, rows: list[tuple[list[int], str]]) -> dict[str, Any]:
        """The texts, padded to the longest, and as they are under ``"text"``."""
        return {**self._padded([ids for ids, _ in rows]), "text": [text for _, text in rows]}

    def _padded(self, texts: list[list[int]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad({"input_ids": texts}, return_tensors="pt"))


def _key(ids: list[int]) -> int:
    return int.from_bytes(blake2b(str(ids).encode(), digest_size=8).digest(), "big", signed=True)
