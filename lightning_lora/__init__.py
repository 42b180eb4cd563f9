"""LoRA for PyTorch Lightning: one callback freezes the base, trains small adapters, saves them alone, merges them."""

from lightning_lora.callback import LoRA
from lightning_lora.checkpoint import load_from_checkpoint
from lightning_lora.combine import combine_adapters
from lightning_lora.config import LoraConfig
from lightning_lora.eva import initialize_eva
from lightning_lora.foreign import load_foreign_adapter
from lightning_lora.inject import eject, inject
from lightning_lora.merging import merge, unmerge
from lightning_lora.optim import param_groups
from lightning_lora.peft_format import load_adapter, save_adapter
from lightning_lora.reference import BaseAsReference
from lightning_lora.state import CheckpointError, adapter_state_dict, load_adapter_state_dict
from lightning_lora.switching import (
    active_adapters,
    adapters,
    adapters_for,
    add_adapter,
    delete_adapter,
    disabled,
    set_adapter,
)
from lightning_lora.targets import TargetError
from lightning_lora.version import __version__
from lightning_lora.wrapping import lora_auto_wrap_policy

__all__ = [
    "BaseAsReference",
    "CheckpointError",
    "LoRA",
    "LoraConfig",
    "TargetError",
    "__version__",
    "active_adapters",
    "adapter_state_dict",
    "adapters",
    "adapters_for",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "disabled",
    "eject",
    "initialize_eva",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "load_foreign_adapter",
    "load_from_checkpoint",
    "lora_auto_wrap_policy",
    "merge",
    "param_groups",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
