"""The adapters of a model that PEFT has wrapped, as PEFT itself would write them."""

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.formats.peft_files import PREFIX
from lightning_lora.model.peft_wrapped import base_model, plain_settings


class PeftAdapter(NamedTuple):
    """One adapter.

    Attributes:
        settings: What ``adapter_config.json`` says of it.
        tensors: Its tensors, under the names that PEFT's file has for them, on the CPU.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def adapters_of_peft(root: nn.Module) -> dict[str, PeftAdapter]:
    """All adapters that PEFT has put into a model, by their names there."""
    peft: Any = sys.modules["peft"]  # which has made the model
    config: Any = getattr(base_model(root), "config", None)
    base = {"base_model_name_or_path": getattr(config, "_name_or_path", None) or None, "inference_mode": True}
    prefix = "" if hasattr(root, "get_base_model") else PREFIX  # a wrapped model has it in its names
    found = {}
    for name, settings in plain_settings(root).items():
        tensors = peft.get_peft_model_state_dict(root, adapter_name=name)
        whole = {f"{prefix}{each}": tensor.detach().cpu().contiguous().clone() for each, tensor in tensors.items()}
        found[name] = PeftAdapter({**settings, **base}, whole)
    return found
