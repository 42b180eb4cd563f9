"""The model card of an exported adapter."""

from pathlib import Path

import yaml
from helpers import toys
from helpers.models import tiny_llama

from lightning_lora import LoRA, LoraConfig, inject, save_adapter


def test_a_run_says_what_it_was(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, LoRA(r=3, export_dir=tmp_path, summary=False), max_epochs=1)
    trainer.fit(toys.Toy(), toys.loader())
    card = (tmp_path / "adapter" / "README.md").read_text()
    for part in ("| r | 3 |", "| task | Toy |", "| steps | 4 |", "| train_loss | ", "| torch | ", "`0`, `4`, `6`"):
        assert part in card, card
    toys.trainer(tmp_path, LoRA(r=3, export_dir=tmp_path, summary=False), max_epochs=2).fit(toys.Toy(), toys.loader())
    assert "| steps | 8 |" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_base_is_named_as_hubs_expect(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    save_adapter(inject(model, LoraConfig(r=2)), tmp_path / "adapter")
    _, header, body = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {"base_model": str(tmp_path / "base"), "library_name": "peft", "tags": ["lora"]}
    assert "`q_proj`" in body and f'from_pretrained("{tmp_path / "base"}")' in body


def test_somebody_s_own_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my words")
    save_adapter(inject(tiny_llama(), LoraConfig(r=2)), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my words"
