from typing import Any

import pytest
import torch
from helpers.models import IDS, tiny_gpt2, tiny_llama
from torch import nn

from lightning_lora.model import extract
from lightning_lora.model.extract import extract_adapter


def moved(model: nn.Module, names: list[str], rank: int | None = None) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(each in name for each in names):
                change = torch.randn(parameter.shape, generator=generator) * 0.02
                if rank:
                    left, values, right = torch.linalg.svd(change, full_matrices=False)
                    change = left[:, :rank] * values[:rank] @ right[:rank]
                parameter.add_(change)
    return model


@pytest.mark.parametrize(
    ("build", "names"), [(tiny_llama, ["q_proj", "down_proj", "lm_head"]), (tiny_gpt2, ["c_attn.w"])]
)
def test_a_change_of_the_rank_is_found_as_a_whole(build: Any, names: list[str]) -> None:
    tuned = moved(build(), names, rank=3).eval()
    base = build().eval()
    apart = float((base(IDS).logits - tuned(IDS).logits).abs().max())
    found = extract_adapter(base, tuned, 3)
    torch.testing.assert_close(base(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-5)
    assert apart > 1e-2
    assert max(found.errors.values()) < 1e-5
    assert not found.left_out


def test_a_higher_rank_than_a_layer_has_is_filled_up() -> None:
    tuned, base = moved(tiny_llama(), ["k_proj"]).eval(), tiny_llama().eval()
    extract_adapter(base, tuned, 40)  # k_proj has 16 outputs
    torch.testing.assert_close(base(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exact", [1024, 0])
def test_errors_are_those_of_the_best_approximation(monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    monkeypatch.setattr(extract, "_EXACT", exact)
    tuned, base = moved(tiny_llama(), ["q_proj"]), tiny_llama()
    changes = {
        f"model.layers.{index}.self_attn.q_proj": one.self_attn.q_proj.weight - other.self_attn.q_proj.weight
        for index, (one, other) in enumerate(zip(tuned.model.layers, tiny_llama().model.layers))
    }
    found = extract_adapter(base, tuned, 4)
    assert found.errors.keys() == changes.keys()
    for name, change in changes.items():
        values = torch.linalg.svdvals(change.detach().double())
        best = float(torch.linalg.norm(values[4:]) / torch.linalg.norm(values))
        assert found.errors[name] == pytest.approx(best, rel=1e-3 if exact else 1e-2)


def test_what_is_no_linear_layer_is_named() -> None:
    tuned = moved(tiny_llama(tie_word_embeddings=True), ["q_proj", "embed_tokens", "norm"])
    found = extract_adapter(tiny_llama(tie_word_embeddings=True), tuned, 4)
    assert all("q_proj" in name for name in found.errors)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= found.left_out.keys()
    size = torch.linalg.vector_norm
    before = tiny_llama(tie_word_embeddings=True).model.norm.weight
    expected = size(tuned.model.norm.weight - before) / size(before)
    assert found.left_out["model.norm.weight"] == pytest.approx(float(expected), rel=1e-4)


def test_other_models_and_equal_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="These are not one model before and after: 'model"):
        extract_adapter(tiny_llama(), tiny_gpt2(), 4)
    with pytest.raises(ValueError, match="No linear layer of the two models differs"):
        extract_adapter(tiny_llama(), moved(tiny_llama(), ["norm"]), 4)
