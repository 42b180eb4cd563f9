"""Words with a tag each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.chat_templates import byte_tokenizer
from helpers.texts import word_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lightning_lora.data import TaggedWordsData
from lightning_lora.data.record import Record
from lightning_lora.tasks import TokenClassification

LABELS = ["O", "B"]


def bert_like() -> Any:
    """A tokenizer that drops control characters, as BERT's does."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "play", "##ing", *(f"w{i}" for i in range(9))]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def data(tokenizer: Any, **options: Any) -> TaggedWordsData:
    found = TaggedWordsData("absent", "absent", LABELS, **options)
    found.tokenizer = tokenizer
    return found


def test_words_have_the_spaces_of_texts() -> None:
    """As RoBERTa's tokenizer has learned them: the first word without, the others with the one before them."""
    tokenizer = byte_tokenizer()
    record = Record("here", {"tokens": ["hello", "world", "x"], "tags": ["B", "O", "B"]})
    (row,) = data(tokenizer).encode(record).rows
    assert row["input_ids"] == tokenizer("hello world x")["input_ids"]
    starts = [tokenizer.decode([token]) for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert [text.strip()[:1] for text in starts] in (["h", "w", "x"], ["h", "", ""])
    assert [label for label in row["labels"] if label != -100] == [1, 0, 1]


def test_a_word_without_tokens_keeps_its_tag() -> None:
    record = Record("here", {"tokens": ["w1", "\u200d", "playing"], "tags": ["O", "B", "B"]})
    (row,) = data(bert_like()).encode(record).rows
    assert row["input_ids"] == [2, 7, 0, 4, 5, 3]
    assert row["labels"] == [-100, 0, 1, 1, -100, -100]


class Tagger(TokenClassification):
    """Says of each token whether its id is even."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.nn.functional.one_hot(input_ids % 2, 2).float()


@pytest.mark.parametrize("max_length", [3, 4, 5, 20])
def test_predict_gives_one_tag_for_each_word(max_length: int) -> None:
    words = ["w1", "playing", "\u200d", "w2", "unheard", "playing", "w4"]
    module, source = Tagger("absent", LABELS), data(bert_like(), max_length=max_length)
    parts = source.encode_predict(Record("here", {"tokens": words}))
    assert all(len(part["input_ids"]) <= max_length for part in parts[0])
    batch = source.collate_predict([parts, source.encode_predict(Record("here", {"tokens": ["w3"]}))])
    ids = {"w1": 7, "w2": 8, "w3": 9, "w4": 10, "playing": 4}
    expected = [[LABELS[ids.get(word, 0) % 2] for word in row] for row in (words, ["w3"])]
    assert module.predict_step(batch, 0) == [{"tags": tags} for tags in expected]


SPANNED = {"text": "  w1 play.playing, w2", "label": [[5, 17, "X"]]}


def test_texts_with_spans() -> None:
    source = data(bert_like())
    source.labels = ["O", "B-X", "I-X"]
    (row,) = source.encode(Record("here", SPANNED)).rows
    # The tokenizer knows no signs, which are part of an unknown token.
    known = {"text": "  w1 play playing  w2", "entities": [{"start": 5, "end": 17, "label": "X"}]}
    (row,) = source.encode(Record("here", known)).rows
    assert row["input_ids"] == [2, 7, 4, 4, 5, 8, 3]
    assert row["labels"] == [-100, 0, 1, 2, -100, 0, -100]
    with pytest.raises(ValueError, match=r"field 'entities\[1\]': found 'B-Y', expected one of the labels O, B-X, I-X"):
        source.encode(Record("here", {"text": "w1 w2", "entities": [[3, 5, "Y"]]}))
    with pytest.raises(ValueError, match=r"field 'spans': found none"):
        source.encode(Record("here", {"text": "w1 w2"}))


def test_a_token_over_several_words_has_the_tag_of_the_last() -> None:
    """As byte pairs have "'s" for one token."""
    tokenizer = byte_tokenizer()
    source = data(tokenizer)
    text = "hello world's x."
    row, places = source.encode_predict(Record("here", {"text": text}))
    assert row[0]["input_ids"] == tokenizer(text)["input_ids"]
    assert places is not None and len(places) == sum(label != -100 for label in row[0]["labels"])


def test_predict_gives_the_spans_of_a_text() -> None:
    module, source = Tagger("absent", ["O", "B-X"]), data(bert_like())
    batch = source.collate_predict(
        [source.encode_predict(Record("here", {"text": f" w1 {word} w1"})) for word in ("w1", "w2")]
    )
    one, two = module.predict_step(batch, 0)
    assert one == {"spans": [{"start": start, "end": start + 2, "label": "X"} for start in (1, 4, 7)]}
    assert two == {"spans": [{"start": start, "end": start + 2, "label": "X"} for start in (1, 7)]}


def test_what_is_too_long_loses_its_end_in_training() -> None:
    record = Record("here", {"tokens": ["w1", "playing", "w2"], "tags": ["O", "B", "O"]})
    found = data(bert_like(), max_length=4).encode(record)
    assert found.truncated and found.rows[0]["input_ids"] == [2, 7, 3]  # no half of a word


def test_labels_of_the_model(tmp_path: Path) -> None:
    source = TaggedWordsData("absent", "absent")
    source.trainer = SimpleNamespace(lightning_module=Tagger("absent", LABELS))  # type: ignore[assignment]
    source.tokenizer = word_tokenizer()
    source.prepare()
    assert source.labels == LABELS
