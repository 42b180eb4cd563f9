"""LoRA on ``nn.Embedding`` against an explicit float64 ``W + scaling * (B A)^T``, and beside PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, bart, gemma, tiny_classifier, tiny_llama
from helpers.toys import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import LoRA, LoraConfig, TargetError, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.model.targets import find_targets

ITSELF = ".*"  # the layer that is the whole model


def adapted(layer: nn.Embedding, r: int, **config: Any) -> Any:
    """The layer with a trained-looking adapter: A is zero in the padding's column alone."""
    inject(layer, LoraConfig(r=r, lora_alpha=3, target_modules=ITSELF, **config))
    lora_A = layer.lora["default"].lora_A  # type: ignore[index]
    nn.init.normal_(lora_A)
    if layer.padding_idx is not None:
        lora_A.data[:, layer.padding_idx] = 0
    return layer


def reference(layer: Any, x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output in float64, and the A and B that autograd can be asked about."""
    adapter = layer.lora["default"]
    A, B = (p.detach().double().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    weight = layer.weight.detach().double() + (3 / r) * (B @ A).T
    return nn.functional.embedding(x, weight, layer.padding_idx), A, B


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    dim=st.integers(1, 12),
    r=st.integers(1, 14),
    shape=st.lists(st.integers(0, 4), max_size=3),
    padding_idx=st.none() | st.integers(-1, 0),
    seed=st.integers(0, 1000),
)
def test_forward_and_gradients_equal_the_reference(
    rows: int, dim: int, r: int, shape: list[int], padding_idx: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = adapted(nn.Embedding(rows, dim, padding_idx), r)
    x = torch.randint(rows, shape)
    out = layer(x)
    expected, A, B = reference(layer, x, r)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    adapter = layer.lora["default"]
    for found, wanted in ((adapter.lora_A, A), (adapter.lora_B, B)):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)
    if padding_idx is not None:
        assert not adapter.lora_A.grad[:, padding_idx].any()
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_fresh_adapter_changes_nothing(dtype: torch.dtype, init: Any) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Embedding(30, 24, padding_idx=0, dtype=dtype)
    x = torch.randint(30, (3, 5))
    before = layer(x)
    inject(layer, LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=init, target_modules=ITSELF))
    assert torch.equal(layer(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), before)
    assert layer(x).dtype == dtype
    adapter = layer.lora["default"]
    assert not adapter.lora_A.any()
    assert 0.7 < adapter.lora_B.std() < 1.3
    other = inject(nn.Embedding(30, 24), LoraConfig(r=4, target_modules=ITSELF))
    assert torch.equal(other.lora["default"].lora_B.double(), adapter.lora_B.double())  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_equals_adapted_and_unmerge_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = adapted(nn.Embedding(30, 24, padding_idx=2, dtype=dtype), 4)
    weight = layer.weight
    bits = weight.detach().clone()
    every = torch.arange(30)
    out = layer(every).double()
    exact = reference(layer, every, 4)[0]
    merge(layer)
    ulp = torch.finfo(dtype).eps
    for found in (out, layer(every).double()):
        assert ((found - exact).abs() <= 0.51 * ulp * exact.abs() + 2e-6).all()
    assert torch.equal(layer.weight[2], bits[2])
    unmerge(layer)
    assert layer.weight is weight
    assert torch.equal(weight, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [bart, gemma])
def test_scaled_embeddings_scale_the_adapter(make: Any, dtype: torch.dtype) -> None:
    layer: Any = make().to(dtype).get_input_embeddings()
    scale = layer(IDS) / nn.functional.embedding(IDS, layer.weight)
    scale = scale[scale.isfinite()].double().median()
    assert scale > 3
    adapted(layer, 4)
    out = layer(IDS).double()
    torch.testing.assert_close(out, scale * reference(layer, IDS, 4)[0], rtol=2e-2, atol=2e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(merge(layer)(IDS).double(), out, rtol=tolerance, atol=tolerance)


# The output embedding is tied to the input in Gemma.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, both ends": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "llama, regular expression": (tiny_llama, {"target_modules": r".*embed_tokens"}),
    "classifier": (tiny_classifier, {"target_modules": ["word_embeddings", "position_embeddings", "query"]}),
    "gemma, tied and scaled": (gemma, {"target_modules": ["embed_tokens", "v_proj"]}),
}


@pytest.mark.filterwarnings("ignore:.*(tied|embedding layers found in|tie_word_embeddings).*")
@pytest.mark.parametrize("name", CASES)
def test_beside_peft(name: str, tmp_path: Path) -> None:
    make, settings = CASES[name]
    model: Any = inject(make(), LoraConfig(r=4, lora_alpha=6, modules_to_save=None, **settings)).eval()
    randomize(model)  # the padding's row too, which PEFT adds as any other
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make().eval()(IDS).logits, model(IDS).logits, atol=1e-3)
    for one in (model, theirs):
        one(IDS).logits.square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(mine) == len(gradients) > 0
    for key, gradient in mine.items():
        layer, matrix = key.removesuffix(".lora.default.lora_A").removesuffix(".lora.default.lora_B"), key[-1]
        (other,) = (n for n in gradients if f".{layer}.lora_" in n and n.count(f"_{matrix}.default"))
        torch.testing.assert_close(gradient, gradients[other], rtol=1e-4, atol=1e-6)

    theirs.save_pretrained(tmp_path / "again")
    one, again = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "again"))
    toys.assert_same_tensors(one, {key: tensor for key, tensor in again.items() if ".base_layer." not in key})


@pytest.mark.filterwarnings("ignore:.*(tied|embedding layers found in|tie_word_embeddings).*")
@pytest.mark.parametrize("name", CASES)
def test_we_open_what_peft_saves(name: str, tmp_path: Path) -> None:
    make, settings = CASES[name]
    theirs: Any = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    # PEFT writes the base's weight of an embedding that has one of the names it knows.
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith(".base_layer.weight") for key in found) == (name != "classifier")
    opened: Any = load_adapter(make(), tmp_path).eval()
    torch.testing.assert_close(opened(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    merged: Any = eject(opened, merge=True)
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_fresh_adapters_start_as_pefts() -> None:
    theirs: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    there = theirs.get_input_embeddings()
    here: Any = inject(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens"])).model.embed_tokens.lora.default
    assert torch.equal(here.lora_A, there.lora_embedding_A["default"])
    assert here.lora_B.shape == there.lora_embedding_B["default"].shape
    assert there.lora_embedding_B["default"].std() > 0.7 and here.lora_B.std() > 0.7


@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_a_tied_head_keeps_its_function(tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True).eval()
    hidden = torch.randn(2, 3, 32)
    before = model.lm_head(hidden)
    with pytest.warns(UserWarning, match=r"'model\.embed_tokens' is tied to 'lm_head\.weight'"):
        inject(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    randomize(model)
    adapted_logits = model(IDS).logits
    assert torch.equal(model.lm_head(hidden), before)
    for fold in (merge, lambda m: eject(m, merge=True)):
        fold(model)
        assert torch.equal(model.lm_head(hidden), before)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        torch.testing.assert_close(model(IDS).logits, adapted_logits, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_a_tied_model_trains_and_its_export_opens(tmp_path: Path) -> None:
    from helpers.models import Wrapped, batches

    module = Wrapped()
    module.model = tiny_llama(tie_word_embeddings=True)
    base = toys.snapshot(module)
    lora = LoRA(r=2, target_modules=["embed_tokens"], export_dir=tmp_path / "export", summary=False)
    toys.trainer(tmp_path, [lora], max_epochs=1).fit(module, batches(IDS, IDS + 1))
    plain = type(module.model).from_pretrained(tmp_path / "export" / "merged").eval()
    assert torch.equal(plain(IDS).logits, module.model.eval()(IDS).logits)
    assert not torch.equal(module.model.model.embed_tokens.weight, base["model.model.embed_tokens.weight"])
    assert torch.equal(module.model.lm_head.weight, base["model.lm_head.weight"])


def test_all_linear_leaves_embeddings_alone() -> None:
    assert not [name for name in find_targets(tiny_llama(), LoraConfig()) if "embed" in name]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm changes its weight"),
        (lambda: nn.Embedding(4, 3, sparse=True), "sparse and scale_grad_by_freq"),
        (lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), "sparse and scale_grad_by_freq"),
        (lambda: bart().model.encoder.embed_positions, "forward of its own"),
    ],
)
def test_what_cannot_be_right_is_refused(make: Any, match: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "embed": make()})
    before = toys.snapshot(model)
    with pytest.raises(TargetError, match=f"'embed'.*Embedding and cannot be adapted: .*{match}.*Nothing was changed"):
        inject(model, LoraConfig(target_modules=["first", "embed"]))
    toys.assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_embeddings_do_not_have() -> None:
    with pytest.raises(TargetError, match="'pissa' is not for this kind of layer"):
        inject(nn.Embedding(4, 3), LoraConfig(r=2, target_modules=ITSELF, init_lora_weights="pissa"))
