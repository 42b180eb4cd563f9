"""What the data modules for texts share: a tokenizer, and batches for causal language models."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_lora.data.cache import cache_name
from lightning_lora.data.chat_template import MessageError, require_written, special_tokens
from lightning_lora.data.conversation import IGNORED, Row, encode_question
from lightning_lora.data.files import Paths, data_files
from lightning_lora.data.from_files import FileData
from lightning_lora.data.messages import Conversation, Message, read_question
from lightning_lora.data.record import Record
from lightning_lora.pretrained import load_tokenizer

# Attributes that say nothing of how a record is encoded.
_OTHERS = frozenset(
    (
        *vars(L.LightningDataModule()),
        *("path", "val_path", "val_fraction", "predict_path", "on_error", "batch_size", "num_workers", "cache_dir"),
        *("train_rows", "val_rows", "predict_rows", "highest_token", "longest_row", "tokenizer", "_learned"),
    )
)


class TextData(FileData):
    """Rows of a file that go through a tokenizer.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: Checkpoint whose tokenizer is used. Default ``None``: the model's. Another one must give every token
            of the model's the same id.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: the model's, or an ordinary
            checkpoint.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.
    """

    def __init__(
        self, path: Paths, pretrained: str | None = None, gguf_file: str | None = None, **options: Any
    ) -> None:
        super().__init__(path, **options)
        self.pretrained = pretrained
        self.gguf_file = gguf_file
        # Any: the classes of transformers are imported only when the tokenizer is loaded.
        self.tokenizer: Any = None

    def prepare(self) -> None:
        """Load the tokenizer."""
        if self.tokenizer is not None:
            return
        model, model_file = self.of_model("pretrained"), self.of_model("gguf_file")
        if self.pretrained in (None, model):
            self.pretrained, self.gguf_file = model, self.gguf_file or model_file
        if self.pretrained is None:
            raise ValueError("Found no 'pretrained', expected the checkpoint whose tokenizer is used. Name it.")
        tokenizer = load_tokenizer(self.pretrained, self.gguf_file)
        if model is not None and (self.pretrained, self.gguf_file) != (model, model_file):
            ids = tokenizer.get_vocab()
            other = next(
                (token for token, id in load_tokenizer(model, model_file).get_vocab().items() if ids.get(token) != id),
                None,
            )
            if other is not None:
                raise ValueError(
                    f"Found data.pretrained={self.pretrained!r} whose tokenizer gives {other!r} another id than that "
                    f"of model.pretrained={model!r}, expected one tokenizer for both. Leave out "
                    "data.pretrained, which is then the model's."
                )
        self.tokenizer = tokenizer

    def prepare_data(self) -> None:
        """Encode the rows of large files before the processes of a machine, which share them, look for them."""
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and not (trainer.predicting and self.predict_path):
            self.encode_large_files()

    def cache_name(self, path: Paths) -> str | None:
        """A name that files, tokenizer and settings give; ``None`` where a subclass has settings of another kind."""
        settings = {name: value for name, value in vars(self).items() if name not in _OTHERS}
        try:
            return cache_name(type(self), {**settings, "path": path}, self.tokenizer, data_files(path))
        except TypeError:
            return None

    def cut(self, max_length: int, **text: str) -> tuple[list[int], bool]:
        """Token ids of a text, under the name that the tokenizer has for it, and whether it had to lose its end."""
        ids = list(self.tokenizer(**text, truncation=True, max_length=max_length)["input_ids"])
        return ids, len(ids) == max_length and len(self.tokenizer(**text)["input_ids"]) > max_length

    def token_ids(self, row: Any) -> Iterator[list[int]]:
        """Token ids of the texts in a row. Default: its ``input_ids``."""
        yield row["input_ids"]

    def learned(self, row: Any) -> Iterator[list[bool]]:
        """Which of these tokens are learned. Default: those that have a label."""
        yield [label != IGNORED for label in row["labels"]]

    def remarks(self, row: Any) -> Iterator[str]:
        """Whether the tokenizer does not know a part of a row."""
        unknown = self.tokenizer.unk_token_id
        # Tokenizers of bytes know everything, and name any other token here.
        others = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        if unknown not in (None, *others) and any(unknown in ids for ids in self.token_ids(row)):
            yield f"The tokenizer does not know a part of the text, which is {self.tokenizer.unk_token!r} in its place"


class LanguageModelData(TextData):
    """Questions and answers for a causal language model.

    A row has ``input_ids`` and ``labels``, which are -100 where nothing is learned.

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`TextData`.
        gguf_file: See :class:`TextData`.
        max_length: Longest row, in tokens. Default 512.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.

    Raises:
        ValueError: If ``max_length`` is below 2, and as in the base class.
    """

    separator = "\n"  # what joins contents where there is no chat template

    def __init__(
        self,
        path: Paths,
        pretrained: str | None = None,
        gguf_file: str | None = None,
        max_length: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, gguf_file, **options)
        if max_length < 2:
            raise ValueError(f"Found max_length={max_length}, expected at least 2 tokens, such as 512.")
        self.max_length = max_length

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

    def encode_predict(self, record: Record) -> tuple[list[int], list[Message]]:
        """The messages before the last answer, as token ids up to where it begins, and as they are."""
        found = read_question(record)
        try:
            require_written(self.tokenizer, found.messages, found.tools)
            return encode_question(self.tokenizer, found.messages, found.tools, self.separator), found.messages
        except ValueError as error:
            raise in_row(record, found, error) from None

    def collate_predict(self, rows: list[tuple[list[int], list[Message]]]) -> dict[str, Any]:
        """The questions, padded on the left, and as they are under ``"question"``."""
        longest = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * (longest - len(ids)) + ids for ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows]),
            "question": [question for _, question in rows],
        }


def remarks_on(tokenizer: Any, messages: list[Message]) -> list[str]:
    """What there is to say of contents: that one holds a token such as that which ends a turn."""
    found = {token for token in special_tokens(tokenizer) for message in messages if token in message["content"]}
    return [f"A content holds {token!r}, which the tokenizer takes for its special token" for token in sorted(found)]


def in_row(record: Record, conversation: Conversation, error: ValueError) -> ValueError:
    """What is wrong with a conversation, with its file and line."""
    if isinstance(error, MessageError):
        return record.error(conversation.where(error.index, error.key), error.expected, error.found)
    return ValueError(f"{record.where}: {error}")
