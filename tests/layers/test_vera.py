"""VeRA beside PEFT, and what only we do: small checkpoints, sharing, merging."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
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
from lightning_lora.layers.vera import VeraAdapter

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


def test_the_input_is_not_kept() -> None:
    """Nor anything of the output's size: vectors, rank-wide products and what has a weight's size at most."""
    layer = inject(nn.Linear(64, 48), LoraConfig(r=4, use_vera=True))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(100, 64, requires_grad=True))
    assert max(kept) <= 64 * 48
    assert not {100 * 64, 100 * 48} & set(kept)


def test_no_buffer_is_sent_to_other_processes() -> None:
    """DDP broadcasts all buffers in every forward pass, and the pair never changes."""
    buffers = {name for name, _ in tiny_llama().named_buffers()}
    assert {name for name, _ in ours(*MODELS[0]).named_buffers()} == buffers


def test_a_model_on_the_meta_device_gets_the_pair_when_it_is_materialized() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 9))
    inject(model, LoraConfig(r=4, use_vera=True, target_modules=["0", "1"], seed=5)).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    whole = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 9))
    inject(whole, LoraConfig(r=4, use_vera=True, target_modules=["0", "1"], seed=5))
    expected = VeraAdapter.shared_tensors([whole[0].lora["default"]])
    assert expected["vera_A"].abs().min() > 0
    for layer in model:
        toys.assert_same_tensors(VeraAdapter.shared_tensors([layer.lora["default"]]), expected)


def test_another_projection_is_refused(tmp_path: Path) -> None:
    save_adapter(ours(*MODELS[0]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"] + 1}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another base_model\.vera_A than seed=3 and r=12 give here"):
        load_adapter(tiny_llama(), tmp_path)


def test_adapters_of_other_settings_are_refused(tmp_path: Path) -> None:
    make, targets = MODELS[0]
    config = peft.VeraConfig(r=12, target_modules=targets, projection_prng_key=3, save_projection=False)
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "seed-3")
    save_adapter(ours(make, targets), tmp_path / "r-12")
    for model, directory, match in (
        (ours(make, targets, seed=4), "seed-3", "holds a VeRA of seed=3, and this model's adapter is a VeRA of seed=4"),
        (ours(make, targets, use_vera=False), "seed-3", "holds a VeRA of seed=3, and this model's adapter is a LoRA"),
        (ours(make, targets, r=10), "r-12", "than seed=3 and r=10 give here"),
    ):
        toys.randomize(model)
        before = toys.snapshot(model)
        with pytest.raises(CheckpointError, match=match):
            load_adapter(model, tmp_path / directory)
        toys.assert_same_tensors(toys.snapshot(model), before)
    load_adapter(ours(make, targets), tmp_path / "seed-3")


@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [1], "layers_pattern": "layers"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_we_open_what_peft_saves_of_some_blocks_and_in_any_precision(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config = peft.VeraConfig(r=12, target_modules=["q_proj", "up_proj"], projection_prng_key=3, **settings)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    toys.randomize(model)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data = parameter.data.to(dtype).float()  # what the file can hold
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    opened = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_llama().eval()(IDS).logits, model(IDS).logits, atol=1e-3)


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
    with pytest.raises(TargetError, match="use_vera is not for this kind of layer"):
        ours(tiny_llama, ["embed_tokens"])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_start_without_a_gradient_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="vera_d_initial is"):
        LoraConfig(use_vera=True, vera_d_initial=value)
