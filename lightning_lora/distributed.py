"""Which strategies are supported."""

from typing import Any

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def require_supported(strategy: Any) -> None:
    """Require a strategy under which every process holds the whole model.

    Raises:
        ValueError: If it shards the model.
    """
    # By name, so that the strategies of the package pytorch_lightning count too.
    sharding = [cls.__name__ for cls in type(strategy).__mro__ if cls.__name__ in _SHARDING]
    if sharding:
        raise ValueError(
            f"LoRA does not support {sharding[0]} yet, which shards the model over processes: use one device or "
            'strategy="ddp". With adapters, optimizer state is small, so the model often fits without sharding.'
        )
