"""The state of random generators, in plain types: what dropout and shuffling need to go on where they stopped."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and every GPU's generator."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **({"xpu": torch.xpu.get_rng_state_all()} if torch.xpu.is_available() else {}),
        **({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {}),
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).view(np.int32)), position, has_gauss, cached],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all generators to what :func:`rng_state` gave; those of GPUs where the same number of them is there."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    if torch.xpu.is_available() and len(state.get("xpu", [])) == torch.xpu.device_count():
        torch.xpu.set_rng_state_all([device_state.cpu() for device_state in state["xpu"]])
    if torch.backends.mps.is_available() and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().view(np.uint32), position, has_gauss, cached))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by a seed on a device in this block; all generators go on as if nothing had been drawn.

    ``torch.manual_seed`` would seed the generators of all other devices too, for good.
    """
    on_cpu = device.type in ("cpu", "meta")  # nothing is drawn on the meta device
    state = torch.Generator("cpu" if on_cpu else device).manual_seed(seed).get_state()
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a data loader and its samplers have to themselves."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
