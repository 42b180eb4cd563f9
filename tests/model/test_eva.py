"""EVA: the directions beside an exact decomposition and PEFT's, and a start of ``fit`` that leaves no trace."""

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.quantized import dequantize, kinds, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoraConfig, TargetError, initialize_eva, inject, load_adapter, save_adapter
from lightning_lora.model.eva import PrincipalDirections

NEVER = 2.0  # no cosine reaches this, so that all batches are taken in


def data(features: int = 32, rows: int = 400, seed: int = 0) -> Tensor:
    """Rows with a clear order of directions, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return torch.randn(rows, features, generator=generator) * 0.7 ** torch.arange(features) @ basis + 1.0


def exact(rows: Tensor, r: int) -> Tensor:
    return torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False).Vh[:r].float()


def assert_same_rows(found: Tensor, expected: Tensor, atol: float = 1e-3) -> None:
    """Equal up to the sign of each row."""
    assert found.shape == expected.shape
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(len(found)), rtol=0, atol=atol)
    torch.testing.assert_close(found @ found.T, torch.eye(len(found)), rtol=0, atol=1e-4)


def eva(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": "eva"} | settings)


@settings(max_examples=20)
@given(st.integers(5, 100), st.integers(0, 5))
def test_the_directions_are_those_of_all_rows(batch_size: int, seed: int) -> None:
    rows = data(seed=seed)
    inputs = PrincipalDirections(4, NEVER)
    for batch in rows.split(batch_size):
        inputs.update(batch)
    assert_same_rows(inputs.directions, exact(rows, 4))
    assert inputs.count == 400 and not inputs.converged


def test_directions_converge_and_never_outnumber_the_data() -> None:
    inputs = PrincipalDirections(4, 0.99)
    inputs.update(torch.ones(3, 8))
    assert len(inputs.directions) == 0  # rows that do not vary
    inputs.update(data(8)[:1])
    assert len(inputs.directions) == 1
    for batch in data(8).split(50):
        assert not inputs.converged
        inputs.update(batch)
        if inputs.converged:
            break
    assert inputs.converged and inputs.count < 400


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_module_starts_at_its_inputs_and_computes_what_it_did(use_dora: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Dropout(0.5), nn.Linear(24, 24), nn.Linear(24, 2))
    rows = data()
    inject(model, eva(target_modules=["0", "3"], rank_pattern={"3": 2}, use_dora=use_dora)).train()
    before = model.eval()(rows)
    model.train()
    model[3].eval()
    initialize_eva(model, rows.split(50), tau=NEVER)
    assert model.training and model[2].training and not model[3].training
    assert not any(layer._forward_pre_hooks for layer in model)
    first, second = model[0].lora["default"], model[3].lora["default"]
    assert_same_rows(first.lora_A.detach(), exact(rows, 4))
    assert_same_rows(second.lora_A.detach(), exact(model[:2](rows).detach(), 2))
    assert not first.lora_B.any() and first.lora_A.requires_grad and first.lora_A.grad is None
    assert torch.equal(model.eval()(rows), before)


def test_autocast_does_not_make_the_directions_coarser() -> None:
    rows, starts = data(200), []
    for enabled in (False, True):
        model = inject(nn.Sequential(nn.Linear(200, 2)), eva(r=2, target_modules=["0"]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            initialize_eva(model, rows.split(100), tau=NEVER)
        starts.append(model[0].lora["default"].lora_A.detach())
    torch.testing.assert_close(*starts, rtol=1e-5, atol=1e-6)


def batches_of(count: int = 12) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    frequencies = 0.6 ** torch.arange(64.0)  # so that the inputs vary most in some directions
    return [{"input_ids": torch.multinomial(frequencies, 128, True).view(8, 16)} for _ in range(count)]


def test_pefts_start_spans_the_same_space() -> None:
    batches, targets = batches_of(), ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.LoraConfig(
            r=2, init_lora_weights="eva", target_modules=targets, eva_config=peft.EvaConfig(rho=1.0, tau=0.9999)
        ),
        low_cpu_mem_usage=True,
    )
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    ours = inject(tiny_llama(), eva(r=2, target_modules=targets))
    initialize_eva(ours, batches, tau=NEVER)
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A = module.lora_A["default"].weight.detach()
            mine = ours.get_submodule(name).lora["default"].lora_A.detach()
            cosines = torch.linalg.svdvals(nn.functional.normalize(A) @ mine.T)  # of the principal angles
            assert cosines.min() > 0.99, name


@kinds("nf4", "nf4-dq", "fp4", "torchao int8", "torchao nf4")
def test_a_quantized_base_starts_as_its_values_do(kind: str) -> None:
    starts = []
    for values in (False, True):
        model = quantize(tiny_llama(tie_word_embeddings=False), kind)
        model = inject(dequantize(model) if values else model, eva())
        initialize_eva(model, [torch.arange(start, start + 24).view(2, 12) for start in range(0, 40, 8)], tau=NEVER)
        starts.append({name: p.detach() for name, p in model.named_parameters() if name.endswith("lora_A")})
    assert starts[0] and starts[0].keys() == starts[1].keys()
    for name, rows in starts[0].items():
        assert_same_rows(rows, starts[1][name])


def test_layers_with_one_input_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: Counter[int] = Counter()
    update = PrincipalDirections.update
    monkeypatch.setattr(
        PrincipalDirections, "update", lambda self, rows: (updates.update([id(self)]), update(self, rows))
    )
    model = inject(tiny_llama(), eva(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    initialize_eva(model, batches_of(3), tau=NEVER)
    assert sorted(updates.values()) == [3] * 2 * len(model.model.layers)  # one for q, k and v, and one for o
    attention = model.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.lora["default"].lora_A, attention.v_proj.lora["default"].lora_A)


def test_masked_positions_do_not_count() -> None:
    torch.manual_seed(0)
    model, ids = tiny_llama(), torch.randint(1, 64, (6, 12))
    mask = (torch.arange(12) < torch.tensor([12, 3, 5, 7, 9, 4]).unsqueeze(1)).long()
    config = eva(r=3, target_modules=["q_proj"], layers_to_transform=0)
    inject(model, config)
    initialize_eva(model, [{"input_ids": ids, "attention_mask": mask}], tau=NEVER)
    block = model.model.layers[0]
    inputs = block.input_layernorm(model.model.embed_tokens(ids))[mask.bool()].detach()
    assert_same_rows(block.self_attn.q_proj.lora["default"].lora_A.detach(), exact(inputs, 3))


def test_wrong_uses_are_refused(tmp_path: Path) -> None:
    rows = data(8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="no adapter in this Sequential that starts from data"):
        initialize_eva(model, [rows])
    inject(model, eva(target_modules=["0", "1"]))
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="None of the 2 adapted layers saw any input"):
        initialize_eva(model, [rows], forward=lambda model, batch: batch)
    with pytest.raises(ValueError, match="The input of 0 holds a NaN"):
        initialize_eva(model, [rows * float("nan")])
    toys.assert_same_tensors(model.state_dict(), before)
    with pytest.warns(UserWarning, match="1 of 2 adapted layers, among them '1', saw no input"):
        initialize_eva(model, [rows], forward=lambda model, batch: model[0](batch))
    toys.randomize(model)
    with pytest.raises(ValueError, match="'default' is trained already"):
        initialize_eva(model, [rows])
    save_adapter(model, tmp_path)
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bare.load_state_dict({name: tensor for name, tensor in before.items() if "lora" not in name})
    torch.testing.assert_close(load_adapter(bare, tmp_path)(rows), model(rows))
    with pytest.raises(TargetError, match="'eva' is not for this kind of layer"):
        inject(nn.Sequential(nn.Embedding(4, 4)), eva(target_modules=["0"]))
