"""Rows that cannot be used, fields that are not used, and names of fields, in all data modules alike."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import word_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_lora.data import (
    ChatData,
    LabelledTextData,
    PreferenceData,
    PromptCompletionData,
    RewardData,
    SentencePairData,
    Seq2SeqData,
    TaggedWordsData,
)
from lightning_lora.data.from_files import FileData
from lightning_lora.tasks import CausalLM

Make = Callable[..., FileData]
LABELS = ["a", "b"]
READERS: dict[str, tuple[Make, dict[str, Any]]] = {
    "chat": (ChatData, {"prompt": "w1", "completion": "w2"}),
    "pairs": (PromptCompletionData, {"prompt": "w1", "completion": "w2"}),
    "texts": (ChatData, {"text": "w1 w2"}),
    "preferences": (PreferenceData, {"prompt": "w1", "chosen": "w2", "rejected": "w3"}),
    "labels": (lambda *args, **options: LabelledTextData(*args, LABELS, **options), {"text": "w1", "label": "a"}),
    "tags": (lambda *args, **options: TaggedWordsData(*args, LABELS, **options), {"tokens": ["w1"], "tags": ["a"]}),
    "targets": (Seq2SeqData, {"source": "w1", "target": "w2"}),
    "rewards": (RewardData, {"prompt": "w1", "chosen": "w2", "rejected": "w3"}),
    "sentences": (SentencePairData, {"anchor": "w1", "positive": "w2"}),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return word_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def module_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return word_checkpoint(tmp_path_factory.mktemp("model"))


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def fit(make: Make, path: Any, checkpoint: str, **options: Any) -> FileData:
    data = make(path, checkpoint, **{"val_fraction": 0, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("key", ["weight", "reasoning_content", "tool_calls", "images"])
def test_keys_that_would_change_what_is_learned_are_refused(
    reader: str, key: str, tmp_path: Path, checkpoint: str
) -> None:
    make, row = READERS[reader]
    path = write(tmp_path, [row, row | {key: 3}])
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl, line 2, field '{key}': found 3 \(int\), expected no such field"
    ):
        fit(make, path, checkpoint)
    assert len(fit(make, path, checkpoint, ignore=[key]).train_dataloader().dataset) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", READERS)
def test_other_keys_are_named_once(
    reader: str, tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, row = READERS[reader]
    with caplog.at_level("INFO"):
        fit(make, write(tmp_path, [row | {"id": 1, "note": None}, row | {"origin": "x"}]), checkpoint)
    assert caplog.text.count("Left out the fields 'id', 'origin', which training does not use.") == 1


@pytest.mark.parametrize("reader", READERS)
def test_fields_are_named_by_a_setting(reader: str, tmp_path: Path, checkpoint: str) -> None:
    make, row = READERS[reader]
    names = {field: f"my {field}" for field in row}
    plain = fit(make, write(tmp_path, [row], "plain.jsonl"), checkpoint)
    mine = write(tmp_path, [{names[field]: value for field, value in row.items()}])
    assert fit(make, mine, checkpoint, fields=names).train_rows[:] == plain.train_rows[:]
    first = next(iter(row))
    with pytest.raises(ValueError, match=r"line 1, field 'my \w+': found"):
        fit(make, write(tmp_path, [{names[first]: 3}]), checkpoint, fields=names)


@pytest.mark.parametrize("reader", READERS)
def test_all_bad_rows_are_named_in_one_run(reader: str, tmp_path: Path, checkpoint: str) -> None:
    make, row = READERS[reader]
    first = next(iter(row))
    path = write(tmp_path, [row if index % 2 else row | {first: 7} for index in range(60)])
    with pytest.raises(
        ValueError, match=r"Found 30 rows that cannot be used \(on_error: skip leaves them out\)"
    ) as error:
        fit(make, path, checkpoint)
    lines = str(error.value).splitlines()
    assert len(lines) == 22 and lines[-1] == "..."
    assert all(f"line {2 * index + 1}, field '{first}'" in line for index, line in enumerate(lines[1:-1]))
    with pytest.warns(UserWarning, match="Left out 30 rows"):
        skipped = fit(make, path, checkpoint, on_error="skip")
    assert len(skipped.train_rows or []) >= 1


def test_rejected_rows_are_named(tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "w1", "completion": "w2"}, *[{"prompt": "w1 " * 30, "completion": "w2"}] * 7]
    with caplog.at_level("INFO"):
        fit(ChatData, write(tmp_path, rows), checkpoint, max_length=20)
    assert "training: kept 1 rows, 0 of them truncated, and rejected 7." in caplog.text
    assert "Rejected as too long: " in caplog.text and "line 6 and 2 more." in caplog.text


def test_what_is_not_learned_as_it_stands_is_said(
    tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1 </s>", "completion": "w2"}, {"text": "w1 ☃"}]
    with caplog.at_level("INFO"):
        fit(ChatData, write(tmp_path, rows), checkpoint)
    assert "A content holds '</s>', which the tokenizer takes for its special token: " in caplog.text
    assert "rows.jsonl, line 2.\n" in caplog.text
    assert "The tokenizer does not know a part of the text, which is '<unk>' in its place: " in caplog.text
    assert "rows.jsonl, line 3.\n" in caplog.text and "line 1" not in caplog.text


def test_questions_are_looked_at_before_the_first_answer(tmp_path: Path, checkpoint: str) -> None:
    path = write(tmp_path, [{"prompt": "w1"}, {"prompt": ""}, {"question": "w1"}, {"answer": "w1"}])
    data = ChatData("absent.jsonl", checkpoint, predict_path=path, on_error="skip")
    with pytest.raises(ValueError, match=r"Found 2 rows that cannot be used:\n"):  # which no setting skips
        data.setup("predict")


def test_texts_are_learned_whole(tmp_path: Path, checkpoint: str) -> None:
    text = " ".join(f"w{i}" for i in range(12))
    data = fit(ChatData, write(tmp_path, [{"text": text}]), checkpoint, max_length=5, packing=False)
    rows = data.train_rows or []
    tokens = [token for row in rows for token in row["input_ids"]]
    assert data.tokenizer.decode(tokens) == f"{text} </s>"  # type: ignore[attr-defined]
    # The first token of a row is never predicted.
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in rows) and len(rows) == 3


def sides(path: Any, checkpoint: str, **options: Any) -> tuple[set[str], set[str]]:
    """The texts that are learned, and those held out."""
    data: Any = PromptCompletionData(path, checkpoint, **{"val_fraction": 0.3, **options})
    data.setup("fit")
    train, held_out = (
        {data.tokenizer.decode(row["input_ids"]) for row in rows} for rows in (data.train_rows, data.val_rows)
    )
    return train, held_out


NUMBERS = st.lists(st.integers(0, 1599), min_size=2, max_size=40, unique=True)


def pairs(numbers: list[int]) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"w{n % 40}", "completion": f"w{n // 40}"} for i, n in enumerate(numbers)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=NUMBERS, seed=st.integers(0, 3), data=st.data())
def test_rows_that_are_added_move_no_others(
    numbers: list[int], seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, module_checkpoint: str
) -> None:
    """Unless a side has no other row; equal ones are on one side, wherever they stand and whatever their id."""
    folder, checkpoint = tmp_path_factory.mktemp("rows"), module_checkpoint
    before = sides(write(folder, pairs(numbers)), checkpoint, seed=seed)
    more = data.draw(st.permutations([*numbers, *data.draw(NUMBERS), *numbers[:3]]))
    after = sides(write(folder, pairs(more)), checkpoint, seed=seed)
    assert before[0] and before[1] and not after[0] & after[1]
    for mine, others in (before, after[1]), (before[::-1], after[0]):
        assert len(mine[0]) == 1 or not mine[0] & others


def test_the_share_held_out_is_met_in_the_mean(tmp_path: Path, checkpoint: str) -> None:
    path = write(tmp_path, pairs(list(range(600))))
    held_out = [len(sides(path, checkpoint, val_fraction=share)[1]) for share in (0.1, 0.5, 0.9)]
    assert all(abs(count - 600 * share) < 60 for count, share in zip(held_out, (0.1, 0.5, 0.9)))
    assert sides(path, checkpoint) != sides(path, checkpoint, seed=1)
    one, other = (sides(write(tmp_path, pairs([1, 2]), "two.jsonl"), checkpoint, val_fraction=f) for f in (0.01, 0.99))
    assert len(one[0]) == len(one[1]) == 1 and one == other


def test_rows_on_both_sides_are_counted(tmp_path: Path, checkpoint: str) -> None:
    rows = pairs(list(range(9)))
    train = write(tmp_path, rows)
    val = write(tmp_path, [row | {"id": 7} for row in rows[3:5]] + pairs([77]), "val.jsonl")
    with pytest.warns(
        UserWarning, match=r"^2 of the 3 rows to validate on are learned too, .*val\.jsonl, line 1; .*line 2\."
    ):
        fit(PromptCompletionData, train, checkpoint, val_path=val)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(PromptCompletionData, train, checkpoint, val_path=write(tmp_path, pairs([77]), "other.jsonl"))


def test_rows_are_learned_as_often_as_their_weight_says(tmp_path: Path, checkpoint: str) -> None:
    twice = write(tmp_path, pairs(list(range(100))), "a.jsonl")
    half = write(tmp_path, pairs(list(range(200, 700))), "b.jsonl")
    data: Any = PromptCompletionData({twice: 2, half: 0.5}, checkpoint, val_fraction=0.2)
    data.setup("fit")
    found = Counter(data.tokenizer.decode(row["input_ids"]) for row in data.train_rows)
    counts = Counter(found.values())
    assert 60 < counts[2] < 95 and 160 < counts[1] < 240 and counts.keys() == {1, 2}
    assert 80 < len(data.val_rows) < 160  # each once
    one, other = sides([twice, half], checkpoint, val_fraction=0.2)
    assert found.keys() <= one and len(other) == len(data.val_rows)


def test_resuming_on_other_rows_is_said(tmp_path: Path, checkpoint: str) -> None:
    path = write(tmp_path, pairs(list(range(12))))

    def run(**options: Any) -> Trainer:
        data = PromptCompletionData(path, checkpoint, val_fraction=0.2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        few = {"limit_train_batches": 1, "limit_val_batches": 1, "enable_checkpointing": False, "max_epochs": 2}
        trainer = Trainer(accelerator="cpu", **quiet, **few)
        trainer.fit(CausalLM(checkpoint), data, **options)
        return trainer

    run().save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The training rows are not those")
        run(ckpt_path=str(tmp_path / "a.ckpt"))
    write(tmp_path, [*pairs(list(range(12))), *pairs([55, 66, 77])])
    with pytest.warns(UserWarning, match="The training rows are not those that the checkpoint was trained on"):
        run(ckpt_path=str(tmp_path / "a.ckpt"))


def test_a_file_of_its_own_for_validation(tmp_path: Path, checkpoint: str) -> None:
    row = READERS["chat"][1]
    val = write(tmp_path, [row] * 3, "val.jsonl")
    data = fit(ChatData, [write(tmp_path, [row]), val], checkpoint, val_path=val, packing=False)
    assert (len(data.train_rows or []), len(data.val_rows)) == (4, 3)
