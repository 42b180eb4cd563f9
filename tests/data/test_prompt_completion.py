from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import PromptCompletionData
from lightning_lora.data.conversation import encode_conversation
from lightning_lora.pretrained import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    words = ["<s>", "</s>", "<unk>", "user", "assistant", "define", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [{"prompt": f"define w{i}", "completion": " ".join(["w0"] * (i % 3 + 1))} for i in range(40)]
    return write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n")


def write(folder: Path, text: str) -> str:
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return str(folder / "rows.jsonl")


def encode_pair(tokenizer: Any, prompt: str, completion: str, max_length: int) -> tuple[Any, bool]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return encode_conversation(tokenizer, messages, max_length, separator="")


def test_loss_only_on_the_completion(pretrained: str) -> None:
    tokenizer = load_tokenizer(pretrained)
    row, truncated = encode_pair(tokenizer, "define w1", "w2 w3", max_length=20)
    assert tokenizer.decode(row["input_ids"]) == "<s> user define w1 </s> <s> assistant w2 w3 </s>"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "w2 w3 </s>"
    assert row["labels"][:7] == [-100] * 7
    assert not truncated


def test_truncation_keeps_the_question(pretrained: str) -> None:
    tokenizer = load_tokenizer(pretrained)
    row, truncated = encode_pair(tokenizer, "define w1", "w2 w3", max_length=8)
    assert tokenizer.decode(row["input_ids"]) == "<s> user define w1 </s> <s> assistant w2"
    assert row["labels"] == [-100] * 7 + row["input_ids"][-1:]
    assert truncated
    assert encode_pair(tokenizer, "define w1", "w2 w3", max_length=7) == (None, True)


def test_without_chat_template(pretrained: str) -> None:
    tokenizer = load_tokenizer(pretrained)
    tokenizer.chat_template = None
    row, _ = encode_pair(tokenizer, "define w1 ", "w2 ", max_length=20)
    assert tokenizer.decode(row["input_ids"]) == "define w1 w2 </s>"
    assert row["labels"][:2] == [-100, -100]


def test_batches_are_padded_on_the_right(path: str, pretrained: str) -> None:
    data = PromptCompletionData(path, pretrained, val_fraction=0, batch_size=40)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["labels"].shape == (40, int(lengths.max()))
    assert len(lengths.unique()) == 3
    for ids, mask, labels, length in zip(*batch.values(), lengths.tolist(), strict=True):
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (ids[length:] == 1).all() and (labels[length:] == -100).all()


def test_split_is_deterministic_and_disjoint(path: str, pretrained: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        first = PromptCompletionData(path, pretrained, val_fraction=0.25)
        first.setup("fit")
        first.setup("validate")
    counts = [
        int(count) for count in re.findall(r"kept (\d+) rows, 0 of them truncated, and rejected 0\.", caplog.text)
    ]
    assert len(counts) == 2 and sum(counts) == 40 and 4 <= counts[1] <= 16
    torch.manual_seed(99)
    second = PromptCompletionData(path, pretrained, val_fraction=0.25)
    second.setup("fit")
    assert list(first.val_rows) == list(second.val_rows)
    assert first.train_rows is not None
    words = [row["input_ids"][3] for row in [*first.train_rows, *first.val_rows]]
    assert len(set(words)) == 40
    batches = [[batch["input_ids"].tolist() for batch in data.train_dataloader()] for data in (first, second)]
    assert batches[0] == batches[1]
    other = PromptCompletionData(path, pretrained, val_fraction=0.25, seed=1)
    other.setup("fit")
    assert list(other.val_rows) != list(first.val_rows)


def test_questions_to_predict_are_written_as_in_training(tmp_path: Path, path: str, pretrained: str) -> None:
    questions = tmp_path / "questions.csv"
    questions.write_text("prompt\ndefine w1\ndefine w2 w3\n")
    data = PromptCompletionData(path, pretrained, predict_path=str(questions))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    row, _ = encode_pair(data.tokenizer, "define w2 w3", "w4", max_length=20)
    question = [token for token, label in zip(row["input_ids"], row["labels"]) if label == -100]
    assert batch["input_ids"][1].tolist() == question
    assert batch["attention_mask"].tolist()[0] == [0] + [1] * (batch["input_ids"].shape[1] - 1)
    assert batch["question"][0] == [{"role": "user", "content": "define w1"}]


def test_no_validation(path: str, pretrained: str) -> None:
    data = PromptCompletionData(path, pretrained, val_fraction=0)
    data.setup("fit")
    assert len(data.train_rows or []) == 40
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"line 2, field 'completion': found none \(the fields are 'prompt'\), expected a string"),
        ('{"prompt": 3, "completion": "b"}', r"line 2, field 'prompt': found 3 \(int\), expected a string"),
        ('{"prompt": "a", "completion": " "}', r"line 2, field 'completion': found ' ' \(str\), expected"),
        ('["a", "b"]', r"line 2: found a JSON list, expected an object"),
        ("prompt", r"line 2: found no valid JSON"),
    ],
)
def test_bad_row(tmp_path: Path, pretrained: str, line: str, message: str) -> None:
    path = write(tmp_path, '{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}") as error:
        PromptCompletionData(path, pretrained).setup("fit")
    assert re.search("Correct the (row|line) or remove it.", str(error.value))


def test_too_few_rows(tmp_path: Path, pretrained: str) -> None:
    path = write(tmp_path, '{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match="found no two rows that differ, expected one at least to train on"):
        PromptCompletionData(path, pretrained).setup("fit")


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"max_length": 1}])
def test_arguments_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"Found {next(iter(options))}="):
        PromptCompletionData("rows.jsonl", "model", **options)  # type: ignore[arg-type]
