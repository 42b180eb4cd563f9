"""Labels in data files."""

from typing import Any

from lightning_lora.data.files import Record


def label_index(record: Record, field: str, labels: list[str]) -> int:
    """The index of the label in a field, which holds a label's name or its index.

    Raises:
        ValueError: If it holds neither.
    """
    value = record.fields.get(field)
    found = _index(value, labels)
    if found is None:
        raise record.error(field, f"one of the labels {', '.join(labels)}, or an index below {len(labels)}")
    return found


def label_indices(record: Record, field: str, labels: list[str]) -> list[int]:
    """The same for a list of labels.

    Raises:
        ValueError: If the field holds no list, or one of something else.
    """
    values = record.fields.get(field)
    if not isinstance(values, list):
        raise record.error(field, "a list of labels")
    indices = []
    for position, value in enumerate(values):
        index = _index(value, labels)
        if index is None:
            raise record.error(f"{field}[{position}]", f"one of the labels {', '.join(labels)}", repr(value))
        indices.append(index)
    return indices


def _index(value: Any, labels: list[str]) -> int | None:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    # CSV has no numbers.
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    return None
