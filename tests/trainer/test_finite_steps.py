"""A NaN or an infinity is noticed before an optimizer steps, and comes into no adapter, checkpoint or export."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.distributed.processes import run_processes
from helpers.toys import Toy, loader, snapshot
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora import LoRA, LoraConfig, inject, load_adapter, save_adapter
from lightning_lora.model.finite import not_finite, total_norm
from lightning_lora.model.state_dict import CheckpointError, adapter_state_dict
from lightning_lora.trainer.finite_steps import FiniteSteps

NAN, INF = float("nan"), float("inf")


class Diverging(Toy):
    """The loss of one batch is multiplied by something, with its gradients."""

    def __init__(self, factor: float = NAN, batch: int = 2, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.factor, self.batch, self.seen = factor, batch, 0
        self.kept: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        if self.seen == self.batch + 1:
            self.kept = {name: tensor.clone() for name, tensor in adapter_state_dict(self).items()}
            return super().training_step(batch, batch_idx) * self.factor
        return super().training_step(batch, batch_idx)


class BadLossAlone(Diverging):
    """The loss of one batch is NaN while its gradients are finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return Toy.training_step(self, batch, batch_idx) + (self.factor if self.seen == self.batch + 1 else 0.0)


class BadGradientAlone(Toy):
    """One layer's gradient of the second step is infinite while the loss is finite."""

    def on_before_backward(self, loss: Tensor) -> None:
        if self.global_step == 1:
            self.net[4].lora["default"].lora_B.register_hook(lambda grad: grad * INF)


class Lbfgs(Diverging):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], max_iter=2)


class Manual(Diverging):
    """Two optimizers in turn, of which ``take`` makes a step in one of four ways."""

    def __init__(self, take: Callable[[Any, Callable[[], Tensor]], None], **kw: Any) -> None:
        super().__init__(**kw)
        self.automatic_optimization = False
        self.take = take

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step

        def closure() -> Tensor:
            self.optimizers()[turn].zero_grad()
            value = loss(batch, batch_idx)
            self.manual_backward(value)
            return value

        turn = batch_idx % 2
        self.take(self.optimizers()[turn], closure)

    def configure_optimizers(self) -> Any:
        first, *others = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD([first], lr=1e-2), torch.optim.SGD(others, lr=1e-2)


