"""Which rows of a batch belong to which adapter, where each sample has its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Which adapter each sample of a batch has.

    Attributes:
        choice: For each sample, the index of its adapter in ``samples``, or their number for none.
        samples: By adapter, the indices of its samples.
    """

    choice: Tensor
    samples: dict[str, Tensor]


def rows_of(adapter_names: Sequence[str | None], names: Sequence[str]) -> Rows:
    """Which adapter each sample has, given the name of each sample's adapter and all of these names once."""
    index = {name: position for position, name in enumerate(names)}
    choice = torch.tensor([len(index) if name is None else index[name] for name in adapter_names], dtype=torch.long)
    samples = {name: (choice == position).nonzero().flatten() for name, position in index.items()}
    return Rows(choice, samples)


def input_rows(samples: Tensor, count: int, rows: int) -> Tensor:
    """The rows of given samples in a tensor whose rows are ``count`` samples, or several in a row for each of them."""
    each, rest = divmod(rows, count)
    if rest:
        raise ValueError(
            f"adapters_for names the adapters of {count} samples, but a layer got an input of {rows} rows: give one "
            "name for each sample of the batch (None for the base alone)."
        )
    return (samples.unsqueeze(1) * each + torch.arange(each, device=samples.device)).flatten()
