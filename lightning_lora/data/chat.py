"""Conversations for instruction tuning of a causal language model."""

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.data.conversation import Row, encode_conversation, read_conversation
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.packing import collate_packs, pack
from lightning_lora.data.texts import LanguageModelData


class ChatData(LanguageModelData):
    """Conversations, question and answer pairs, or Alpaca's instructions, from JSONL, CSV or Parquet.

    The fields of a row say which it is: ``messages``; ``prompt`` and ``completion``; ``instruction``, ``input`` and
    ``output``. Each goes through the tokenizer's chat template, and only what the assistant says is learned, in every
    one of its turns. See :func:`~lightning_lora.data.conversation.encode_conversation` for what truncation leaves out.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.LanguageModelData`.
        overlong: What happens to a conversation longer than ``max_length``: ``"truncate"`` (default) or ``"reject"``.
        packing: Whether to put several conversations into one row of at most ``max_length`` tokens, kept apart by their
            positions. Default true. A batch then holds more, so use a smaller ``batch_size``.
        options: The other arguments of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def __init__(
        self,
        path: str,
        pretrained: str,
        overlong: Literal["truncate", "reject"] = "truncate",
        packing: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        self.overlong = overlong
        self.packing = packing

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
        return collate_packs(rows, self.pad_token_id) if self.packing else super().collate(rows)
