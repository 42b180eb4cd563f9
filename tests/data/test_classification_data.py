from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.texts import word_tokenizer
from PIL import Image

from lightning_lora.data import ImageData, LabelledTextData, Seq2SeqData, TaggedWordsData


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


def test_texts_and_labels_by_name_or_index(tmp_path: Path, pretrained: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "w1 w2", "label": "good"}, {"text": "w3", "label": 1}, {"text": "w4", "label": "0"}]
    data = LabelledTextData(write(tmp_path, rows), pretrained, ["bad", "good"], val_fraction=0, max_length=2)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "Training rows by label: bad 1, good 2." in caplog.text
    assert data.class_counts == [1, 2]
    (batch,) = data.train_dataloader()
    found = {
        tuple(ids[mask.bool()].tolist()): int(label)
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
    }
    words = data.tokenizer.convert_tokens_to_ids
    assert found == {(words("w1"), words("w2")): 1, (words("w3"),): 1, (words("w4"),): 0}


def test_truncated_texts_are_counted(tmp_path: Path, pretrained: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "w1 w2 w3", "label": 0}, {"text": "w1 w2", "label": 0}, {"text": "w1", "label": 1}]
    with caplog.at_level("INFO"):
        LabelledTextData(write(tmp_path, rows), pretrained, ["a", "b"], val_fraction=0, max_length=2).setup("fit")
    assert "kept 3 rows, 1 of them truncated, and rejected 0." in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "w1", "label": "ugly"},
            r"line 1, field 'label': found 'ugly' \(str\), expected one of the labels a, b",
        ),
        ({"text": "w1", "label": 2}, r"line 1, field 'label': found 2 \(int\)"),
        ({"text": "w1", "label": True}, r"line 1, field 'label': found True \(bool\)"),
        ({"text": " ", "label": 1}, r"line 1, field 'text': found ' ' \(str\), expected a string"),
    ],
)
def test_bad_labelled_rows(tmp_path: Path, pretrained: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledTextData(write(tmp_path, [row]), pretrained, ["a", "b"], val_fraction=0).setup("fit")


def test_tags_are_on_the_first_token_of_a_word(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "play": 2, "##ing": 3, "w": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "pieces")
    rows = [{"tokens": ["playing", "w"], "tags": ["B", "O"]}, {"tokens": ["w"], "tags": ["O"]}]
    data = TaggedWordsData(write(tmp_path, rows), str(tmp_path / "pieces"), ["O", "B"], val_fraction=0)
    data.setup("fit")
    batch = data.collate(sorted(data.train_rows or [], key=lambda row: len(row["labels"])))
    assert batch["input_ids"].tolist() == [[4, 1, 1], [2, 3, 4]]
    assert batch["labels"].tolist() == [[0, -100, -100], [1, -100, 0]]
    assert data.class_counts == [2, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"tokens": ["w1", "w2"], "tags": ["a"]},
            r"line 1, field 'tags': found 1 tags, expected a tag for each of the 2",
        ),
        ({"tokens": ["w1"], "tags": ["c"]}, r"line 1, field 'tags\[0\]': found 'c', expected one of the labels a, b"),
        ({"tokens": "w1", "tags": ["a"]}, r"line 1, field 'tokens': found 'w1' \(str\), expected a list of words"),
        ({"tokens": ["w1"]}, r"line 1, field 'tags': found none"),
    ],
)
def test_bad_tagged_rows(tmp_path: Path, pretrained: str, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaggedWordsData(write(tmp_path, [row]), pretrained, ["a", "b"], val_fraction=0).setup("fit")


def test_sources_and_targets(tmp_path: Path, pretrained: str) -> None:
    rows = [{"source": "w1 w2", "target": "w3"}, {"source": "w4", "target": "w5 w6 w7"}]
    data = Seq2SeqData(write(tmp_path, rows), pretrained, val_fraction=0, max_target_length=2)
    data.setup("fit")
    batch = data.collate(sorted(data.train_rows or [], key=lambda row: len(row[0])))
    words = data.tokenizer.convert_tokens_to_ids
    assert batch["input_ids"][1].tolist() == words(["w1", "w2"])
    assert batch["labels"].tolist() == [words(["w5", "w6"]), [words("w3"), -100]]
    assert batch["attention_mask"].sum() == 3


def test_folders_of_images(tmp_path: Path) -> None:
    for label, value in (("black", 0), ("white", 255)):
        (tmp_path / label).mkdir()
        for index in range(2):
            Image.fromarray(np.full((5, 9, 3), abs(value - index), np.uint8)).save(tmp_path / label / f"{index}.png")
    data = ImageData(str(tmp_path), ["white", "black"], size=14, val_fraction=0.01)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["pixel_values"].shape == (3, 3, 14, 14)
    assert torch.equal(batch["pixel_values"].mean((1, 2, 3)) > 0, batch["labels"] == 0)
    assert sum(data.class_counts) == 3
    new = ImageData("unread", ["white", "black"], size=14, predict_path=str(tmp_path / "white"))
    new.setup("predict")
    (batch,) = new.predict_dataloader()
    assert batch.keys() == {"pixel_values"} and batch["pixel_values"].shape == (2, 3, 14, 14)
    (tmp_path / "gray").mkdir()
    with pytest.raises(ValueError, match="Found the folders black, gray, white in .*, expected one for each label"):
        ImageData(str(tmp_path), ["white", "black"]).setup("fit")
    with pytest.raises(ValueError, match="Found no images"):
        ImageData(str(tmp_path), ["white", "black", "gray"]).setup("fit")
    (tmp_path / "gray" / "a.png").write_text("no image")
    broken = ImageData(str(tmp_path), ["white", "black", "gray"], val_fraction=0.2)
    with pytest.raises(ValueError, match=r"a\.png: found no image that can be read"):
        broken.setup("fit")
