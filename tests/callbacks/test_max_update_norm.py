"""An update that has grown beyond a norm is scaled back to it, and any other stays as it is."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy, loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoRA, LoraConfig, inject
from lightning_lora.callbacks import MaxUpdateNorm
from lightning_lora.model.record import injections


def updates(model: Any) -> dict[str, torch.Tensor]:
    (injection,) = injections(model)
    return {name: layer.lora["default"].delta_weight().detach().double() for name, layer in injection.layers()}


def fit(path: Path, callbacks: list[Any], **lora: Any) -> Toy:
    torch.manual_seed(0)
    model = Toy(dropout=0.0, lr=0.1)
    callbacks = [LoRA(**{"r": 2, "merge": None, "summary": False, **lora}), *callbacks]
    toys.trainer(path, callbacks, max_epochs=2, enable_checkpointing=False).fit(model, loader())
    return model


@settings(max_examples=20)
@given(
    max_norm=st.floats(1e-4, 10.0),
    r=st.integers(1, 5),
    freeze_A=st.booleans(),
    lora_alpha=st.floats(0.5, 64.0),
    seed=st.integers(0, 9),
)
def test_one_step(max_norm: float, r: int, freeze_A: bool, lora_alpha: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Toy()
    config = LoraConfig(r=r, lora_alpha=lora_alpha, freeze_A=freeze_A, modules_to_save=[])
    inject(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    before, held = updates(model), copy.deepcopy(model.state_dict())
    limit = MaxUpdateNorm(max_norm)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    limit.on_train_start(type("", (), {"optimizers": [optimizer]})(), model)  # type: ignore[arg-type]
    optimizer.step()
    after = updates(model)
    for name, update in before.items():
        share = min(1.0, max_norm / float(update.norm()))
        torch.testing.assert_close(after[name], share * update, rtol=1e-4, atol=1e-7)
        if float(update.norm()) < 0.999 * max_norm:
            assert torch.equal(after[name], update)
    for name, value in model.state_dict().items():
        moves = "lora_B" in name or ("lora_A" in name and not freeze_A)
        assert moves or torch.equal(value, held[name]), name
    limit.on_train_end()
    for parameter in trained:
        parameter.data.mul_(100)
    moved = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())


def test_a_run_stays_below(tmp_path: Path) -> None:
    free = {name: float(update.norm()) for name, update in updates(fit(tmp_path, [])).items()}
    limit = 0.5 * min(free.values())
    seen: list[float] = []

    class Look(L.Callback):  # it comes first, and yet sees what is scaled back
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.extend(float(update.norm()) for update in updates(pl_module).values())

    fit(tmp_path, [Look(), MaxUpdateNorm(limit)])
    assert max(seen) == pytest.approx(limit, rel=1e-4)
    toys.assert_same_tensors(*(toys.snapshot(fit(tmp_path, each)) for each in ([], [MaxUpdateNorm(1e4)])))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa", "r": 1}, {"use_vera": True}])
def test_what_is_no_product_is_named_before_a_step(variant: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot scale the updates of '?net\.\d.*DoRA, VeRA"):
        fit(tmp_path, [MaxUpdateNorm(1.0)], **variant)


def test_no_adapter_is_an_error_and_not_a_limit_of_nothing(tmp_path: Path) -> None:
    wrapped = Toy()
    wrapped.net[0] = peft.get_peft_model(nn.Sequential(wrapped.net[0]), peft.LoraConfig(target_modules=["0"]))
    for model, callbacks in ((Toy(), []), (wrapped, [LoRA(merge=None, summary=False)])):
        trainer = toys.trainer(tmp_path, [*callbacks, MaxUpdateNorm(1.0)], enable_checkpointing=False)
        with pytest.raises(ValueError, match="no adapter of this package"):
            trainer.fit(model, loader())


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_no_such_norm(max_norm: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0"):
        MaxUpdateNorm(max_norm)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_sharded_as_in_one_process(strategy: str, tmp_path: Path) -> None:
    (alone,) = run_processes("jobs.limited", str(tmp_path / "one"), "one", world_size=1)
    found, _ = run_processes("jobs.limited", str(tmp_path / strategy), strategy)
    assert max(alone["norms"].values()) == pytest.approx(1e-3, rel=1e-3)
    for name, value in alone["norms"].items():
        assert found["norms"][name] == pytest.approx(value, rel=1e-2), name
