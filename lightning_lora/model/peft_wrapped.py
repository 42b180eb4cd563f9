"""Models that PEFT has wrapped: what in them is PEFT's, what is the base's, and the base with the adapters merged in.

PEFT's layers stay as they are. PEFT is looked up and never imported: whoever has its layers has imported it.
"""

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.class_names import is_a
from lightning_lora.config import LoraConfig
from lightning_lora.fqn import clean_fqn, is_submodule, outermost
from lightning_lora.model.base_config import configs_of
from lightning_lora.model.fingerprint import BaseTensor, Fingerprint, base_values, fingerprint_of
from lightning_lora.model.freeze import tracks_statistics
from lightning_lora.model.quantization import is_quantized, plain_names, quantization
from lightning_lora.model.record import Injection, drop_record, injections_of, keep_record
from lightning_lora.model.targets import TargetError
from lightning_lora.sharding import named_tensors

_PEFT, _SAVED = "peft.", "AuxiliaryTrainingWrapper"  # its class around modules that it trains in full


class PeftInjection(Injection):
    """The record of a model that PEFT has wrapped, with all adapters that it has.

    Its root is the outermost module that PEFT knows of. What is PEFT's, or requires gradients, or is a running
    statistic, which a training step moves, is trained; the rest is the base. It has no layers of this package.

    Attributes:
        moved: Names of the buffers among what is trained.
    """

    def __init__(self, root: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        super().__init__(root, config, adapter_name)
        self.quantization = quantization(root)
        frozen = {id(tensor) for _, module in _base(root) for tensor in _standing(module)}
        own = [each for each in named_tensors(root) if id(getattr(each[1], each[2])) not in frozen]
        self.trained = [name for name, module, inner in own if inner in module._parameters]
        self.moved = [name for name, module, inner in own if inner in module._buffers]
        self.fingerprint = base_fingerprint(root)

    @property
    @override
    def peft(self) -> dict[str, dict[str, Any]]:
        return plain_settings(self.root)

    @override
    def own_names(self) -> list[str]:
        return [*self.trained, *self.moved]

    @override
    def switch(self, in_place: bool) -> None:
        raise ValueError("The adapters are PEFT's: use its own set_adapter and disable_adapter. Nothing was changed.")

    @override
    def parameters(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        for name, module, _ in self.wrapped():
            yield name, [parameter for parameter in module.parameters() if parameter.requires_grad]

    def wrapped(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The modules of PEFT, with their names in the base, and their ranks, in words, if they have such."""
        for name, module in _base(self.root, outside=True):
            if _wraps(module):
                ranks = getattr(module, "r", None)
                yield name, module, ", ".join(sorted(map(str, ranks.values()))) if isinstance(ranks, dict) else ""

    def lora_layers(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Each layer of PEFT with an active adapter of two matrices: its name in the base, it, and the adapter's."""
        for name, module, _ in self.wrapped():
            for adapter in getattr(module, "active_adapters", ()):
                if any(adapter in getattr(module, pair, ()) for pair in ("lora_A", "lora_embedding_A")):
                    yield name, module, adapter


def lora_factors(module: Any, adapter: str) -> tuple[tuple[Tensor, Tensor], float] | None:
    """A and B of an adapter in a layer of PEFT, and their scaling; ``None`` if it adds more than their product."""
    if module.lora_variant.get(adapter) is not None:  # DoRA and others
        return None
    if adapter in module.lora_embedding_A:
        factors = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return factors, float(module.scaling[adapter])


def wrapped_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that PEFT has wrapped (``get_peft_model``) or put layers into, by name."""
    return {clean_fqn(name): module for name, module in outermost(model, _is_root).items()}


def adopt_peft(root: nn.Module, config: LoraConfig, adapter_name: str) -> PeftInjection:
    """Keep a record of the adapters that PEFT has put into a model, anew if there is one; nothing else is changed.

    Args:
        root: One of :func:`wrapped_models`.
        config: Settings that the record is found by.
        adapter_name: Name that it is found by.

    Raises:
        TargetError: If an adapter is merged, or a weight has no values yet.
    """
    merged = [name for name, module in root.named_modules() if _wraps(module) and getattr(module, "merged", False)]
    if merged:
        raise TargetError(
            f"PEFT has merged an adapter into {merged[0]!r}, so that the base is not there: call unmerge_adapter() "
            "first, or merge_and_unload() to train on top of it."
        )
    if any(tensor.is_meta for tensor in root.parameters()):
        raise TargetError(f"PEFT's {type(root).__name__} is on the meta device: give it values in configure_model.")
    injection = PeftInjection(root, config, adapter_name)
    for earlier in [each for each in injections_of(root) if each.peft is not None]:
        drop_record(earlier)
    keep_record(injection)
    return injection


def plain_settings(root: nn.Module) -> dict[str, dict[str, Any]]:
    """The settings of each adapter by its name in PEFT, in types of JSON, with PEFT's sets of names in order."""
    configs: Mapping[str, Any] = root.peft_config  # type: ignore[assignment]
    in_json = {name: json.dumps(config.to_dict(), default=sorted) for name, config in configs.items()}
    return {name: json.loads(settings) for name, settings in in_json.items()}


def base_model(root: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, its layers in it."""
    wrapped: nn.Module = root.get_base_model() if hasattr(root, "get_base_model") else root  # type: ignore[operator]
    return wrapped


def base_fingerprint(root: nn.Module, adapter: str | None = None) -> Fingerprint:
    """The fingerprint of the base, by the names that it has without PEFT.

    Args:
        root: One of :func:`wrapped_models`, unmerged.
        adapter: The adapter of PEFT that is to be put on this base. ``None`` is all of them, with the running
            statistics that they were trained with.
    """
    trained_in_full: list[str] = []
    replaced: dict[int, tuple[int, ...]] = {}
    for name, module in _base(root, outside=True):
        copies = getattr(module, "modules_to_save", {})
        if is_a(module, _SAVED, _PEFT) and (copies if adapter is None else adapter in copies):
            trained_in_full.append(name)
        rows = getattr(getattr(module, "token_adapter", module), "token_indices", {})
        for chosen in [rows[each] for each in rows if adapter in (None, each)]:
            weight = id(_inner(module).weight)
            replaced[weight] = (*replaced.get(weight, ()), *chosen)

    def tensors() -> Iterator[BaseTensor]:
        for name, module in _base(root):
            if any(is_submodule(name, saved) for saved in trained_in_full):
                continue
            for inner, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or tensor.requires_grad or inner in module._non_persistent_buffers_set:
                    continue
                if adapter is None and inner in module._buffers and tracks_statistics(module):
                    continue
                for plain, own in plain_names(module, inner):
                    values = base_values(module, own, tensor if own == inner else None)
                    full_name = clean_fqn(f"{name}.{plain}".lstrip("."))
                    yield BaseTensor(full_name, values, replaced.get(id(tensor), ()))

    return fingerprint_of(tensors(), configs_of(base_model(root)))


def unmergeable_reason(root: nn.Module) -> str | None:
    """Why a model that PEFT has wrapped has no merged form, ``None`` if it has one."""
    if is_quantized(root):
        return "the base is quantized, and PEFT would merge the adapters into quantized weights"
    if not any(map(_wraps, root.modules())):
        kinds = ", ".join(sorted({str(each["peft_type"]) for each in plain_settings(root).values()}))
        return f"{kinds} changes no weights of the base"
    return None


@contextmanager
def merged_base(root: nn.Module) -> Iterator[nn.Module]:
    """The plain model with PEFT's active adapters merged in, as long as the context lasts.

    PEFT merges copies of the layers, so that base and adapters stay what they are, bit for bit.

    Raises:
        ValueError: If a merged weight holds a NaN or an infinity.
    """
    base: Any = base_model(root)
    merged: dict[nn.Module, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for _, parent in list(_base(root)):
        for name, child in parent._modules.items():
            if child is not None and _wraps(child):
                if child not in merged:
                    merged[child] = _merged(child)
                places.append((parent, name, child))
    loaded = vars(base).pop("_hf_peft_config_loaded", None)  # else transformers would save the adapter alone
    for parent, name, child in places:
        parent._modules[name] = merged[child]
    try:
        yield base
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
        if loaded is not None:
            base._hf_peft_config_loaded = loaded


def _merged(layer: Any) -> nn.Module:
    of_base = {id(parameter) for parameter in _innermost(layer).parameters()}
    memo = {id(t): t for t in (*layer.parameters(), *layer.buffers()) if id(t) not in of_base}
    twin = copy.deepcopy(layer, memo)
    if hasattr(twin, "unload_and_optionally_merge_module"):
        plain: nn.Module = twin.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        return plain
    twin.merge(safe_merge=True)
    return twin.get_base_layer()  # type: ignore[no-any-return]


def _is_root(module: nn.Module) -> bool:
    if any(base.__module__ in ("peft.peft_model", "peft.mixed_model") for base in type(module).__mro__):
        return True
    configs = vars(module).get("peft_config")  # where layers were put into it
    return isinstance(configs, dict) and bool(configs) and any(map(_wraps, module.modules()))


def _wraps(module: nn.Module) -> bool:
    """Whether it is a module that PEFT has put around one of the base."""
    return "peft" in sys.modules and (is_a(module, "BaseTunerLayer", _PEFT) or is_a(module, _SAVED, _PEFT))


def _inner(wrapper: nn.Module) -> nn.Module:
    """What PEFT has put a module around, which it may have done more than once."""
    inner = wrapper.original_module if is_a(wrapper, _SAVED, _PEFT) else wrapper.base_layer
    assert isinstance(inner, nn.Module)
    return inner


def _innermost(module: nn.Module) -> nn.Module:
    while _wraps(module):
        module = _inner(module)
    return module


def _base(root: nn.Module, outside: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base under the names that they have without PEFT, under each of them.

    Args:
        root: One of :func:`wrapped_models`.
        outside: Whether to give what PEFT has put around them too, before them and under their names.
    """
    waiting = [("", base_model(root))]
    while waiting:
        name, module = waiting.pop()
        while _wraps(module):
            if outside:
                yield name, module
            module = _inner(module)
        yield name, module
        waiting.extend(
            (f"{name}.{inner}".lstrip("."), child)
            for inner, child in reversed(module._modules.items())
            if child is not None
        )


def _standing(module: nn.Module) -> Iterator[Tensor]:
    """What no training step changes of a module of the base, without those in it."""
    yield from (each for each in module._parameters.values() if each is not None and not each.requires_grad)
    if not tracks_statistics(module):
        yield from (each for each in module._buffers.values() if each is not None)
