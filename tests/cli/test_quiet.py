"""The screen of a recipe says nothing that a user can do nothing about, and what matters stays."""

import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers.recipe_runs import RECIPES

from lightning_lora.cli.quiet import quiet

NOISE = ("LeafSpec", "skip_none", "model summary", "FLOPs", "litlogger", "Loading weights", "Writing model shards")


def test_a_recipe_prints_no_noise(tmp_path: Path, tiny: list[str]) -> None:
    arguments = ["fit", "--config", str(RECIPES / "chat_sft.yaml"), *tiny, "--trainer.precision", "bf16-mixed"]
    command = [sys.executable, "-m", "lightning_lora", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    screen = done.stdout + done.stderr
    assert [noise for noise in NOISE if noise in screen] == []
    for shown in ("tokens_per_second", "minutes_left", "peak_memory_gb", "val_loss", "trainable"):
        assert shown in screen.replace("\n", "")


def test_other_warnings_and_notes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as transformers_logging

    notes: list[str] = []
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    # Whatever a run in this process has made of it.
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "disabled", False)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            assert not transformers_logging.is_progress_bar_enabled()
            assert gguf.tqdm([1]).disable
            warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something of one's own", UserWarning, stacklevel=1)
            logger.info("💡 Tip: a service")
            logger.info("GPU available: False")
        logger.info("💡 Tip: after it")
    assert [str(each.message) for each in caught] == ["something of one's own"]
    assert notes == ["GPU available: False", "💡 Tip: after it"]
    assert transformers_logging.is_progress_bar_enabled()
    assert not gguf.tqdm([1], file=io.StringIO()).disable
