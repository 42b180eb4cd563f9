"""``AdapterMonitor``: how much of its rank each group of layers uses, how far it moves its weights, and advice."""

import math
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lora.layers import Adapter
from lightning_lora.layers.offloading import onloaded
from lightning_lora.layers.spectrum import Factors, inner
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.record import named_injections
from lightning_lora.sharding import is_sharded, unsharded, unwrap_fsdp

_ENERGY = 0.99  # of an update, that a smaller rank must hold to be advised
_LARGE = 0.1  # of a weight's norm
_DEAD = 1e-3  # of the largest component
_STILL = 0.01  # of the median


class _Layer(NamedTuple):
    """An adapter of a layer, and the norm of the weight under it, if it is known."""

    name: str
    adapter: Adapter
    weight_norm: float | None


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


def spectrum_of(values: Tensor) -> Spectrum:
    """Sum up singular values, of shape ``(r,)`` and the largest first; all zero for an update of zero."""
    norm, largest = float(torch.linalg.vector_norm(values)), float(values[0])
    if norm == 0 or not math.isfinite(norm):
        return Spectrum(norm, largest, 0.0, 0.0, 0)
    shares = values / values.sum()
    entropy = float(torch.special.entr(shares).sum())
    energy = values.square().cumsum(0) / values.square().sum()
    enough = int((energy < _ENERGY - 1e-12).sum()) + 1
    return Spectrum(norm, largest, math.exp(entropy), (norm / largest) ** 2, enough)


class AdapterMonitor(Callback):
    """Log what adapters learn, by groups of layers of one name, and say at the end of a fit what to try next.

    Every figure comes from A and B by matrices of the rank's size. To each of the Trainer's loggers go, as means over
    a group such as ``q_proj``: ``adapter/q_proj/update_norm`` and ``update_spectral_norm`` (of the scaled update,
    relative to the Frobenius norm of the weight), ``effective_rank`` and ``stable_rank``, ``dead_components`` (share
    of the rank's components below a thousandth of the largest), ``update_cosine`` (between what was learned since the
    last look and before it), and of the whole group ``grad_norm_A`` and ``grad_norm_B``. Kinds of adapters whose
    update is not a product of two matrices are left out.

    Args:
        every_n_steps: How often to look, in steps of optimizers. Default 50.

    Raises:
        ValueError: If ``every_n_steps`` is not positive.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"AdapterMonitor found every_n_steps={every_n_steps}, expected 1 or more.")
        self.every_n_steps = every_n_steps
        self.advice: list[str] = []
        self._layers: list[_Layer] = []
        self._looked_at = 0
        self._before: dict[str, list[Factors]] = {}
        self._gradients: dict[str, float] = {}

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the adapters, which are all in by now, and the norms of the weights."""
        self._layers = list(_layers_of(pl_module))
        self._looked_at, self._before, self.advice = trainer.global_step, {}, []

    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the gradients' norms of the step at which a look is due."""
        if trainer.loggers and trainer.global_step + 1 >= self._looked_at + self.every_n_steps:
            self._gradients = self._gradient_norms(is_sharded(pl_module))

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *args: Any) -> None:
        """Look, every so many steps."""
        if trainer.loggers and trainer.global_step >= self._looked_at + self.every_n_steps:
            self._looked_at = trainer.global_step
            figures = {**self._figures(), **self._gradients}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Say what the figures advise, before the adapters are merged."""
        self.advice = advice_on([(layer, spectrum_of(values)) for layer, values, _ in self._look()])
        if self.advice:
            rank_zero_info("\n".join(["What the adapters learned:", *(f"- {line}" for line in self.advice)]))
        self._before = {}

    def card_facts(self) -> dict[str, str]:
        """What the card of an exported adapter says."""
        return {"what it learned": " ".join(self.advice)} if self.advice else {}

    def _look(self) -> Iterator[tuple[_Layer, Tensor, Factors | None]]:
        for layer in self._layers:
            modules = list(layer.adapter.modules())
            with unsharded(modules), onloaded(modules):
                values = layer.adapter.update_spectrum()
                if values is not None and len(values):
                    yield layer, values, layer.adapter.low_rank_factors()

    def _figures(self) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for layer, values, factors in self._look():
            spectrum, group = spectrum_of(values), group_of(layer.name)
            figures: dict[str, float | None] = {
                "update_norm": layer.weight_norm and spectrum.norm / layer.weight_norm,
                "update_spectral_norm": layer.weight_norm and spectrum.largest / layer.weight_norm,
                "effective_rank": spectrum.effective_rank,
                "stable_rank": spectrum.stable_rank,
            }
            if factors is not None:
                figures["dead_components"] = dead_components(factors)
                figures["update_cosine"] = self._cosine(layer.name, factors)
            for name, value in figures.items():
                if value is not None:
                    found.setdefault(f"adapter/{group}/{name}", []).append(value)
        return {name: fmean(each) for name, each in found.items()}

    def _cosine(self, name: str, factors: Factors) -> float | None:
        """Between the latest change of the update and the one before it."""
        before = self._before.setdefault(name, [])
        before.append((factors[0].detach().clone(), factors[1].detach().clone()))
        if len(before) < 3:
            return None
        zero, one, two = before
        del before[0]
        # <two - one, one - zero>, where each stands for its product
        oo, oz, ot = inner(one, one), inner(one, zero), inner(one, two)
        product = ot - inner(two, zero) - oo + oz
        squares = (inner(two, two) - 2 * ot + oo) * (oo - 2 * oz + inner(zero, zero))
        return product / math.sqrt(squares) if squares > 0 else None

    def _gradient_norms(self, sharded: bool) -> dict[str, float]:
        squares: dict[str, Tensor] = {}
        for layer in self._layers:
            for name, parameter in layer.adapter.named_parameters():
                factor = name.rpartition(".")[2]
                if parameter.requires_grad and factor in ("lora_A", "lora_B"):
                    key = f"adapter/{group_of(layer.name)}/grad_norm_{factor[-1]}"
                    before = squares.get(key, torch.zeros((), device=parameter.device))
                    # A process whose slice is empty has no gradient.
                    squares[key] = before if parameter.grad is None else before + _square(parameter.grad)
        if not squares:
            return {}
        total = torch.stack(list(squares.values()))
        if sharded and not any(isinstance(p, DTensor) for layer in self._layers for p in layer.adapter.parameters()):
            dist.all_reduce(total)  # under FSDPStrategy each process has a slice
        return dict(zip(squares, total.sqrt().tolist()))


def _square(gradient: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(gradient.detach().float())
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2


def _layers_of(module: "pl.LightningModule") -> Iterator[_Layer]:
    for root_name, injection in named_injections(module):
        norms = fingerprint(injection).norms()
        for name, layer in injection.layers():
            adapter = unwrap_fsdp(layer.lora[injection.adapter_name])
            if isinstance(adapter, Adapter):
                full_name = f"{root_name}.{name}".lstrip(".")
                yield _Layer(full_name, adapter, norms.get(f"{name}.weight".lstrip(".")) or None)


def group_of(name: str) -> str:
    """The last part of a layer's name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def dead_components(factors: Factors) -> float:
    """The share of the rank's components that are below a thousandth of the largest; all of an update of zero."""
    A, B = (factor.detach().flatten(1).float() for factor in factors)
    sizes = A.norm(dim=1) * B.norm(dim=0)
    return float((sizes <= _DEAD * sizes.max()).float().mean())


