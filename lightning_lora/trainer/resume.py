"""The state of the random generators, in plain types: what dropout and shuffling need to go on where they stopped."""

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_lora.formats.checkpoint import KEY

RNG_KEY = "rng"


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


def rebuild_dataloader(trainer: pl.Trainer) -> None:
    """Have the training data loader made after the progress of a run is restored, not before.

    Lightning 2.6 gives a resumable loader its saved position when it makes the loader, and asking for
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes it before there is a position. There is no
    public way to have it made again; Lightning's learning-rate finder does it in this way too.

    Raises:
        RuntimeError: If this version of Lightning keeps the loader elsewhere.
    """
    if not hasattr(trainer.fit_loop, "_combined_loader"):
        raise RuntimeError(
            "Lightning's fit loop has no _combined_loader, through which lightning-lora resumes data loaders in the "
            "middle of an epoch: it was made for Lightning 2.6, so install that version."
        )
    trainer.fit_loop._combined_loader = None


def run_rng_state(trainer: pl.Trainer) -> dict[str, Any]:
    batch_idx = trainer.fit_loop.batch_idx
    return {
        "mid_epoch": batch_idx >= 0 and not trainer.is_last_batch,
        "states": _rng_states_of_all_ranks(trainer),
    }


def _rng_states_of_all_ranks(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """One a rank, since dropout differs between them; none where the other ranks cannot be asked."""
    if trainer.world_size == 1:
        return [rng_state()]
    if trainer.interrupted or not torch.distributed.is_initialized():
        return []  # after an exception, this may be the only rank that saves
    states: list[Any] = [None] * trainer.world_size
    # Lightning's own `strategy.all_gather` takes tensors alone.
    torch.distributed.all_gather_object(states, rng_state())
    return states


def rng_to_restore(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> dict[str, Any] | None:
    """The random state of this rank in a checkpoint, if that is of a run with as many processes."""
    saved: dict[str, Any] | None = checkpoint.get(KEY, {}).get(RNG_KEY)
    if saved is None or len(saved["states"]) != trainer.world_size:
        return None
    return {"mid_epoch": saved["mid_epoch"], "state": saved["states"][trainer.global_rank]}
