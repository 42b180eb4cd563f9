"""Weights of HQQ (Badri and Shaji, "Half-Quadratic Quantization"): codes in ``W_q``, and all else in a dictionary."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear  # by its own name, for Lightning's BitsandbytesPrecision has nn.Linear be another class

from lightning_lora.class_names import is_a
from lightning_lora.layers.quantized.storage import PLAIN, Packed, QuantizedStorage, tensors_in


class HQQ(QuantizedStorage):
    """``HQQLinear``: groups of codes of 1 to 8 bits, with a scale and a zero each. Its bias is no parameter."""

    supported = "hqq.core.quantize.HQQLinear"
    parts = ("W_q", "meta", "bias")
    attributes = (
        "axis", "channel_wise", "compute_dtype", "del_orig", "device", "encoded_state_dict", "in_gpu", "linear_layer",
        "offload_meta", "quant_config", "ready",
    )  # fmt: skip

    def holds(self, module: nn.Module) -> bool:
        return is_a(module, "HQQLinear", "hqq.")

    def shape(self, module: nn.Module, packed: Packed) -> torch.Size:
        return torch.Size(packed["meta"]["shape"])

    def dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        dtype: torch.dtype = packed["meta"]["compute_dtype"]
        return dtype

    def dequantized(self, module: nn.Module, packed: Packed) -> Tensor:
        from hqq.core.quantize import HQQLinear

        # It writes to the dictionary meanwhile.
        layer: Any = SimpleNamespace(ready=True, W_q=self.codes(packed).detach(), meta=dict(packed["meta"]))
        values: Tensor = HQQLinear.dequantize(layer)
        return values.float()

    def requantized(self, module: nn.Module, packed: Packed, weight: Tensor) -> Packed:
        from hqq.core.quantize import HQQLinear

        settings: Any = copy.deepcopy(module.quant_config)
        if settings is None:
            raise ValueError("This HQQLinear does not know how it was quantized, so it cannot be quantized again.")
        dtype, device = packed["meta"]["compute_dtype"], str(self.codes(packed).device)
        new = HQQLinear(None, {**settings, "offload_meta": module.offload_meta}, compute_dtype=dtype, device=device)
        new.quantize(weight, **settings)
        return {**packed, "W_q": new.W_q, "meta": new.meta}

    def record(self, module: nn.Module, packed: Packed) -> dict[str, Any]:
        meta = packed["meta"]
        return {"library": "hqq", "bits": meta["nbits"], "group_size": meta["group_size"], "axis": meta["axis"]}

    def size(self, module: nn.Module, packed: Packed) -> int:
        return sum(tensor.nbytes for tensor in tensors_in({"W_q": packed["W_q"], "meta": packed["meta"]}))

    def only_dtype(self, module: nn.Module, packed: Packed) -> torch.dtype | None:
        return self.dtype(module, packed)  # since its backward pass knows of no autocast

    def beside(self, packed: Packed) -> dict[str, nn.Parameter]:
        bias = packed.get("bias")
        return {} if bias is None else {"bias": nn.Parameter(bias.detach(), requires_grad=False)}

    def refusal(self, module: nn.Module, packed: Packed) -> str | None:
        if not packed.keys() >= {"W_q", "meta"}:
            return "it is not initialized yet, so that it has no weight"
        if "linear_layer" in module._modules:
            return "it has kept the layer that it was made of, which would be adapted too: make it with del_orig=True"
        if isinstance(getattr(type(module), PLAIN, None), property):
            return "this version of transformers gives all layers of HQQ an empty weight: install transformers 5.22"
        return None

    def swap(self, module: nn.Module, other: Packed) -> Packed:
        before = super().swap(module, other)
        if module.bias is None:  # a parameter of nn.Linear that is not there, and here an attribute
            vars(module).pop("bias", None)
            module._parameters.pop("bias", None)
            (module._parameters if PLAIN in other else vars(module))["bias"] = None
        return before

    def plain_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        return Linear
