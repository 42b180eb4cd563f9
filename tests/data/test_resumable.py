from pathlib import Path
from typing import Any

import pytest
from helpers import toys
from helpers.resuming import assert_same_run, train

from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader


def make(num_workers: int = 0) -> ResumableDataLoader:
    rows = toys.dataset()
    return ResumableDataLoader(rows, batch_size=4, sampler=EpochSampler(len(rows), seed=3), num_workers=num_workers)


def order(loader: ResumableDataLoader) -> list[list[float]]:
    return [batch[1].flatten().tolist() for batch in loader]


def test_orders_differ_by_epoch_and_repeat() -> None:
    loader, epochs = make(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(order(loader))
        assert sorted(value for batch in epochs[-1] for value in batch) == sorted(
            toys.dataset().tensors[1].flatten().tolist()
        )
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(make()) == epochs[0]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("taken", [0, 3])
def test_goes_on_where_it_stopped(taken: int, num_workers: int) -> None:
    whole, loader = order(make()), make(num_workers)
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    resumed = make(num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert order(resumed) == whole[taken:]
    assert order(resumed) == whole  # once only


def test_goes_on_after_the_same_share_of_fewer_batches() -> None:
    loader = make()
    batches = iter(loader)
    for _ in range(6):  # of 8
        next(batches)
    half = ResumableDataLoader(range(16), batch_size=4)  # what each of two processes gets
    half.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in half] == [[12, 13, 14, 15]]


def test_at_the_end_of_an_epoch_the_next_one_begins() -> None:
    loader = make()
    order(loader)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert order(resumed) == order(loader)


@pytest.mark.parametrize("step", [3, 8, 13, 16])
def test_a_run_resumes_exactly(tmp_path: Path, step: int) -> None:
    keep: dict[str, Any] = {"every_n_train_steps": 1}
    whole = train(tmp_path / "whole", make(), keep=dict(keep))
    path = tmp_path / "whole" / f"step={step}.ckpt"
    resumed = train(tmp_path / "resumed", make(), keep=dict(keep), seed=9, ckpt_path=path)
    assert_same_run(resumed, whole)
