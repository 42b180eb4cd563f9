"""A data loader that goes on where it stopped, in the middle of an epoch too."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lightning_lora.rng import generators_of, rng_state, set_rng_state


class EpochSampler(Sampler[int]):
    """A random order of ``length`` rows that depends on the seed and the epoch alone.

    Args:
        length: Number of rows.
        seed: Seed of all orders.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class ResumableDataLoader(DataLoader[Any]):
    """``DataLoader`` with the ``state_dict`` interface through which Lightning resumes in the middle of an epoch.

    The state is the epoch, the number of batches that were taken of it, and the random state at its start, from which
    an order that is drawn (``shuffle=True``) and the seeds of workers are drawn again. Where the loader has another
    number of batches now, since there are more or fewer processes, it goes on after the same share of them; that needs
    an order that depends on the epoch alone, such as :class:`EpochSampler` or ``DistributedSampler`` give it.
    """

    _taken = 0
    _start: dict[str, Any] | None = None
    _loaded: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        state, self._loaded = self._loaded, None
        if state is None or state.get("start") is None or state["batches"] != len(self):
            self._start = self._random_state()
            return self._counting(self._skipping(state))
        before, self._start = rng_state(), state["start"]
        self._set_random_state(state["start"])
        try:
            return self._counting(self._skipping(state))
        finally:
            set_rng_state(before)

    def _skipping(self, state: dict[str, Any] | None) -> Iterator[Any]:
        batches = super().__iter__()
        self._taken = 0 if state is None else state["taken"] * len(self) // state["batches"]
        for _ in range(self._taken):
            next(batches)
        # An order is drawn with the first batch, which must be by the random state of this moment.
        return batches if self._taken else chain(list(islice(batches, 1)), batches)

    def _counting(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of batches taken of it, that of all, and the random state at its start."""
        if self._loaded is not None:
            return self._loaded
        epochs = [sampler.epoch for sampler in self._samplers() if hasattr(sampler, "epoch")]
        epoch = epochs[0] if epochs else 0
        return {"epoch": epoch, "taken": self._taken, "batches": len(self), "start": self._start, "lightning_lora": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start after the batches that were taken."""
        self._loaded = dict(state_dict)
        if state_dict["taken"] >= state_dict["batches"]:
            # Lightning begins a new epoch after the last batch, and would find this one empty.
            self._loaded.update(epoch=state_dict["epoch"] + 1, taken=0, start=None)
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._loaded["epoch"])

    def _samplers(self) -> list[Any]:
        found = (self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None))
        return list({id(each): each for each in found if each is not None}.values())

    def _random_state(self) -> dict[str, Any]:
        return {**rng_state(), "generators": [each.get_state() for each in generators_of(self)]}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_rng_state(state)
        for generator, saved in zip(generators_of(self), state["generators"]):
            generator.set_state(saved.cpu())
