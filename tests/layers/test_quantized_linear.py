"""LoRA on linear layers that bitsandbytes and torchao have quantized: the same as on their dequantized weights."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from helpers.quantized import NEEDS, QUANTIZERS, dequantize, kinds, needs, quantize, torchao, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoraConfig, TargetError, eject, inject, merge, unmerge
from lightning_lora.formats.merged import parts_of
from lightning_lora.layers import QuantizedStorage, dequantized, register_quantized_storage, storage_of
from lightning_lora.layers import quantized as registry
from lightning_lora.layers.quantized.storage import tensors_in
from lightning_lora.model.fingerprint import fingerprint_in
from lightning_lora.model.record import injections_of

IDS = torch.arange(24).view(2, 12)


def llama(kind: str) -> Any:
    return quantize(tiny_llama(tie_word_embeddings=False), kind).train()


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def gradients(model: Any) -> dict[str, Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@kinds()
def test_a_fresh_adapter_changes_no_bit(kind: str) -> None:
    model = llama(kind)
    before = logits(model)
    inject(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * 7 * 3


@kinds()
@pytest.mark.parametrize(
    "variant",
    [
        {"lora_dropout": 0.0},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"freeze_A": True},
        {"use_vera": True},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda variant: next(iter(variant)) + str(next(iter(variant.values()))),
)
def test_gradients_are_those_on_the_dequantized_weights(kind: str, variant: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=8, **variant)
    model, plain = llama(kind), dequantize(llama(kind))
    for each in (model, plain):
        inject(each, config)
        train(each, size=0.02)
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys() and found
    # The start of PiSSA and OLoRA is taken out of the weight there and subtracted from the output here.
    limit = 1e-4 if "init_lora_weights" in variant else 5e-6
    assert max(far(found[name], expected[name]) for name in found) < limit


@kinds()
@settings(max_examples=6)
@given(data=st.data())
def test_gradients_are_those_of_the_dequantized_values_in_double_precision(kind: str, data: st.DataObject) -> None:
    sizes = [128 * data.draw(st.integers(1, 2)) for _ in range(3)]
    biases = data.draw(st.tuples(st.booleans(), st.booleans()))
    first, second = (nn.Linear(*sizes[i : i + 2], bias=bias) for i, bias in enumerate(biases))
    layers = nn.Sequential(first, nn.SiLU(), second)
    exact, model = dequantize(quantize(copy.deepcopy(layers), kind)).double(), quantize(layers, kind)
    targets = data.draw(st.lists(st.sampled_from(["0", "2"]), min_size=1, unique=True))
    x = torch.randn(*data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)), sizes[0])
    found = []
    for each in (model, exact):
        inject(each, LoraConfig(r=2, target_modules=targets))
        train(each)
        own = x.detach().clone().to(torch.float64 if each is exact else torch.float32).requires_grad_()
        each(own).square().sum().backward()
        found.append({"x": own.grad, **{name: p.grad for name, p in each.named_parameters() if p.requires_grad}})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 1 + 2 * len(targets)
    assert max(far(found[0][name].double(), found[1][name]) for name in found[0]) < 1e-5


@kinds("nf4", "int8", "torchao int8", "hqq 4")
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_starts_at_the_weight_leave_the_function(kind: str, start: str) -> None:
    model = llama(kind).eval()
    before = logits(model)
    inject(model, LoraConfig(r=4, init_lora_weights=start, lora_dropout=0.5))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)
    torch.manual_seed(1)
    dropped = logits(model.train())
    plain = inject(dequantize(llama(kind)), LoraConfig(r=4, init_lora_weights=start, lora_dropout=0.5))
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, logits(plain), rtol=0, atol=2e-5)
    eject(model.eval())
    assert torch.equal(logits(model), before)


@kinds()
def test_merge_folds_into_the_dequantized_weight_and_unmerge_restores_every_bit(kind: str) -> None:
    model = llama(kind)
    inject(model, LoraConfig(r=4))
    train(model)
    adapted = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    packed, names = layer.packed, list(layer.state_dict())
    merge(model)
    assert list(layer.state_dict()) == ["weight", "lora.default.lora_A", "lora.default.lora_B"]
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-6)
    assert logits(model).equal(logits(merge(model)))
    unmerge(model)
    assert layer.packed.keys() == packed.keys() and list(layer.state_dict()) == names
    for name, value in layer.packed.items():
        assert value is packed[name] or value.data_ptr() == packed[name].data_ptr()
    assert torch.equal(logits(model), adapted)


@kinds()
def test_eject_with_merge_leaves_plain_linear_layers(kind: str) -> None:
    model = llama(kind)
    before = logits(model)
    inject(model, LoraConfig(r=4))
    train(model)
    adapted = logits(model)
    eject(model, merge=True)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is nn.Linear
    assert vars(layer).keys() - {"_is_hf_initialized"} == vars(nn.Linear(1, 1)).keys()
    assert list(layer.state_dict()) == ["weight"] and type(layer.weight) is nn.Parameter
    layer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-6)
    unmerge(model)
    assert torch.equal(logits(model), adapted)
    eject(model)
    assert torch.equal(logits(model), before)


@kinds("nf4", "int8", "torchao int8", "hqq 4")
def test_the_type_of_merged_weights(kind: str) -> None:
    model = llama(kind).bfloat16() if NEEDS[kind] == "bitsandbytes" else quantize(tiny_llama().bfloat16(), kind)
    inject(model, LoraConfig(r=4))
    eject(model, merge=True)
    expected = torch.float32 if kind == "nf4" else torch.bfloat16  # bitsandbytes notes what it quantized
    assert model.model.layers[0].mlp.up_proj.weight.dtype == expected
    unmerge(model)
    merge(model, dtype=torch.float16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


@kinds()
def test_a_merge_that_quantizes_again(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    model = llama(kind)
    inject(model, LoraConfig(r=4))
    train(model, size=0.001)
    adapted = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    base, update = dequantized(layer), layer.lora["default"].delta_weight()
    merge(model, requantize=True)
    here = storage_of(layer).packed(layer)
    again = storage_of(layer).dequantized(layer, here)
    assert {name: type(value) for name, value in here.items()} == {n: type(v) for n, v in layer.packed.items()}
    measured = float(((again - base) * update).sum() / update.square().sum())
    assert layer.kept(here) == pytest.approx(measured, rel=1e-4)
    said = [str(warning.message) for warning in recwarn if "Quantized again" in str(warning.message)]
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "kept")}
    kept = {name: each.kept(storage_of(each).packed(each)) for name, each in layers.items()}
    name = min(kept, key=lambda name: kept[name])
    assert len(said) == (kept[name] < 0.9) and (not said or f"{kept[name]:.2f} at least, in {name!r}" in said[0])
    again_merged = logits(model)
    unmerge(model)
    assert torch.equal(logits(model), adapted)
    eject(model, merge=True, requantize=True)
    assert storage_of(layer) is not None and torch.equal(logits(model), again_merged)
    unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_in_four_bits_small_updates_are_lost() -> None:
    pytest.importorskip("bitsandbytes")
    model = llama("nf4")
    inject(model, LoraConfig(r=4))
    train(model, size=0.001)
    with pytest.warns(UserWarning, match=r"hold 0\.\d\d of the adapter's update"):
        merge(model, requantize=True)


@needs("torchao")
def test_a_format_without_a_backward_pass_is_refused_before_anything_changes() -> None:
    model = tiny_llama()
    inject(quantize(tiny_llama(), "torchao int8"), LoraConfig(r=4))  # which has the same class of weights
    torchao(model.model.layers[1].mlp.up_proj, "Int8DynamicActivationInt8WeightConfig")
    before = [(type(module), module.training) for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(TargetError, match=r"'model.layers.1.mlp.up_proj'.*quantize activations too"):
        inject(model, LoraConfig(r=4))
    assert [(type(module), module.training) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


@needs("torchao")
def test_one_that_came_after_the_adapter_is_found_in_the_first_forward_pass() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), LoraConfig(r=2))
    torchao(model[1], "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(RuntimeError, match="A backward pass ends in a weight of type Int8Tensor"):
        model(torch.randn(2, 8))
    with torch.no_grad():
        model(torch.randn(2, 8))
    with pytest.raises(ValueError, match="quantized after the adapter was put in"):
        merge(model)


@kinds("nf4", "int8")
def test_loftq_on_a_quantized_base_is_refused(kind: str) -> None:
    model = llama(kind)
    with pytest.raises(TargetError, match="this one is quantized already"):
        inject(model, LoraConfig(r=4, init_lora_weights="loftq"))
    assert type(model.model.layers[0].mlp.up_proj).__module__ == "bitsandbytes.nn.modules"


@needs("bitsandbytes")
@pytest.mark.parametrize("name", ["Linear4bit", "Linear8bitLt"])
def test_a_layer_that_is_not_quantized_yet_is_refused(name: str) -> None:
    import bitsandbytes

    settings = {"has_fp16_weights": False} if name == "Linear8bitLt" else {}
    model = nn.Sequential(getattr(bitsandbytes.nn, name)(64, 64, **settings))
    with pytest.raises(TargetError, match="not quantized yet"):
        inject(model, LoraConfig(r=2))
    inject(model.to("cpu"), LoraConfig(r=2))


@needs("hqq")
@pytest.mark.parametrize(
    ("made", "config", "said"),
    [
        ({"initialize": False}, {}, "not initialized yet"),
        ({"del_orig": False}, {}, "make it with del_orig=True"),
        ({}, {"bias": "all"}, "its bias is no parameter, so that bias='all' cannot train it"),
        ({}, {"bias": "lora_only"}, "its bias is no parameter"),
    ],
    ids=str,
)
def test_what_hqq_cannot_have_is_refused_by_name(made: dict[str, Any], config: dict[str, Any], said: str) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = HQQLinear(nn.Linear(64, 64), BaseQuantizeConfig(), compute_dtype=torch.float32, device="cpu", **made)
    with pytest.raises(TargetError, match=said):
        inject(nn.Sequential(layer), LoraConfig(r=2, **config))
    assert type(layer) is HQQLinear


@needs("hqq")
def test_hqq_that_does_not_know_how_it_was_quantized_is_merged_but_not_quantized_again() -> None:
    model = nn.Sequential(QUANTIZERS["hqq 4"](nn.Linear(64, 64)))
    model[0].quant_config = None
    inject(model, LoraConfig(r=2))
    before = model(torch.ones(2, 64))
    with pytest.raises(ValueError, match="does not know how it was quantized"):
        merge(model, requantize=True)
    torch.testing.assert_close(merge(model)(torch.ones(2, 64)), before)


@needs("bitsandbytes")
def test_a_quantized_module_to_save_is_refused() -> None:
    model = quantize(tiny_llama(), "nf4", skip=())
    with pytest.raises(TargetError, match=r"'lm_head' would be trained in full .* is quantized"):
        inject(model, LoraConfig(r=2, modules_to_save=["lm_head"]))


def test_what_cannot_be_read_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match=r"'1'.*its weight holds torch.uint8 in a torch.nn.parameter.Parameter"):
        inject(model, LoraConfig(r=2))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


@needs("bitsandbytes")
def test_weights_that_were_packed_anew_for_inference_are_refused() -> None:
    layer = QUANTIZERS["nf4"](nn.Linear(64, 64))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TargetError, match="packed its weight anew"):
        inject(nn.Sequential(layer), LoraConfig(r=2))


@needs("bitsandbytes")
def test_an_adapted_layer_is_never_packed_anew() -> None:
    layer = QUANTIZERS["nf4"](nn.Linear(64, 64))
    layer.support_avx512bf16_for_cpu = True
    model = nn.Sequential(layer)
    inject(model, LoraConfig(r=2))
    assert layer.support_avx512bf16_for_cpu is False
    eject(model)
    assert layer.support_avx512bf16_for_cpu is True


class _Wrong(QuantizedStorage):
    """A reader that takes codes for values."""

    supported = "wrong"

    def __init__(self, right: QuantizedStorage) -> None:
        self.right = right

    def __getattribute__(self, name: str) -> Any:
        if name in ("right", "dequantized", "__class__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "right"), name)

    def dequantized(self, module: nn.Module, packed: Tensor) -> Tensor:
        return self.right.dequantized(module, packed) * 3

    holds = shape = dtype = requantized = record = size = None  # type: ignore[assignment]


@needs("bitsandbytes")
def test_values_that_the_layer_does_not_compute_with_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = storage_of(QUANTIZERS["nf4"](nn.Linear(64, 64)))
    monkeypatch.setattr(registry, "_storages", [*registry._storages])
    monkeypatch.setattr("lightning_lora.layers.quantized_linear._proven", set())
    register_quantized_storage(_Wrong(right))  # type: ignore[abstract,arg-type]
    with pytest.raises(TargetError, match=r"its gradient is not that of its dequantized weight but 67% off"):
        inject(nn.Sequential(QUANTIZERS["nf4"](nn.Linear(64, 64))), LoraConfig(r=2))


@kinds(*(kind for kind in QUANTIZERS if kind not in ("nf4 in bfloat16", "nf4 in float32", "fp4", "torchao nf4")))
@settings(max_examples=8)
@given(data=st.data())
def test_any_shape(kind: str, data: st.DataObject) -> None:
    features = st.integers(1, 6).map(lambda n: 16 * n)
    layer = nn.Linear(data.draw(features), data.draw(features), bias=data.draw(st.booleans()))
    model = nn.Sequential(QUANTIZERS[kind](layer)).train()
    x = torch.randn(3, layer.in_features)
    before = model(x)
    inject(model, LoraConfig(r=data.draw(st.integers(1, 8))))
    assert torch.equal(model(x), before)
    train(model)
    adapted = model(x)
    assert model[0].base_weight().shape == (layer.out_features, layer.in_features)
    eject(model, merge=True)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)


@kinds()
@settings(max_examples=6)
@given(bias=st.booleans(), adapts=st.booleans(), sizes=st.tuples(*[st.integers(1, 2).map(lambda n: 128 * n)] * 2))
def test_it_is_read_as_the_ordinary_model_of_its_values(
    kind: str, bias: bool, adapts: bool, sizes: tuple[int, int]
) -> None:
    layers = nn.Sequential(nn.Linear(*sizes, bias=bias), nn.Linear(sizes[1], 4))
    model, plain = quantize(copy.deepcopy(layers), kind, ("1",)), dequantize(quantize(layers, kind, ("1",)))
    config = LoraConfig(r=2, target_modules=["0", "1"] if adapts else ["1"])
    for each in (model, plain):
        inject(each, config)
        train(each)

    def seen(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
        injection = injections_of(model)[0]
        return fingerprint_in(injection).short, {part.name: part.values() for part in parts_of(model, torch.float32)}

    (base, values), (expected, wanted) = seen(model), seen(plain)
    assert base == expected and values.keys() == wanted.keys()
    merge(model)
    assert seen(model)[0] == base
    assert not adapts or model.state_dict().keys() == plain.state_dict().keys()
    if adapts and NEEDS[kind] != "bitsandbytes":  # whose hooks would quantize what is loaded
        model.load_state_dict(model.state_dict())
    for name in wanted:
        torch.testing.assert_close(values[name], wanted[name])
        torch.testing.assert_close(seen(model)[1][name], values[name], rtol=0, atol=0)
    eject(unmerge(model), merge=True, dtype=torch.float32)
    ejected = model.state_dict()
    assert not adapts or all(torch.equal(ejected[name], values[name]) for name in wanted)
    assert seen(unmerge(model))[0] == base


@kinds()
def test_a_state_dict_is_that_of_the_base_with_the_adapter(kind: str) -> None:
    model = nn.Sequential(QUANTIZERS[kind](nn.Linear(128, 128)), nn.ReLU())
    before = model.state_dict()
    inject(model, LoraConfig(r=2))
    train(model)
    x, state = torch.randn(3, 128), model.state_dict()
    expected, inside = model(x), {"0.lora.default.lora_A", "0.lora.default.lora_B"}
    assert state.keys() == before.keys() | inside
    assert model[0].state_dict(prefix="a.").keys() >= {"a.lora.default.lora_A"}
    if NEEDS[kind] != "bitsandbytes":  # whose layers cannot be loaded
        state = {name: copy.deepcopy(value) for name, value in state.items()}
        train(model, seed=2)
        model.load_state_dict(state, strict=NEEDS[kind] != "hqq")  # whose layers miss what they themselves leave out
        assert torch.equal(model(x), expected)


@kinds("nf4", "nf4-dq", "int8", "torchao int8", "torchao int4", "torchao float8", "hqq 4", "buffers")
def test_copies_and_pickles(kind: str) -> None:
    model = llama(kind)
    inject(model, LoraConfig(r=4))
    train(model)
    adapted = logits(model)
    twins = [copy.deepcopy(model)]
    if NEEDS[kind] != "torchao":  # what torchao puts on the layers cannot be pickled
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(logits(twin), adapted)
        merge(twin)
        torch.testing.assert_close(logits(twin), adapted, rtol=0, atol=1e-6)
        assert torch.equal(logits(unmerge(twin)), adapted)
    names, merged = list(model.state_dict()), copy.deepcopy(merge(model))
    assert torch.equal(logits(unmerge(merged)), adapted) and list(merged.state_dict()) == names


@kinds("hqq 4", "buffers")
def test_what_is_aside_comes_back_to_where_the_model_is_by_then(kind: str) -> None:
    model = nn.Sequential(QUANTIZERS[kind](nn.Linear(64, 64)))
    inject(model, LoraConfig(r=2))
    names, parts = list(model.state_dict()), model[0].packed.keys()
    merge(model).to("meta")
    model[0].unmerge()
    assert list(model.state_dict()) == names and model[0].packed.keys() == parts
    assert {tensor.device.type for tensor in tensors_in(model[0].packed)} == {"meta"}


@kinds()
@settings(max_examples=6)
@given(
    mode=st.sampled_from([torch.no_grad, torch.inference_mode]),
    variant=st.sampled_from([{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_vera": True}]),
    then=st.sampled_from([lambda model: model, merge, lambda model: unmerge(merge(model))]),
)
def test_outside_of_training(kind: str, mode: Any, variant: dict[str, Any], then: Any) -> None:
    """The Trainer validates, tests and predicts in inference mode."""
    model = inject(llama(kind).eval(), LoraConfig(r=4, **variant))
    train(model)
    expected = logits(model).detach()
    with mode():
        found = logits(then(model))
    limit = 1e-2 if kind == "int8" else 2e-5  # which rounds its inputs to 8 bits while it is not merged
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@kinds("nf4", "torchao int8", "hqq 4")
def test_several_adapters_beside_each_other(kind: str) -> None:
    from lightning_lora import add_adapter, set_adapter

    model, plain = llama(kind), dequantize(llama(kind))
    for each in (model, plain):
        inject(each, LoraConfig(r=4))
        add_adapter(each, LoraConfig(r=2, lora_alpha=4), "other")
        train(each)
        set_adapter(each, ["default", "other"])
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-6)


@kinds("nf4", "torchao int8", "hqq 4")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    model = nn.Sequential(QUANTIZERS[kind](nn.Linear(64, 64)), nn.ReLU(), QUANTIZERS[kind](nn.Linear(64, 64)))
    inject(model, LoraConfig(r=2))
    x = torch.randn(5, 64, requires_grad=True)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@kinds("torchao int8", "hqq 4")
def test_compiles(kind: str) -> None:
    model = nn.Sequential(QUANTIZERS[kind](nn.Linear(64, 64)))
    inject(model, LoraConfig(r=2))
    train(model)
    x = torch.randn(2, 64)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


@kinds("nf4 in float32", "torchao int8", "hqq 4")
@pytest.mark.parametrize(
    "part", [{"fused_qkv": ["q", "v"], "target_modules": ["qkv_proj"]}, {"target_parameters": ["qkv_proj.[wW]*"]}]
)
def test_parts_of_quantized_layers_are_refused(kind: str, part: dict[str, Any]) -> None:
    model = nn.ModuleDict({"qkv_proj": QUANTIZERS[kind](nn.Linear(64, 192))})
    with pytest.raises(TargetError, match="of a quantized layer only the whole can be adapted"):
        inject(model, LoraConfig(**{"r": 2, "target_modules": [], **part}))


@kinds("nf4", "int8", "torchao int8", "hqq 4")
def test_a_batch_of_several_adapters_samples(kind: str) -> None:
    from lightning_lora import adapters_for, add_adapter, disabled, set_adapter

    model = llama(kind)
    base = logits(model)
    inject(model, LoraConfig(r=4))
    add_adapter(model, LoraConfig(r=2), "other")
    train(model)
    set_adapter(model, ["default", "other"])
    train(model, seed=2)
    alone = {}
    for name in ("default", "other"):
        set_adapter(model, name)
        alone[name] = logits(model)
    with adapters_for(model, ["other", "default"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed, torch.stack([alone["other"][0], alone["default"][1]]), rtol=0, atol=2e-6)
    with disabled(model):
        assert torch.equal(logits(model), base)
