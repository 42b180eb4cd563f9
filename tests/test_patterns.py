"""Regular expressions of settings: what they mean, and that none of them hangs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora import LoraConfig, patterns
from lightning_lora.patterns import fullmatch, require_expression

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", ""]
PIECES = st.sampled_from(
    [".*", r"\.", "q_proj", "layers", r"\d+", "[01]", "(q|v)_proj", "x?", "^", "$", r"[^.]+", "mlp"]
)


@given(pieces=st.lists(PIECES, max_size=5), name=st.sampled_from(NAMES))
def test_they_mean_what_re_says(pieces: list[str], name: str) -> None:
    pattern = "".join(pieces)
    assert fullmatch(pattern, name, "setting") == (re.fullmatch(pattern, name) is not None)


def test_many_names_have_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT", 2.0)
    monkeypatch.setattr(patterns, "_SLOW", 0.0)
    monkeypatch.setattr(patterns, "_spent", {"(a|aa)+[!?]": 1.9999})  # of other names

    def match(pattern: str) -> None:
        for _ in range(1000):
            fullmatch(pattern, "a" * 20, "rank_pattern")  # each is far within the limit

    with pytest.raises(ValueError, match="takes more than 2 s"):
        match("(a|aa)+[!?]")
    match("a+")  # another expression has its own


def test_a_slow_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT", 0.05)
    with pytest.raises(ValueError, match=r"in rank_pattern takes more than 0\.05 s to match"):
        fullmatch("(a|aa)+[!?]", "a" * 60, "rank_pattern")


@pytest.mark.parametrize("pattern", ["(", "[a", "*", r"\8"])
def test_what_is_no_expression_is_refused_early(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a valid one"):
        require_expression(pattern, "setting")
    for setting, value in (
        ("rank_pattern", {pattern: 2}),
        ("alpha_pattern", {pattern: 2}),
        ("target_modules", pattern),
    ):
        with pytest.raises(ValueError, match=rf"{setting} has .* not a valid one"):
            LoraConfig(**{setting: value})


@given(
    number=st.integers(1000, 10**12),
    times=st.integers(2, 5),
    inner=PIECES,
    blank=st.sampled_from(["", " "]),
)
def test_what_is_repeated_takes_no_memory(number: int, times: int, inner: str, blank: str) -> None:
    pattern = "(?x)" + "(?:" * times + f"a{inner}" + f"){{{blank.join(str(number))}}}" * times
    with pytest.raises(ValueError, match="longer than 100,000 characters"):
        require_expression(pattern, "setting")


@given(number=st.integers(0, 50), more=st.integers(0, 10**6))
def test_what_is_repeated_less_is_matched(number: int, more: int) -> None:
    for pattern in (f"(?:ab){{{number}}}", f"(?:ab){{{number},{number + more}}}"):
        require_expression(pattern, "setting")
        assert fullmatch(pattern, "ab" * number, "setting")


@pytest.mark.parametrize("pattern", ["(?R)|(?R)(?R)", "(?:(?R)a|(?R)b)"])
def test_what_means_itself_is_an_error_at_most(pattern: str) -> None:
    with pytest.raises(ValueError, match="takes more than"):
        fullmatch(pattern, "model.layers.0", "setting")
