"""Each run has a name, and its checkpoints say which runs led to them: so a file tells whether it is one's own."""

import uuid
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_lora.formats.checkpoint import KEY
from lightning_lora.formats.metadata import activate_as_saved, runs_in
from lightning_lora.model.record import injections


def begin(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give the run that begins a name, the same in all processes."""
    run = trainer.strategy.broadcast(uuid.uuid4().hex)
    for injection in injections(module):
        injection.runs.append(run)


def go_on_from(checkpoint: Mapping[str, Any], module: pl.LightningModule) -> None:
    """Take over the names of the runs that led to a checkpoint, and which adapters were active."""
    if KEY not in checkpoint:
        return
    activate_as_saved(module, checkpoint[KEY])
    runs = runs_in(checkpoint[KEY])
    for injection in injections(module):
        injection.runs = [*runs, *(run for run in injection.runs if run not in runs)]
