"""Callbacks in YAML, under their class paths of today and of version 0.1."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_lora
from lightning_lora.cli.main import main

ROOT = Path(lightning_lora.__file__).parents[1]


def test_class_paths_of_version_0_1_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old: list[dict[str, Any]] = [
        {"class_path": "lightning_lora.LoRA"},
        {"class_path": "lightning_lora.report.BeforeAfter", "init_args": {"prompt": "Define: Internet"}},
        {"class_path": "lightning_lora.curve.LearningCurve"},
        {"class_path": "lightning_lora.predictions.PredictionWriter", "init_args": {"path": "answers.jsonl"}},
        {"class_path": "lightning_lora.reference.BaseAsReference"},
    ]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": old}}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "chat_sft", "--config", str(tmp_path / "old.yaml"), "--print_config"])
    assert stop.value.code in (0, None)
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in found] == [
        callback["class_path"].rpartition(".")[2] for callback in old
    ]
    assert found[1]["init_args"]["prompt"] == "Define: Internet"


def test_recipes_say_where_callbacks_are_now() -> None:
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        text = recipe.read_text()
        assert not [old for old in ("report", "curve", "predictions", "reference") if f"lightning_lora.{old}." in text]
