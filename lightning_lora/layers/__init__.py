"""The layers that can be adapted and the kinds of adapters for them, one file a kind; here is their registry."""

from collections.abc import Mapping

from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import base_modules
from lightning_lora.layers.adapted_class import adapted_class, change_class, class_problem, class_without_adapter
from lightning_lora.layers.adapter import Adapter, LoraAdapter
from lightning_lora.layers.attention import LoraMultiheadAttention
from lightning_lora.layers.base import LoraLayer, MergedForm, Target
from lightning_lora.layers.conv import LoraConv
from lightning_lora.layers.dora import DORA
from lightning_lora.layers.embedding import LoraEmbedding
from lightning_lora.layers.linear import LoraConv1D, LoraLinear
from lightning_lora.layers.offloading import offloading_hook, onloaded
from lightning_lora.layers.own_linear import LoraOwnLinear
from lightning_lora.layers.parameters import LoraParameters
from lightning_lora.layers.quantized import Packed, QuantizedStorage, register_quantized_storage, storage_of
from lightning_lora.layers.quantized_linear import LoraQuantizedLinear, dequantized, stored
from lightning_lora.layers.readable import unreadable_reason, weightless_reason
from lightning_lora.layers.recurrent import LoraRecurrent
from lightning_lora.layers.rows import rows_of
from lightning_lora.layers.tokens import LoraTokens
from lightning_lora.layers.unread_linear import LoraUnreadLinear
from lightning_lora.layers.vera import VERA

__all__ = [
    "Adapter",
    "LoraAdapter",
    "LoraLayer",
    "LoraParameters",
    "LoraQuantizedLinear",
    "LoraTokens",
    "MergedForm",
    "Packed",
    "QuantizedStorage",
    "Target",
    "adapted_class",
    "adapter_class_for",
    "change_class",
    "class_without_adapter",
    "dequantized",
    "kind_of",
    "kind_of_peft_type",
    "layer_class_for",
    "new_adapter",
    "register_adapter_kind",
    "register_layer_kind",
    "register_quantized_storage",
    "rows_of",
    "storage_of",
    "stored",
    "supported_modules",
    "unsupported_reason",
    "weightless_reason",
]

_layer_kinds: list[type[LoraLayer]] = [
    LoraQuantizedLinear,
    LoraUnreadLinear,
    LoraLinear,
    LoraOwnLinear,
    LoraEmbedding,
    LoraConv,
    LoraMultiheadAttention,
    LoraConv1D,
    LoraRecurrent,
]
# Of a name in _PLAIN, each layer class has its own adapter class.
_PLAIN = "lora"
_adapter_kinds: dict[str, Mapping[type[LoraLayer], type[Adapter]]] = {_PLAIN: {}, "dora": DORA, "vera": VERA}


def register_layer_kind(layer_class: type[LoraLayer]) -> None:
    """Have modules of a further class adapted.

    Args:
        layer_class: What they become while they are adapted. Its ``adapts`` says which modules it is for, before those
            of the kinds that are there.
    """
    if layer_class not in _layer_kinds:
        _layer_kinds.insert(0, layer_class)


def register_adapter_kind(name: str, classes: Mapping[type[LoraLayer], type[Adapter]]) -> None:
    """Make a further kind of adapter one that settings can ask for, by ``LoraConfig(adapter_kind=name)``.

    Args:
        name: Its name.
        classes: Its class for each kind of layer that can have it.

    Raises:
        ValueError: If another kind has this name.
    """
    if _adapter_kinds.setdefault(name, classes) != classes:
        raise ValueError(f"There is another kind of adapter named {name!r} already: give this one a name of its own.")


def layer_class_for(module: nn.Module) -> type[LoraLayer] | None:
    """The class that adapts this module, ``None`` if its kind is not supported."""
    return next((layer_class for layer_class in _layer_kinds if layer_class.adapts(module)), None)


def supported_modules() -> str:
    """The modules that can be adapted, in words."""
    return ", ".join(layer_class.supported for layer_class in _layer_kinds if layer_class.supported)


def adapter_class_for(layer_class: type[LoraLayer], config: LoraConfig) -> type[Adapter] | None:
    """The class of adapter that a config asks for in layers of a kind, ``None`` if they cannot have it."""
    if layer_class.has_one_kind or config.kind == _PLAIN:
        return layer_class.adapter_class
    classes = _adapter_kinds.get(config.kind, {})
    like = layer_class.kinds_like
    return classes.get(layer_class) or (classes.get(like) if like is not None else None)


def kind_of_peft_type(peft_type: str) -> type[Adapter] | None:
    """The first class of the kind of adapter that has this type in PEFT, ``None`` if there is none."""
    every = (adapter_class for classes in _adapter_kinds.values() for adapter_class in classes.values())
    return next((adapter_class for adapter_class in every if adapter_class.peft_type == peft_type), None)


def kind_of(config: LoraConfig) -> type[Adapter]:
    """The first class of the kind of adapter that a config asks for."""
    return next(iter(_adapter_kinds.get(config.kind, {}).values()), LoraAdapter)


def unsupported_reason(target: Target, config: LoraConfig) -> str | None:
    """Why a module cannot be adapted as the config asks, ``None`` if it can."""
    offloaded = [module for module in target.module.modules() if offloading_hook(module) is not None]
    if offloaded and config.takes_from_base:
        return (
            f"init_lora_weights={config.init_lora_weights!r} changes its weight, which accelerate keeps elsewhere: "
            "inject before accelerate's dispatch"
        )
    layer_class = target.layer_class
    with onloaded(offloaded):
        reason = (
            (None if layer_class.reads_packed else unreadable_reason(target.module, target.parameters))
            or layer_class.unsupported_reason(target, config)
            or class_problem(layer_class, target.module)
        )
    if reason is None and adapter_class_for(target.layer_class, config) is None:
        if config.kind not in _adapter_kinds:
            return (
                f"there is no kind of adapter named {config.kind!r}; there are {', '.join(map(repr, _adapter_kinds))}"
            )
        return f"{config.kind_setting} is not for this kind of layer"
    return reason


def new_adapter(target: Target, config: LoraConfig, adapter_name: str) -> nn.Module:
    """An adapter for one module that can have it, ready to be put in."""
    adapter_class = adapter_class_for(target.layer_class, config)
    assert adapter_class is not None
    with onloaded(module for _, module in base_modules(target.module)):
        adapter = target.layer_class.new_adapter(adapter_class, target, config, adapter_name)
    return adapter.train(target.module.training)
