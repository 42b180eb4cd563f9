"""What goes wrong on the command line, and settings that belong together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.recipe_runs import MODEL_ALONE, SHORT, run
from helpers.texts import word_checkpoint, word_tokenizer

from lightning_lora.cli.main import main

ROWS = [{"prompt": f"w{i % 40}", "completion": "w1 w2"} for i in range(300)]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model for a recipe, named once, and rows of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    checkpoint = word_checkpoint(tmp_path / "model")
    return ["--model.pretrained", checkpoint, *MODEL_ALONE, "--data.path", "rows.jsonl"]


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that fails prints as an error."""
    monkeypatch.setattr(sys, "argv", ["lightning-lora", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["chat_sft", "quickstart", "prefix_and_lora", "dpo", "reward_model"])
def test_the_model_is_named_once(
    recipe: str, model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe in ("dpo", "reward_model"):
        Path("rows.jsonl").write_text(
            "\n".join(json.dumps({"prompt": f"w{i % 40}", "chosen": "w1", "rejected": "w2"}) for i in range(300))
        )
    run(tmp_path, monkeypatch, "fit", recipe, *model, *SHORT)
    assert list((tmp_path / f"runs/{recipe}/checkpoints").glob("last.ckpt"))


@pytest.mark.parametrize("recipe", ["chat_sft", "quickstart", "prefix_and_lora", "dpo", "reward_model"])
def test_fast_dev_run(recipe: str, model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, "fit", recipe, *model[:-2], "--trainer.fast_dev_run", "true")
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("learning_curve.*"))


def test_errors_are_one_paragraph(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "w1"}\n' * 3)
    err = failing(monkeypatch, capsys, "fit", "--config", "chat_sft", *model)
    assert "lightning-lora fit: Found 3 rows that cannot be used" in err
    assert "Traceback" not in err and "line 2, field 'completion': found none" in err
    monkeypatch.setattr(sys, "argv", ["lightning-lora", "fit", "--config", "chat_sft", *model, "--debug"])
    with pytest.raises(ValueError, match="Found 3 rows"):
        main()


@pytest.mark.parametrize("given", [["--config", "quickstrat"], ["--config=quickstrat"]])
def test_a_recipe_that_is_not_there(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = failing(monkeypatch, capsys, "fit", *given)
    assert said.startswith("lightning-lora fit: Found no file 'quickstrat', expected one of settings, or a recipe: ")
    assert "quickstart" in said and said.count("\n") == 1


def test_a_tokenizer_of_another_model_is_an_error(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = word_tokenizer()
    other.add_tokens(["w100"])
    other.save_pretrained(tmp_path / "more")
    arguments = ["fit", "--config", "chat_sft", *model, *SHORT]
    run(tmp_path, monkeypatch, *arguments[:1], "chat_sft", *arguments[3:], "--data.pretrained", str(tmp_path / "more"))
    text = (
        (tmp_path / "more/tokenizer.json").read_text().replace('"w3": 10', '"w3": 11').replace('"w4": 11', '"w4": 10')
    )
    (tmp_path / "more/tokenizer.json").write_text(text)
    err = failing(monkeypatch, capsys, *arguments, "--data.pretrained", str(tmp_path / "more"))
    assert "whose tokenizer gives 'w" in err and "Leave out data.pretrained" in err


def test_predict_needs_a_checkpoint(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "--config", "chat_sft", *model, "--output", "a.jsonl", "--model.max_new_tokens", "2"]
    err = failing(monkeypatch, capsys, *arguments)
    assert "lightning-lora predict: Found no --ckpt_path" in err and "--ckpt_path none asks the base alone" in err
    err = failing(monkeypatch, capsys, *arguments, "--ckpt_path", "last")
    assert "Found --ckpt_path last and no checkpoint of an earlier fit" in err and not Path("a.jsonl").exists()
    run(tmp_path, monkeypatch, "predict", "chat_sft", *arguments[3:], "--ckpt_path", "none")
    assert 0 < len(Path("a.jsonl").read_text().splitlines()) < len(ROWS)
