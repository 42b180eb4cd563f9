"""Whether a module runs through ``torch.compile``."""

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module was compiled: by ``torch.compile``, its own ``compile``, or by Lightning in a run."""
    # What these three leave.
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )
