"""Have one object of a library behave differently in a few methods, where there is no public way to plug in."""

from functools import cache
from typing import Any


def mix_into(instance: Any, mixin: type) -> None:
    """Put the methods of ``mixin`` before those of the object's class, for this object alone; twice is as once.

    Args:
        instance: Any object of a class without ``__slots__``.
        mixin: An abstract class (``ABC``), since an object can only take on a class of the same layout.
    """
    if not isinstance(instance, mixin):
        instance.__class__ = _mixed(mixin, type(instance))  # type: ignore[arg-type]


@cache
def _mixed(mixin: type, cls: type) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": mixin.__module__})
