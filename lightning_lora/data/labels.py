"""Labels in data files."""

from typing import Any

from lightning_lora.data.keys import is_empty
from lightning_lora.data.record import Record


def agreed_labels(given: list[str] | None, of_model: list[str] | None) -> list[str]:
    """The labels of a data module, which are those of the model unless there is none.

    Raises:
        ValueError: If there are none, or if both are given and differ.
    """
    labels = of_model if given is None else given
    if labels is None:
        raise ValueError("Found no 'labels', expected the names of the classes. Name them.")
    if of_model is not None and labels != of_model:
        raise ValueError(
            f"Found data.labels={labels} and model.labels={of_model}, expected the same in the same order. Leave out "
            "data.labels, which are then the model's."
        )
    return labels


def label_index(record: Record, field: str, labels: list[str]) -> int:
    """The index of the label in a field, which holds a label's name or its index.

    A name goes before an index, whatever its type is in the file: with the labels ``["1", "2"]``, both ``1`` and
    ``"1"`` are the first. Where labels are numbers, there are no indices.

    Raises:
        ValueError: If it holds neither.
    """
    found = _index(record.fields.get(field), labels)
    if found is None:
        raise record.error(field, _expected(labels))
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
            raise record.error(f"{field}[{position}]", _expected(labels), repr(value))
        indices.append(index)
    return indices


def _expected(labels: list[str]) -> str:
    names = f"one of the labels {', '.join(labels)}"
    return names if any(_number(label) is not None for label in labels) else f"{names}, or an index below {len(labels)}"


def _index(value: Any, labels: list[str]) -> int | None:
    if is_empty(value):
        return None
    names = [str(value), str(value).lower()] if isinstance(value, bool) else [str(value)]
    for name in names:
        if name in labels:
            return labels.index(name)
    if isinstance(value, bool) or (number := _number(value)) is None:
        return None
    numbers = [_number(label) for label in labels]
    if number in numbers:  # 1.0 where the label is "1", as tables with gaps have whole numbers
        return numbers.index(number)
    if any(label is not None for label in numbers):
        return None
    return int(number) if number.is_integer() and 0 <= number < len(labels) else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
