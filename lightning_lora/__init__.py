"""LoRA for PyTorch Lightning: one callback freezes the base, trains small adapters, saves them alone, merges them."""

from lightning_lora.callback import LoRA
from lightning_lora.callbacks.base_as_reference import BaseAsReference
from lightning_lora.config import LoraConfig
from lightning_lora.formats.checkpoint import load_from_checkpoint
from lightning_lora.formats.foreign import load_foreign_adapter
from lightning_lora.formats.peft import load_adapter, save_adapter
from lightning_lora.model.combine import combine_adapters
from lightning_lora.model.eject import eject
from lightning_lora.model.eva import initialize_eva
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge, unmerge
from lightning_lora.model.multi_adapter import (
    active_adapters,
    adapters,
    adapters_for,
    add_adapter,
    delete_adapter,
    disabled,
    set_adapter,
)
from lightning_lora.model.param_groups import param_groups
from lightning_lora.model.state_dict import CheckpointError, adapter_state_dict, load_adapter_state_dict
from lightning_lora.model.targets import TargetError
from lightning_lora.trainer.fsdp_wrap_policy import lora_auto_wrap_policy
from lightning_lora.version import __version__

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
