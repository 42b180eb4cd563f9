"""Adapters combined into one, beside PEFT and the formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.models import tiny_classifier, tiny_gpt2, tiny_llama
from helpers.several_adapters import alone, logits, moved, two
from torch import nn

from lightning_lora import LoraConfig, active_adapters, adapters, combine_adapters, save_adapter, set_adapter
from lightning_lora.layers.init import generator_for
from lightning_lora.model.combine import _keep_random

FR = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
DE = LoraConfig(r=4, lora_alpha=5, target_modules=["v_proj", "up_proj"])
EMBEDDING = LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"])
GPT2 = LoraConfig(r=4, target_modules=["c_attn"])


def in_peft(model: nn.Module, make: Callable[[], nn.Module], path: Path, **settings: Any) -> Any:
    """The same adapters there, combined there."""
    for name in ("fr", "de"):
        save_adapter(model, path / name, name)
    theirs = peft.PeftModel.from_pretrained(make().eval(), path / "fr", adapter_name="fr")
    theirs.load_adapter(path / "de", "de")
    theirs.add_weighted_adapter(["fr", "de"], [0.7, -0.4], "new", **settings)
    theirs.set_adapter("new")
    return theirs


@pytest.mark.parametrize(
    ("make", "fr", "de"),
    [(tiny_llama, FR, DE), (tiny_llama, EMBEDDING, EMBEDDING), (tiny_gpt2, GPT2, GPT2)],
    ids=["linear", "embedding", "conv1d"],
)
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "magnitude_prune", "ties"])
def test_beside_peft(make: Any, fr: LoraConfig, de: LoraConfig, method: str, tmp_path: Path) -> None:
    model = two(make, fr, de)
    more: dict[str, Any] = {"density": 0.6} if method in ("magnitude_prune", "ties") else {}
    theirs = in_peft(model, make, tmp_path, combination_type=method, svd_rank=3 if method == "svd" else None, **more)
    before = logits(model)
    combine_adapters(model, ["fr", "de"], "new", [0.7, -0.4], method, r=3 if method == "svd" else None, **more)
    assert active_adapters(model) == ["fr"]
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(alone(model, "new"), logits(theirs), rtol=1e-4, atol=1e-4)


def test_cat_is_the_weighted_sum() -> None:
    model = two(tiny_llama, FR, LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj", "up_proj"]))
    combine_adapters(model, ["fr", "de"], "new", [2.0, -0.5])
    assert adapters(model)["new"].rank("model.layers.0.self_attn.v_proj") == 6
    layer = model.model.layers[1].self_attn.v_proj
    expected = 2 * layer.lora["fr"].delta_weight() - 0.5 * layer.lora["de"].delta_weight()
    torch.testing.assert_close(layer.lora["new"].delta_weight(), expected)
    set_adapter(model, ["fr", "de"])
    together = logits(model)
    combine_adapters(model, ["fr", "de"], "both")
    torch.testing.assert_close(alone(model, "both"), together, rtol=1e-4, atol=1e-5)


def test_svd_at_full_rank_is_exact_and_at_a_lower_one_the_best() -> None:
    model = two(tiny_llama, FR, DE)
    combine_adapters(model, ["fr", "de"], "cat")
    combine_adapters(model, ["fr", "de"], "full", method="svd", r=8)
    torch.testing.assert_close(alone(model, "full"), alone(model, "cat"), rtol=1e-4, atol=1e-5)
    combine_adapters(model, ["fr", "de"], "low", method="svd", r=2)
    layer = model.model.layers[0].self_attn.v_proj
    whole, low = (layer.lora[name].delta_weight() for name in ("cat", "low"))
    best = torch.linalg.svdvals(whole)[2:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(whole - low), best, rtol=1e-4, atol=1e-5)


def test_dare_keeps_random_values_and_scales_them_up() -> None:
    tensor = torch.randn(200, 200)
    kept = _keep_random(tensor, 0.25, generator_for(0, "name"))
    chosen = kept != 0
    torch.testing.assert_close(kept[chosen], tensor[chosen] / 0.25)
    assert abs(chosen.float().mean() - 0.25) < 0.01
    made = [two(tiny_llama, FR, DE) for _ in range(3)]
    for model, seed in zip(made, (1, 1, 2)):
        combine_adapters(model, ["fr", "de"], "new", method="dare_linear", density=0.5, seed=seed)
    assert torch.equal(alone(made[0], "new"), alone(made[1], "new"))
    assert not torch.equal(alone(made[0], "new"), alone(made[2], "new"))


@pytest.mark.parametrize(("dare", "same"), [("dare_linear", "linear"), ("dare_ties", "ties")])
def test_dare_that_keeps_all(dare: str, same: str) -> None:
    model = two(tiny_llama, FR, DE)
    combine_adapters(model, ["fr", "de"], "dare", [0.3, 0.9], dare, density=1.0)
    combine_adapters(model, ["fr", "de"], "same", [0.3, 0.9], same, density=1.0)
    torch.testing.assert_close(alone(model, "dare"), alone(model, "same"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "mean"}, "method is 'mean', but it must be one of 'cat'"),
        ({"adapter_names": ["fr", "it"]}, "no adapter 'it'; it has 'fr', 'de'"),
        ({"weights": [1.0]}, "2 adapter names .* and 1 weights"),
        ({"method": "ties", "density": 0.0}, r"density is 0.0, but it must lie in \(0, 1\]"),
        ({"method": "linear"}, "v_proj' have the ranks 2, 4, and 'linear' combines those of equal rank"),
    ],
)
def test_what_cannot_be_combined(settings: dict[str, Any], match: str) -> None:
    model = two(tiny_llama, FR, LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=match):
        combine_adapters(model, **{"adapter_names": ["fr", "de"], "new_name": "new", **settings})
    assert list(adapters(model)) == ["fr", "de"]


def test_kinds_that_cannot_be_combined() -> None:
    model = two(tiny_llama, LoraConfig(r=2, target_modules=["v_proj"], use_dora=True), DE)
    with pytest.raises(ValueError, match="v_proj' is a DoraLinearAdapter, which is not one A and one B"):
        combine_adapters(model, ["fr", "de"], "new")
    saved = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = moved(two(tiny_classifier, saved, saved))
    with pytest.raises(ValueError, match="'fr' trains parameters in full"):
        combine_adapters(model, ["fr", "de"], "new")
