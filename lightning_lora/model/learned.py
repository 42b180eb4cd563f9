"""What adapters have learned, layer by layer, of this package or of PEFT: by matrices of the rank's size."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.layers import Adapter
from lightning_lora.layers.offloading import onloaded
from lightning_lora.layers.spectrum import Factors, singular_values
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.peft_wrapped import PeftInjection, lora_factors
from lightning_lora.model.record import named_injections
from lightning_lora.sharding import unsharded, unwrap_fsdp

ENERGY = 0.99  # of an update, that a rank holds which is enough


class Spectrum(NamedTuple):
    """What the singular values of an update say.

    Attributes:
        norm: The update's Frobenius norm.
        largest: Its spectral norm.
        effective_rank: The exponential of the entropy of the values' shares (Roy and Vetterli, 2007).
        stable_rank: The squared norm over the squared spectral norm.
        enough: The smallest rank that holds 99% of the squared norm.
    """

    norm: float
    largest: float
    effective_rank: float
    stable_rank: float
    enough: int


class Update(NamedTuple):
    """What one adapter has learned.

    Attributes:
        layer: The layer's name.
        r: The adapter's rank.
        weight_norm: Frobenius norm of the weight under it, if it is known.
        values: Singular values of the update, the largest first.
    """

    layer: str
    r: int
    weight_norm: float | None
    values: list[float]

    @property
    def spectrum(self) -> Spectrum:
        """What the singular values say; all zero for an update of zero."""
        values = torch.tensor(self.values, dtype=torch.float64)
        norm, largest = float(torch.linalg.vector_norm(values)), float(values[0])
        if norm == 0 or not math.isfinite(norm):
            return Spectrum(norm, largest, 0.0, 0.0, 0)
        entropy = float(torch.special.entr(values / values.sum()).sum())
        energy = values.square().cumsum(0) / values.square().sum()
        enough = int((energy < ENERGY - 1e-12).sum()) + 1
        return Spectrum(norm, largest, math.exp(entropy), (norm / largest) ** 2, enough)

    @property
    def relative_norm(self) -> float | None:
        """Of the update, relative to its weight, if that is known."""
        return self.spectrum.norm / self.weight_norm if self.weight_norm else None


class Learner:
    """An adapter of a layer while it learns.

    Args:
        layer: The layer's name.
        weight_norm: Frobenius norm of the weight under it, if it is known.
        module: What holds its trained tensors.
        adapter: Its name in PEFT, if it is PEFT's.
    """

    def __init__(self, layer: str, weight_norm: float | None, module: nn.Module, adapter: str | None = None) -> None:
        self.layer, self.weight_norm = layer, weight_norm
        self._module, self._adapter = module, adapter

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its trained parameters, or this process's slices of them, each under ``"A"`` or ``"B"``."""
        for name, parameter in self._module.named_parameters():
            matrix = next((part[-1] for part in name.split(".") if part in _MATRICES), None)
            if matrix is not None and parameter.requires_grad and self._adapter in (None, *name.split(".")):
                yield matrix, parameter

    def look(self) -> tuple[Update, Factors | None] | None:
        """What it has learned, and its A and B if their product is that; ``None`` if its kind does not tell.

        Where processes share the model, all of them must call it.
        """
        modules = list(self._module.modules())
        with unsharded(modules), onloaded(modules):
            if isinstance(self._module, Adapter):
                factors, values = self._module.low_rank_factors(), self._module.update_spectrum()
            else:
                factors, values = _looked_at_in_peft(self._module, self._adapter or "")
            if values is None or not len(values):
                return None
            if factors is not None:
                factors = (factors[0].detach().clone(), factors[1].detach().clone())
        r = len(values) if factors is None else len(factors[0])
        return Update(self.layer, r, self.weight_norm, values.tolist()), factors


def _looked_at_in_peft(module: nn.Module, adapter: str) -> tuple[Factors | None, Tensor | None]:
    found = lora_factors(module, adapter)
    if found is None:
        return None, None
    factors, scaling = found
    return factors, abs(scaling) * singular_values(factors)


_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def learners(model: nn.Module) -> list[Learner]:
    """The adapters of a model, layer by layer; of PEFT's, those that are active."""
    found = []
    for root_name, injection in named_injections(model):
        norms = fingerprint(injection).norms()
        own = [(name, unwrap_fsdp(layer.lora[injection.adapter_name]), None) for name, layer in injection.layers()]
        theirs = list(injection.lora_layers()) if isinstance(injection, PeftInjection) else []
        for name, module, adapter in (*own, *theirs):
            if adapter is not None or isinstance(module, Adapter):
                weight_norm = norms.get(f"{name}.weight".lstrip(".")) or None
                found.append(Learner(f"{root_name}.{name}".strip("."), weight_norm, module, adapter))
    return found


def updates_of(model: nn.Module) -> list[Update]:
    """What the adapters of a model have learned, but for kinds that do not tell.

    Where processes share the model, all of them must call it.
    """
    return [looked[0] for learner in learners(model) if (looked := learner.look()) is not None]
