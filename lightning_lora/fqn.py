"""Names of modules and parameters."""

from collections.abc import Sequence

# What torch.compile, FSDP and activation checkpointing put into them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_fqn(name: str) -> str:
    """A dotted name without the parts that compiling, sharding or checkpointing put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_submodule(name: str, other: str) -> bool:
    """Whether a dotted name is that of ``other`` or of something in it; all is in the root, whose name is empty."""
    return name == other or other == "" or name.startswith(f"{other}.")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are, for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
