"""Pairs of a better and a worse answer to the same question, or single answers that are marked as good or bad."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import Row, encode_answers
from lightning_lora.data.encoded import Encoded
from lightning_lora.data.keys import is_empty
from lightning_lora.data.messages import (
    QUESTION,
    SYSTEM,
    Conversation,
    Message,
    left_out,
    messages_in,
    question_in,
    read_conversation,
    tools_in,
)
from lightning_lora.data.record import Record
from lightning_lora.data.texts import LanguageModelData, in_row, remarks_on

_REPEATED = "messages"  # UltraFeedback's, which repeat what was chosen
_MARK = "label"
_MARKS = {"true": True, "false": False, "1": True, "0": False}
_TURN = re.compile(r"\s*(?:^|\n\n)(Human|Assistant): ?")


class PreferenceData(LanguageModelData):
    """Rows of a question, ``chosen`` and ``rejected``, from files of all kinds.

    Each is a string or a list of messages; the question has its fields, with context, history and system message, as in
    :func:`~lightning_lora.data.messages.read_conversation`. What was chosen and rejected may repeat the question, as in
    UltraFeedback, or hold it alone, as in HH-RLHF, whose texts of ``Human:`` and ``Assistant:`` are read too. Only the
    last answer is compared, after the same tokens in both: where question and answer are longer than ``max_length``
    together, the oldest exchanges are left out of both, then answers lose their end. Pairs that are equal after that
    are dropped and counted.

    For the loss ``kto``, a row may also be a conversation, in any layout of
    :func:`~lightning_lora.data.messages.read_conversation`, with ``label``: whether its last answer is a good one, as
    ``true`` or ``false``, or 1 or 0.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    pairs_only = False  # whether the model that is trained learns from pairs alone

    def prepare(self) -> None:
        """Load the tokenizer, and find out what the model learns from."""
        super().prepare()
        self.pairs_only = self.of_model("takes_single_answers") is False

    def encode(self, record: Record) -> Encoded:
        """The question with each of its two answers, or with the one that is marked."""
        if not has_pair(record) and _MARK in record.fields:
            return self._encode_marked(record)
        question, answers = read_pair(record)
        rows, truncated = self.encode_answers(record, question, answers)
        if rows is not None and rows[0] == rows[1]:
            return Encoded([], True, question.unused, "without a difference in max_length tokens")
        remarks = remarks_on(self.tokenizer, [*question.messages, *answers])
        asked = question.messages[-1]["content"].strip()
        if all(answer["content"].strip().startswith(asked) for answer in answers):
            remarks = [*remarks, "Both answers begin with the words of the question, which is learned in them"]
        return Encoded([] if rows is None else [rows], truncated, question.unused, remarks=remarks)

    def encode_answers(
        self, record: Record, question: Conversation, answers: list[Message]
    ) -> tuple[list[Row] | None, bool]:
        """See :func:`~lightning_lora.data.conversation.encode_answers`, with file and line in errors."""
        try:
            return encode_answers(self.tokenizer, question.messages, answers, self.max_length, question.tools)
        except ValueError as error:
            raise in_row(record, question, error) from None

    def _encode_marked(self, record: Record) -> Encoded:
        if self.pairs_only:
            raise record.error(_MARK, "'chosen' and 'rejected', for only model.loss=kto learns from single answers")
        desirable = _MARKS.get(str(record.fields[_MARK]).strip().lower())
        if desirable is None:
            raise record.error(_MARK, "true for a good answer or false for a bad one")
        question, answer = read_single(record)
        rows, truncated = self.encode_answers(record, question, [answer])
        marked = [[{**row, "desirable": desirable} for row in rows]] if rows else []
        remarks = remarks_on(self.tokenizer, [*question.messages, answer])
        return Encoded(marked, truncated, question.unused, remarks=remarks)

    def label(self, row: Any) -> str | None:
        """Whether an answer without a pair is a good one."""
        marks = {True: "desirable", False: "undesirable"}
        return marks.get(row[0].get("desirable"))

    def token_ids(self, row: Any) -> Iterator[list[int]]:
        """Those of each answer with its question."""
        yield from (half["input_ids"] for half in row)

    def learned(self, row: Any) -> Iterator[list[bool]]:
        """Which of these tokens are of an answer."""
        for half in row:
            yield from super().learned(half)

    def collate(self, rows: list[Any]) -> dict[str, Tensor]:
        """The chosen of all rows, then the rejected of all rows, padded on the right.

        Where a row has a single answer, all are single ones, with ``desirable`` of shape ``(answers,)``.
        """
        if all(len(row) == 2 for row in rows):
            return super().collate([row[half] for half in (0, 1) for row in rows])
        marks = [mark for row in rows for mark in ((True, False) if len(row) == 2 else (row[0]["desirable"],))]
        return {**super().collate([answer for row in rows for answer in row]), "desirable": torch.tensor(marks)}


