"""Regular expressions of settings, which may come from a file of somebody else's: matched within a time limit."""

import regex  # re has no time limit

LIMIT = 1.0  # seconds for one name; what is meant well takes microseconds


def fullmatch(pattern: str, name: str, setting: str) -> bool:
    """Whether a regular expression matches a whole name.

    Args:
        pattern: The expression.
        name: The name of a module.
        setting: Where the expression stands, for errors.

    Raises:
        ValueError: If it takes too long, as one with a repetition inside of a repetition may.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=LIMIT) is not None
    except TimeoutError as error:
        raise ValueError(
            f"The regular expression {pattern[:80]!r} in {setting} takes more than {LIMIT:g} s to match {name!r}: "
            "write it without a repetition inside of a repetition, or name the modules."
        ) from error


def require_expression(pattern: str, setting: str) -> None:
    """Require a valid regular expression.

    Raises:
        ValueError: If it is none.
    """
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{setting} has {pattern[:80]!r}, which is read as a regular expression and is not a valid one ({error}): "
            "correct it, or name modules."
        ) from error
