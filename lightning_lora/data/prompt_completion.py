"""Rows of a question and its answer, for a causal language model."""

import json
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader
from lightning_lora.shipped import locate
from lightning_lora.tasks.pretrained import chat_text, encode_prompt, load_tokenizer

Row = dict[str, list[int]]


class PromptCompletionData(L.LightningDataModule):
    """A JSONL file with one object per line, ``{"prompt": "...", "completion": "..."}``.

    Each row goes through the chat template of the tokenizer; without one, prompt and completion are joined as they are
    and closed by the end-of-text token. Only the completion counts for the loss (labels are -100 elsewhere). A row
    longer than ``max_length`` loses the beginning of its prompt, and of its completion only what would not fit alone.

    Args:
        path: The JSONL file, UTF-8, or ``shipped:<name>`` for one that comes with the recipes.
        pretrained: Checkpoint whose tokenizer is used, as in :class:`~lightning_lora.tasks.CausalLM`.
        gguf_file: Name of the GGUF file inside ``pretrained``. Default ``None``: an ordinary checkpoint.
        val_fraction: Share of the rows held out for validation, from 0 (none) to below 1. Default 0.1.
        batch_size: Rows in a batch. Default 8.
        max_length: Longest row, in tokens. Default 256.
        num_workers: Processes that load batches; 0 loads in the training process. Default 0.
        seed: Seed of the split and of the training order. Default 0.

    Raises:
        ValueError: If ``val_fraction`` or ``max_length`` is out of range, or, in ``setup``, for a row that cannot be
            read or a file too small to split.
    """

    def __init__(
        self,
        path: str,
        pretrained: str,
        gguf_file: str | None = None,
        val_fraction: float = 0.1,
        batch_size: int = 8,
        max_length: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"Found val_fraction={val_fraction}, expected at least 0 and less than 1, such as 0.1.")
        if max_length < 2:
            raise ValueError(f"Found max_length={max_length}, expected at least 2 tokens, such as 256.")
        self.path = path
        self.pretrained = pretrained
        self.gguf_file = gguf_file
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.pad_token_id = 0
        self.train_rows: list[Row] | None = None
        self.val_rows: list[Row] = []

    def setup(self, stage: str) -> None:
        """Read, tokenize and split the file, once."""
        if self.train_rows is not None:
            return
        pairs = read_pairs(self.path)
        held_out = max(1, round(self.val_fraction * len(pairs))) if self.val_fraction else 0
        if len(pairs) <= held_out:
            raise ValueError(
                f"{self.path}: found {len(pairs)} rows, expected more than the {held_out} held out for validation. "
                "Add rows, or lower val_fraction."
            )
        tokenizer = load_tokenizer(self.pretrained, self.gguf_file)
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        encoded = [encode_pair(tokenizer, *pair, self.max_length) for pair in pairs]
        rows = [row for row, _ in encoded]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.val_rows = [rows[index] for index in order[:held_out]]
        self.train_rows = [rows[index] for index in order[held_out:]]
        rank_zero_info(
            f"{self.path}: kept {len(rows)} rows ({len(self.train_rows)} for training, {held_out} for validation), "
            f"of which {sum(cut for _, cut in encoded)} truncated to {self.max_length} tokens."
        )

    def train_dataloader(self) -> DataLoader[Row]:
        """The training rows, in an order of their own that ``seed`` fixes."""
        return self._loader(self.train_rows or [], shuffle=True)

    def val_dataloader(self) -> DataLoader[Row] | list[Any]:
        """The rows held out, or no loader when there are none."""
        return self._loader(self.val_rows, shuffle=False) if self.val_rows else []

    def test_dataloader(self) -> DataLoader[Row] | list[Any]:
        """The rows held out, which no training has seen."""
        return self.val_dataloader()

    def _loader(self, rows: list[Row], shuffle: bool) -> DataLoader[Row]:
        return ResumableDataLoader(
            rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=EpochSampler(len(rows), self.seed) if shuffle else None,
            num_workers=self.num_workers,
            collate_fn=partial(collate, pad_token_id=self.pad_token_id),
        )


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Prompts and completions of a JSONL file; blank lines are skipped.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For the first bad row, naming the file, the line and the field.
    """
    pairs = []
    with locate(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: found no valid JSON ({error}), expected one object per line with the fields 'prompt' "
                    "and 'completion'. Correct the line or remove it."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}: found a JSON {type(row).__name__}, expected an object with the fields 'prompt' and "
                    "'completion'. Correct the line or remove it."
                )
            pairs.append((_text(row, "prompt", where), _text(row, "completion", where)))
    return pairs


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, str) and value.strip():
        return value
    if field not in row:
        found = f"none (the fields are {', '.join(map(repr, row)) or 'none at all'})"
    else:
        found = f"{value!r} ({type(value).__name__})"
    raise ValueError(
        f"{where}, field {field!r}: found {found}, expected a string that is not blank. Correct the line or remove it."
    )


def encode_pair(tokenizer: Any, prompt: str, completion: str, max_length: int) -> tuple[Row, bool]:
    """Token ids and labels of one row, and whether it had to be truncated."""
    question = encode_prompt(tokenizer, prompt)
    answer = tokenizer(_answer_text(tokenizer, prompt, completion), add_special_tokens=False)["input_ids"]
    truncated = len(question) + len(answer) > max_length
    # One token of the prompt stays in any case: the first token of a row is never predicted.
    answer = answer[: max_length - 1]
    question = question[-(max_length - len(answer)) :]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}, truncated


def _answer_text(tokenizer: Any, prompt: str, completion: str) -> str:
    if tokenizer.chat_template:
        asked, answered = chat_text(tokenizer, prompt), chat_text(tokenizer, prompt, completion)
        if answered.startswith(asked):
            # What follows the end-of-turn token (a line break) is never generated.
            return answered[len(asked) :].rstrip()
    # No template, or one that writes an answered turn differently from one about to be answered.
    return completion + (tokenizer.eos_token or "")


def collate(rows: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them."""
    length = max(len(row["input_ids"]) for row in rows)

    def pad(field: str, value: int) -> Tensor:
        return torch.tensor([row[field] + [value] * (length - len(row[field])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": pad("input_ids", pad_token_id),
        "attention_mask": torch.tensor(mask),
        "labels": pad("labels", -100),
    }
