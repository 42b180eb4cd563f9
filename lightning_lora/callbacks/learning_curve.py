"""The learning curve of a run, beside its checkpoints."""

from io import BytesIO
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_lora.callbacks.logged_files import log_file
from lightning_lora.formats.curves import (
    CURVE_FILE,
    METRICS_FILE,
    SPEED,
    Curves,
    read_curves,
    read_metrics,
    write_curves,
)
from lightning_lora.formats.publish import whole_file

PICTURE = "learning_curve.png"


class LearningCurve(Callback):
    """Save ``learning_curve.csv`` and ``learning_curve.png`` beside the checkpoints when a fit ends, or is interrupted.

    Both hold what the run logged, by step, as Lightning's ``CSVLogger`` recorded it, and where it was resumed, what it
    had logged before. The picture needs matplotlib; the cards of what ``LoRA(export_dir=...)`` exports show it too, and
    MLflow, W&B and TensorBoard, where the Trainer has their loggers.

    Raises:
        ValueError: At the start of a fit, if the trainer has no ``CSVLogger`` or no ``ModelCheckpoint``.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look early for what the end needs."""
        self._start = 0
        self._drawn: tuple[Curves, bytes | None] = ({}, None)
        if stage == "fit" and _is_recorded(trainer):
            _logger(trainer)
            _folder(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where a run that is resumed goes on."""
        self._start = trainer.global_step // max(1, len(trainer.optimizers))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the files."""
        if stage == "fit" and _is_recorded(trainer):
            self._save(trainer)

    def card_picture(self, trainer: L.Trainer, directory: Path) -> str | None:
        """The run so far, drawn for the card of what it exports.

        Returns:
            The name of the picture in the directory, ``None`` if there is nothing to draw.
        """
        picture = self._picture(self._curves(trainer)) if _is_recorded(trainer) else None
        if picture is None:
            return None
        (directory / PICTURE).write_bytes(picture)
        return PICTURE

    def _picture(self, curves: Curves) -> bytes | None:
        """These curves, drawn once for all who show them."""
        if curves != self._drawn[0]:
            self._drawn = curves, draw(curves)
        return self._drawn[1]

    def _curves(self, trainer: L.Trainer) -> Curves:
        """What was logged so far, and where the run was resumed, before."""
        logger = _logger(trainer)
        logger.save()
        table = Path(logger.log_dir) / METRICS_FILE
        curves = read_metrics(table) if table.exists() else {}
        saved = _folder(trainer) / CURVE_FILE
        if self._start and saved.exists():
            curves = _joined(read_curves(saved), curves, self._start)
        return curves

    @rank_zero_only
    def _save(self, trainer: L.Trainer) -> None:
        curves = self._curves(trainer)
        if not curves:
            return
        folder = _folder(trainer)
        write_curves(curves, folder / CURVE_FILE)
        if (picture := self._picture(curves)) is not None:
            with whole_file(folder / PICTURE) as new:
                new.write_bytes(picture)
            log_file(trainer, folder / PICTURE)


def _joined(earlier: Curves, later: Curves, start: int) -> Curves:
    """The curves of a run up to a step, and from there on."""
    names = dict.fromkeys([*earlier, *later])
    return {
        name: [*(point for point in earlier.get(name, []) if point[0] < start), *later.get(name, [])] for name in names
    }


def draw(curves: Curves) -> bytes | None:
    """A PNG of losses in one panel and other metrics but speed in a second; ``None`` if there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_info("There is no picture of the learning curve: run pip install matplotlib for one.")
        return None
    panels = [
        {name: points for name, points in curves.items() if ("loss" in name) == wanted and name not in SPEED}
        for wanted in (True, False)
    ]
    panels = [panel for panel in panels if panel]
    if not panels:
        return None
    # Not through pyplot, which would look for a display.
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, points in panel.items():
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_xlabel("step")
        axes.legend()
        axes.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


def _is_recorded(trainer: L.Trainer) -> bool:
    # A fast_dev_run has neither loggers nor checkpoints.
    return trainer.logger is not None and not trainer.fast_dev_run  # type: ignore[attr-defined]  # set in its setup


def _logger(trainer: L.Trainer) -> CSVLogger:
    found = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    if found is None:
        raise ValueError("LearningCurve found no CSVLogger, expected one in the trainer's loggers. Add it.")
    return found


def _folder(trainer: L.Trainer) -> Path:
    checkpoint = next((found for found in trainer.checkpoint_callbacks if isinstance(found, ModelCheckpoint)), None)
    if checkpoint is None:
        raise ValueError(
            "LearningCurve found no ModelCheckpoint, beside whose files it saves. Add one, or remove this."
        )
    return Path(checkpoint.dirpath or Path(trainer.default_root_dir) / "checkpoints")
