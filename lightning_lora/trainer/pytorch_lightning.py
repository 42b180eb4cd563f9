"""``lightning`` and ``pytorch_lightning``: two packages with a Trainer each, and each knows its own callbacks alone."""

import sys
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def serve_both_packages(callback: T) -> T:
    """Make a callback one of ``pytorch_lightning`` too, where that package is in use.

    The hooks have the same names and arguments in both. The class is made at run time, since importing the second
    package would cost everyone as much as importing the first.
    """
    other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    if other is not None and not isinstance(callback, other):
        callback.__class__ = _class_for_both(type(callback), other)  # type: ignore[arg-type]
    return callback


def original_class(callback: Any) -> type:
    """The class that can be found by its name, as pickle has to."""
    cls = type(callback)
    found: type = cls.__dict__.get("_original", cls)
    return found


def rebuild(cls: type[T]) -> T:
    """Make an empty callback, which unpickling then fills."""
    return serve_both_packages(cls.__new__(cls))


@cache
def _class_for_both(cls: type, other: type) -> type:
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_original": cls}
    return type(cls.__name__, (cls, other), namespace)
