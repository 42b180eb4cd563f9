"""Whether values that were read from a file are of the types that they must be of."""

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

from lightning_lora.model.state_dict import CheckpointError

_LONGEST = 1000  # characters
_LARGEST = 2**63  # what tensors can count with


def require_names(names: Iterable[str], source: str) -> None:
    """Require names of tensors that are no longer than those of modules, for it takes the square of that to read one.

    Args:
        names: The names.
        source: The file, for errors.

    Raises:
        CheckpointError: If one is longer.
    """
    longest = max(names, key=len, default="")
    if len(longest) > _LONGEST:
        raise CheckpointError(
            f"{source} is damaged or was made up: it has a tensor whose name has {len(longest):,} characters, "
            f"{longest[:80]!r}... Take another copy of it. Nothing was loaded."
        )


def require_type(value: Any, hint: Any, source: str, field: str = "") -> None:
    """Require a value of a type, and all in it of the types that this asks for.

    Args:
        value: Of plain types, as JSON or a pickle of these has them.
        hint: A type, such as ``dict[str, int] | None``, or a ``TypedDict``, beside whose keys others are let be.
        source: The file, for errors.
        field: Where the value was found in it.

    Raises:
        CheckpointError: Naming the file, the field, what was found and what was expected.
    """
    problem = _mismatch(value, hint, field)
    if problem is not None:
        raise CheckpointError(
            f"{source} is damaged or was made up: {problem}. Take another copy of it. Nothing was loaded."
        )


def _mismatch(value: Any, hint: Any, field: str) -> str | None:
    """What is not as it must be, in words; ``None`` if all is."""
    args = get_args(hint)
    if hint is Any:
        return None
    if get_origin(hint) in (Union, UnionType):
        # Of the one that has the value's outer type, if any, so that the inmost problem is named.
        problems = [_mismatch(value, each, field) for each in args]
        inner = (problem for problem in problems if problem is not None and not problem.startswith(f"{field} is "))
        return None if None in problems else next(inner, _found(value, hint, field))
    if is_typeddict(hint):
        return _mismatch_of_keys(value, hint, field)
    if get_origin(hint) is list and isinstance(value, list):
        return _first([_mismatch(item, args[0], f"{field}[{index}]") for index, item in enumerate(value)])
    if get_origin(hint) is dict and isinstance(value, dict):
        keys = [_mismatch(key, args[0], f"a key of {field}") for key in value]
        return _first(keys + [_mismatch(item, args[1], f"{field}[{key!r}]") for key, item in value.items()])
    return None if get_origin(hint) is None and _is_a(value, hint) else _found(value, hint, field)


def _mismatch_of_keys(value: Any, hint: Any, field: str) -> str | None:
    if not isinstance(value, dict):
        return _found(value, dict, field)
    hints, required = get_type_hints(hint), hint.__required_keys__
    absent = sorted(required - value.keys())
    if absent:
        return f"{field or 'it'} has no {absent[0]!r}"
    return _first([_mismatch(value[k], hints[k], f"{field}.{k}".lstrip(".")) for k in hints if k in value])


def _first(problems: list[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _is_a(value: Any, hint: type) -> bool:
    """Whether a value is of a class; as in type hints, an int may stand for a float, and unlike there, no bool may."""
    if hint in (int, float):
        of_kind = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        return of_kind and (isinstance(value, float) or abs(value) < _LARGEST)
    return isinstance(value, NoneType if hint is None else hint)


def _found(value: Any, hint: Any, field: str) -> str:
    shown, expected = repr(value), hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return f"{field or 'it'} is {shown if len(shown) <= 80 else f'{shown[:77]}...'}, and must be {expected}"
