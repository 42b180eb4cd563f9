"""Which precision a machine computes in fast, by what its hardware says, or by a product that is timed."""

from functools import lru_cache

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.benchmark import Timer

# From this factor on, half precision costs more than it saves in memory traffic.
_EMULATED = 2.0
# Forward pass, gradient of the input and gradient of the weight: an emulated type may be slow in one of them alone.
_PRODUCTS = ("x @ weight.T", "grad @ weight", "grad.T @ x")


def fitting_precision(accelerator: str) -> tuple[str, str]:
    """The precision for ``Trainer(precision=...)`` that an accelerator is fast in.

    That is ``bf16-mixed`` where there are instructions for bfloat16, ``16-mixed`` on older GPUs, else ``32-true``.

    Args:
        accelerator: As ``Trainer(accelerator=...)`` takes it, such as ``auto``, ``gpu`` or ``cpu``.

    Returns:
        The precision, and why.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU has instructions for bfloat16"
        return "16-mixed", "the GPU has no instructions for bfloat16"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        factor = slowdown(torch.bfloat16, torch.device("cpu"))
        words = f"a product in bfloat16 takes {factor:.2g} times as long as in float32 on this processor"
        return ("bf16-mixed" if factor < 1 else "32-true"), words
    return "32-true", f"half precision is not known to be fast on the accelerator {accelerator!r}"


@lru_cache
def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How many times as long as in float32 the products of a small linear layer's training take, measured once.

    Args:
        dtype: Such as ``torch.bfloat16``.
        device: Where to measure.
    """
    return _seconds(dtype, device) / _seconds(torch.float32, device)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    rows = 16 if device.type == "cpu" else 8192  # a GPU needs work that hides the start of its kernels
    shapes = {"x": (rows, 256), "weight": (2048, 256), "grad": (rows, 2048)}
    tensors = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    # The timer waits for GPUs, and takes one thread, which others on the machine disturb least. The least of several is
    # what the machine can do.
    timers = [Timer(product, globals=tensors) for product in _PRODUCTS]
    return sum(min(timer.timeit(1).median for _ in range(3)) for timer in timers)


def warn_of_emulation(trainer: "pl.Trainer") -> None:
    """Warn if the Trainer's precision is a half one that its device only emulates, with the factor that this costs."""
    precision, device = str(trainer.precision), trainer.strategy.root_device
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])
    if dtype is None or device.type not in ("cpu", "cuda"):
        return
    factor = slowdown(dtype, device)
    if factor >= _EMULATED:
        rank_zero_warn(
            f"Found Trainer(precision={precision!r}), which this {'processor' if device.type == 'cpu' else 'GPU'} only "
            f"emulates: a small product takes {factor:.2g} times as long as in float32. Set precision="
            f"{'32-true' if device.type == 'cpu' or dtype == torch.float16 else '16-mixed'!r} to be faster."
        )
