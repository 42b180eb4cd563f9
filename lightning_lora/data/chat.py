"""Conversations for instruction tuning of a causal language model."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.data.conversation import Row, TrainOn, encode_text, encode_turns
from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.json_rows import ChosenRows
from lightning_lora.data.keys import unused_keys
from lightning_lora.data.messages import is_text, read_conversation
from lightning_lora.data.packing import collate_packs, pack, unpack
from lightning_lora.data.record import Record
from lightning_lora.data.texts import LanguageModelData, in_row, remarks_on


class ConversationData(LanguageModelData):
    """Conversations in any layout of :func:`~lightning_lora.data.messages.read_conversation`, or texts.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    train_on: TrainOn = "all"
    overlong: Literal["truncate", "reject"] = "truncate"

    def encode(self, record: Record) -> Encoded:
        """Token ids and labels of a conversation, in one row or in one for each answer, or of a text."""
        remarks: list[str] = []
        if is_text(record):
            unused: Collection[str] = unused_keys(record, {"text"})
            found = encode_text(self.tokenizer, record.text("text"), self.max_length)
        else:
            conversation = read_conversation(record)
            unused = conversation.unused
            remarks = remarks_on(self.tokenizer, conversation.messages)
            try:
                found = encode_turns(
                    self.tokenizer,
                    conversation.messages,
                    self.max_length,
                    conversation.tools,
                    self.train_on,
                    self.separator,
                )
            except ValueError as error:
                raise in_row(record, conversation, error) from None
        if self.overlong == "reject":
            found = [(row, cut) for row, cut in found if not cut]
        rows = [row for row, _ in found if row is not None]
        return Encoded(rows, any(cut for _, cut in found), unused, remarks=remarks)


class ChatData(ConversationData):
    """Conversations, question and answer pairs, instructions or texts, from files of all kinds.

    The fields of a row say which layout it has; see :func:`~lightning_lora.data.messages.read_conversation`. All but
    texts go through the tokenizer's chat template, and only what the assistant says is learned, in every one of its
    turns. See :func:`~lightning_lora.data.conversation.encode_conversation` for what truncation leaves out, and
    :func:`~lightning_lora.data.conversation.encode_turns` for templates that rewrite earlier turns.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.TextData`.
        overlong: What happens to a conversation longer than ``max_length``: ``"truncate"`` (default) or ``"reject"``.
        packing: Whether to put several conversations into one row of at most ``max_length`` tokens, kept apart by their
            positions. Default true. A batch then holds more, so use a smaller ``batch_size``.
        train_on: Which answers of a conversation are learned: ``"all"`` (default) or the ``"last"`` alone.
        options: The other arguments of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def __init__(
        self,
        path: Paths,
        pretrained: str | None = None,
        overlong: Literal["truncate", "reject"] = "truncate",
        packing: bool = True,
        train_on: TrainOn = "all",
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        self.overlong = overlong
        self.packing = packing
        self.train_on = train_on

    def arrange(self, rows: ChosenRows) -> Sequence[Row]:
        """Pack the rows, if asked for."""
        if not self.packing:
            return rows
        packs = pack(rows, self.max_length, rows.lengths.tolist())
        used = rows.lengths.sum() / (len(packs) * self.max_length)
        rank_zero_info(f"Packed {len(rows)} rows into {len(packs)} of {self.max_length} tokens, {used:.0%} full.")
        return packs

    def token_ids(self, row: Row) -> Iterator[list[int]]:
        """Those of each row in a pack."""
        yield from (part["input_ids"] for part in unpack(row))

    def learned(self, row: Row) -> Iterator[list[bool]]:
        """Which of these tokens are learned."""
        for part in unpack(row):
            yield from super().learned(part)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Pad rows or packs on the right."""
        return collate_packs(rows, self.pad_token_id) if self.packing else super().collate(rows)
