"""The learning rate over a run."""

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: float) -> OptimizerLRScheduler:
    """A linear warm-up, then a linear decay to zero at the last step.

    Args:
        optimizer: Whose rates are the peak.
        warmup_steps: Optimizer steps of warm-up.
        total_steps: Optimizer steps of the run; infinite keeps the rate after the warm-up.

    Returns:
        What ``configure_optimizers`` returns, with a step of the schedule for each of the optimizer.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if total_steps == float("inf"):
            return 1.0
        return max(0.0, (total_steps - step) / max(1.0, total_steps - warmup_steps))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
