"""EVA: A starts at the directions in which the inputs of its layer vary most.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170. As in
PEFT, the directions are those of the centered inputs (principal components). The redistribution of ranks is left out:
each layer keeps the rank that ``r`` and ``rank_pattern`` give it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.eval_mode import evaluating
from lightning_lora.layers import LoraAdapter, LoraLayer
from lightning_lora.model.record import Injection, injections
from lightning_lora.rng import seeded

KIND = "eva"
TAU = 0.99

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initialize_eva(
    model: ModuleT,
    batches: Iterable[Any],
    forward: Callable[[ModuleT, Any], Any] | None = None,
    tau: float = TAU,
) -> ModuleT:
    """Start the adapters of a model at the principal directions of their layers' inputs, in place.

    A gets orthonormal rows and B stays zero, so the function stays the base's, bit for bit. The model runs in eval mode
    without gradients. Rows beyond the number of directions in the data keep the default initialization.

    Args:
        model: A model with fresh adapters that were injected under ``init_lora_weights="eva"``.
        batches: What to feed, until the directions have converged or nothing is left. They are moved to the device of
            the model's first parameter. In several processes, give each the same.
        forward: Runs the model on a batch; by default the batch is its keyword arguments, its positional ones, or its
            only one. Where a batch is a mapping with an ``attention_mask`` of shape ``(batch, tokens)``, inputs at
            masked positions do not count.
        tau: A layer has converged when every direction's cosine with the one before the last batch is at least this.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no such adapter, if it is trained already, or if no layer saw any input. No adapter is
            changed then.
    """
    wanted = [found for found in injections(model) if found.config.init_lora_weights == KIND]
    if not wanted:
        raise ValueError(
            f"There is no adapter in this {type(model).__name__} that starts from data: inject one with "
            f"LoraConfig(init_lora_weights={KIND!r}) first."
        )
    initialization = EvaInitialization(wanted, tau)
    run = forward or _call
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            batch = move_data_to_device(batch, device)
            initialization.observe(partial(run, model, batch), batch)
            if initialization.converged:
                break
    initialization.finish()
    return model


def is_untrained(injection: Injection) -> bool:
    """Whether an adapter still changes nothing."""
    return not any(adapter.lora_B.any() for _, _, adapter in _adapters(injection))


class EvaInitialization:
    """The initialization of adapters, while their layers' inputs go by.

    Args:
        wanted: The injections.
        tau: See :func:`initialize_eva`.

    Raises:
        ValueError: If one of the adapters is trained already.
    """

    def __init__(self, wanted: list[Injection], tau: float = TAU) -> None:
        trained = [injection.adapter_name for injection in wanted if not is_untrained(injection)]
        if trained:
            raise ValueError(
                f"The adapter {trained[0]!r} is trained already, and another A would change what it computes: "
                "initialize it right after injecting it, before training and loading."
            )
        self._injections = wanted
        found = [item for injection in wanted for item in _adapters(injection)]
        self._layers: dict[str, LoraLayer] = {name: layer for name, layer, _ in found}
        self._adapters: dict[str, LoraAdapter] = {name: adapter for name, _, adapter in found}
        self._tau = tau
        self._leaders: dict[str, str] = {}  # of the layers that share their inputs, the first
        self._inputs: dict[str, PrincipalDirections] = {}

    @property
    def converged(self) -> bool:
        """Whether further batches would change little."""
        return bool(self._inputs) and all(inputs.converged for inputs in self._inputs.values())

    def observe(self, run: Callable[[], Any], batch: Any) -> None:
        """Take in the inputs of one batch.

        Args:
            run: Runs the model on it.
            batch: The batch, which may bring a mask.
        """
        if not self._leaders:
            self._leaders = self._find_shared(run)
            for name, leader in self._leaders.items():
                rank = max(self._adapters[name].r, getattr(self._inputs.get(leader), "rank", 0))
                self._inputs[leader] = PrincipalDirections(rank, self._tau)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def take(name: str, x: Tensor) -> None:
            if not self._inputs[name].converged:
                is_masked = isinstance(mask, Tensor) and mask.shape == x.shape[:-1]
                rows = x[mask.bool()] if is_masked else x.reshape(-1, x.shape[-1])  # type: ignore[union-attr]
                if not torch.isfinite(rows).all():
                    raise ValueError(
                        f"The input of {name} holds a NaN or an infinity, so it has no principal directions: check the "
                        "data and the precision."
                    )
                self._inputs[name].update(rows)

        with self._watching(self._inputs, take):
            run()

    @torch.no_grad()
    def finish(self, broadcast: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Put the directions into A.

        Args:
            broadcast: Gives the first process's tensor to all.

        Raises:
            ValueError: If no layer saw any input.
        """
        unseen = [name for name, leader in self._leaders.items() if not self._inputs[leader].count]
        if len(unseen) == len(self._leaders):
            raise ValueError(
                f"None of the {len(self._layers)} adapted layers saw any input, so there is nothing to start from: "
                "give at least one batch, and a forward that calls them."
            )
        if unseen:
            rank_zero_warn(
                f"{len(unseen)} of {len(self._layers)} adapted layers, among them {unseen[0]!r}, saw no input and keep "
                "the default initialization."
            )
        for name, leader in self._leaders.items():
            adapter = self._adapters[name]
            start = adapter.lora_A.detach().clone()
            directions = self._inputs[leader].directions[: adapter.r]
            if len(directions):
                start[: len(directions)] = directions
            adapter.lora_A.copy_(broadcast(start))
        for injection in self._injections:
            injection.from_data = True

    def _find_shared(self, run: Callable[[], Any]) -> dict[str, str]:
        """Which layers get the very same tensors, as q, k and v do: those are looked at once."""
        seen: list[weakref.ref[Tensor]] = []
        calls: dict[str, tuple[int, ...]] = dict.fromkeys(self._layers, ())

        def note(name: str, x: Tensor) -> None:
            token = next((index for index, other in enumerate(seen) if other() is x), len(seen))
            if token == len(seen):
                seen.append(weakref.ref(x))
            calls[name] += (token,)

        with self._watching(self._layers, note):
            run()
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(tokens, name) if tokens else name for name, tokens in calls.items()}

    @contextmanager
    def _watching(self, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.autocast(x.device.type, enabled=False):
                see(name, x)

        handles = [
            self._layers[name].register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PrincipalDirections:
    """The principal directions of rows that come batch by batch, of which none is kept.

    Source: the incremental decomposition of Ross et al., "Incremental Learning for Robust Visual Tracking", IJCV 2008,
    with the randomized one of Halko et al., arXiv 0909.4061.

    Args:
        rank: How many.
        tau: See :func:`initialize_eva`.
    """

    def __init__(self, rank: int, tau: float) -> None:
        self.rank = rank
        self.tau = tau
        self.count = 0
        self.converged = False
        self._mean: Tensor | None = None
        self._scaled: Tensor | None = None  # directions times singular values, more than are asked for

    def update(self, rows: Tensor) -> None:
        """Take in rows of shape ``(count, features)``."""
        if not len(rows):
            return
        rows, before = rows.float(), self.directions
        mean = rows.mean(0)
        parts = [rows - mean]
        total = self.count + len(rows)
        if self._mean is not None and self._scaled is not None:
            shift = (self.count * len(rows) / total) ** 0.5 * (self._mean - mean)
            parts = [self._scaled, *parts, shift.unsqueeze(0)]
            mean = self._mean + (mean - self._mean) * (len(rows) / total)
        values, right = _largest(torch.cat(parts), 2 * self.rank + 16)
        self._scaled, self._mean, self.count = values.unsqueeze(1) * right, mean, total
        after = self.directions
        enough = len(before) == len(after) == min(self.rank, rows.shape[1])
        self.converged = enough and bool(((before * after).sum(1).abs() >= self.tau).all())

    @property
    def directions(self) -> Tensor:
        """At most ``rank`` orthonormal rows, the most important first, each with its largest entry positive."""
        if self._scaled is None:
            return torch.empty(0)
        lengths = self._scaled.norm(dim=1, keepdim=True)
        is_there = lengths.flatten() > 1e-6 * lengths.max()  # others are directions of rounding errors
        rows: Tensor = (self._scaled[is_there] / lengths[is_there])[: self.rank]
        return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their right vectors, the same ones each time."""
    if min(matrix.shape) <= 2 * count:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return values[:count], right[:count]
    with seeded(0, matrix.device):
        _, values, right = torch.svd_lowrank(matrix, count, niter=4)
    return values, right.t()


def _adapters(injection: Injection) -> Iterator[tuple[str, LoraLayer, LoraAdapter]]:
    for name, layer in injection.layers():
        adapter = layer.lora[injection.adapter_name]
        assert isinstance(adapter, LoraAdapter)
        yield name, layer, adapter


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
