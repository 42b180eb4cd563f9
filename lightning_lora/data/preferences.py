"""Pairs of a better and a worse answer to the same question."""

from typing import Any

from torch import Tensor

from lightning_lora.data.conversation import encode_conversation, messages_in
from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded, FileData
from lightning_lora.data.prompt_completion import collate
from lightning_lora.tasks.pretrained import load_tokenizer


class PreferenceData(FileData):
    """Rows of ``prompt``, ``chosen`` and ``rejected``, strings or lists of messages, from JSONL, CSV or Parquet.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`, as for the arguments up to ``seed``.
        pretrained: Checkpoint whose tokenizer is used, as in :class:`~lightning_lora.tasks.DPO`.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        max_length: Longest question and answer together, in tokens; the beginning of a longer question is left out.
            Default 512.

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
        batch_size: int = 4,
        max_length: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(path, val_path, val_fraction, None, batch_size, num_workers, seed)
        if max_length < 2:
            raise ValueError(f"Found max_length={max_length}, expected at least 2 tokens, such as 512.")
        self.pretrained = pretrained
        self.gguf_file = gguf_file
        self.max_length = max_length
        self.tokenizer: Any = None

    def prepare(self, records: list[Record]) -> None:
        """Load the tokenizer."""
        self.tokenizer = load_tokenizer(self.pretrained, self.gguf_file)

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
        return collate(both, int(self.tokenizer.pad_token_id or 0))
