"""``LoRA(merge="best")``: which checkpoint is the best of a run, and how the model gets what it holds."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.formats.checkpoint import KEY, check_checkpoint
from lightning_lora.formats.metadata import runs_in
from lightning_lora.model.record import injections
from lightning_lora.model.state_dict import CheckpointError

_ADD = 'add ModelCheckpoint(monitor="val_loss") to its callbacks, or use merge="last"'


def require_best(trainer: pl.Trainer) -> None:
    """Require, before a run, that it will keep one checkpoint that is the best.

    Raises:
        ValueError: If none is kept, or several by different monitored values.
    """
    keepers = _keepers(trainer)
    if not keepers:
        what = "none of the Trainer's ModelCheckpoints keeps one" if trainer.checkpoint_callbacks else "it keeps none"
        raise ValueError(f'LoRA(merge="best") needs a checkpoint of the best step, and {what}: {_ADD}.')
    if keepers[0].monitor is None:
        rank_zero_warn(
            'LoRA(merge="best") will merge the newest checkpoint, which is the best_model_path of a ModelCheckpoint '
            f"that monitors nothing: {_ADD}."
        )
    kinds = list(dict.fromkeys(f"monitor={keeper.monitor!r}, mode={keeper.mode!r}" for keeper in keepers))
    if len(kinds) > 1:
        raise ValueError(
            f'LoRA(merge="best") cannot tell which is the best: the Trainer has ModelCheckpoints with '
            f"{' and with '.join(kinds)}. Give all that have a monitor the same one, or use merge=None and load the "
            "checkpoint that you want after the run."
        )


def require_own_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Require, before the first step, that no ModelCheckpoint has the best of a run of another adapter.

    Raises:
        ValueError: If one has: it was in another Trainer before.
    """
    earlier = next((keeper.best_model_path for keeper in _keepers(trainer) if keeper.best_model_path), None)
    if earlier and trainer.ckpt_path is None and not any(injection.runs for injection in injections(module)):
        raise ValueError(
            f'LoRA(merge="best") would merge {earlier}, which a ModelCheckpoint of this Trainer has kept in a run of '
            "another adapter: give each run a ModelCheckpoint of its own."
        )


def load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Load the best checkpoint of the run that just ended: adapters, and what is trained outside of them.

    Raises:
        CheckpointError: If the run kept none, as its monitored value was never there, or another run's is there now.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info('fast_dev_run keeps no checkpoints, so merge="best" merges the adapter of the last step.')
        return
    keepers = [keeper for keeper in _keepers(trainer) if keeper.best_model_path]
    if not keepers:
        raise CheckpointError(
            f'merge="best" needs a best checkpoint, and this run kept none: {_ADD}. The adapter of the last step is '
            "still in the model, unmerged."
        )
    path = min(keepers, key=_rank).best_model_path
    strategy: Any = trainer.strategy
    checkpoint = strategy.read_again(path)
    runs = runs_in(checkpoint[KEY])
    if runs and not any(runs[-1] in injection.runs for injection in injections(module)):
        raise CheckpointError(
            f'merge="best" finds in {path} the checkpoint of another run, which has written to the same place: give '
            "each run a directory of its own. The adapter of the last step is still in the model, unmerged."
        )
    checkpoint["state_dict"] = check_checkpoint(module, checkpoint, path)
    module.on_load_checkpoint(checkpoint)  # as Lightning does before it loads
    strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)


def _keepers(trainer: pl.Trainer) -> list[Any]:
    """The callbacks that keep checkpoints by a monitored value; if there is none, the first, as Lightning has it."""
    found: list[Any] = [each for each in trainer.checkpoint_callbacks if getattr(each, "save_top_k", 0) != 0]
    return [keeper for keeper in found if keeper.monitor] or found[:1]


def _rank(keeper: Any) -> float:
    score = keeper.best_model_score
    if score is None:
        return float("inf")
    return -float(score) if keeper.mode == "max" else float(score)
