"""Recipes that change the strategy of others."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.recipe_runs import RECIPES, logged, printed, run
from helpers.texts import word_tokenizer
from transformers import BertConfig, BertModel


def test_overlay_changes_the_strategy_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    alone = printed(capsys, "fit", "--config", "chat_sft")
    both = printed(capsys, "fit", "--config", "chat_sft", "--config", "ddp")
    assert (both["trainer"]["strategy"], both["trainer"]["devices"]) == ("ddp", "auto")
    alone["trainer"] |= {"strategy": "ddp", "devices": "auto"}
    assert both == alone


@pytest.mark.parametrize(("overlay", "strategy"), [("fsdp", "FSDPStrategy"), ("fsdp2", "ModelParallelStrategy")])
def test_overlays_that_shard_are_read(
    overlay: str, strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed(capsys, "fit", "--config", "chat_sft", "--config", overlay)
    settings = config["trainer"]["strategy"]
    assert settings["class_path"] == f"lightning.pytorch.strategies.{strategy}"
    shipped = yaml.safe_load((RECIPES / f"{overlay}.yaml").read_text())["trainer"]["strategy"]["init_args"]
    assert settings["init_args"] == settings["init_args"] | shipped
    assert config["model"]["class_path"].endswith("CausalLM")
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "fit", "--config", str(tmp_path / "both.yaml")) == config


def test_the_overlay_that_quantizes_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    alone = printed(capsys, "fit", "--config", "chat_sft")
    both = printed(capsys, "fit", "--config", "chat_sft", "--config", "qlora")
    assert both["model"]["init_args"]["quantize"] == "nf4-dq"
    alone["model"]["init_args"]["quantize"] = "nf4-dq"
    assert both == alone
    other = printed(capsys, "fit", "--config", "chat_sft", "--model.quantize", "nf4")
    assert other["model"]["init_args"]["quantize"] == "nf4"


def test_the_overlay_for_numbers_runs_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the callbacks of the recipe, but for what is monitored and where it goes."""
    recipe, overlay = (
        yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]["callbacks"]
        for name in ("sequence_classification", "regression")
    )
    recipe[1]["init_args"] |= {"monitor": "val_loss"}
    del recipe[1]["init_args"]["mode"]
    assert json.loads(json.dumps(recipe).replace("runs/sequence_classification", "runs/regression")) == overlay
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"w{index}", "label": index / 4} for index in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = ["--config", "regression", "--model.pretrained", "model", "--data.path", "rows.jsonl"]
    mine += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    run(tmp_path, monkeypatch, "fit", "sequence_classification", *mine, "--trainer.max_epochs", "1")
    assert "val_spearman" in logged(tmp_path) and list(Path("runs/regression/checkpoints").glob("epoch=*"))
    predict = [*mine, "--data.predict_path", "rows.jsonl", "--ckpt_path", "last", "--output", "out.jsonl"]
    run(tmp_path, monkeypatch, "predict", "sequence_classification", *predict)
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(found) == 24 and all(isinstance(row["score"], float) for row in found)
