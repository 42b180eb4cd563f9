"""Plain types in place of what other libraries hand over."""

import enum
from collections import OrderedDict, deque
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from helpers.settings import DictConfig, ListConfig
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.plain import plain


class Color(str, enum.Enum):  # noqa: UP042 -- as much code still has it
    RED = "red"


class Width(enum.IntEnum):
    NARROW = 4


class Name(enum.Enum):
    FIRST = Path("a/b")


class Text(str):
    pass


def is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def same(one: Any, other: Any) -> bool:
    """Equal, with equal types, and NaN equal to itself."""
    return repr(one) == repr(other)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, True),
        (np.bool_(True), True),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.str_("q"), "q"),
        (np.array([1, 2]), [1, 2]),
        (np.array(3), 3),
        (torch.tensor([1, 2]), [1, 2]),
        (Fraction(1, 2), 0.5),
        (Color.RED, "red"),
        (Width.NARROW, 4),
        (Name.FIRST, "a/b"),
        (Text("q"), "q"),
        (PurePosixPath("a/b"), "a/b"),
        (("q", "v"), ["q", "v"]),
        (range(3), [0, 1, 2]),
        (deque([1, 2]), [1, 2]),
        ({"v", "q"}, ["q", "v"]),
        (frozenset({10, 9}), [9, 10]),
        ({1, "q"}, ["q", 1]),
        ({"q": 1}.keys(), ["q"]),
        (OrderedDict(q=(1, 2)), {"q": [1, 2]}),
        ({Color.RED: {1: np.int8(2)}}, {"red": {"1": 2}}),
        (ListConfig(["q", ListConfig([np.int32(1)])]), ["q", [1]]),
        (DictConfig({"q": ListConfig([1]), "v": DictConfig({})}), {"q": [1], "v": {}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_becomes_plain(given: Any, expected: Any) -> None:
    assert same(plain(given), expected)


@pytest.mark.parametrize(
    "value", [b"q", bytearray(b"q"), object(), iter([1]), 1j, print], ids=lambda value: type(value).__name__
)
def test_what_is_of_no_such_kind_stays(value: Any) -> None:
    assert plain(value) is value


numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.fractions(), st.integers(0, 99).map(np.int16), st.floats(width=32)
)
leaves = st.one_of(
    st.none(),
    numbers,
    st.text(),
    st.text().map(Text),
    st.booleans().map(np.bool_),
    st.floats().map(np.float64),
    st.text(alphabet="abc./", min_size=1).map(Path),
    st.sampled_from([Color.RED, Width.NARROW, Name.FIRST]),
)
keys = st.one_of(st.text(), st.integers(), st.sampled_from(list(Color)), st.text().map(Text))
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.lists(inner).map(ListConfig),
        st.dictionaries(keys, inner),
        st.dictionaries(st.text(), inner).map(DictConfig),
        st.frozensets(leaves),
    ),
    max_leaves=20,
)


@given(nested)
def test_anything_nested_becomes_plain_and_then_stays(value: Any) -> None:
    once = plain(value)
    assert is_plain(once)
    assert same(plain(once), once)
