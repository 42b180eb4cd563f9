"""Several rows in one."""

import time

from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.data.packing import pack


def rows(lengths: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": [index] * length, "labels": [index] * length} for index, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 32)))
def test_every_row_is_in_one_pack_and_no_two_packs_would_fit_together(lengths: list[int]) -> None:
    packs = pack(rows(lengths), 32)
    assert list(pack(rows(lengths), 32, lengths)) == list(packs)
    sizes = sorted(len(one["input_ids"]) for one in packs)
    assert sorted(token for one in packs for token in one["input_ids"]) == [
        index for index, length in enumerate(lengths) for _ in range(length)
    ]
    assert not sizes or sizes[-1] <= 32
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 32


def test_packing_takes_n_log_n() -> None:
    def seconds(count: int) -> float:
        many = rows([index % 97 + 3 for index in range(count)])
        start = time.process_time()
        pack(many, 256)
        return time.process_time() - start

    # Eight times the rows: 64 times the time where packing is quadratic.
    assert min(seconds(16000) for _ in range(2)) < 30 * min(seconds(2000) for _ in range(2))
