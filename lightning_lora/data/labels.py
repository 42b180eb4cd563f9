"""Labels in data files."""

import json
from math import isfinite
from typing import Any, Literal, get_args

from lightning_lora.data.keys import is_empty
from lightning_lora.data.record import Record

# As transformers calls what the labels of a row are.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE_LABEL, MULTI_LABEL, REGRESSION = get_args(ProblemType)


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


def multi_hot(record: Record, field: str, labels: list[str]) -> list[float]:
    """1 for each label that a row has, 0 for the others.

    The field holds a list of labels, as in :func:`label_indices` and also empty, or of 0 or 1 for each label. Without
    it, each label is a field that holds 0 or 1. Lists may be JSON, as in tables.

    Raises:
        ValueError: If it holds something else, or what may be indices as well as 0 and 1.
    """
    if field not in record.fields and all(label in record.fields for label in labels):
        return [_flag(record, label) for label in labels]
    values = _list(record, field)
    if len(values) == len(labels) and all(value in (0, 1) for value in values):
        indices = [label for label in labels if _number(label) is not None] or sorted(values) == [0, 1]
        if indices and not any(isinstance(value, float) for value in values):
            raise record.error(field, "names of labels, for these may be labels as well as 0 and 1 for each")
        return [float(value) for value in values]
    found = label_indices(Record(record.where, {field: values}, record.names), field, labels)
    return [float(index in found) for index in range(len(labels))]


def numbers(record: Record, field: str, labels: list[str]) -> list[float]:
    """A number for each label: in the field, as one or as a list, or without it in fields of the labels' names.

    Raises:
        ValueError: If there are others, or none.
    """
    if field not in record.fields and all(label in record.fields for label in labels):
        return [_finite(record, label, record.fields[label]) for label in labels]
    if len(labels) == 1 and not isinstance(record.fields.get(field), list):
        return [_finite(record, field, record.fields.get(field))]
    values = _list(record, field)
    if len(values) != len(labels):
        raise record.error(field, f"a number for each of {', '.join(labels)}", f"{len(values)} values")
    return [_finite(record, field, value) for value in values]


def _flag(record: Record, field: str) -> float:
    number = _number(record.fields[field])
    if number not in (0, 1):
        raise record.error(field, "0 or 1")
    return float(number == 1)


def _finite(record: Record, field: str, value: Any) -> float:
    number = None if isinstance(value, bool) else _number(value)
    if number is None or not isfinite(number):
        raise record.error(field, "a number")
    return number


def _list(record: Record, field: str) -> list[Any]:
    value = record.fields.get(field)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list):
        raise record.error(field, "a list")
    return value


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
    except (OverflowError, TypeError, ValueError):  # of a whole number that no float holds, too
        return None
