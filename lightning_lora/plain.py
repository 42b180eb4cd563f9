"""Plain Python types in place of what other libraries hand over."""

import os
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from numbers import Integral, Real
from typing import Any


def plain(value: Any) -> Any:
    """Turn a value, and all that is in it, into ``None``, bool, int, float, str, list and dict, as JSON has them.

    Members of an enumeration become their value, paths strings, sets sorted lists, and keys strings. What is of none
    of these kinds stays as it is.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return plain(os.fspath(value))
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(value[key]) for key in value}
    if isinstance(value, Set):
        return _in_order([plain(item) for item in value])
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's booleans, its arrays and PyTorch's tensors
        return plain(value.tolist())
    return value


def _in_order(items: list[Any]) -> list[Any]:
    try:
        return sorted(items)
    except TypeError:  # of several kinds
        return sorted(items, key=repr)
