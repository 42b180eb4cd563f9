"""Conversations for instruction tuning of a causal language model."""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.data.conversation import (
    Row,
    encode_conversation,
    encode_question,
    read_conversation,
    read_question,
)
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded, FileData
from lightning_lora.data.packing import collate_packs, pack
from lightning_lora.data.prompt_completion import collate
from lightning_lora.tasks.pretrained import load_tokenizer


class ChatData(FileData):
    """Conversations, question and answer pairs, or Alpaca's instructions, from JSONL, CSV or Parquet.

    The fields of a row say which it is: ``messages``; ``prompt`` and ``completion``; ``instruction``, ``input`` and
    ``output``. Each goes through the tokenizer's chat template, and only what the assistant says is learned, in every
    one of its turns. See :func:`~lightning_lora.data.conversation.encode_conversation` for what truncation leaves out.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`, as for the arguments up to ``seed``.
        pretrained: Checkpoint whose tokenizer is used, as in :class:`~lightning_lora.tasks.CausalLM`.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        max_length: Longest row, in tokens. Default 512.
        overlong: What happens to a conversation longer than that: ``"truncate"`` (default) or ``"reject"``.
        packing: Whether to put several conversations into one row of at most ``max_length`` tokens, kept apart by their
            positions. Default true. A batch then holds more, so use a smaller ``batch_size``.

    Raises:
        ValueError: If ``max_length`` is below 2, and as in the base class.
    """

    def __init__(
        self,
        path: str,
        pretrained: str,
        gguf_file: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.1,
        predict_path: str | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        overlong: Literal["truncate", "reject"] = "truncate",
        packing: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(path, val_path, val_fraction, predict_path, batch_size, num_workers, seed)
        if max_length < 2:
            raise ValueError(f"Found max_length={max_length}, expected at least 2 tokens, such as 512.")
        self.pretrained = pretrained
        self.gguf_file = gguf_file
        self.max_length = max_length
        self.overlong = overlong
        self.packing = packing
        self.tokenizer: Any = None

    def prepare(self, records: list[Record]) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained, self.gguf_file)

    def encode(self, record: Record) -> Encoded:
        """Token ids and labels of a conversation."""
        messages = read_conversation(record)
        try:
            row, truncated = encode_conversation(self.tokenizer, messages, self.max_length)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        return Encoded(None) if truncated and self.overlong == "reject" else Encoded(row, truncated)

    def arrange(self, rows: list[Row]) -> list[Row]:
        """Pack the rows, if asked for."""
        if not self.packing:
            return rows
        packs = pack(rows, self.max_length)
        used = sum(len(row["input_ids"]) for row in rows) / (len(packs) * self.max_length)
        rank_zero_info(f"Packed {len(rows)} rows into {len(packs)} of {self.max_length} tokens, {used:.0%} full.")
        return packs

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Pad rows or packs on the right."""
        batched = collate_packs if self.packing else collate
        return batched(rows, int(self.tokenizer.pad_token_id or 0))

    def collate_predict(self, records: list[Record]) -> dict[str, Any]:
        """The messages before the last answer, padded on the left, and as they are under ``"question"``."""
        questions = [read_question(record) for record in records]
        ids = [encode_question(self.tokenizer, question) for question in questions]
        length = max(map(len, ids))
        padding = int(self.tokenizer.pad_token_id or 0)
        return {
            "input_ids": torch.tensor([[padding] * (length - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
            "question": questions,
        }
