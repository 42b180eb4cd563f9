"""Pairs of answers to learn a reward from, and answers to be scored by it."""

from typing import Any

from lightning_lora.data.preferences import PreferenceData, has_pair, read_pair, read_single
from lightning_lora.data.record import Record
from lightning_lora.data.texts import LanguageModelData


class RewardData(PreferenceData):
    """The rows of :class:`~lightning_lora.data.PreferenceData`; ``predict`` scores answers in place of writing them.

    Those are the two of a pair, or the last of a conversation in any layout of
    :func:`~lightning_lora.data.messages.read_conversation`.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def encode_predict(self, record: Record) -> Any:
        """The question with each of its answers."""
        if has_pair(record):
            question, answers = read_pair(record)
        else:
            question, answer = read_single(record)
            answers = [answer]
        rows, _ = self.encode_answers(record, question, answers)
        if rows is None:
            raise ValueError(
                f"{record.where}: found a question that leaves no room for an answer in {self.max_length} tokens. "
                "Shorten it, or raise max_length."
            )
        return rows

    def collate_predict(self, rows: list[Any]) -> dict[str, Any]:
        """The answers one after another, padded on the right, and under ``"answers"`` how many each row has."""
        batch = LanguageModelData.collate(self, [answer for row in rows for answer in row])
        return {**batch, "answers": [len(row) for row in rows]}
