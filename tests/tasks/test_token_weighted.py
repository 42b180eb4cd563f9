"""Steps weigh by label tokens, over micro-batches and over processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed.processes import run_processes
from helpers.distributed.token_weights import LEARNED, Recorded, gradients, rows
from helpers.texts import word_checkpoint
from torch import Tensor


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return word_checkpoint(tmp_path / "model")


def steps(
    tmp_path: Path, checkpoint: str, batch_size: int, kind: type[Recorded] = Recorded, **options: Any
) -> list[dict[str, Tensor]]:
    return gradients(str(tmp_path), kind(checkpoint), rows(), batch_size, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any(gradient.any() for gradient in expected.values()) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_add_up_to_one_batch(tmp_path: Path, checkpoint: str, micro_batches: int) -> None:
    (whole,) = steps(tmp_path, checkpoint, len(LEARNED))
    size = len(LEARNED) // micro_batches
    (parts,) = steps(tmp_path, checkpoint, size, accumulate_grad_batches=micro_batches)
    assert_same(parts, whole)


def test_the_last_step_may_have_fewer(tmp_path: Path, checkpoint: str) -> None:
    alone = steps(tmp_path, checkpoint, 1)
    _, last = steps(tmp_path, checkpoint, 1, accumulate_grad_batches=3)
    assert_same(last, alone[-1])


def test_processes_add_up_to_one_batch(tmp_path: Path, checkpoint: str) -> None:
    (whole,) = steps(tmp_path, checkpoint, len(LEARNED))
    one, other = run_processes("token_weights.of_two_processes", str(tmp_path), checkpoint)
    assert one == other
    assert_same({name: torch.tensor(gradient) for name, gradient in one.items()}, whole)


def test_a_step_of_ones_own_that_weighs_nothing_is_left_alone(tmp_path: Path, checkpoint: str) -> None:
    class Own(Recorded):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self._loss(batch, "train_loss", sync_dist=False)

    alone = steps(tmp_path, checkpoint, 1)
    (mean,) = steps(tmp_path, checkpoint, 1, Own, accumulate_grad_batches=4)
    assert_same(mean, {name: sum(step[name] for step in alone) / 4 for name in mean})
