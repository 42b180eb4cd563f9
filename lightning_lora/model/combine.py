"""Combine adapters into a new one: their updates joined, approximated at a lower rank, or averaged by factors."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers import LoraAdapter
from lightning_lora.layers.init import generator_for
from lightning_lora.layers.spectrum import decomposed
from lightning_lora.model.multi_adapter import add_adapter
from lightning_lora.model.record import Injection, injections

ModuleT = TypeVar("ModuleT", bound=nn.Module)

METHODS = ("cat", "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
_PRUNING = METHODS[3:]


@torch.no_grad()
def combine_adapters(
    model: ModuleT,
    adapter_names: Sequence[str],
    new_name: str,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> ModuleT:
    """Make a new adapter of several, under the names that PEFT has for the ways to do it.

    ``"cat"`` is exactly the weighted sum of the updates, at the sum of the ranks. ``"svd"`` is the best approximation
    of that sum at rank ``r`` (Eckart and Young, 1936). The others need equal ranks and combine the As and the Bs by
    themselves, each weighted by the root of ``weight * scaling``: ``"linear"`` adds them; ``"magnitude_prune"`` keeps
    the largest values of each before; ``"ties"`` also elects a sign for each position and averages what agrees with it
    (Yadav et al., arXiv 2306.01708); ``"dare_linear"`` and ``"dare_ties"`` keep random values and scale them up (Yu et
    al., arXiv 2311.03099).

    Args:
        model: A model with these adapters, unmerged.
        adapter_names: Which to combine.
        new_name: Name of the new adapter. It is not active until :func:`~lightning_lora.set_adapter` says so.
        weights: The factor of each update, 1 by default.
        method: See above.
        r: Rank of ``"svd"``; the largest of the ranks by default.
        density: The part of the values that the pruning methods keep, in ``(0, 1]``.
        seed: Of the random choice of ``"dare_linear"`` and ``"dare_ties"``.

    Returns:
        The same model.

    Raises:
        ValueError: If the adapters cannot be combined so. Nothing is changed then.
    """
    factors = list(weights) if weights is not None else [1.0] * len(adapter_names)
    _check_settings(adapter_names, factors, method, density)
    chosen = _find(model, adapter_names)
    parts: dict[str, list[tuple[LoraAdapter, float]]] = {}
    for injection, factor in zip(chosen, factors):
        for name, layer in injection.layers():
            adapter = layer.lora[injection.adapter_name]
            _require_factors(name, adapter, method)
            parts.setdefault(name, []).append((adapter, factor))  # type: ignore[arg-type]
    if method not in ("cat", "svd"):
        _require_equal_ranks(parts, method)
    made = {name: _combined(name, adapters, method, r, density, seed) for name, adapters in parts.items()}
    ranks = {name: len(lora_A) for name, (lora_A, _) in made.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),  # a scaling of one, here and by the pattern
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): float(rank) for name, rank in ranks.items()},
        target_modules=list(made),
        modules_to_save=None,
    )
    add_adapter(chosen[0].root, config, new_name)
    for name, layer in _find(model, [new_name])[0].layers():
        new: Any = layer.lora[new_name]
        for parameter, value in zip((new.lora_A, new.lora_B), made[name]):
            parameter.copy_(value)
    return model


def _combined(
    name: str, adapters: list[tuple[LoraAdapter, float]], method: str, r: int | None, density: float, seed: int
) -> tuple[Tensor, Tensor]:
    """A and B of one layer's new adapter, for a scaling of one."""
    if method == "cat":
        return _joined(adapters)
    if method == "svd":
        return _truncated(*_joined(adapters), r or max(adapter.r for adapter, _ in adapters))
    scalings = [factor * adapter.scaling for adapter, factor in adapters]
    roots = [abs(scaling) ** 0.5 for scaling in scalings]
    signed = [root if scaling >= 0 else -root for root, scaling in zip(roots, scalings)]  # the sign goes with A alone
    if method == "linear":
        keep: Callable[[Tensor], Tensor] = _keep_all
    elif method.startswith("dare"):
        generator = generator_for(seed, name)
        keep = lambda tensor: _keep_random(tensor, density, generator)  # noqa: E731
    else:
        keep = lambda tensor: _keep_largest(tensor, density)  # noqa: E731
    add = _add_agreeing if method.endswith("ties") else _add
    lora_A = add([keep(adapter.lora_A) for adapter, _ in adapters], signed)
    return lora_A, add([keep(adapter.lora_B) for adapter, _ in adapters], roots)


