"""Recipes that change the strategy of others."""

from pathlib import Path

import pytest
import yaml
from helpers.recipe_runs import RECIPES, printed


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
