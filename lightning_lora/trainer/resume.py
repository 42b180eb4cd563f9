"""The moment at which a run was saved: what a checkpoint keeps of it, and how a resumed run goes on from there.

From the saved moment to its next training batch, a run may validate, step a scheduler by a metric, end the epoch, begin
the next one and make the data loader's iterator, and any of that may draw random numbers. Lightning 2.6 leaves some of
it out when it resumes, and does other parts too early, so that no random state is the right one for all. A resumed run
takes the loops up where the saved one was instead, sets the random state there, and does all that follows in its order.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader

from lightning_lora.formats.checkpoint import KEY
from lightning_lora.rng import generators_of, rng_state, set_rng_state
from lightning_lora.sharding import is_sharded
from lightning_lora.trainer.instance_mixin import mix_into
from lightning_lora.trainer.requeue import Requeue

RNG_KEY = "rng"

_PROGRESS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
# What is overridden, used or relied on in Lightning 2.6's loops, which have no public interface.
_FIT_LOOP = (
    "_combined_loader",
    "_combined_loader_states_to_load",
    "_load_combined_loader_states",
    "_data_fetcher",
    "done",
    "reset",
    "on_advance_start",
    "on_iteration_done",
    "epoch_progress",
)
_EPOCH_LOOP = (
    "_skip_next_val",
    "_should_check_val_fx",
    "done",
    "advance",
    "on_advance_end",
    "on_iteration_done",
    "update_lr_schedulers",
    "batch_progress",
    "val_loop",
)


def rebuild_dataloader(trainer: pl.Trainer) -> None:
    """Have the training data loader made after the progress of a run is restored, not before.

    Lightning 2.6 gives a resumable loader its saved position when it makes the loader, and asking for
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes it before there is a position. There is no
    public way to have it made again; Lightning's learning-rate finder does it in this way too.
    """
    trainer.fit_loop._combined_loader = None


def run_rng_state(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of this moment, beside the progress that Lightning keeps."""
    loop = trainer.fit_loop.epoch_loop
    out_of_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return {
        "mid_epoch": trainer.fit_loop.batch_idx >= 0 and not trainer.is_last_batch,
        "states": _states_of_all_ranks(trainer, checkpoint),
        "in_validation": getattr(loop, "before_validation", None) is not None,
        "stopped_in_epoch": not trainer.is_last_batch and (out_of_steps or trainer.should_stop),
        "batches": trainer.num_training_batches,
        "metrics": {} if trainer.interrupted else _metrics(trainer),
        # Their gradients have part of another batch's in them by now, so they are computed anew.
        "again": _accumulated(trainer) if _in_backward(trainer) else 0,
        "accumulate": _accumulates(trainer),
    }


def _accumulates(trainer: pl.Trainer) -> int | None:
    """Of how many batches a step takes the gradients, if a hook has set it since the run began."""
    number = trainer.accumulate_grad_batches
    return None if number == getattr(trainer.fit_loop, "accumulated", number) else number


def _metrics(trainer: pl.Trainer) -> dict[str, Any]:
    return {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}


