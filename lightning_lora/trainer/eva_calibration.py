"""EVA calibration: run training_step on training batches before fit, without side effects."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora.eval_mode import evaluating
from lightning_lora.model.eva import KIND, EvaInitialization, is_untrained
from lightning_lora.model.record import Injection
from lightning_lora.rng import generators_of, rng_state, set_rng_state

MAX_BATCHES = 100
_SILENT = ("log", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
_INSTEAD = (
    "Compute the start yourself before fit: inject(module, config), then initialize_eva(module, batches, forward), and "
    "give LoRA the same config."
)


def calibrate_eva(trainer: "pl.Trainer", pl_module: "pl.LightningModule", mine: Injection) -> None:
    """Start a fresh EVA adapter at what training batches bring to its layers; other adapters stay as they are.

    ``training_step`` runs in eval mode without gradients on at most 100 batches. Optimizers, schedulers, loggers,
    random numbers, buffers, metrics and the modules' attributes are as before afterwards, and so is the order of the
    batches. In several processes, all take over what the first one found.

    Raises:
        ValueError: If the module's ``training_step`` or data cannot be used so.
    """
    is_fresh = mine.config.init_lora_weights == KIND and not mine.from_data and is_untrained(mine)
    if not is_fresh or trainer.ckpt_path is not None or trainer.limit_train_batches == 0:
        return
    step = pl_module.training_step
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"The training_step of {type(pl_module).__name__} takes dataloader_iter, so that batches cannot be fed to "
            f"it for init_lora_weights={KIND!r}. {_INSTEAD}"
        )
    has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    start = EvaInitialization([mine])
    with _without_side_effects(trainer, pl_module):
        for index, batch in enumerate(_batches(trainer, lambda: start.converged)):
            on_device = _to_device(trainer, pl_module, batch)
            arguments = (on_device, index) if has_index else (on_device,)
            try:
                start.observe(partial(pl_module.training_step, *arguments), on_device)
            except Exception as error:
                raise ValueError(
                    f"init_lora_weights={KIND!r} runs the training_step of {type(pl_module).__name__} before the "
                    "training, without gradients and before on_train_start, and it failed "
                    f"({type(error).__name__}: {error}). With manual optimization, call self.manual_backward(loss) "
                    f"rather than loss.backward(). {_INSTEAD}"
                ) from error
    # On the CPU, since tensors are sent with their device.
    start.finish(lambda tensor: trainer.strategy.broadcast(tensor.cpu()))


def _batches(trainer: "pl.Trainer", enough: Callable[[], bool]) -> Iterator[Any]:
    """Training batches, equally many in each process, until the first process has enough."""
    loaders = _request_dataloader(trainer.fit_loop._data_source)
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    if any(isinstance(loader, Iterator) for loader in combined.flattened):
        raise ValueError(
            "The training data is an iterator, which cannot start over after init_lora_weights="
            f"{KIND!r} has looked at it: pass a DataLoader or another iterable. {_INSTEAD}"
        )
    again = CombinedLoader(combined.iterables, combined._mode)
    generators = {id(found): found for loader in combined.flattened for found in generators_of(loader)}.values()
    states = [generator.get_state() for generator in generators]
    again.flattened = [_own_copy(loader) for loader in combined.flattened]
    try:
        batches = islice(iter(again), _limit(trainer, sized_len(again)))
        while True:
            batch = next(batches, None)
            stop = batch is None or (trainer.is_global_zero and enough())
            if trainer.strategy.reduce_boolean_decision(stop, all=False):
                return
            assert batch is not None
            yield batch[0]
    finally:
        again.reset()
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _limit(trainer: "pl.Trainer", length: int | None) -> int:
    limit = trainer.limit_train_batches
    if isinstance(limit, float):
        limit = MAX_BATCHES if length is None else int(limit * length)
    return min(limit, MAX_BATCHES)


def _own_copy(loader: Any) -> Any:
    """The same data with a position of its own."""
    if not isinstance(loader, DataLoader):
        return loader
    loader = copy.copy(loader)
    loader._iterator = None  # of persistent workers
    return loader


def _to_device(trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any) -> Any:
    """As Lightning's training loop does, which has no public method for it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _without_side_effects(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[None]:
    """Have training steps log, optimize and change nothing."""
    random, loggers = rng_state(), trainer.loggers
    attributes = [(module, _attributes(module)) for module in pl_module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    optimizers, schedulers = pl_module.optimizers, pl_module.lr_schedulers
    with ExitStack() as stack:
        stack.enter_context(trainer.precision_plugin.train_step_context())
        # Compiling for this would be a waste. Only since torch 2.6, and not imported where nothing is compiled.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(pl_module))
        trainer.loggers = [DummyLogger() for _ in loggers]
        pl_module.__dict__.update(
            dict.fromkeys(_SILENT, _do_nothing),
            optimizers=lambda use_pl_optimizer=True: _idle(optimizers(use_pl_optimizer)),
            lr_schedulers=lambda: _idle(schedulers()),
        )
        try:
            yield
        finally:
            trainer.loggers = loggers
            for module, before in attributes:
                module.__dict__.clear()
                module.__dict__.update(before)
            for buffer, value in buffers:
                buffer.copy_(value)
            set_rng_state(random)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module; of a metric, with copies of what it has counted."""
    from torchmetrics import Metric  # here, so that importing the package does not import it

    counted = copy.deepcopy(module.metric_state) if isinstance(module, Metric) else {}
    return {**module.__dict__, **counted}


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Idle:
    """An optimizer or a scheduler that can be read, but takes no step."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Run the closure alone; a scheduler gets a number there."""
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Leave the gradients."""


def _idle(real: Any) -> Any:
    if isinstance(real, list):
        return [_Idle(each) for each in real]
    return _Idle(real) if real is not None else None