def advice_on(layers: list[tuple[_Layer, Spectrum]]) -> list[str]:
    """What the figures of all layers advise, in words; nothing for what has learned nothing."""
    groups: dict[str, list[tuple[_Layer, Spectrum]]] = {}
    for layer, spectrum in layers:
        if spectrum.norm > 0:
            groups.setdefault(group_of(layer.name), []).append((layer, spectrum))
    lines = []
    for group, found in groups.items():
        rank = max(getattr(layer.adapter, "r", 0) for layer, _ in found)
        used, enough = fmean(s.effective_rank for _, s in found), max(s.enough for _, s in found)
        if enough <= rank / 2:
            lines.append(
                f"{group} uses {used:.1f} of {rank} ranks: r={enough} would hold {_ENERGY:.0%} of each update's energy."
            )
        large = [(s.norm / layer.weight_norm, layer.name) for layer, s in found if layer.weight_norm]
        share, name = max(large, default=(0.0, ""))
        if share > _LARGE:
            lines.append(
                f"The update of {name} is {share:.0%} of its weight's norm: a lower learning rate or lora_alpha keeps "
                "more of the base."
            )
    norms = [s.norm for _, s in layers]
    still = [layer.name for layer, s in layers if s.norm < _STILL * median(norms)] if norms else []
    if still:
        lines.append(
            f"{len(still)} of {len(layers)} layers moved less than {_STILL:.0%} of the median, "
            f"the first is {still[0]}: they could be left out (exclude_modules)."
        )
    return lines
