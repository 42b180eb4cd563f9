"""A data loader that goes on where it stopped, in the middle of an epoch too."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


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

    The state is the epoch and the number of batches that were taken of it. That is enough with an order that depends on
    the epoch alone, such as :class:`EpochSampler` or ``DistributedSampler`` give it. Where the loader has another
    number of batches now, since there are more or fewer processes, it goes on after the same share of them.
    """

    _taken = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._taken, self._skip = self._skip, 0
        batches = super().__iter__()
        for _ in range(self._taken):
            next(batches)
        return self._counting(batches)

    def _counting(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the number of batches taken of it, and that of all."""
        epoch = getattr(self.sampler, "epoch", 0)
        # Lightning begins a new epoch after the last batch, and would find this one empty.
        epoch, taken = (epoch + 1, 0) if self._taken >= len(self) else (epoch, self._taken)
        return {"epoch": epoch, "taken": taken, "batches": len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start after the batches that were taken."""
        self._skip = state_dict["taken"] * len(self) // state_dict["batches"]
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(state_dict["epoch"])
