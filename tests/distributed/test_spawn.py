"""Strategies that start their processes from the main one, which has a model of its own."""

from pathlib import Path
from typing import Any

import pytest
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy

from lightning_lora import LoRA, inject


@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.slow), "ddp_fork"])
def test_the_main_process_gets_the_trained_adapter_on_its_base(tmp_path: Path, strategy: str) -> None:
    (found,) = run_processes("spawned", str(tmp_path), strategy, {"merge": None}, True, world_size=1)
    of_checkpoint, of_model = found.pop("losses")
    assert of_checkpoint == pytest.approx(of_model)
    assert set(found.values()) == {True}, found


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
@pytest.mark.parametrize(("merge", "injected"), [(None, False), ("last", True)])
def test_what_would_be_lost_is_refused(tmp_path: Path, strategy: str, merge: Any, injected: bool) -> None:
    model, lora = Toy(), LoRA(r=2, merge=merge)
    if injected:
        inject(model, lora.config)
    trainer = toys.trainer(tmp_path, [lora], devices=2, strategy=strategy)
    with pytest.raises(ValueError, match=r"lora = LoRA\(..., merge=None\)\n +inject\(model, lora.config\)"):
        lora.setup(trainer, model, "fit")
    lora.setup(trainer, model, "test")  # which brings nothing back


@pytest.mark.parametrize("what", ["not injected", "raises"])
def test_an_error_in_a_started_process_comes_through(tmp_path: Path, what: str) -> None:
    """The main process's module has no Trainer then."""

    class Raises(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ArithmeticError("on purpose")

    model, lora = Raises(), LoRA(r=2, merge=None, summary=False)
    if what == "raises":
        inject(model, lora.config)
    trainer = toys.trainer(tmp_path, [lora], devices=1, strategy="ddp_fork")
    with pytest.raises(
        Exception, match="ArithmeticError: on purpose" if what == "raises" else "and only parameters that"
    ):
        trainer.fit(model, toys.loader())
