"""Rows of a question and its answer, for a causal language model."""

from typing import Any

from lightning_lora.data.conversation import IGNORED, Message, Row
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded
from lightning_lora.data.texts import LanguageModelData
from lightning_lora.pretrained import chat_text, encode_prompt


class PromptCompletionData(LanguageModelData):
    """Rows of ``{"prompt": "...", "completion": "..."}``, from JSONL, CSV or Parquet.

    Each row goes through the chat template of the tokenizer; without one, prompt and completion are joined as they are
    and closed by the end-of-text token. Only the completion counts for the loss (labels are -100 elsewhere). A row
    longer than ``max_length`` loses the beginning of its prompt, and of its completion only what would not fit alone.

    The arguments are those of :class:`~lightning_lora.data.texts.LanguageModelData`.
    """

    def encode(self, record: Record) -> Encoded:
        """Token ids and labels of a pair."""
        row, truncated = encode_pair(self.tokenizer, record.text("prompt"), record.text("completion"), self.max_length)
        return Encoded(row, truncated)

    def encode_question(self, question: list[Message]) -> list[int]:
        """Token ids of a prompt, as in training."""
        return encode_prompt(self.tokenizer, question[-1]["content"])


def encode_pair(tokenizer: Any, prompt: str, completion: str, max_length: int) -> tuple[Row, bool]:
    """Token ids and labels of one row, and whether it had to be truncated."""
    question = encode_prompt(tokenizer, prompt)
    answer = tokenizer(_answer_text(tokenizer, prompt, completion), add_special_tokens=False)["input_ids"]
    truncated = len(question) + len(answer) > max_length
    # One token of the prompt stays in any case: the first token of a row is never predicted.
    answer = answer[: max_length - 1]
    question = question[-(max_length - len(answer)) :]
    return {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer}, truncated


def _answer_text(tokenizer: Any, prompt: str, completion: str) -> str:
    if tokenizer.chat_template:
        asked, answered = chat_text(tokenizer, prompt), chat_text(tokenizer, prompt, completion)
        if answered.startswith(asked):
            # What follows the end-of-turn token (a line break) is never generated.
            return answered[len(asked) :].rstrip()
    # No template, or one that writes an answered turn differently from one about to be answered.
    return completion + (tokenizer.eos_token or "")