def _joined(adapters: list[tuple[LoraAdapter, float]]) -> tuple[Tensor, Tensor]:
    lora_A = torch.cat([factor * adapter.scaling * adapter.lora_A for adapter, factor in adapters])
    return lora_A, torch.cat([adapter.lora_B for adapter, _ in adapters], dim=1)


def _truncated(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best factors of rank r of a product; decomposed by way of its factors, never as a whole."""
    shape_A, shape_B = lora_A.shape[1:], (lora_B.shape[0], -1, *lora_B.shape[2:])
    left, values, right = decomposed((lora_A, lora_B))
    r = min(r, len(values))
    new_B, new_A = left[:, :r] * values[:r], right[:r]
    return new_A.to(lora_A.dtype).view(-1, *shape_A), new_B.to(lora_B.dtype).reshape(shape_B)


def _keep_all(tensor: Tensor) -> Tensor:
    return tensor


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).flatten().index_copy(0, kept, tensor.flatten()[kept]).view_as(tensor)


def _keep_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(tensor.shape, generator=generator).to(tensor.device) < density
    return tensor * kept / density


def _add(tensors: list[Tensor], factors: list[float]) -> Tensor:
    return sum((factor * tensor for tensor, factor in zip(tensors, factors)), torch.zeros_like(tensors[0]))


def _add_agreeing(tensors: list[Tensor], factors: list[float]) -> Tensor:
    """At each position, the mean of the weighted values whose sign is that of the sum."""
    stacked = torch.stack(tensors)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agreeing = stacked.sign() == elected
    weighted = stacked * torch.tensor(factors, device=stacked.device).view(-1, *[1] * tensors[0].dim())
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def _check_settings(names: Sequence[str], weights: list[float], method: str, density: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but it must be one of {', '.join(map(repr, METHODS))}.")
    if not names or len(set(names)) < len(names) or len(weights) != len(names):
        raise ValueError(
            f"There are {len(names)} adapter names ({', '.join(map(repr, names))}) and {len(weights)} weights: name "
            "each adapter once, and give one weight for each."
        )
    if method in _PRUNING and not 0 < density <= 1:
        raise ValueError(f"density is {density!r}, but it must lie in (0, 1]: 0.5 keeps half of the values.")


def _find(model: nn.Module, names: Sequence[str]) -> list[Injection]:
    found = {injection.adapter_name: injection for injection in injections(model)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"The model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, found)) or 'none'}: load it first."
        )
    chosen = [found[name] for name in names]
    full = [injection.adapter_name for injection in chosen if injection.aside]
    if full or any(injection.root is not chosen[0].root for injection in chosen):
        raise ValueError(
            f"{full[0]!r} trains parameters in full or starts at a part of the base, which cannot be combined."
            if full
            else f"The adapters {', '.join(map(repr, names))} were put into different modules of the model: combine "
            "those of one module."
        )
    return chosen


def _require_equal_ranks(parts: dict[str, list[tuple[LoraAdapter, float]]], method: str) -> None:
    for name, adapters in parts.items():
        ranks = sorted({adapter.r for adapter, _ in adapters})
        if len(ranks) > 1:
            raise ValueError(
                f"The adapters of {name!r} have the ranks {', '.join(map(str, ranks))}, and {method!r} combines those "
                "of equal rank: use 'cat' or 'svd'."
            )


def _require_factors(name: str, adapter: nn.Module, method: str) -> None:
    if not isinstance(adapter, LoraAdapter) or adapter.low_rank_factors() is None:
        raise ValueError(
            f"The adapter of {name!r} is a {type(adapter).__name__}, which is not one A and one B of its rank, so it "
            f"cannot be combined by {method!r}: merge it, or leave it out."
        )
