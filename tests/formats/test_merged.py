"""A merged model as files, of a model that is adapted, merged, or taken apart already: the same ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import toys
from helpers.models import IDS, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoraConfig, eject, inject, merge, save_merged, unmerge


def toy() -> nn.Module:
    return toys.Toy(dropout=0.0).eval()


def tied() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "toy": (toy, {"target_modules": ["net.0", "net.4"], "modules_to_save": ["net.1", "net.6"]}),
    "dora": (toy, {"use_dora": True}),
    "pissa": (toy, {"init_lora_weights": "pissa", "r": 1}),
    "llama": (tiny_llama, {"bias": "all"}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "wte"]}),
    "tied": (tied, {"trainable_token_indices": [1, 5]}),
}


def out(model: nn.Module) -> torch.Tensor:
    return toys.outputs(model) if isinstance(model, toys.Toy) else model(IDS).logits


@pytest.mark.parametrize("state", ["adapted", "merged", "taken apart"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*is tied to.*")
@torch.no_grad()
def test_what_is_trained_is_what_is_written(tmp_path: Path, kind: str, state: str) -> None:
    make, settings = MODELS[kind]
    model = inject(make(), LoraConfig(**{"r": 2, **settings})).eval()
    toys.randomize(model)
    before, expected = toys.snapshot(model), out(model)
    if state == "merged":
        merge(model)
    elif state == "taken apart":
        eject(model, merge=True)
    save_merged(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any("lora" in name for name in names)
    if isinstance(model, toys.Toy):
        opened = make()
        opened.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        opened = getattr(tf, type(model).__name__).from_pretrained(tmp_path)
    torch.testing.assert_close(out(opened.eval()), expected, rtol=1e-4, atol=1e-5)
    toys.assert_same_tensors(toys.snapshot(unmerge(model)), before)
