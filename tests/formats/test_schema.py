"""Types of what is read from files."""

from typing import Any, NotRequired

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from lightning_lora import CheckpointError
from lightning_lora.formats.schema import require_type


class Inner(TypedDict):
    name: str
    sizes: NotRequired[list[int]]


class Outer(TypedDict):
    inner: list[Inner]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int), (3, float), (3.5, float), ("x", str), (True, bool), (None, str | None), ([1], list[int] | None),
        ({"a": [1]}, dict[str, list[int]]), ({"a": object()}, dict[str, Any]), ([], list[int] | str),
        ({"inner": [{"name": "x", "other": 1}]}, Outer), ({"inner": [{"name": "x", "sizes": [1]}]}, Outer),
    ],
)  # fmt: skip
def test_what_fits(value: Any, hint: Any) -> None:
    require_type(value, hint, "file")


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ("3", int, "field is '3', and must be int"),
        (True, int, "field is True, and must be int"),
        (2**63, float, "must be float"),
        (1, str | None, r"must be str \| None"),
        ([1, "x"], list[int] | None, r"field\[1\] is 'x', and must be int"),
        ({1: 2}, dict[str, int], "a key of field is 1, and must be str"),
        ({"a": {"b": None}}, dict[str, dict[str, int]], r"field\['a'\]\['b'\] is None"),
        ({}, Outer, "field has no 'inner'"),
        ({"inner": [{"name": "x"}, {"sizes": []}]}, Outer, r"field.inner\[1\] has no 'name'"),
        ({"inner": [{"name": "x", "sizes": [0.5]}]}, Outer, r"field.inner\[0\].sizes\[0\] is 0.5"),
        (["x" * 1000], int, r"'\.\.\., and must be int|\.\.\., and must be int"),
    ],
)
def test_the_inmost_problem_is_named(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^file is damaged or was made up: .*{said}") as error:
        require_type(value, hint, "file", "field")
    assert len(str(error.value)) < 300


@given(value=PLAIN)
def test_it_agrees_with_what_python_says(value: Any) -> None:
    def fits(hint: Any) -> bool:
        try:
            require_type(value, hint, "file")
        except CheckpointError:
            return False
        return True

    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    assert fits(int) == is_number
    assert fits(float) == (is_number or isinstance(value, float))
    assert fits(list[int]) == (
        isinstance(value, list) and all(type(each) is int and abs(each) < 2**63 for each in value)
    )
    assert fits(str | bool | None) == (value is None or isinstance(value, (str, bool)))
