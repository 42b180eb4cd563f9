"""LoRA for PyTorch Lightning: one callback freezes the base, trains small adapters, saves them alone, merges them.

Names are imported when they are first used (PEP 562), so that ``import lightning_lora`` alone brings in no PyTorch.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    "push_to_hub",
    "save_adapter",
    "save_merged",
    "set_adapter",
    "unmerge",
]

# Where each public name lives.
_PUBLIC = {
    "callback": ("LoRA",),
    "callbacks": ("BaseAsReference",),
    "config": ("LoraConfig",),
    "formats.checkpoint": ("load_from_checkpoint",),
    "formats.foreign": ("load_foreign_adapter",),
    "formats.hub": ("push_to_hub",),
    "formats.merged": ("save_merged",),
    "formats.peft": ("load_adapter", "save_adapter"),
    "model.combine": ("combine_adapters",),
    "model.eject": ("eject",),
    "model.eva": ("initialize_eva",),
    "model.inject": ("inject",),
    "model.merge": ("merge", "unmerge"),
    "model.multi_adapter": (
        "active_adapters",
        "adapters",
        "adapters_for",
        "add_adapter",
        "delete_adapter",
        "disabled",
        "set_adapter",
    ),
    "model.param_groups": ("param_groups",),
    "model.state_dict": ("CheckpointError", "adapter_state_dict", "load_adapter_state_dict"),
    "model.targets": ("TargetError",),
    "trainer.fsdp_wrap_policy": ("lora_auto_wrap_policy",),
}

# Modules of version 0.1 that configurations and scripts may still name, and where they are now.
_MOVED = {
    "curve": "callbacks.learning_curve",
    "export": "formats.merged",
    "predictions": "callbacks.prediction_writer",
    "reference": "callbacks.base_as_reference",
    "report": "callbacks.before_after",
    "tasks.modes": "eval_mode",
    "tasks.pretrained": "pretrained",
}

# The same names for those who read the source alone, who would take a ``__getattr__`` to know every name there is.
if TYPE_CHECKING:
    from lightning_lora.callback import LoRA
    from lightning_lora.callbacks import BaseAsReference
    from lightning_lora.config import LoraConfig
    from lightning_lora.formats.checkpoint import load_from_checkpoint
    from lightning_lora.formats.foreign import load_foreign_adapter
    from lightning_lora.formats.hub import push_to_hub
    from lightning_lora.formats.merged import save_merged
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
else:
    _HOMES = {name: f"{__name__}.{home}" for home, names in _PUBLIC.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return value
        module = f"{__name__}.{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


class _MovedModule(ModuleType):
    """A module of an earlier version, which finds its names where they are now."""

    def __init__(self, name: str, home: str) -> None:
        super().__init__(name, f"Moved to :mod:`{home}`.")
        self.__spec__ = ModuleSpec(name, None)
        self._home = home

    def __getattr__(self, name: str) -> Any:
        # Names with underscores others ask all modules for, such as inspect for __file__.
        home = None if name.startswith("__") else import_module(self._home)
        if home is None or not hasattr(home, name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(home, name)


for _old, _home in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = _MovedModule(f"{__name__}.{_old}", f"{__name__}.{_home}")
