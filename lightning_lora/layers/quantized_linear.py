"""LoRA on linear layers whose weight is quantized (QLoRA; Dettmers et al., arXiv 2305.14314)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.config import LoraConfig
from lightning_lora.fake_tensors import has_values
from lightning_lora.layers.adapted_class import base_class
from lightning_lora.layers.adapter import Adapter
from lightning_lora.layers.base import MergedForm, Target
from lightning_lora.layers.functional import add_low_rank
from lightning_lora.layers.linear import LinearAdapter, LoraLinear
from lightning_lora.layers.offloading import onloaded
from lightning_lora.layers.quantized import Packed, QuantizedStorage, storage_of, supported_storages
from lightning_lora.layers.quantized.storage import PLAIN
from lightning_lora.sharding import BEFORE_SHARDING, full_tensor, is_shard, unsharded

_ALIKE = 0.1  # relative; half precision and rounded activations stay within
_proven: set[str] = set()  # the formats that were seen to give right gradients, with the device


class QuantizedLinearAdapter(LinearAdapter):
    """The same beside a packed weight, out of which no start can be taken.

    So what PiSSA and OLoRA start at is subtracted in each forward pass. That computes the same, and nothing is rounded
    once more.
    """

    def forward(self, x: Tensor, out: Tensor, layer: nn.Module) -> Tensor:
        if hasattr(self, "initial_A"):
            out = add_low_rank(out, x, self.initial_A, self.initial_B, -self.scaling)  # type: ignore[arg-type]
        return super().forward(x, out, layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "initial_A"):
            return super().factors()
        tensors = self.plain_tensors()
        return tensors[self.peft_names["lora_A"]], tensors[self.peft_names["lora_B"]]

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        return None if hasattr(self, "initial_A") else super().low_rank_factors()

    def is_plain_lora(self) -> bool:
        return not hasattr(self, "initial_A") and not (self.training and (self.dropout.p or self.rank_dropout))


class _Never:
    """An attribute that is ``False`` while the layer is adapted, whatever the layer itself has."""

    def __get__(self, layer: Any, owner: Any) -> bool:
        return False

    def __set__(self, layer: nn.Module, value: bool) -> None:
        layer.__dict__["support_avx512bf16_for_cpu"] = value


class LoraQuantizedLinear(LoraLinear):
    """``nn.Linear`` and its subclasses with a packed weight, which ``layers/quantized/`` reads.

    Adapters are merged into the dequantized weight, which is rounded once to an ordinary one. Packed again, it would
    lose most of an update that is smaller than the steps between two codes.
    """

    adapter_class = QuantizedLinearAdapter
    supported = supported_storages()
    reads_packed = True
    kinds_like = LoraLinear

    # On CPUs with AVX512-BF16, bitsandbytes would pack the weight anew in the first evaluation, round it, and leave
    # autograd.
    support_avx512bf16_for_cpu = _Never()

    _storage: QuantizedStorage

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return storage_of(module) is not None

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        storage = storage_of(module)
        names = super().parameters_of(module) if storage is None else storage.parts[:1]
        return tuple(name for name in names if name not in {**module._buffers, **vars(module)})

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        module = target.module
        storage, packed = _stored(module)
        if is_shard(module, storage.parts[0]):
            return f"its weight is quantized and processes share it already: {BEFORE_SHARDING}"
        if not storage.is_ready(module, packed):
            return (
                "its weight is not quantized yet, which is done when it is moved: move the model to the device that it "
                "is to train on (model.to(device)) before it gets adapters"
            )
        reason = storage.refusal(module, packed)
        if reason is not None:
            return reason
        if config.quantizes_base:
            return (
                f"init_lora_weights={config.init_lora_weights!r} quantizes the base itself, and this one is quantized "
                f"already ({storage.record(module, packed)}): load the base in full precision, or use another start"
            )
        if config.bias != "none" and storage.beside(packed):
            return f"its bias is no parameter, so that bias={config.bias!r} cannot train it"
        return super().unsupported_reason(target, config) or _gradient_problem(module, storage, packed)

    @classmethod
    def weight_for(cls, module: nn.Module, adapter_class: type[Adapter]) -> Tensor:
        storage, packed = _stored(module)
        if adapter_class.reads_weight:
            return storage.dequantized(module, packed)
        # All that others look at, and no memory.
        dtype = storage.dtype(module, packed) or torch.float32
        return torch.zeros((), dtype=dtype, device=storage.codes(packed).device).expand(storage.shape(module, packed))

    @classmethod
    def start_at_weight(cls, module: nn.Module, adapter: Any) -> dict[str, Tensor]:
        storage, packed = _stored(module)
        adapter.init_from_weight(storage.dequantized(module, packed))
        return {}

    def begin(self) -> None:
        super().begin()
        storage = storage_of(self)
        assert storage is not None
        self.__dict__["_storage"] = storage

    def end(self, own_class: type[nn.Module]) -> tuple[type[nn.Module], dict[str, Any]]:
        is_plain = self._is_merged_plain()
        storage: QuantizedStorage = self.__dict__.pop("_storage")
        own_class, taken = super().end(own_class)
        if is_plain:
            taken |= storage.strip(self)
            own_class = storage.plain_class(own_class)
        return own_class, {**taken, "_storage": storage}

    @property
    def packed(self) -> Packed:
        """The base's packed weight, also while adapters are merged."""
        return self._aside or self._storage.packed(self)

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        name = PLAIN if self._is_merged_plain() else self._storage.parts[0]
        return {name: getattr(self, name)}

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._is_merged_plain():
            return super().base_forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        bias = self.bias if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)  # type: ignore[arg-type]

    def base_weight(self) -> Tensor:
        return self._storage.dequantized(self, self.packed)

    def _is_plain(self, x: Tensor) -> bool:
        return False

    def _is_merged_plain(self) -> bool:
        return self._merged and type(self._parameters.get(PLAIN)) is nn.Parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any layer, also if the base's class has one of its own, which knows of its packed weight alone."""
        if self._is_merged_plain() or base_class(self).state_dict is nn.Module.state_dict:
            return nn.Module.state_dict(self, *args, **kwargs)
        state = super().state_dict(*args, **kwargs)
        destination, prefix = kwargs.get("destination"), kwargs.get("prefix", "")
        inside = self.lora.state_dict(prefix=f"{prefix}lora.", keep_vars=kwargs.get("keep_vars", False))
        (state if destination is None else destination).update(inside)
        return state

    def _save_to_state_dict(self, *args: Any) -> None:
        if self._is_merged_plain():
            nn.Module._save_to_state_dict(self, *args)
        else:
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._is_merged_plain():
            nn.Module._load_from_state_dict(self, *args)
        else:
            super()._load_from_state_dict(*args)

    def merged_weights(self) -> dict[str, Tensor]:
        return self.merged_as(MergedForm())

    @torch.no_grad()
    def merged_as(self, form: MergedForm) -> dict[str, Any]:
        """As of any layer, but whole where processes share the packed weight."""
        modules = self.modules_at_work()
        with unsharded(modules), onloaded(modules):
            packed = self.packed
            dtype = form.dtype or self._storage.dtype(self, packed) or form.otherwise
            total = self.folded(PLAIN, self.base_weight())
            rounded = self.rounded(total, dtype)
            if form.requantize:
                return dict(self._storage.requantized(self, packed, total))
            return {PLAIN: nn.Parameter(rounded, requires_grad=False), **self._storage.beside(packed)}

    @torch.no_grad()
    def kept(self, packed: Packed) -> float:
        """How much of the active adapters' update another packed weight has, ``<W' - W, U> / |U|^2``.

        Args:
            packed: Of :meth:`merged_as` under ``requantize``.

        Returns:
            1 if it has all of it, as it has of none at all; 0 if it is lost.
        """
        before = self.base_weight()
        update = self.folded(PLAIN, before) - before
        size = update.square().sum()
        change = self._storage.dequantized(self, packed) - before
        return float((change * update).sum() / size) if size else 1.0

    def _exchange(self, others: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._storage.swap(self, others) if others else {}


def stored(module: nn.Module) -> tuple[QuantizedStorage, Packed] | None:
    """What reads a layer's packed weight and that, before adapters were merged; ``None`` if it is not quantized."""
    if isinstance(module, LoraQuantizedLinear):
        return module._storage, module.packed
    storage = storage_of(module)
    return None if storage is None else (storage, storage.packed(module))


def dequantized(module: nn.Module) -> Tensor:
    """The values of a quantized weight, in float32 and in full, also where processes share it.

    They are the base's, also while adapters are merged.

    Args:
        module: A quantized layer, adapted or not.
    """
    storage, packed = _stored(module)
    codes = storage.parts[0]
    if hasattr(module, codes) and is_shard(module, codes):
        packed = {**packed, codes: full_tensor(module, codes)}
    return storage.dequantized(module, packed)


def _stored(module: nn.Module) -> tuple[QuantizedStorage, Packed]:
    found = stored(module)
    assert found is not None
    return found


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient_problem(module: nn.Module, storage: QuantizedStorage, packed: Packed) -> str | None:
    """Why no adapter before this layer could learn, ``None`` if gradients pass as through the dequantized weight.

    Formats that quantize activations too have no backward pass, and some give none without a word. One layer of each
    format is tried, with its class's forward, so that hooks see nothing of it.
    """
    record = storage.record(module, packed)
    codes = storage.codes(packed)
    key = f"{record} {type(module)} {codes.device.type}"
    if codes.is_meta or key in _proven:
        return None
    weight = storage.dequantized(module, packed)
    if not has_values(weight):
        return None
    dtype = storage.dtype(module, packed) or torch.float32
    draw = torch.Generator().manual_seed(0)
    x, grad_out = (torch.randn(2, size, generator=draw).to(weight.device, dtype) for size in weight.shape[::-1])
    x.requires_grad_()
    out = type(module).forward(module, x)
    if not out.requires_grad:
        return (
            f"a backward pass ends in it, so layers before it would get wrong gradients; its format {record} has none, "
            "as those have not that quantize activations too: quantize the weights only"
        )
    (found,) = torch.autograd.grad(out, x, grad_out)
    expected = grad_out.float() @ weight
    error = float((found.float() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= _ALIKE:
        return (
            f"its gradient is not that of its dequantized weight but {error:.0%} off, so what it computes is not known "
            f"here; its format is {record}"
        )
    _proven.add(key)
    return None
