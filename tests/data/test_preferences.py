"""Pairs of answers: one question, the same tokens before both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES, byte_tokenizer, marked
from helpers.texts import word_checkpoint

from lightning_lora.data import PreferenceData
from lightning_lora.data.record import Record

HI = {"role": "user", "content": "hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
ML = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def encoded(row: dict[str, Any], template: str = "chatml", **options: Any) -> Any:
    data = PreferenceData("absent", "absent", **options)
    data.tokenizer = byte_tokenizer(TEMPLATES[template])
    return data.encode(Record("here", row)), data.tokenizer


def halves(row: dict[str, Any], template: str = "chatml", **options: Any) -> list[str]:
    found, tokenizer = encoded(row, template, **options)
    return [marked(tokenizer, half) for half in found.rows[0]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"question": "hi", "chosen": "good", "rejected": "bad"},
        {"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [HI, GOOD], "rejected": [HI, BAD]},  # UltraFeedback
        {"prompt": "hi", "chosen": [HI, GOOD], "rejected": [HI, BAD], "messages": [HI, GOOD]},
        {"chosen": [HI, GOOD], "rejected": [HI, BAD]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"},  # HH-RLHF
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        {"messages": [HI], "chosen": "good", "rejected": "bad"},
        {"prompt": json.dumps([HI]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_the_question_is_asked_once(row: dict[str, Any]) -> None:
    assert halves(row) == [f"{ML}«good<|im_end|>»", f"{ML}«bad<|im_end|>»"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "good", "label": True},
        {"prompt": [HI], "completion": [GOOD], "label": True},
        {"messages": [HI, GOOD], "label": "True"},
        {"question": "hi", "answer": "good", "label": 1, "chosen": None, "rejected": ""},
        {"instruction": "hi", "output": "good", "label": "1"},
    ],
)
def test_a_single_answer_is_good_or_bad(row: dict[str, Any]) -> None:
    assert halves(row) == [f"{ML}«good<|im_end|>»"]
    label = row["label"]
    bad = False if label is True else 0 if label == 1 else "false" if label == "True" else "0"
    for value, desirable in ((label, True), (bad, False)):
        found, _ = encoded({**row, "label": value})
        assert found.rows[0][0]["desirable"] is desirable


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "completion": "good", "label": "yes"}, "'label': found 'yes' .*, expected true for a good"),
        ({"prompt": "hi", "completion": "good", "label": None}, "'label': found None"),
        ({"prompt": "hi", "completion": "good", "label": 2}, "'label': found 2"),
        ({"messages": [HI, GOOD, HI], "label": True}, "field 'messages': found none, expected an answer at its end"),
        ({"prompt": "hi", "completion": "good", "label": True, "weight": 2}, "field 'weight': found 2"),
        ({"prompt": "hi", "label": True}, "field 'completion': found none"),
    ],
)
def test_bad_single_answers(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(row)


def test_batches_of_single_answers() -> None:
    data = PreferenceData("absent", "absent")
    data.tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    pair, single = (
        data.encode(Record("here", {"prompt": "hi", **row})).rows[0]
        for row in ({"chosen": "good", "rejected": "bad"}, {"completion": "worse", "label": False})
    )
    assert (data.label(pair), data.label(single)) == (None, "undesirable")
    batch = data.collate([pair, pair])
    assert "desirable" not in batch and batch["input_ids"].tolist()[0] == batch["input_ids"].tolist()[1]
    batch = data.collate([single, pair])
    assert batch["desirable"].tolist() == [False, True, False]
    lengths = [len(answer["input_ids"]) for answer in (*single, *pair)]
    assert batch["attention_mask"].sum(-1).tolist() == lengths
    assert [len(ids) for ids in data.token_ids(single)] == lengths[:1]


def test_the_question_has_its_context_and_history() -> None:
    row = {"instruction": "more", "input": "of it", "history": [["hi", "yo"]], "chosen": "good", "rejected": "bad"}
    more = f"{ML}yo<|im_end|>\n<|im_start|>user\nmore\n\nof it<|im_end|>\n<|im_start|>assistant\n"
    assert halves(row) == [f"{more}«good<|im_end|>»", f"{more}«bad<|im_end|>»"]


def test_a_question_in_both_answers_is_said() -> None:
    row = {"prompt": "what is it", "chosen": "what is it good", "rejected": "what is it bad"}
    assert any(remark.startswith("Both answers begin with") for remark in encoded(row)[0].remarks)
    assert not encoded(row | {"rejected": "it is bad"})[0].remarks


def test_the_system_is_used() -> None:
    found = halves({"system": "Be.", "prompt": "hi", "chosen": "good", "rejected": "bad"})
    assert all(half.startswith(f"<|im_start|>system\nBe.<|im_end|>\n{ML}«") for half in found)


@pytest.mark.parametrize("template", ["chatml", "qwen3", "deepseek", "marked"])
@pytest.mark.parametrize("max_length", range(20, 200, 7))
def test_both_halves_are_cut_alike(template: str, max_length: int) -> None:
    history = [HI, GOOD, {"role": "user", "content": "more"}]
    row = {"prompt": history, "chosen": "a long answer " * 4, "rejected": "short"}
    found, tokenizer = encoded(row, template, max_length=max_length)
    if not found.rows:
        return
    one, other = (marked(tokenizer, half) for half in found.rows[0])
    assert one.split("«")[0] == other.split("«")[0] and "more" in one
    assert one.count("«") == other.count("«") == 1 and "good" not in one.split("«")[1]
    assert all(len(half["input_ids"]) <= max_length for half in found.rows[0])


def test_pairs_without_a_difference_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"prompt": "w1", "chosen": "w2 " * 30 + "w3", "rejected": "w2 " * 30 + "w4"}
    rows = [same, {"prompt": "w1", "chosen": "w2", "rejected": "w3"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceData(str(tmp_path / "rows.jsonl"), word_checkpoint(tmp_path / "m"), val_fraction=0, max_length=20)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "kept 1 rows, 0 of them truncated, and rejected 1." in caplog.text
    assert "Rejected as without a difference in max_length tokens: " in caplog.text and "line 1." in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "chosen": [HI], "rejected": [BAD]}, r"here, field 'chosen': found the roles none, expected"),
        (
            {"prompt": "no", "chosen": [HI, GOOD], "rejected": [HI, BAD]},
            r"field 'chosen': found the roles user, assist",
        ),
        ({"chosen": [HI, GOOD], "rejected": [BAD]}, r"field 'prompt': found none"),
        ({"chosen": "good", "rejected": "bad"}, r"field 'prompt': found none"),
        (
            {"prompt": "hi", "messages": [HI, HI], "chosen": "good", "rejected": "bad"},
            r"field 'messages': found .* or the qu",
        ),
        ({"prompt": "hi", "query": "ho", "chosen": "good", "rejected": "bad"}, r"field 'query': found 'ho'"),
        ({"prompt": "hi", "chosen": "good", "rejected": "bad", "weight": 2}, r"field 'weight': found 2"),
        ({"prompt": "hi", "chosen": [HI, GOOD | {"weight": 0}], "rejected": [BAD]}, r"field 'chosen\[1\]\.weight'"),
        ({"prompt": "hi", "chosen": [GOOD | {"mood": "x"}], "rejected": [BAD]}, r"field 'chosen.*': found 'x'"),
    ],
)
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(row)
