"""Recipes with an overlay, as commands that start two processes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, TESTS
from helpers.recipe_runs import RECIPES


@pytest.mark.parametrize(
    ("overlay", "more"),
    [
        ("ddp", []),
        *(
            pytest.param(overlay, more, marks=pytest.mark.slow)
            for overlay in ("fsdp", "fsdp2")
            for more in ([], ["--config", "qlora"], ["--lora.use_dora", "true"])
        ),
    ],
)
def test_overlay_runs_on_two_processes(tmp_path: Path, tiny: list[str], overlay: str, more: list[str]) -> None:
    """Beside a recipe, in processes of their own."""
    arguments = ["fit", "--config", "chat_sft", "--config", overlay, *more, *tiny]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    if overlay == "fsdp":  # with its settings, on the CPU, which the class itself refuses
        arguments += ["--trainer.strategy.class_path", "helpers.distributed.llama.CpuFSDP"]
    paths = os.pathsep.join([str(ROOT), str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_lora", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "runs/chat_sft/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state and all(".lora." in name for name in state)
    assert (tmp_path / "runs/chat_sft/checkpoints/learning_curve.csv").exists()


@pytest.mark.slow
def test_full_fine_tuning_under_fsdp2(tmp_path: Path, tiny: list[str]) -> None:
    """Without LoRA, two processes that share the parameters reach the loss of one with the same batches."""
    recipe = yaml.safe_load((RECIPES / "chat_sft.yaml").read_text())
    recipe["trainer"]["callbacks"] = [
        callback
        for callback in recipe["trainer"]["callbacks"]
        if callback["class_path"].rpartition(".")[2] in ("ModelCheckpoint", "LearningCurve")
    ]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(recipe))
    losses = []
    for folder, overlay, size in (("one", [], "4"), ("two", ["--config", "fsdp2"], "2")):
        (tmp_path / folder).mkdir()
        arguments = ["fit", "--config", "../full.yaml", *overlay, *tiny, "--trainer.accelerator", "cpu"]
        arguments += ["--data.batch_size", size, "--trainer.limit_val_batches", "1.0"]
        command = [sys.executable, "-m", "lightning_lora", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        table = (tmp_path / folder / "runs/chat_sft/checkpoints/learning_curve.csv").read_text().splitlines()
        losses += [float(row["value"]) for row in csv.DictReader(table) if row["metric"] == "val_loss"]
    # Each process weighs its tokens alike, however many it has.
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
