"""Regular expressions of settings, which may come from a file of somebody else's: matched within a time limit."""

import math
import re
import time

import regex  # re has no time limit

LIMIT = 1.0  # seconds for all names that an expression is matched with; one takes microseconds if it is meant well
_LONGEST = 100_000  # characters, with what is repeated written out, as it is in memory
_REPEATED = re.compile(r"\{(\d+)")
_SLOW = 0.01  # seconds of computing from which on they count
_spent: dict[str, float] = {}  # by expression, those of slow matches


def fullmatch(pattern: str, name: str, setting: str) -> bool:
    """Whether a regular expression matches a whole name.

    Args:
        pattern: The expression.
        name: The name of a module.
        setting: Where the expression stands, for errors.

    Raises:
        ValueError: If it takes too long, as one with a repetition inside of a repetition may.
    """
    left, begin = LIMIT - _spent.get(pattern, 0.0), time.thread_time()
    try:
        if left <= 0:
            raise TimeoutError
        matched = regex.fullmatch(pattern, name, timeout=left) is not None
    except (TimeoutError, MemoryError) as error:
        raise ValueError(
            f"The regular expression {pattern[:80]!r} in {setting} takes more than {LIMIT:g} s to match names such as "
            f"{name!r}: write it without a repetition inside of a repetition, or name the modules."
        ) from error
    if (spent := time.thread_time() - begin) > _SLOW:
        _spent[pattern] = _spent.get(pattern, 0.0) + spent
    return matched


def require_expression(pattern: str, setting: str) -> None:
    """Require a valid regular expression.

    Raises:
        ValueError: If it is none.
    """
    # In a verbose expression, blanks may stand in a number.
    times = math.prod(max(1, int(number[:9])) for number in _REPEATED.findall("".join(pattern.split())))
    if len(pattern) * times > _LONGEST:
        raise ValueError(
            f"{setting} has {pattern[:80]!r}, which is longer than {_LONGEST:,} characters with what it repeats: name "
            "the modules, or repeat less."
        )
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{setting} has {pattern[:80]!r}, which is read as a regular expression and is not a valid one ({error}): "
            "correct it, or name modules."
        ) from error
