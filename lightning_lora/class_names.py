"""The classes of an object by their names, so that no library has to be imported for them."""

from typing import Any


def is_a(instance: Any, class_name: str, package: str = "") -> bool:
    """Whether an object is of a class of this name, in a module whose name begins with ``package``."""
    return any(c.__name__ == class_name and c.__module__.startswith(package) for c in type(instance).__mro__)
