"""What a training run will hold in memory, before it runs: one step of it, on tensors without values."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora.fake_tensors import FakeTensors, ValueNeededError
from lightning_lora.fqn import clean_fqn
from lightning_lora.layers.quantized.bitsandbytes import OPERATORS
from lightning_lora.model.quantization import quantized_layers
from lightning_lora.model.state_dict import adapter_tensors

_ROWS, _BATCHES = 5_000, 32  # that are looked at for the largest batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds.

    Attributes:
        frozen: Frozen parameters, buffers and the scales of quantized weights.
        adapters: Trained parameters of adapters.
        others: Other trained parameters.
        kept: What lies beside the model for the whole run, such as the base's copy of what is trained in full, and
            averages of weights.
        gradients: All gradients.
        moments: The optimizers' state.
        peak: The most at once in a step that is not the first.
        gradients_at_peak: The gradients that are there at the peak.
        batch: The batch, in words.
    """

    frozen: int
    adapters: int
    others: int
    kept: int
    gradients: int
    moments: int
    peak: int
    gradients_at_peak: int
    batch: str

    @property
    def resting(self) -> int:
        """What is there between two steps, without gradients."""
        return self.frozen + self.adapters + self.others + self.kept + self.moments

    @property
    def activations(self) -> int:
        """What a step adds at its peak: what the backward pass needs, and intermediate results."""
        return self.peak - self.resting - self.gradients_at_peak


def fake_tensors() -> FakeTensors:
    """The context in which what :func:`estimate` takes is made."""
    return FakeTensors(OPERATORS)


def estimate(
    trainer: "pl.Trainer", model: "pl.LightningModule", data: "pl.LightningDataModule | None", fakes: FakeTensors
) -> MemoryEstimate:
    """Fit two steps on the largest batch, within ``fakes``.

    Args:
        trainer: Made in ``fakes``, for one process on the CPU, without loggers, checkpoints, validation or what else
            leaves traces.
        model: Made in ``fakes``.
        data: The data; ``None`` if the model has its own.
        fakes: What is running.

    Raises:
        ValueError: If values decide what a step does, so that it cannot be foreseen.
    """
    owner: Any = model if data is None else data
    own, found = owner.train_dataloader, ""

    def largest() -> Any:
        nonlocal found
        with fakes.off():
            loaders, found = _largest(own(), 2 * steps)
        return loaders

    steps = trainer.accumulate_grad_batches
    watch = _SecondStep(fakes, steps)
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]  # set by a connector
    owner.train_dataloader = largest
    try:
        trainer.fit(model, datamodule=data)
    except ValueNeededError as error:
        raise ValueError(
            f"Found that {error} in a step needs values, which there are none of before a run, expected steps that are "
            "alike for all values. Measure the first steps instead: fit with --trainer.max_steps 2."
        ) from error
    finally:
        owner.train_dataloader = own
        trainer.callbacks.remove(watch)  # type: ignore[attr-defined]
    if watch.found is None:
        raise ValueError("Found no second step to look at, expected a training_step that returns a loss.")
    return MemoryEstimate(**watch.found, batch=found)


class _SecondStep(Callback):
    """Looks at the steps after the first one of the optimizer, when all that is kept is there."""

    def __init__(self, fakes: FakeTensors, first: int) -> None:
        self._fakes = fakes
        self._first = first
        self.found: dict[str, Any] | None = None
        self._at_peak = self._unseen = 0

    def on_train_batch_start(self, trainer: "pl.Trainer", module: "pl.LightningModule", batch: Any, index: int) -> None:
        for tensor in _tensors(batch):
            self._fakes.count(tensor)
        if index != self._first:
            return
        gc.collect()
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]

        def on_peak() -> None:
            self._at_peak = _size(p.grad for p in trained if p.grad is not None)

        self._fakes.restart()
        on_peak()
        self._fakes.on_peak = on_peak
        names = set(map(clean_fqn, adapter_tensors(module)))
        adapters = _size(p for name, p in module.named_parameters() if p.requires_grad and clean_fqn(name) in names)
        packed: dict[int, int] = {}
        for _, layer, storage, weight in quantized_layers(module):
            packed.update((id(tensor), 0) for tensor in storage.tensors(weight))
            packed[id(storage.codes(weight))] = storage.size(layer, weight)
        frozen = [p for p in (*parameters, *module.buffers()) if not p.requires_grad and id(p) not in packed]
        states = [each for optimizer in trainer.optimizers for each in _tensors(list(optimizer.state.values()))]
        sizes = {
            "frozen": _size(frozen) + sum(packed.values()),
            "adapters": adapters,
            "others": _size(trained) - adapters,
            "gradients": _size(p.grad for p in trained if p.grad is not None),
            "moments": _size(states),
        }
        # Of packed weights without values, one number is there.
        self._unseen = sum(
            tensor.numel() * tensor.element_size() - _size([tensor])
            for *_, storage, weight in quantized_layers(module)
            for tensor in storage.tensors(weight)
        )
        kept = self._fakes.live + self._unseen - sum(sizes.values()) - _size(_tensors(batch))
        self.found = {**sizes, "kept": max(0, kept)}

    def on_train_batch_end(self, *_: Any) -> None:
        if self.found is not None:
            self._fakes.on_peak = None
            self.found |= {"peak": self._fakes.peak + self._unseen, "gradients_at_peak": self._at_peak}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors; what shares memory counts once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _largest(loaders: Any, count: int) -> tuple[Any, str]:
    """The same loaders, which give their largest batch so many times; and in words, which it is."""
    if isinstance(loaders, dict):
        found = {name: _largest(each, count) for name, each in loaders.items()}
        return {name: each for name, (each, _) in found.items()}, "; ".join(words for _, words in found.values())
    if isinstance(loaders, (list, tuple)):
        several = [_largest(each, count) for each in loaders]
        return [each for each, _ in several], "; ".join(words for _, words in several)
    batch, words = _largest_batch(loaders)
    return DataLoader([batch] * count, batch_size=None, collate_fn=_as_it_is), words  # type: ignore[arg-type]


def _as_it_is(batch: Any) -> Any:
    return batch


def _largest_batch(loader: Any) -> tuple[Any, str]:
    """The largest rows of a data set in one batch, or where a loader makes batches otherwise, the largest it gives."""
    if _batches_rows(loader):
        rows = loader.dataset
        chosen = np.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).astype(int).tolist()
        of_all = "" if len(chosen) == len(rows) else f" {len(chosen):,} of"
        chosen = sorted(chosen, key=lambda index: _numbers(rows[index]), reverse=True)[: loader.batch_size]
        batch = loader.collate_fn([rows[index] for index in chosen])
        words = f"the {len(chosen)} largest of{of_all} {len(rows):,} rows"
    else:
        batches = list(islice(loader, _BATCHES))
        if not batches:
            raise ValueError("Found no batch to train on, expected one at least.")
        batch = max(batches, key=_numbers)
        words = f"the largest of the first {len(batches)} batches"
    shapes = dict.fromkeys("x".join(map(str, tensor.shape)) for tensor in _tensors(batch) if tensor.ndim)
    return batch, f"{words}, {', '.join(shapes)}"


def _batches_rows(loader: Any) -> bool:
    """Whether a loader makes its batches of rows by their number alone."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return False
    return hasattr(loader.dataset, "__len__") and len(loader.dataset) > 0


def _numbers(row: Any) -> int:
    """How many numbers there are in a row or batch, in tensors, arrays and lists."""
    return sum(int(np.prod(leaf.shape)) if hasattr(leaf, "shape") else 1 for leaf in tree_leaves(row))
