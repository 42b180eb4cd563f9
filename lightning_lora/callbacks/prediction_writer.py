"""Predictions in a file."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, a list with a dictionary for each row, as JSON Lines in the rows' order.

    Until the last of them is there, they are in a file of the same name that ends in ``.partial``.

    Args:
        path: The file to write. One that is there is replaced when all predictions are made.

    Raises:
        ValueError: In ``predict`` with several processes, whose rows would be out of order.
    """

    def __init__(self, path: str) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self._partial = self.path.with_name(f"{self.path.name}.partial")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file."""
        if trainer.world_size > 1:
            raise ValueError(
                f"Found {trainer.world_size} processes, expected one to write predictions in the order of the rows. "
                "Set --trainer.devices 1."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.write_text("", encoding="utf-8")

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Add the rows of one batch."""
        with self._partial.open("a", encoding="utf-8", newline="\n") as file:
            for row in prediction:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the file in its place, and say where that is."""
        self._partial.replace(self.path)
        rank_zero_info(f"Wrote the predictions to {self.path}")
