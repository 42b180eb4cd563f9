"""What the data modules for texts share: a tokenizer, and batches for causal language models."""

from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED, Message, Row, encode_question, read_question
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import FileData
from lightning_lora.pretrained import load_tokenizer


class TextData(FileData):
    """Rows of a file that go through a tokenizer.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: Checkpoint whose tokenizer is used, the same as the model's.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(self, path: str, pretrained: str, **options: Any) -> None:
        super().__init__(path, **options)
        self.pretrained = pretrained
        # Any: the classes of transformers are imported only when the tokenizer is loaded.
        self.tokenizer: Any = None

    def prepare(self) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained)


class LanguageModelData(TextData):
    """Questions and answers for a causal language model.

    A row has ``input_ids`` and ``labels``, which are -100 where nothing is learned.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: Checkpoint whose tokenizer is used, the same as the model's.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        max_length: Longest row, in tokens. Default 512.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.

    Raises:
        ValueError: If ``max_length`` is below 2, and as in the base class.
    """

    def __init__(
        self, path: str, pretrained: str, gguf_file: str | None = None, max_length: int = 512, **options: Any
    ) -> None:
        super().__init__(path, pretrained, **options)
        if max_length < 2:
            raise ValueError(f"Found max_length={max_length}, expected at least 2 tokens, such as 512.")
        self.gguf_file = gguf_file
        self.max_length = max_length

    def prepare(self) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained, self.gguf_file)

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with; the attention mask and the labels leave it out."""
        return int(self.tokenizer.pad_token_id or 0)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """Pad rows on the right to the longest."""
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)

        def padded(field: str, value: int) -> Tensor:
            return torch.tensor([row[field] + [value] * (longest - len(row[field])) for row in rows])

        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor([[1] * length + [0] * (longest - length) for length in lengths]),
            "labels": padded("labels", IGNORED),
        }

    def encode_question(self, question: list[Message]) -> list[int]:
        """Token ids of the messages before an answer, up to where it begins."""
        return encode_question(self.tokenizer, question)

    def collate_predict(self, records: list[Record]) -> dict[str, Any]:
        """The messages before the last answer, padded on the left, and as they are under ``"question"``."""
        questions = [read_question(record) for record in records]
        ids = [self.encode_question(question) for question in questions]
        longest = max(map(len, ids))
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * (longest - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
            "question": questions,
        }
