"""LoRA on ``nn.MultiheadAttention``, which reads the weights of its projections and calls none of them."""

from typing import Any

from torch import nn

from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.parameters import LoraParameters


class LoraMultiheadAttention(LoraParameters):
    """``nn.MultiheadAttention``: the projections of query, key and value, fused or split, and the output projection."""

    supported = "torch.nn.MultiheadAttention"
    group = "linear"
    by_parameter = False

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        assert isinstance(module, nn.MultiheadAttention)
        fused = module._qkv_same_embed_dim  # no public attribute says so
        inputs = ("in_proj_weight",) if fused else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return (*inputs, "out_proj.weight")

    def peft_adapters(self, adapter_name: str) -> dict[str, Adapter]:
        adapters: Any = self.lora[adapter_name]
        if "in_proj_weight" not in adapters:
            raise ValueError(
                "This nn.MultiheadAttention has separate weights for query, key and value (kdim or vdim), for which "
                "PEFT's format has no place: keep the checkpoint, or the merged model."
            )
        return {"": adapters["in_proj_weight"], ".base_layer.out_proj": adapters["out_proj_weight"]}

    def peft_targets(self, name: str) -> dict[str, list[str]]:
        return {"target_modules": [name]}

    def misrun_by_peft(self) -> str | None:
        return "adds the update of an attention's output projection twice"

    def peft_wrapped(self) -> dict[str, str]:
        return {"": ".base_layer", ".out_proj": ".base_layer.out_proj.base_layer"}
