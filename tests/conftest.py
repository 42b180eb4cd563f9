"""What every test starts from, and what tests in several folders start from."""

import logging
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers.recipe_runs import SHORT
from helpers.runs import fit
from helpers.texts import word_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import adapter_state_dict, unmerge

# Machines differ, and a test that the processor was busy for is not wrong.
hypothesis.settings.register_profile("untimed", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """No test depends on those before it, nor on which of them its process has run."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # which ``seed_everything`` leaves behind
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)  # which benchmarks raise


@pytest.fixture(scope="session")
def adapter_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The last checkpoint of a run, and the trained adapter."""
    path = tmp_path_factory.mktemp("run")
    model, _ = fit(path, ModelCheckpoint(path, save_last=True))
    unmerge(model)
    return path / "last.ckpt", {k: v.clone() for k, v in adapter_state_dict(model).items()}


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Overrides that put a tiny model into the recipes for language models, and make them short."""
    checkpoint = word_checkpoint(tmp_path / "model")
    found = []
    for part in ("model", "data"):
        found += [f"--{part}.pretrained", checkpoint, f"--{part}.gguf_file", "null"]
    return [*found, "--trainer.precision", "32-true", *SHORT]
