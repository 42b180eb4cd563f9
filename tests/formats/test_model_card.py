"""The model cards of exported adapters and merged models."""

import ast
from pathlib import Path

import lightning as L
import pytest
import yaml
from helpers import toys
from helpers.models import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRA, LoraConfig, eject, inject, save_adapter, save_merged
from lightning_lora.callbacks import LearningCurve
from lightning_lora.formats.model_card import write_card


def test_a_run_says_what_it_was(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, LoRA(r=3, export_dir=tmp_path, summary=False), max_epochs=1)
    trainer.fit(toys.Toy(), toys.loader())
    card = (tmp_path / "adapter" / "README.md").read_text()
    for part in ("| r | 3 |", "| task | Toy |", "| steps | 4 |", "| train_loss | ", "| torch | ", "`0`, `4`, `6`"):
        assert part in card, card
    toys.trainer(tmp_path, LoRA(r=3, export_dir=tmp_path, summary=False), max_epochs=2).fit(toys.Toy(), toys.loader())
    assert "| steps | 8 |" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("by_id", [True, False])
def test_the_base_is_named_as_hubs_expect(by_id: bool, tmp_path: Path) -> None:
    name = "owner/base" if by_id else str(tmp_path / "base")  # hubs refuse a card that names a directory
    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model.config._name_or_path = name
    save_adapter(inject(model, LoraConfig(r=2)), tmp_path / "adapter")
    save_merged(eject(model, merge=True), tmp_path / "merged")
    bodies = {}
    for directory, library in (("adapter", "peft"), ("merged", "transformers")):
        _, header, bodies[directory] = (tmp_path / directory / "README.md").read_text().split("---\n", 2)
        base = {"base_model": name} if by_id else {}
        assert yaml.safe_load(header) == {**base, "library_name": library, "tags": ["lora"]}
    assert "`q_proj`" in bodies["adapter"] and f'from_pretrained("{name}")' in bodies["adapter"]
    assert f"# {name} with" in bodies["merged"] and "from transformers import LlamaForCausalLM" in bodies["merged"]


def test_both_cards_show_the_run_and_its_learning_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lora = LoRA(r=3, export_dir=tmp_path / "export", summary=False)
    more = {"callbacks": [lora, LearningCurve(), ModelCheckpoint(tmp_path)], "logger": CSVLogger(tmp_path)}
    trainer = L.Trainer(max_epochs=1, log_every_n_steps=1, enable_progress_bar=False, accelerator="cpu", **more)
    trainer.fit(toys.Toy(), toys.loader())
    for name in ("adapter", "merged"):
        card = (tmp_path / "export" / name / "README.md").read_text()
        assert card.count("![LearningCurve](learning_curve.png)") == 1
        assert "| steps | 4 |" in card and "| merged outputs apart | " in card
        assert (tmp_path / "export" / name / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "The state dict of a `Toy`" in card


def test_somebody_s_own_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my words")
    save_adapter(inject(tiny_llama(), LoraConfig(r=2)), tmp_path)
    save_merged(tiny_llama(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my words"


@given(
    name=st.lists(st.sampled_from(['"', ")", "\n", "```", "\\", "import os", "x", "#"]), min_size=1, max_size=8).map(
        "".join
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_is_no_code(name: str, tmp_path: Path) -> None:
    write_card(tmp_path, {"base_model_name_or_path": name})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith("base = "))
    call = ast.parse(line).body[0].value  # type: ignore[attr-defined]
    assert [argument.value for argument in call.args] == [name]
