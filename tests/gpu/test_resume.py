"""A resumed run ends with the bits of the uninterrupted one: the device's own random state is in the checkpoint."""

from pathlib import Path

import pytest
import torch
from helpers.moments import Setup, difference, kind_of

from lightning_lora.rng import rng_state, set_rng_state

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_is_exact_with_dropout_on_the_device(device: str, precision: str, tmp_path: Path) -> None:
    setup = Setup(trainer={"accelerator": device, "precision": precision})
    whole = setup.run(tmp_path, kinds=("batch_end", "validation_end"))
    moments = list(whole[3].items())
    for path, lines in (moments[2], moments[len(moments) // 2], moments[-2]):
        resumed = setup.run(tmp_path, ckpt_path=path)
        assert difference(resumed, whole, lines, kind_of(path)) is None, path.name


def test_the_devices_generator_goes_on_where_it_was(device: str) -> None:
    torch.rand(3, device=device)
    state = rng_state()
    expected = torch.rand(3, device=device)
    assert not torch.equal(torch.rand(3, device=device), expected)
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device=device), expected)