def has_pair(record: Record) -> bool:
    """Whether a row has an answer that was chosen or rejected."""
    return not all(is_empty(record.fields.get(field)) for field in ("chosen", "rejected"))


def read_single(record: Record) -> tuple[Conversation, Message]:
    """The question of a row, and its single answer, of which ``label`` may say how good it is.

    Raises:
        ValueError: If the row does not end with an answer, and as
            :func:`~lightning_lora.data.messages.read_conversation`.
    """
    others = {field: value for field, value in record.fields.items() if field != _MARK}
    found = read_conversation(record._replace(fields=others))
    *question, answer = found.messages
    if answer["role"] != "assistant" or answer.get("weight") == 0:
        raise record.error(found.fields[-1].partition("[")[0], "an answer at its end", "none")
    return found._replace(messages=question), answer


def read_pair(record: Record) -> tuple[Conversation, list[Message]]:
    """The question of a row, and its two answers.

    Raises:
        ValueError: If a value is bad, or an answer is missing.
    """
    halves = [_messages(record, field) for field in ("chosen", "rejected")]
    if halves[0] == halves[1]:
        raise record.error("rejected", "an answer that differs from 'chosen'", "the same")
    question: list[Message] = []
    fields: list[str] = []
    used: set[str] = set()
    if any(not is_empty(record.fields.get(field)) for field in QUESTION):
        question, fields, used = question_in(record)
        if len(question) == 1 and _TURN.match(question[0]["content"]):
            question = _turns(question[0]["content"]) or question
            fields *= len(question)
    elif all(len(half) == 1 for half in halves) and not is_empty(record.fields.get(_REPEATED)):
        question, fields = messages_in(record, _REPEATED, "user")
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
        if own[0].get("weight") == 0:
            raise record.error(f"{name}[{len(half) - 1}].weight", "no such key in an answer that is compared", "0")
        answers += own
    if not is_empty(record.fields.get(_REPEATED)):
        there = messages_in(record, _REPEATED, "user")[0]
        if there not in (question, *halves, *([*question, answer] for answer in answers)):
            raise record.error(_REPEATED, "no such field here, or the question, which an answer may follow")
    system = next((field for field in SYSTEM if not is_empty(record.fields.get(field))), None)
    if system is not None:
        question, fields = [{"role": "system", "content": record.text(system)}, *question], [system, *fields]
    unused = left_out(record, used | {"chosen", "rejected", *SYSTEM, "tools", _REPEATED})
    return Conversation(question, [*fields, "chosen"], tools_in(record), unused), answers


def _messages(record: Record, field: str) -> list[Message]:
    value = record.fields.get(field)
    if isinstance(value, str) and _TURN.match(value):
        return _turns(value)
    return messages_in(record, field, "assistant")[0]


def _turns(text: str) -> list[Message]:
    """The turns of a text of HH-RLHF, without one that waits for its words."""
    turns = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    found = [{"role": roles[name], "content": said.strip()} for name, said in zip(turns[::2], turns[1::2])]
    return found if found[-1]["content"] else found[:-1]
