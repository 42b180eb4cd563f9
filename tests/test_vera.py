"""VeRA beside PEFT, and what only we do: small checkpoints, sharing, merging."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from test_peft import tiny_gpt2
from test_targets import tiny_llama
from torch import nn

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    TargetError,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_lora.layers import LoraLayer

IDS = torch.arange(16).view(2, 8)
MODELS: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    (tiny_gpt2, ["c_attn", "c_proj"]),
]


def ours(make: Callable[[], nn.Module], targets: list[str], **more: Any) -> nn.Module:
    settings = {"r": 12, "use_vera": True, "vera_d_initial": 0.2, "seed": 3, "modules_to_save": None}
    return inject(make(), LoraConfig(target_modules=targets, **{**settings, **more}))


def theirs(make: Callable[[], nn.Module], targets: list[str]) -> Any:
    config = peft.VeraConfig(r=12, target_modules=targets, projection_prng_key=3, d_initial=0.2)
    return peft.get_peft_model(make(), config)


@pytest.mark.parametrize(("make", "targets"), MODELS, ids=["linear", "conv1d"])
def test_outputs_and_gradients_beside_peft(make: Any, targets: list[str], tmp_path: Path) -> None:
    model, reference = ours(make, targets).eval(), theirs(make, targets).eval()
    assert torch.equal(model(IDS).logits, make().eval()(IDS).logits)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    torch.manual_seed(0)
    for name, layer in layers.items():
        other = reference.get_submodule(f"base_model.model.{name}")
        for vector in ("vera_lambda_b", "vera_lambda_d"):
            value = torch.randn_like(getattr(layer.lora["default"], vector)) * 0.1
            getattr(layer.lora["default"], vector).data = value
            getattr(other, vector)["default"].data = value.clone()
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    for each in (model, reference):
        each(IDS).logits.square().sum().backward()
    for name, layer in layers.items():
        other = reference.get_submodule(f"base_model.model.{name}")
        for vector in ("vera_lambda_b", "vera_lambda_d"):
            gradient = getattr(other, vector)["default"].grad
            torch.testing.assert_close(getattr(layer.lora["default"], vector).grad, gradient, rtol=1e-3, atol=1e-3)
    adapted = model(IDS).logits
    save_adapter(model, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(opened(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    reference.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(load_adapter(make().eval(), tmp_path / "theirs")(IDS).logits, adapted)
    weights = {name: layer.weight for name, layer in layers.items()}
    torch.testing.assert_close(merge(model)(IDS).logits, adapted, rtol=1e-3, atol=1e-4)
    unmerge(model)
    assert all(layers[name].weight is weight for name, weight in weights.items())


def test_projections_are_one_and_stay_one() -> None:
    model = ours(*MODELS[0])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        shared = {id(m.lora["default"].projections) for m in each.modules() if isinstance(m, LoraLayer)}
        assert len(shared) == 1
    assert not any("projections" in name for name in model.state_dict())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (3 * 12 + 32 + 16 + 32)


def test_another_projection_is_refused(tmp_path: Path) -> None:
    save_adapter(ours(*MODELS[0]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"] + 1}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another base_model\.vera_A than seed=3 gives here"):
        load_adapter(tiny_llama(), tmp_path)


def test_a_run_resumes_from_a_small_checkpoint(tmp_path: Path) -> None:
    def lora(**more: Any) -> LoRA:
        return LoRA(r=8, use_vera=True, modules_to_save=None, summary=False, **more)

    whole, resumed = toys.Toy(dropout=0.0), toys.Toy(dropout=0.0)
    base = toys.snapshot(whole)
    toys.trainer(tmp_path / "whole", lora(), max_epochs=2).fit(whole, toys.loader())
    first = toys.trainer(tmp_path / "first", lora(), max_epochs=1)
    first.fit(toys.Toy(dropout=0.0), toys.loader())
    path = first.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {name.rpartition(".")[2] for name in state} == {"vera_lambda_b", "vera_lambda_d"}
    toys.trainer(tmp_path / "second", lora(), max_epochs=2).fit(resumed, toys.loader(), ckpt_path=path)
    toys.assert_same_tensors(toys.snapshot(resumed), toys.snapshot(whole))
    assert not torch.equal(whole.net[0].weight, base["net.0.weight"])
    toys.assert_same_tensors(toys.snapshot(eject(unmerge(whole))), base)
    with pytest.raises(CheckpointError, match="seed"):
        toys.trainer(tmp_path / "other", lora(seed=1)).fit(toys.Toy(dropout=0.0), toys.loader(), ckpt_path=path)


@pytest.mark.parametrize(
    "other",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"a": 2}}, {"freeze_A": True}],
)
def test_settings_that_do_not_go_together(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"use_vera and {next(iter(other))} do not go together"):
        LoraConfig(use_vera=True, **other)


def test_other_kinds_of_layers_are_refused() -> None:
    with pytest.raises(TargetError, match="use_vera is for linear layers alone"):
        ours(tiny_llama, ["embed_tokens"])
