"""Predictions in a file."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.formats.publish import publish


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, a list with a dictionary for each row, as JSON Lines in the rows' order.

    Until the last of them is there, they are in a file of the same name that ends in ``.partial``.

    Args:
        path: The file to write. One that is there is replaced when all predictions are made.
        start: The row that the data begins with, to go on with the ``.partial`` file of an earlier run; of its rows
            from there on, those predicted now must be the same. Default ``None``: all rows are written anew. See
            :func:`resumable_from`.

    Raises:
        ValueError: In ``predict`` with several processes, whose rows would be out of order, and where the rows of an
            earlier run are others. Its file is left then.
    """

    def __init__(self, path: str, start: int | None = None) -> None:
        super().__init__("batch")
        self.path = Path(path)
        self.start = start
        self._partial = partial_file(path)
        self._again: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file, or go on with it."""
        if trainer.world_size > 1:
            raise ValueError(
                f"Found {trainer.world_size} processes, expected one to write predictions in the order of the rows. "
                "Set --trainer.devices 1."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [] if self.start is None else finished_rows(self._partial)
        self._again = rows[self.start :]
        with self._partial.open("ab") as file:
            file.truncate(len("".join(rows).encode()))  # never written again, which may fail on the way

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Add the rows of one batch."""
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in prediction]
        before, self._again = self._again, self._again[len(rows) :]
        if rows[: len(before)] != before[: len(rows)]:
            raise ValueError(
                f"The last rows of {self._partial} are not what is predicted now: they were made of another "
                "checkpoint, other data or settings, or drawn. Leave out --resume to make all rows anew."
            )
        with self._partial.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(rows[len(before) :])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the file in its place, and say where that is."""
        publish(self._partial, self.path)
        rank_zero_info(f"Wrote the predictions to {self.path}")


def partial_file(path: str | Path) -> Path:
    """Where predictions are until they are complete."""
    return Path(path).with_name(f"{Path(path).name}.partial")


def finished_rows(partial: Path) -> list[str]:
    """The lines that an earlier run has written to their ends."""
    written = partial.read_bytes() if partial.exists() else b""
    return [f"{line.decode()}\n" for line in written.split(b"\n")[:-1]]


def resumable_from(path: str | Path, batch_size: int) -> int:
    """The row to go on from: the first of the last batch that was written, to be predicted again and compared.

    Args:
        path: The file that the predictions go to at last.
        batch_size: Of both runs, since rows are computed together with those of their batch.
    """
    return max(len(finished_rows(partial_file(path))) - 1, 0) // batch_size * batch_size
