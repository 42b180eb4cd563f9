"""Experts that were layers of their own: what is cut short, lopsided or of another model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.peft_cases import CASES, computed, edit, factors, mixtral, moe, stacked_experts_of_peft_0_18, written
from safetensors.torch import load_file, save_file

from lightning_lora import CheckpointError, load_adapter, save_adapter

PLACE = "model.layers.0.block_sparse_moe.experts"


def tensors_of(experts: dict[tuple[int, str], int], rows: int = 48) -> dict[str, torch.Tensor]:
    """A and B of some of the layers, each of its own rank."""
    found = {}
    for seed, ((expert, name), r) in enumerate(experts.items()):
        sizes = (32, 48) if name == "w2" else (rows, 32)
        for matrix, factor in zip("AB", factors(*sizes, r, seed)):
            found[f"{PLACE}.{expert}.{name}.lora_{matrix}.weight"] = factor
    return found


@pytest.mark.parametrize(
    "experts",
    [{(0, "w1"): 2}, {(2, "w3"): 2, (0, "w2"): 2}, {(1, "w1"): 2, (2, "w1"): 3, (1, "w3"): 5}],
    ids=["one layer", "parts", "several ranks"],
)
def test_experts_that_are_not_all_there(experts: dict[tuple[int, str], int], tmp_path: Path) -> None:
    ranks = {rf"experts\.{expert}\.{name}": r for (expert, name), r in experts.items() if r != 2}
    tensors, model = tensors_of(experts), mixtral()
    weights = model.model.layers[0].mlp.experts
    for (expert, name), r in experts.items():
        weight = (weights.down_proj if name == "w2" else weights.gate_up_proj).data[expert]
        rows = {"w1": slice(0, 48), "w3": slice(48, 96), "w2": slice(None)}[name]
        lora_A, lora_B = (tensors[f"{PLACE}.{expert}.{name}.lora_{matrix}.weight"] for matrix in "AB")
        weight[rows] += 8 / r * lora_B @ lora_A
    written(tmp_path, tensors, ["w1", "w2", "w3"], 2, rank_pattern=ranks)
    edit(tmp_path, layers_to_transform=[0])
    opened = load_adapter(mixtral(), tmp_path)
    torch.testing.assert_close(computed(opened), computed(model), rtol=1e-4, atol=2e-5)
    save_adapter(opened, tmp_path / "again")  # under the names of today
    torch.testing.assert_close(
        computed(load_adapter(mixtral(), tmp_path / "again")), computed(model), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (tensors_of({(3, "w1"): 2}), r"one of 3 experts here"),
        (tensors_of({(0, "w1"): 2}, rows=40), r"\(40, 2\)\] for .*must be \[\(2, 32\), \(48, 2\)\]"),
        ({k: v for k, v in tensors_of({(0, "w1"): 2}).items() if "lora_A" in k}, r"\[\(2, 32\), None\]"),
        (tensors_of({(0, "w1"): 7}), "on another model, or is cut short"),
        ({"model.layers.0.block_sparse_moe.experts.0.w9.lora_A.weight": torch.ones(2, 32)}, "target_modules|left over"),
    ],
    ids=["another expert", "other rows", "no B", "another rank", "another layer"],
)
def test_experts_that_do_not_fit(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(tmp_path, tensors, ["w1"], 2)
    with pytest.raises(CheckpointError, match=said):
        load_adapter(mixtral(), tmp_path)


def test_square_experts_without_a_version_are_refused(tmp_path: Path) -> None:
    trained = stacked_experts_of_peft_0_18(16)(tmp_path)
    torch.testing.assert_close(computed(load_adapter(moe(16), tmp_path)), trained, rtol=1e-4, atol=2e-5)
    edit(tmp_path, peft_version=...)
    with pytest.raises(CheckpointError, match=r"has no peft_version, and the experts of .* are square"):
        load_adapter(moe(16), tmp_path)


def test_an_embedding_of_another_base_under_an_adapter_is_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if str(case) == "`target_modules` embedding")
    case.write(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the base's weight of 'model\.embed_tokens', .* not this model's"):
        load_adapter(case.make(), tmp_path)
