"""Pairs of a source text and a target text."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.texts import TextData


class Seq2SeqData(TextData):
    """Rows with a source and a target, from JSONL, CSV or Parquet.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: Checkpoint whose tokenizer is used, the same as the model's.
        source_field: Field of the text that is read. Default ``source``.
        target_field: Field of the text that is to be written. Default ``target``.
        max_source_length: Longest source, in tokens; longer ones lose their end. Default 256.
        max_target_length: The same for targets. Default 64.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(
        self,
        path: str,
        pretrained: str,
        source_field: str = "source",
        target_field: str = "target",
        max_source_length: int = 256,
        max_target_length: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        self.source_field = source_field
        self.target_field = target_field
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length

    def encode(self, record: Record) -> Encoded:
        """Token ids of the source, and of the target as labels."""
        source, cut = self._tokenize(record, self.source_field, self.max_source_length)
        target, cut_too = self._tokenize(record, self.target_field, self.max_target_length)
        # An encoder's tokenizer puts its first token in front, which the decoder is given and need not write.
        start = self.tokenizer.cls_token_id
        return Encoded((source, target[1:] if start is not None and target[0] == start else target), cut or cut_too)

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Pad sources and targets to the longest."""
        longest = max(len(target) for _, target in rows)
        labels = [target + [IGNORED] * (longest - len(target)) for _, target in rows]
        return {**self._pad([source for source, _ in rows]), "labels": torch.tensor(labels)}

    def collate_predict(self, records: list[Record]) -> dict[str, Tensor]:
        """The sources alone."""
        return self._pad([self._tokenize(record, self.source_field, self.max_source_length)[0] for record in records])

    def _pad(self, sources: list[list[int]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad({"input_ids": sources}, return_tensors="pt"))

    def _tokenize(self, record: Record, field: str, max_length: int) -> tuple[list[int], bool]:
        text = record.text(field)
        ids = list(self.tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        return ids, len(ids) == max_length and len(self.tokenizer(text)["input_ids"]) > max_length
