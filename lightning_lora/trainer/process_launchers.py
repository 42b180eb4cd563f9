"""Strategies that train in processes which the main one spawns or forks: ``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``.

Callbacks run in those processes alone. When they end, Lightning 2.6 loads their weights into the main process's model
by name, over the base's, and ignores every name that this model does not have.
"""

from typing import Any

from lightning_lora.class_names import is_a


def spawns(strategy: Any) -> bool:
    """Whether a strategy trains in processes that it spawns or forks."""
    # By name, since the class is private; that of XLA is derived from it.
    return is_a(strategy.launcher, "_MultiProcessingLauncher")


def no_way_back() -> ValueError:
    """What to raise where the trained adapter would be lost, or the main process's base overwritten."""
    return ValueError(
        "This strategy trains copies of the model in processes that it spawns or forks, and only parameters that exist "
        "in the main process's model are copied back. Put the adapter in before, and fold it in "
        "afterwards:\n"
        "    lora = LoRA(..., merge=None)\n"
        "    inject(model, lora.config)\n"
        "    trainer.fit(model)\n"
        "    merge(model)\n"
        'Or use strategy="ddp", which needs none of that.'
    )