def step_after(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.step()


def step_with(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    optimizer.step(closure=closure)


def bare_step_after(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.optimizer.step()


def bare_step_with(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    optimizer.optimizer.step(closure)


def fit(path: Path, model: L.LightningModule, *callbacks: Any, trainer: Any = None, **settings: Any) -> L.Trainer:
    lora = LoRA(r=2, summary=False, merge=None, **settings)
    made = toys.trainer(path, [lora, *callbacks], **{"enable_checkpointing": False} | (trainer or {}))
    made.fit(model, loader())
    return made


def every_step(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)


@pytest.mark.parametrize(
    "make",
    [
        Diverging,
        lambda: Diverging(INF),
        Lbfgs,
        *(lambda take=take: Manual(take) for take in (step_after, step_with, bare_step_after, bare_step_with)),
    ],
)
def test_the_step_is_not_taken(make: Callable[[], Diverging], tmp_path: Path) -> None:
    model = make()
    with pytest.raises(
        RuntimeError, match=r"NaN or infinity at step .*: the loss is, and the gradients of .*net\.0.* are not finite"
    ):
        fit(tmp_path, model)
    assert model.seen == 3
    toys.assert_same_tensors(adapter_state_dict(model), model.kept)


def test_each_batch_that_is_accumulated_is_looked_at(tmp_path: Path) -> None:
    model = Diverging(batch=6)  # the last but one of an epoch
    with pytest.raises(RuntimeError, match="NaN or infinity at step 2, in batch 2 of epoch 1"):
        fit(tmp_path, model, trainer={"accumulate_grad_batches": 3, "max_epochs": 3})
    toys.assert_same_tensors(adapter_state_dict(model), model.kept)


def test_large_gradients_are_no_fault(tmp_path: Path) -> None:
    model = Diverging(1e30)  # of which float32 cannot hold the square
    fit(tmp_path, model)
    assert model.seen == 8


@pytest.mark.parametrize(
    "make", [Toy, lambda: Manual(step_with, factor=1.0), lambda: Manual(bare_step_after, factor=1.0)]
)
def test_each_step_is_looked_at_once(make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    real = FiniteSteps._look
    monkeypatch.setattr(FiniteSteps, "_look", lambda self, optimizer: (looks.append(optimizer), real(self, optimizer)))
    fit(tmp_path, make())
    assert len(looks) == 8


def test_only_the_loss(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="at step 2, in batch 2 of epoch 0: the loss is not finite. AdamW has not"):
        fit(tmp_path, BadLossAlone())


@pytest.mark.parametrize("clipping", [{}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}])
def test_only_one_layer_is_named_also_if_clipping_would_hide_it(clipping: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"at step 1, .*: the gradients of 'net\.4' are not finite"):
        fit(tmp_path, BadGradientAlone(), trainer=clipping)


@pytest.mark.parametrize("max_epochs", [1, 2])  # at the end of the run, and at the next step
def test_what_an_optimizer_has_made_itself(max_epochs: int, tmp_path: Path) -> None:
    model = Toy(lr=1e38)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=INF)  # type: ignore[method-assign]
    steps = 1 if max_epochs == 1 else 4
    with pytest.raises(
        RuntimeError, match="the adapter itself in 3 layers .* is not finite. The optimizer's last step"
    ):
        fit(tmp_path, model, trainer={"max_steps": steps}, on_nan="warn")


def test_the_last_checkpoint_is_named_and_finite(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"The last checkpoint, {tmp_path}/last.ckpt, is finite") as caught:
        fit(tmp_path, Diverging(), every_step(tmp_path), trainer={"enable_checkpointing": True}, export_dir=tmp_path)
    assert "on_nan" in str(caught.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert not not_finite(saved["state_dict"])
    assert not (tmp_path / "adapter").exists()


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No checkpoint was written before"):
        fit(tmp_path, Diverging())


def test_steps_are_left_out(tmp_path: Path) -> None:
    model = Diverging()
    with pytest.warns(UserWarning, match="at step 2.*Steps left out so far: 1"):
        toys.trainer(tmp_path, [LoRA(r=2, summary=False, merge=None, on_nan="warn")]).fit(model, loader())
    found = adapter_state_dict(model)
    assert model.seen == 8
    assert not not_finite(found)
    assert any(not torch.equal(found[name], model.kept[name]) for name in found)  # it went on


def test_many_that_are_left_out_are_told_less_and_less(tmp_path: Path) -> None:
    class Always(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * NAN

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toys.trainer(tmp_path, [LoRA(r=2, summary=False, merge=None, on_nan="warn")]).fit(Always(), loader())
    assert [str(each.message)[-2:] for each in caught if "left out" in str(each.message)] == ["1.", "2.", "4.", "8."]


def test_nothing_is_looked_at(tmp_path: Path) -> None:
    model = Diverging()
    fit(tmp_path, model, every_step(tmp_path), trainer={"enable_checkpointing": True}, on_nan="ignore")
    assert not_finite(adapter_state_dict(model))
    with pytest.raises(CheckpointError, match="The adapter holds a NaN or an infinity in .*Nothing was written"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    for reader in (
        lambda path: load_adapter(Toy(), path),
        lambda path: toys.trainer(tmp_path, [LoRA(r=2)], max_epochs=3).fit(Toy(), loader(), ckpt_path=path),
    ):
        with pytest.raises(CheckpointError, match="step=8.ckpt holds a NaN or an infinity in .*Nothing was loaded"):
            reader(tmp_path / "step=8.ckpt")


def test_nothing_that_is_not_finite_takes_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    model = Toy()
    trainer = fit(tmp_path, model)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    before = (tmp_path / "kept.ckpt").read_bytes()
    with torch.no_grad():
        model.net[0].lora["default"].lora_B[0, 0] = NAN
    with pytest.raises(CheckpointError, match=r"to be saved holds a NaN .*'net\.0\.lora.*No checkpoint was written"):
        trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert (tmp_path / "kept.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"].fill_(NAN), "exp_avg of parameter 0 of optimizer 0"),
        (lambda c: c["state_dict"].update({k: v.to(torch.float8_e5m2) for k, v in c["state_dict"].items()}), "type"),
    ],
)
def test_what_resuming_refuses(change: Callable[[Any], None], named: str, tmp_path: Path) -> None:
    fit(tmp_path, Toy()).save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    model = Toy()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=named):
        toys.trainer(tmp_path, [LoRA(r=2)], max_epochs=3).fit(model, loader(), ckpt_path=tmp_path / "last.ckpt")
    toys.assert_same_tensors(snapshot(model), before)


def test_a_mask_of_infinities_is_no_fault(tmp_path: Path) -> None:
    class Masked(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[6].register_buffer("mask", torch.tensor([-INF]))
            self.register_buffer("mask", torch.tensor([-INF]))

    settings: dict[str, Any] = {"module": "net", "modules_to_save": ["6"]}
    trainer = fit(tmp_path, Masked(), **settings)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fitted = load_adapter(Masked(), tmp_path / "last.ckpt")
    save_adapter(fitted, tmp_path / "adapter")
    toys.trainer(tmp_path, [LoRA(r=2, **settings)], max_epochs=3).fit(
        Masked(), loader(), ckpt_path=tmp_path / "last.ckpt"
    )


def scaled(factor: float, batch: int, scale: float = 2.0**16) -> tuple[Diverging, dict[str, Any]]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))  # type: ignore[attr-defined]
    return Diverging(factor, batch), {"plugins": [plugin]}


def test_a_step_that_a_scaler_leaves_out_is_normal(tmp_path: Path) -> None:
    model, settings = scaled(INF, 2)
    fit(tmp_path, model, trainer=settings)
    assert model.seen == 8
    assert not not_finite(adapter_state_dict(model))


def test_a_scaler_that_has_given_up(tmp_path: Path) -> None:
    model, settings = scaled(NAN, 2, scale=2.0**-9)
    with pytest.raises(RuntimeError, match="the gradients of .* are not finite"):
        fit(tmp_path, model, trainer=settings)
    assert model.seen == 3


def test_trial_steps_may_diverge(tmp_path: Path) -> None:
    class Short(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            trial = any(type(callback).__name__ == "_LRCallback" for callback in self.trainer.callbacks)
            return super().training_step(batch, batch_idx) * (NAN if trial and batch_idx == 3 else 1.0)

    finder = LearningRateFinder(num_training_steps=4, update_attr=False, early_stop_threshold=None)
    toys.trainer(tmp_path, [LoRA(r=2, summary=False), finder], max_epochs=1).fit(Short(), loader())


def test_hooks_do_not_outlast_a_run(tmp_path: Path) -> None:
    model = Toy()
    trainer = fit(tmp_path, model)
    optimizer: Any = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    copy.deepcopy(trainer.callbacks[0])


def test_one_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="on_nan is 'stop', but it must be one of 'raise', 'warn', 'ignore'"):
        LoRA(on_nan="stop")


def test_two_callbacks_look_at_the_same_steps(tmp_path: Path) -> None:
    one, two = (
        LoRA(r=2, target_modules=[name], on_nan=on_nan, adapter_name=name)
        for name, on_nan in (("net.0", "raise"), ("net.4", "warn"))
    )
    with pytest.raises(ValueError, match="give them the same on_nan"):
        toys.trainer(tmp_path, [one, two]).fit(Toy(), loader())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_values_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    tensors = {"a": torch.full((3,), most, dtype=dtype), "b": torch.ones(2), "empty": torch.empty(0)}
    tensors["sparse"] = torch.tensor([[0.0, 1.0]]).to_sparse()
    assert not not_finite(tensors)
    for bad in (NAN, INF, -INF):
        tensors["a"] = torch.tensor([0.0, bad, most], dtype=dtype)
        tensors["sparse"] = torch.tensor([[0.0, bad]]).to_sparse()
        assert not_finite(tensors) == ["a", "sparse"]
        assert not total_norm(tensors.values()).isfinite()
    assert total_norm([]).isfinite()


def test_an_adapter_of_a_file_that_is_not_finite(tmp_path: Path) -> None:
    model = inject(Toy(), LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] = INF
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        load_adapter(Toy(), tmp_path / "adapter")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_all_processes_agree(strategy: str, tmp_path: Path) -> None:
    """The loss of one of two processes alone is NaN, with finite gradients, or with NaN in its own."""
    for rank in run_processes("jobs.diverging", str(tmp_path), strategy):
        assert "the loss is not finite" in rank["alone"]
        assert "the loss is, and the gradients of" in rank["both"]
        assert "q_proj" in rank["both"]
        assert rank["warned"] == 1
        assert rank["finite"]
