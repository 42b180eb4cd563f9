"""Have one object of a library behave differently in a few methods, where there is no public way to plug in."""

from collections.abc import Callable
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
    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        # The class is made at run time, so pickle and deepcopy must find it by the other two.
        make, arguments, *state = super(mixed, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
        arguments = tuple(cls if argument is mixed else argument for argument in arguments)
        return (_remake, (mixin, make, arguments), *state)

    mixed: type = type(cls.__name__, (mixin, cls), {"__module__": mixin.__module__, "__reduce_ex__": __reduce_ex__})
    return mixed


def _remake(mixin: type, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    instance = make(*arguments)
    mix_into(instance, mixin)
    return instance
