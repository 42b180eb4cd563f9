"""The package ``pytorch_lightning`` has a Trainer of its own, which takes the same callback."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import assert_adapter_only, assert_same_tensors, loader, outputs, snapshot, toy_net
from torch import Tensor, nn

from lightning_lora import LoRA, adapter_state_dict, load_from_checkpoint, unmerge

pl = pytest.importorskip("pytorch_lightning")


class Toy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = toy_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def lora(**settings: Any) -> LoRA:
    return LoRA(**({"r": 4, "target_modules": ["net.0", "net.4"], "summary": False} | settings))


def trainer(tmp_path: Path, *callbacks: Any, **settings: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **({"max_epochs": 2} | settings),
    )


def test_eva_starts_at_the_training_data(tmp_path: Path) -> None:
    model, order = Toy(), torch.Generator().manual_seed(1)
    starts: list[Tensor] = []
    model.on_train_start = lambda: starts.append(model.net[0].lora["default"].lora_A.detach().clone())
    rows = torch.utils.data.DataLoader(loader().dataset, batch_size=8, shuffle=True, generator=order)
    trainer(tmp_path, lora(init_lora_weights="eva"), max_epochs=1).fit(model, rows)
    torch.testing.assert_close(starts[0] @ starts[0].T, torch.eye(4), rtol=0, atol=1e-5)


def test_fit_checkpoint_resume_test_and_merge(tmp_path: Path) -> None:
    model = Toy()
    base, base_outputs = snapshot(model), outputs(model)
    checkpoints = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    the_trainer = trainer(tmp_path, lora(), checkpoints)
    pl.seed_everything(3, verbose=False)
    the_trainer.fit(model, loader(), loader())
    for path in tmp_path.glob("*.ckpt"):
        assert_adapter_only(path, base)
    merged = outputs(model)
    assert not torch.allclose(merged, base_outputs, atol=1e-3)
    assert "configure_model" not in vars(model)
    (found,) = the_trainer.test(model, loader(), verbose=False)
    (same,) = trainer(tmp_path, lora()).test(Toy(), loader(), ckpt_path=checkpoints.last_model_path, verbose=False)
    assert found["val_loss"] == pytest.approx(same["val_loss"], rel=1e-4)
    torch.testing.assert_close(
        outputs(load_from_checkpoint(Toy, checkpoints.last_model_path)), merged, rtol=1e-4, atol=1e-5
    )

    resumed, whole = Toy(), Toy()
    trainer(tmp_path, lora(), max_epochs=3).fit(resumed, loader(), loader(), ckpt_path=checkpoints.last_model_path)
    pl.seed_everything(3, verbose=False)
    trainer(tmp_path, lora(), max_epochs=3).fit(whole, loader(), loader())
    assert_same_tensors(snapshot(resumed), snapshot(whole))

    unmerge(model)
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)


@pytest.mark.parametrize("averaging", ["EMAWeightAveraging", "WeightAveraging"])
def test_weight_averaging(tmp_path: Path, averaging: str) -> None:
    model = Toy()
    base = snapshot(model)
    checkpoints = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    callback = getattr(pl.callbacks, averaging)()
    trainer(tmp_path, lora(), callback, checkpoints).fit(model, loader())
    assert_adapter_only(checkpoints.last_model_path, base)
    unmerge(model)
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)


def test_the_callback_is_a_lora_of_both_packages() -> None:
    import lightning

    callback = lora(module="net", merge=None)
    assert isinstance(callback, LoRA)
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, lightning.Callback)
    copy = pickle.loads(pickle.dumps(callback))
    assert type(copy) is type(callback)
    assert vars(copy) == vars(callback)
    assert copy.state_key == callback.state_key
    assert repr(type(callback)) == repr(LoRA)


def test_subclasses() -> None:
    class Mine(LoRA):
        def __init__(self) -> None:
            super().__init__(r=3)

    callback = Mine()
    assert isinstance(callback, Mine)
    assert isinstance(callback, pl.Callback)
    assert callback.config.r == 3


def test_the_same_trainer_of_the_other_package_takes_it_too(tmp_path: Path) -> None:
    from helpers.toys import Toy as LightningToy
    from helpers.toys import trainer as lightning_trainer

    model = LightningToy()
    base = snapshot(model)
    lightning_trainer(tmp_path, [lora()]).fit(model, loader())
    unmerge(model)
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)
