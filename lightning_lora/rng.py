"""The state of random generators, in plain types: what dropout and shuffling need to go on where they stopped."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and every CUDA device's generator."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).view(np.int32)), position, has_gauss, cached],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators to what :func:`rng_state` gave; CUDA's where the same number of devices is there."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().view(np.uint32), position, has_gauss, cached))


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a data loader and its samplers have to themselves."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
