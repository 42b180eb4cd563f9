"""Labels by name and by index."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.data.labels import agreed_labels, label_index, label_indices, multi_hot, numbers
from lightning_lora.data.record import Record


@pytest.mark.parametrize(
    ("labels", "value", "expected"),
    [
        (["1", "2", "3"], 1, 0),
        (["1", "2", "3"], "1", 0),
        (["1", "2", "3"], 1.0, 0),
        (["1", "2", "3"], "1.0", 0),
        (["1", "2", "3"], 0, None),  # no index, where labels are numbers
        (["-1", "0", "1"], -1, 0),
        (["0.5", "1.5"], 1.5, 1),
        (["bad", "good"], 1, 1),
        (["bad", "good"], "1", 1),
        (["bad", "good"], 1.0, 1),
        (["bad", "good"], "good", 1),
        (["bad", "good"], 2, None),
        (["bad", "good"], -1, None),
        (["bad", "good"], 0.5, None),
        (["bad", "good"], True, None),
        (["bad", "good"], None, None),
        (["nan", "good"], float("nan"), None),
        (["false", "true"], True, 1),
        (["True", "False"], False, 1),
    ],
)
def test_a_name_goes_before_an_index(labels: list[str], value: Any, expected: int | None) -> None:
    one, several = Record("here", {"label": value}), Record("here", {"tags": [value, value]})
    if expected is not None:
        assert label_index(one, "label", labels) == expected
        assert label_indices(several, "tags", labels) == [expected] * 2
        return
    with pytest.raises(ValueError, match=r"here, field 'label': found .*, expected one of the labels"):
        label_index(one, "label", labels)
    with pytest.raises(ValueError, match=r"here, field 'tags\[0\]': found .*, expected one of the labels"):
        label_indices(several, "tags", labels)


def test_labels_are_those_of_the_model() -> None:
    assert agreed_labels(None, ["a", "b"]) == agreed_labels(["a", "b"], None) == ["a", "b"]
    with pytest.raises(ValueError, match=r"Found data\.labels=\['b', 'a'\] and model\.labels=\['a', 'b'\]"):
        agreed_labels(["b", "a"], ["a", "b"])
    with pytest.raises(ValueError, match="Found no 'labels'"):
        agreed_labels(None, None)


@pytest.mark.parametrize(
    ("row", "labels", "expected"),
    [
        ({"label": ["b", "a"]}, "abc", [1, 1, 0]),
        ({"label": []}, "abc", [0, 0, 0]),
        ({"label": [2, "a"]}, "abc", [1, 0, 1]),
        ({"label": '["c"]'}, "abc", [0, 0, 1]),  # of a table
        ({"label": [0, 1, 1]}, "abc", [0, 1, 1]),
        ({"label": [1, 1]}, "ab", [1, 1]),
        ({"label": [0.0, 1.0]}, "ab", [0, 1]),
        ({"a": 0, "b": "1", "c": True}, "abc", [0, 1, 1]),
        (
            {"label": [0, 1]},
            "ab",
            r"field 'label': found \[0, 1\] \(list\), expected names of labels, for these may be",
        ),
        ({"label": ["1"]}, "12", [1, 0]),
        ({"label": [1, 0]}, "12", r"field 'label': found .* expected names of labels"),
        ({"label": ["d"]}, "abc", r"field 'label\[0\]': found 'd', expected one of the labels a, b, c"),
        ({"label": "a"}, "abc", r"field 'label': found 'a' \(str\), expected a list"),
        ({"label": None}, "abc", r"field 'label': found None"),
        ({"a": 0, "b": 2}, "ab", r"field 'b': found 2 \(int\), expected 0 or 1"),
        ({"a": 0}, "ab", r"field 'label': found none"),
    ],
)
def test_several_labels(row: dict[str, Any], labels: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            multi_hot(Record("here", row), "label", [*labels])
    else:
        assert multi_hot(Record("here", row), "label", [*labels]) == expected


@pytest.mark.parametrize(
    ("row", "labels", "expected"),
    [
        ({"label": 2}, "a", [2.0]),
        ({"label": "-2.5e1"}, "a", [-25.0]),
        ({"label": [0.5]}, "a", [0.5]),
        ({"label": "[1, 2]"}, "ab", [1.0, 2.0]),
        ({"a": "1", "b": 2}, "ab", [1.0, 2.0]),
        ({"label": [1]}, "ab", r"field 'label': found 1 values, expected a number for each of a, b"),
        ({"label": 1}, "ab", r"field 'label': found 1 \(int\), expected a list"),
        ({"label": float("nan")}, "a", r"field 'label': found nan \(float\), expected a number"),
        ({"label": True}, "a", r"field 'label': found True \(bool\), expected a number"),
        ({"label": "good"}, "a", r"field 'label': found 'good' \(str\), expected a number"),
        ({}, "a", r"field 'label': found none"),
    ],
)
def test_numbers(row: dict[str, Any], labels: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            numbers(Record("here", row), "label", [*labels])
    else:
        assert numbers(Record("here", row), "label", [*labels]) == expected
