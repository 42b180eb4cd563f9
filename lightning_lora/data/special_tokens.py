"""What a tokenizer puts around a text by itself."""

from typing import Any


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer puts in front of every text, and those behind it."""
    plain, whole = (list(tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (False, True))
    place = next((place for place in range(len(whole)) if plain and whole[place : place + len(plain)] == plain), None)
    return ([], []) if place is None else (whole[:place], whole[place + len(plain) :])
