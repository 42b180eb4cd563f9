"""Linear layers whose packed weight nothing here reads: one error that names them, before anything is changed."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoraConfig, TargetError, inject
from lightning_lora.layers import layer_class_for
from lightning_lora.layers.unread_linear import LoraUnreadLinear


class Packed(nn.Module):
    """A stand-in, by the names of what the classes of a library hold."""

    def __init__(self, features: tuple[int, int], names: dict[str, torch.dtype], as_buffers: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = features
        for name, dtype in names.items():
            value = torch.zeros(features).to(dtype)
            if as_buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))


_GROUPS = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
LIBRARIES: dict[str, tuple[str, dict[str, torch.dtype], bool]] = {
    "gptqmodel.nn_modules.qlinear.torch": ("TorchLinear", _GROUPS, True),
    "awq.modules.linear.gemm": ("WQLinear_GEMM", _GROUPS, True),
    "compressed_tensors.linear": ("CompressedLinear", {"weight_packed": torch.int32, "scale": torch.float32}, False),
    "eetq.modules": ("EetqLinear", {"weight": torch.int8, "weight_scales": torch.float16}, True),
    "some.other": ("Float8Linear", {"codes": torch.float8_e4m3fn}, False),
}


def packed(library: str, features: tuple[int, int] = (8, 8)) -> nn.Module:
    name, names, as_buffers = LIBRARIES[library]
    made: nn.Module = type(name, (Packed,), {"__module__": library})(features, names, as_buffers)
    return made


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("targets", ["all-linear", ["1"]])
def test_it_is_named_with_what_it_holds_and_the_way_on(library: str, targets: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), packed(library))
    name, names, _ = LIBRARIES[library]
    before = [(type(module), *map(id, module.parameters(recurse=False))) for module in model.modules()]
    with pytest.raises(TargetError) as error:
        inject(model, LoraConfig(r=2, target_modules=targets))
    said = str(error.value)
    assert f"'1', which is a {library}.{name} and cannot be adapted" in said
    assert f"packed in {next(iter(names))} ({next(iter(names.values()))})" in said and "dequantize=True" in said
    assert [(type(module), *map(id, module.parameters(recurse=False))) for module in model.modules()] == before
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_rest_of_the_model_can_be_adapted(library: str) -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8), packed(library)), LoraConfig(r=2, exclude_modules=["1"]))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "0.lora.default.lora_A",
        "0.lora.default.lora_B",
    ]


@given(
    features=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e5m2]),
    as_buffers=st.booleans(),
    name=st.sampled_from(["qweight", "W_q", "codes", "_weight"]),
)
def test_it_is_told_by_what_it_holds(
    features: tuple[int, int], dtype: torch.dtype, as_buffers: bool, name: str
) -> None:
    assert layer_class_for(Packed(features, {name: dtype}, as_buffers)) is LoraUnreadLinear


@given(dtype=st.sampled_from([torch.bool, torch.float32, torch.bfloat16, torch.complex64]), as_buffers=st.booleans())
def test_masks_and_matrices_of_numbers_are_no_codes(dtype: torch.dtype, as_buffers: bool) -> None:
    assert layer_class_for(Packed((4, 4), {"mask": dtype}, as_buffers)) is None
    unsized = Packed((4, 4), {"index": torch.int64}, as_buffers)
    del unsized.in_features
    assert layer_class_for(unsized) is None


def test_a_linear_layer_with_a_mask_of_whole_numbers_is_one() -> None:
    layer = nn.Linear(4, 4)
    layer.register_buffer("mask", torch.ones(4, 4, dtype=torch.int32))
    assert layer_class_for(layer) is not LoraUnreadLinear


def test_optimum_quanto_is_refused_by_name() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = nn.Sequential(nn.Linear(64, 64))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    with pytest.raises(TargetError, match=r"QLinear and cannot be adapted: its weight holds .* cannot be read here"):
        inject(model, LoraConfig(r=2))


def test_compressed_tensors_are_refused_by_name() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    arguments = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    config = quantization.QuantizationConfig(
        config_groups={"all": scheme}, format="pack-quantized", quantization_status="frozen"
    )
    model = nn.Sequential(nn.Linear(64, 64))
    quantization.apply_quantization_config(model, config)
    model[0].weight_scale.data.fill_(0.01)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with pytest.raises(TargetError, match=r"its weight is packed in weight_packed \(torch.int32\).*dequantize=True"):
        inject(model, LoraConfig(r=2))
