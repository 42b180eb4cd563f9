from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.models import IDS, tiny_gpt2, tiny_llama
from helpers.toys import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from lightning_lora import CheckpointError, LoraConfig, inject, load_adapter, save_adapter
from lightning_lora.formats.resized import resize_adapter
from lightning_lora.layers.spectrum import decomposed


def saved(path: Path, build: Any = tiny_llama, **config: Any) -> nn.Module:
    model = build()
    inject(model, LoraConfig(**{"r": 6, "target_modules": ["q_proj", "v_proj"], **config}))
    randomize(model)
    save_adapter(model, path)
    return model.eval()


def updates(directory: Path) -> dict[str, Tensor]:
    """Each layer's update in float64, as PEFT reads the files."""
    tensors = load_peft_weights(str(directory))
    config = peft.LoraConfig.from_pretrained(str(directory))
    found = {}
    for name, lora_A in tensors.items():
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = next(
                (a for key, a in config.alpha_pattern.items() if key in (layer, layer.replace(".", r"\."))), None
            )
            scaling = (config.lora_alpha if alpha is None else alpha) / (
                len(lora_A) ** 0.5 if config.use_rslora else len(lora_A)
            )
            lora_B = tensors[name.replace("lora_A", "lora_B")]
            found[layer] = scaling * lora_B.double() @ lora_A.double()
    return found


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {"q_proj": 4}}])
def test_each_update_is_the_best_of_its_rank(tmp_path: Path, config: dict[str, Any]) -> None:
    saved(tmp_path / "one", **config)
    done = resize_adapter(tmp_path / "one", tmp_path / "two", r=2)
    before, after = updates(tmp_path / "one"), updates(tmp_path / "two")
    assert done.keys() == before.keys() == after.keys()
    for layer, update in before.items():
        left, values, right = torch.linalg.svd(update)
        best = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(after[layer], best, rtol=1e-5, atol=1e-6)
        error = torch.linalg.norm(update - best) / torch.linalg.norm(update)
        assert done[layer].error == pytest.approx(float(error), rel=1e-4)
        assert (done[layer].before, done[layer].after) == (config.get("rank_pattern", {}).get(layer[-6:], 6), 2)


def test_energy_chooses_the_rank_of_each_layer(tmp_path: Path) -> None:
    model = saved(tmp_path / "one")
    layer: Any = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora["default"].lora_A[2:] *= 1e-3  # two directions that matter
    save_adapter(model, tmp_path / "one")
    done = resize_adapter(tmp_path / "one", tmp_path / "two", energy=0.999)
    name = "model.layers.1.self_attn.q_proj"
    assert done[name].after == 2
    assert {found.after for other, found in done.items() if other != name} == {6}
    for found in done.values():
        assert found.error**2 <= 0.001
    here = load_adapter(tiny_llama(), tmp_path / "two").eval()
    torch.testing.assert_close(here(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "two").eval()
    torch.testing.assert_close(theirs(IDS).logits, here(IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [{"r": 6}, {"r": 50}, {"energy": 1.0}])
def test_all_of_it_is_the_same_adapter(tmp_path: Path, size: dict[str, Any]) -> None:
    model = saved(tmp_path / "one", modules_to_save=["lm_head"], bias="none", trainable_token_indices=[1])
    done = resize_adapter(tmp_path / "one", tmp_path / "two", **size)
    assert {(found.before, found.after) for found in done.values()} == {(6, 6)}
    again = load_adapter(tiny_llama(), tmp_path / "two").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_embeddings_and_conv1d_too(tmp_path: Path) -> None:
    model = saved(tmp_path / "one", tiny_gpt2, target_modules=["c_attn", "wpe"])
    resize_adapter(tmp_path / "one", tmp_path / "two", energy=1.0)
    again = load_adapter(tiny_gpt2(), tmp_path / "two").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_pefts_own_files_too(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(tmp_path / "one")
    resize_adapter(tmp_path / "one", tmp_path / "two", r=4)
    again = load_adapter(tiny_llama(), tmp_path / "two").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector.* beside A and B"),
        ({"use_vera": True}, "vera_lambda"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    saved(tmp_path / "one", **config)
    with pytest.raises(CheckpointError, match=message):
        resize_adapter(tmp_path / "one", tmp_path / "two", r=2)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("size", [{}, {"r": 2, "energy": 0.9}, {"r": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either a rank of 1 or more"):
        resize_adapter(tmp_path / "one", tmp_path / "two", **size)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_product_is_decomposed_as_a_whole_one_is(out: int, inside: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(r, inside, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(out, r, generator=generator, dtype=torch.float64)
    left, values, right = decomposed((lora_A, lora_B))
    torch.testing.assert_close(left * values @ right, lora_B @ lora_A)
    expected = torch.linalg.svdvals(lora_B @ lora_A)
    torch.testing.assert_close(values, expected[: len(values)], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.t() @ left, torch.eye(len(values), dtype=torch.float64))
