"""Files of a run for the loggers that keep such."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger


def log_file(trainer: L.Trainer, path: Path) -> None:
    """Give a file to the Trainer's loggers: to MLflow and W&B as it is, to TensorBoard if it is a picture."""
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path))
        elif isinstance(logger, WandbLogger):
            logger.experiment.save(str(path.resolve()), base_path=str(path.resolve().parent), policy="now")
        elif isinstance(logger, TensorBoardLogger) and path.suffix == ".png":
            from matplotlib.image import imread  # which has drawn it

            logger.experiment.add_image(path.stem, imread(path)[..., :3], trainer.global_step, dataformats="HWC")