def _states_of_all_ranks(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One a rank, since dropout differs between them; none where the other ranks cannot be asked."""
    if trainer.world_size == 1:
        return [_state_of_rank(trainer)]
    if trainer.interrupted or not torch.distributed.is_initialized():
        return []  # after an exception, this may be the only rank that saves
    states: list[Any] = [None] * trainer.world_size
    # Lightning's own `strategy.all_gather` takes tensors alone, and its checkpoint has the first rank's loader alone.
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    torch.distributed.all_gather_object(states, {**_state_of_rank(trainer), "loaders": loaders})
    return states


def _state_of_rank(trainer: pl.Trainer) -> dict[str, Any]:
    # A validation that was saved in its middle is begun again.
    numbers = getattr(trainer.fit_loop.epoch_loop, "before_validation", None) or _random_state(trainer)
    return {**numbers, "gradients": _accumulated_gradients(trainer)}


def _accumulated_gradients(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    module = trainer.lightning_module
    is_kept = _accumulated(trainer) or not module.automatic_optimization  # which may step whenever it likes
    if not is_kept or _in_backward(trainer) or is_sharded(module):
        return {}
    return {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None and p.requires_grad}


def _accumulated(trainer: pl.Trainer) -> int:
    """How many batches are done of those whose gradients the next step takes."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done: int = progress.current.processed
    stepped = progress.is_last_batch and done == progress.current.ready
    if stepped or trainer.strategy.handles_gradient_accumulation:
        return 0
    return done % trainer.accumulate_grad_batches


def _in_backward(trainer: pl.Trainer) -> bool:
    """Whether gradients have part of a batch's in them that is not done."""
    loop: Any = trainer.fit_loop.epoch_loop
    batch: Any = loop.batch_progress.current
    return getattr(loop, "backward_began", False) and batch.ready > batch.processed


def _random_state(trainer: pl.Trainer) -> dict[str, Any]:
    generators = [[each.get_state() for each in of_loaders] for of_loaders in _loaders_generators(trainer)]
    return {**rng_state(), "generators": generators}


def _loaders_generators(trainer: pl.Trainer) -> Iterator[list[torch.Generator]]:
    for loaders in (trainer.train_dataloader, trainer.val_dataloaders):
        yield [each for loader in CombinedLoader(loaders).flattened for each in generators_of(loader)]


@dataclass
class Moment:
    """Where in a run its checkpoint was written.

    Attributes:
        in_epoch: Whether an epoch had begun and not ended.
        follows: Whether what follows a training batch was still to be done for the latest one.
        validated: Whether the validation after that batch, if one is due, had been run.
        epoch_ends: Whether that batch was the last one of its epoch.
        plateau_due: Whether schedulers were still to be stepped by the finished epoch's metrics.
        stateful: Whether the data loaders' positions are in the checkpoint.
        batches: Number of batches of an epoch, if known.
        metrics: What callbacks and schedulers may monitor; ``None`` in checkpoints of version 0.1.
        state: What this rank has to itself: random states and accumulated gradients.
        accumulate: Of how many batches a step takes the gradients, if a hook had set it.
    """

    in_epoch: bool
    follows: bool
    validated: bool
    epoch_ends: bool
    plateau_due: bool
    stateful: bool
    batches: float | None
    metrics: dict[str, Any] | None
    state: dict[str, Any] | None
    accumulate: int | None = None

    def restore(self, trainer: pl.Trainer) -> None:
        """Set random states, gradients and metrics to what they were at this moment."""
        module = trainer.lightning_module
        if self.in_epoch and self.accumulate is not None:  # its start, where hooks set it, is not called again
            trainer.accumulate_grad_batches = self.accumulate
        trainer.callback_metrics.update({name: value.to(module.device) for name, value in (self.metrics or {}).items()})
        if self.state is None:
            return
        parameters = dict(module.named_parameters())
        for name, gradient in self.state.get("gradients", {}).items():
            parameters[name].grad = gradient.to(parameters[name].device)
        states = self.state.get("generators", [[], []])
        if states[1] and trainer.val_dataloaders is None:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        for generators, saved in zip(_loaders_generators(trainer), states):
            for generator, state in zip(generators, saved):
                generator.set_state(state.cpu())
        set_rng_state(self.state)


def install(trainer: pl.Trainer) -> None:
    """Make a Trainer's loops able to go on from any moment.

    Raises:
        RuntimeError: If this version of Lightning has changed the loops.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    absent = [
        name
        for loop, names in ((fit_loop, _FIT_LOOP), (epoch_loop, _EPOCH_LOOP))
        for name in names
        if name not in vars(loop) and not hasattr(type(loop), name)
    ]
    if absent:
        raise RuntimeError(
            f"Lightning's training loops have no {', '.join(absent)}, through which lightning-lora resumes "
            "exactly: it was made for Lightning 2.6, so install that version."
        )
    mix_into(fit_loop, ResumingFitLoop)
    mix_into(epoch_loop, ResumingEpochLoop)
    fit_loop.moment = None  # type: ignore[attr-defined]
    fit_loop.accumulated = trainer.accumulate_grad_batches  # type: ignore[attr-defined]
    fit_loop.requeue = Requeue()  # type: ignore[attr-defined]


def go_on_from(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Have the Trainer's loops go on at the moment of a checkpoint, whose progress they are about to load.

    Raises:
        RuntimeError: If this version of Lightning keeps the progress elsewhere.
    """
    trainer.fit_loop.moment = settle(checkpoint, trainer.global_rank, trainer.world_size)  # type: ignore[attr-defined]


def settle(checkpoint: dict[str, Any], rank: int = 0, world_size: int = 1) -> Moment:
    """Find the moment at which a checkpoint was written, and round its progress to what was done by then.

    Raises:
        RuntimeError: If this version of Lightning keeps the progress elsewhere.
    """
    saved: dict[str, Any] = checkpoint.get(KEY, {}).get(RNG_KEY) or {}
    states = saved.get("states", [])
    state = states[rank] if len(states) == world_size else None
    progress = checkpoint["loops"]["fit_loop"]
    if not all(name in progress for name in _PROGRESS):
        raise RuntimeError(
            f"The checkpoint's progress has no {', '.join(_PROGRESS)}, by which lightning-lora resumes exactly: it was "
            "made for Lightning 2.6, so install that version."
        )
    epoch, batch, validation = (progress[name] for name in _PROGRESS)
    loops = progress["state_dict"]
    if state is not None and "loaders" in state:
        loops["combined_loader"] = state["loaders"]
    now, ends = batch["current"], batch["is_last_batch"]
    # A run that stops in the middle of an epoch, by max_steps, ends that epoch, and goes on in it when resumed.
    begun = epoch["current"]["started"] > epoch["current"]["processed"]
    starting = epoch["current"]["ready"] > epoch["current"]["started"]
    stopped = saved.get("stopped_in_epoch", True) and not (begun or starting or ends) and now["ready"] > 0
    in_validation = saved.get("in_validation", validation["total"]["started"] > validation["total"]["processed"])
    moment = Moment(
        in_epoch=begun or stopped,
        follows=0 < now["ready"] == now["processed"] and not stopped,
        validated=now["completed"] == now["processed"] and not in_validation,
        epoch_ends=ends,
        plateau_due=not (begun or stopped) and epoch["current"]["completed"] < epoch["current"]["processed"],
        stateful=bool(loops.get("combined_loader")),
        batches=saved.get("batches"),
        metrics=saved.get("metrics"),
        state=state,
        accumulate=saved.get("accumulate"),
    )
    again = saved.get("again", 0)
    if begun and now["ready"] > now["processed"]:
        for loader_state in loops.get("combined_loader", []):
            _put_back(loader_state, 1 + again)
    for counts in ("total", "current"):
        _round(epoch[counts], epoch[counts]["processed"] - stopped, moment.in_epoch)
        _round(batch[counts], batch[counts]["processed"] - again)
        _round(validation[counts], validation[counts]["processed"])
    return moment


def _round(counts: dict[str, int], done: int, begun: bool = False) -> None:
    counts.update(ready=done + begun, started=done + begun, processed=done, completed=done)


def _put_back(loader_state: Any, batches: int) -> None:
    """Batches that had only been fetched are fetched again; our own loaders know how."""
    if isinstance(loader_state, dict) and "lightning_lora" in loader_state:
        loader_state["taken"] = max(0, loader_state["taken"] - batches)


class ResumingFitLoop:
    """Lightning's loop over epochs, going on from any moment.

    There is no public way to plug into the loops of Lightning 2.6. Which names this needs is asked in :func:`install`.
    """

    moment: Moment | None
    accumulated: int  # of how many batches a step took the gradients when the run began
    requeue: "Requeue"
    trainer: pl.Trainer
    _combined_loader_states_to_load: list[Any]

    @property
    def done(self: Any) -> bool:
        # Where the last step was saved, what follows it was not done yet.
        return (self.moment is None or not self.moment.in_epoch or not self.moment.follows) and super().done  # type: ignore[misc]

    def _load_combined_loader_states(self: Any) -> None:
        # Lightning leaves it out where an epoch has just ended, though a loader may count the epochs.
        if self.moment is not None and self._combined_loader is not None and self._combined_loader_states_to_load:
            self._combined_loader._load_state_dicts(self._combined_loader_states_to_load)
            self._combined_loader_states_to_load = []
        super()._load_combined_loader_states()  # type: ignore[misc]

    def reset(self: Any) -> None:
        moment, batches = self.moment, self.trainer.num_training_batches
        if moment is not None and moment.batches not in (None, batches, float("inf")) and batches != float("inf"):
            now = self.epoch_loop.batch_progress.current  # more or fewer processes share an epoch
            now.ready = now.started = now.processed = now.completed = int(now.processed * batches // moment.batches)
        super().reset()  # type: ignore[misc]

    def on_advance_start(self: Any) -> None:
        moment = self.moment
        if moment is not None and not moment.in_epoch:
            self.moment = None
            if moment.stateful and self.trainer.current_epoch > 0:
                _leave(self._data_fetcher)
            _end_restart(self)
            moment.restore(self.trainer)
            if moment.plateau_due and moment.metrics is not None:
                self.epoch_progress.current.completed -= 1
                self.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
                self.epoch_progress.current.completed += 1
        super().on_advance_start()  # type: ignore[misc]


class ResumingEpochLoop:
    """Lightning's loop over batches, going on from any moment in it."""

    before_validation: dict[str, Any] | None = None
    backward_began = False  # of the latest batch
    trainer: pl.Trainer

    @property
    def done(self: Any) -> bool:
        return self.trainer.fit_loop.moment is None and super().done  # type: ignore[misc]

    def advance(self: Any, data_fetcher: Any) -> None:
        fit_loop: Any = self.trainer.fit_loop
        moment, fit_loop.moment = fit_loop.moment, None
        self.backward_began = False
        if moment is not None:
            if moment.stateful and moment.epoch_ends and moment.follows:
                _leave(data_fetcher)
            self.on_iteration_done()
            self.val_loop.on_iteration_done()
            if moment.metrics is not None:  # else Lightning leaves out schedulers that monitor one
                _end_restart(fit_loop)
            moment.restore(self.trainer)
            if moment.follows:
                self._skip_next_val = moment.validated
                return
        super().advance(data_fetcher)  # type: ignore[misc]

    def on_advance_end(self: Any, data_fetcher: Any) -> None:
        if self._should_check_val_fx(data_fetcher) and not self._skip_next_val:
            self.before_validation = _random_state(self.trainer)
        try:
            super().on_advance_end(data_fetcher)  # type: ignore[misc]
        finally:
            self.before_validation = None


def backward_begins(trainer: pl.Trainer) -> None:
    """From now on, gradients may have part of this batch's in them."""
    trainer.fit_loop.epoch_loop.backward_began = True


def validation_ended(trainer: pl.Trainer) -> None:
    """From now on, a checkpoint is one of a finished validation."""
    trainer.fit_loop.epoch_loop.before_validation = None


def _end_restart(fit_loop: Any) -> None:
    """From here on, nothing is done otherwise than in a run that was not resumed."""
    for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
        loop.on_iteration_done()


def _leave(data_fetcher: Any) -> None:
    """Have a loader that has loaded the position of an epoch's end pass it, since it is asked for a new epoch next."""
    with suppress(StopIteration):
        next(data_fetcher)
