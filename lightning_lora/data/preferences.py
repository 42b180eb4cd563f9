"""Pairs of a better and a worse answer to the same question."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_lora.data.conversation import encode_answers
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.keys import is_empty, unused_keys
from lightning_lora.data.messages import SYSTEM, Conversation, Message, messages_in, tools_in
from lightning_lora.data.record import Record
from lightning_lora.data.texts import LanguageModelData, in_row

_QUESTION = ("prompt", "question", "instruction")
_REPEATED = ("messages",)  # UltraFeedback's, which repeat what was chosen
_TURN = re.compile(r"\s*(?:^|\n\n)(Human|Assistant): ?")


class PreferenceData(LanguageModelData):
    """Rows of ``prompt`` (or ``question``), ``chosen`` and ``rejected``, from files of all kinds.

    Each is a string or a list of messages. What was chosen and rejected may repeat the question, as in UltraFeedback,
    or hold it alone, as in HH-RLHF, whose texts of ``Human:`` and ``Assistant:`` are read too. Only the last answer is
    compared, after the same tokens in both: where question and answer are longer than ``max_length`` together, the
    oldest exchanges are left out of both, then answers lose their end. Pairs that are equal after that are dropped and
    counted.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def encode(self, record: Record) -> Encoded:
        """The question with each of its two answers."""
        question, answers = _pair(record)
        try:
            rows, truncated = encode_answers(
                self.tokenizer, question.messages, answers, self.max_length, question.tools
            )
        except ValueError as error:
            raise in_row(record, question, error) from None
        if rows is not None and rows[0] == rows[1]:
            return Encoded([], True, question.unused, "without a difference in max_length tokens")
        return Encoded([] if rows is None else [rows], truncated, question.unused)

    def sequences(self) -> Iterator[list[int]]:
        """Token ids of all answers with their questions."""
        for pair in [*(self.train_rows or []), *self.val_rows]:
            yield from (row["input_ids"] for row in pair)

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """The chosen of all rows, then the rejected of all rows, padded on the right."""
        both = [row[0] for row in rows] + [row[1] for row in rows]
        return super().collate(both)


def _pair(record: Record) -> tuple[Conversation, list[Message]]:
    """The question of a row, and its two answers."""
    halves = [_messages(record, field) for field in ("chosen", "rejected")]
    if halves[0] == halves[1]:
        raise record.error("rejected", "an answer that differs from 'chosen'", "the same")
    field = next((field for field in _QUESTION if not is_empty(record.fields.get(field))), None)
    question: list[Message] = []
    fields: list[str] = []
    if field is not None:
        question, fields = messages_in(record, field, "user")
    else:
        shared = next((i for i, (a, b) in enumerate(zip(*halves)) if a != b), min(map(len, halves)))
        question = halves[0][:shared]
        if not question:
            raise record.error("prompt", "a question, or one that both 'chosen' and 'rejected' begin with")
        fields = [f"chosen[{index}]" for index in range(len(question))]
    answers = []
    for name, half in zip(("chosen", "rejected"), halves):
        own = half[len(question) :] if half[: len(question)] == question else half
        if len(own) != 1 or own[0]["role"] != "assistant":
            found = ", ".join(message["role"] for message in own) or "none"
            raise record.error(name, "the question (or nothing) and one answer of the assistant", f"the roles {found}")
        answers += own
    system = next((field for field in SYSTEM if not is_empty(record.fields.get(field))), None)
    if system is not None:
        question, fields = [{"role": "system", "content": record.text(system)}, *question], [system, *fields]
    used = {"chosen", "rejected", *_QUESTION[:1], *SYSTEM, "tools", *_REPEATED} | ({field} if field else set())
    unused = unused_keys(record, used)
    return Conversation(question, [*fields, "chosen"], tools_in(record), unused), answers


def _messages(record: Record, field: str) -> list[Message]:
    value = record.fields.get(field)
    if isinstance(value, str) and _TURN.match(value):
        turns = _TURN.split(value)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[name], "content": said.strip()} for name, said in zip(turns[::2], turns[1::2])]
    return messages_in(record, field, "assistant")[0]
