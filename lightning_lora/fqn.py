"""Names of modules and parameters, and the walk over those of a base."""

from collections.abc import Callable, Iterator, Sequence

from torch import nn

# What torch.compile, FSDP and activation checkpointing put into them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_fqn(name: str) -> str:
    """A dotted name without the parts that compiling, sharding or checkpointing put in."""
    if not any(wrapper in name for wrapper in _WRAPPERS):  # as of most names, and many are asked for
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def group_of(name: str) -> str:
    """The last part of a dotted name that is no number, such as ``q_proj``."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model as ``named_modules`` has them, but those of adapters, which may be thousands a layer."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield name, module
        adapters = getattr(type(module), "adapters_in", None)  # of an adapted layer
        waiting.extend(
            (f"{name}.{inner}" if name else inner, child)
            for inner, child in reversed(module._modules.items())
            if child is not None and inner != adapters
        )


def outermost(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The wanted ones among the base's modules, by name, but those inside of another that is wanted."""
    found: dict[str, nn.Module] = {}
    for name, module in base_modules(model):
        if not any(is_submodule(name, outer) for outer in found) and is_wanted(module):
            found[name] = module
    return found


def is_submodule(name: str, other: str) -> bool:
    """Whether a dotted name is that of ``other`` or of something in it; all is in the root, whose name is empty."""
    return name == other or other == "" or name.startswith(f"{other}.")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are, for messages."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
