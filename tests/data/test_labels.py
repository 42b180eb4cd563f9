"""Labels by name and by index."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lora.data.labels import agreed_labels, label_index, label_indices
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
