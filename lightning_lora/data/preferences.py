"""Pairs of a better and a worse answer to the same question."""

from typing import Any

from torch import Tensor

from lightning_lora.data.conversation import encode_conversation, messages_in
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.texts import LanguageModelData


class PreferenceData(LanguageModelData):
    """Rows of ``prompt``, ``chosen`` and ``rejected``, strings or lists of messages, from JSONL, CSV or Parquet.

    The beginning of a question is left out where question and answer are longer than ``max_length`` together.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def encode(self, record: Record) -> Encoded:
        """The question with each of its two answers."""
        prompt = messages_in(record, "prompt", "user")
        answers = [messages_in(record, field, "assistant") for field in ("chosen", "rejected")]
        if answers[0] == answers[1]:
            raise record.error("rejected", "an answer that differs from 'chosen'", "the same")
        try:
            pair = [encode_conversation(self.tokenizer, prompt + answer, self.max_length) for answer in answers]
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        return Encoded([row for row, _ in pair], any(truncated for _, truncated in pair))

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """The chosen of all rows, then the rejected of all rows, padded on the right."""
        both = [row[0] for row in rows] + [row[1] for row in rows]
        return super().collate(both)
