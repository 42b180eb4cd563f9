"""``lightning-lora data``: counts, lengths, and what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import word_checkpoint
from rich.console import Console

from lightning_lora.cli import shown_data
from lightning_lora.cli.main import main
from lightning_lora.data import ChatData, LabelledTextData, PreferenceData, Seq2SeqData, TaggedWordsData
from lightning_lora.data.from_files import FileData


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


CHAT = [{"prompt": "w1", "completion": "w2 [w3]"}, {"prompt": "w4 w5 w6", "completion": "w7"}]


@pytest.mark.parametrize("file_first", [True, False])
def test_a_file_as_a_recipe_would_learn_it(
    file_first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = word_checkpoint(tmp_path / "m")
    path = write(tmp_path, CHAT)
    given = [path, "--config", "chat_sft"] if file_first else ["chat_sft", "--data.path", path]
    options = ["--model.gguf_file", "null", "--data.val_fraction", "0", "--rows", "9", "--data.packing", "false"]
    main(["data", *given, "--model.pretrained", model, *options])
    said = capsys.readouterr().out
    assert "training: 2 texts, 19 tokens, 5 of them learned (26%)" in said
    assert "<s> user w1 </s> <s> assistant« w2 <unk> </s>»" in said
    assert "<s> user w4 w5 w6 </s> <s> assistant« w7 </s>»" in said
    assert not [path for path in tmp_path.iterdir() if path.name not in ("m", "rows.jsonl")]


def test_what_is_wrong_with_a_file_is_said_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [{"text": 3}])
    monkeypatch.setattr(
        "sys.argv",
        [
            "lightning-lora",
            "data",
            path,
            "--model.pretrained",
            word_checkpoint(tmp_path / "m"),
            "--model.gguf_file",
            "null",
        ],
    )
    with pytest.raises(SystemExit):
        main()
    assert f"\nlightning-lora data: {path}, line 1, field 'text': found 3 (int)" in f"\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("kind", "row", "options", "expected"),
    [
        (
            PreferenceData,
            {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
            {},
            ["<s> assistant« w2 </s>»", "assistant« w3 </s>»"],
        ),
        (Seq2SeqData, {"source": "w1", "target": "w2"}, {}, ["w1\n«w2»"]),
        (LabelledTextData, {"text": "w1", "label": "b"}, {"labels": ["a", "b"]}, ["w1", "«b»"]),
        (TaggedWordsData, {"tokens": ["w1", "w2"], "tags": ["a", "b"]}, {"labels": ["a", "b"]}, ["«w1 w2»", "«a b»"]),
    ],
)
def test_rows_of_the_other_tasks(
    kind: Any,
    row: dict[str, Any],
    options: dict[str, Any],
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown_data.show(set_up(kind, write(tmp_path, [row]), tmp_path, **options), 1)
    said = capsys.readouterr().out
    assert all(part in said for part in expected)


def set_up(kind: Any, path: str, folder: Path, **options: Any) -> FileData:
    data: FileData = kind(path, word_checkpoint(folder / "m"), val_fraction=0, **options)
    data.setup("fit")
    return data


def test_lengths_are_counted_in_ten_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "w1 " * length} for length in (4, 5, 5, 23)]
    shown_data.show(set_up(ChatData, write(tmp_path, rows), tmp_path, packing=True), 0)
    lines = capsys.readouterr().out.splitlines()
    # With the token that ends a text.
    table = [line.split() for line in lines if "-" in line.split("█")[0] and line.strip()[0].isdigit()]
    assert [line[:2] for line in table] == [
        ["5-6", "3"], *([f"{start}-{start + 1}", "0"] for start in range(7, 23, 2)), ["23-24", "1"]
    ]  # fmt: skip
    assert len(table[0][2]) == 40 and len(table[-1][2]) == 14


def test_colors_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        shown_data, "Console", lambda **options: Console(force_terminal=True, color_system="standard", **options)
    )
    shown_data.show(set_up(ChatData, write(tmp_path, CHAT), tmp_path, packing=True), 1)
    said = capsys.readouterr().out
    assert "assistant\x1b[1;32m w2 <unk> </s>\x1b[0m" in said and "«" not in said
