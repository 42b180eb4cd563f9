"""DeepSpeed is refused at set-up. Its package need not be there: the strategy is made without it, and not run."""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from helpers import toys
from helpers.toys import Toy, assert_same_tensors, snapshot
from lightning.pytorch.strategies import DeepSpeedStrategy, deepspeed

from lightning_lora import LoRA
from lightning_lora.model.record import injections_of


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_refused_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", MagicMock())
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_GREATER_EQUAL_0_16", True)
    model, lora = Toy(), LoRA(r=2)
    trainer = toys.trainer(tmp_path, [lora])
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", DeepSpeedStrategy(stage=stage))
    with pytest.raises(ValueError, match=r'does not support DeepSpeedStrategy.*strategy="ddp"'):
        lora.setup(trainer, model, "fit")
    assert not injections_of(model)
    assert_same_tensors(model.state_dict(), snapshot(Toy()))
