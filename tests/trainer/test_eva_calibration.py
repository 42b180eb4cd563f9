"""EVA in a run: a start of ``fit`` at the training data that leaves no trace."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric

from lightning_lora import LoRA, LoraConfig, adapter_state_dict, initialize_eva, inject, unmerge
from lightning_lora.data import ResumableDataLoader
from lightning_lora.model.eva import PrincipalDirections


def eva(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": "eva"} | settings)


def test_a_compiled_module_is_looked_at_uncompiled(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = toys.Toy(dropout=0.0)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    frames: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(torch.is_grad_enabled())
        return graph

    lora = LoRA(r=2, init_lora_weights="eva", target_modules=["net.0"], summary=False)
    toys.trainer(tmp_path, [lora], max_epochs=1).fit(torch.compile(model, backend=backend), toys.loader())
    torch._dynamo.reset()
    assert frames and all(frames)


class Busy(toys.Toy):
    """A toy whose step does all kinds of things beside its work."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__(dropout=0.3)
        self.automatic_optimization = not manual
        self.steps, self.seen = 0, []
        self.mean, self.losses = MeanMetric(), CatMetric()
        self.register_buffer("average", torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        self.steps += 1
        if not torch.is_grad_enabled():
            self.rehearsed = True
        else:
            self.seen.append(x.clone())
            assert not hasattr(self, "rehearsed") and self.steps == len(self.seen)
        self.logger.experiment.log_metrics({"direct": 1.0})
        noise = 0.1 * torch.randn_like(x)  # what is drawn must not depend on the rehearsal
        loss = nn.functional.mse_loss(self.net(x + noise), y)
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        self.mean(loss.detach())
        self.losses.update(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"train_loss": loss})
        if self.automatic_optimization:
            return loss
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        scheduler.step()
        self.untoggle_optimizer(optimizer)
        return None

    def configure_optimizers(self) -> Any:
        self.trainer.estimated_stepping_batches  # noqa: B018  has the data loader made early
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def shuffled() -> DataLoader:
    return DataLoader(toys.dataset(), batch_size=8, shuffle=True)


def with_generator() -> DataLoader:
    return DataLoader(toys.dataset(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4))


def resumable() -> DataLoader:
    return ResumableDataLoader(toys.dataset(), batch_size=8, shuffle=True)


def workers() -> DataLoader:
    return DataLoader(toys.dataset(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("make_loader", [shuffled, with_generator, resumable, workers])
@pytest.mark.parametrize("manual", [False, True])
def test_fit_starts_at_the_training_data_and_leaves_no_trace(manual: bool, make_loader: Any, tmp_path: Path) -> None:
    def run(kind: Any) -> tuple[Busy, Any]:
        path = tmp_path / str(kind)
        L.seed_everything(7, verbose=False)
        model = Busy(manual)
        lora = LoRA(r=2, init_lora_weights=kind, target_modules=["net.0", "net.4"], merge=None, summary=False)
        starts = {}

        class Peek(L.Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                starts.update(toys.snapshot(pl_module))
                starts["random"] = torch.get_rng_state()
                starts["counted"] = pl_module.mean.weight.clone()
                assert not pl_module.losses.value
                starts["lr"] = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"])
                assert all(state == {} for o in trainer.optimizers for state in o.state.values())
                assert trainer.global_step == 0 and not trainer.callback_metrics
                assert all(module.training for module in pl_module.modules() if isinstance(module, nn.Dropout))

        trainer = toys.trainer(path, [lora, Peek()], logger=CSVLogger(path), log_every_n_steps=1)
        trainer.fit(model, make_loader())
        return model, starts

    (model, starts), (plain, plain_starts) = run("eva"), run(True)
    A = [name for name in starts if name.endswith("lora_A")]
    assert len(A) == 2
    toys.assert_same_tensors(*({n: t for n, t in s.items() if n not in A} for s in (starts, plain_starts)))
    assert model.steps == plain.steps == 8
    for batch, same in zip(model.seen, plain.seen, strict=True):
        assert torch.equal(batch, same)
    # The toy adds noise to its inputs, so this is where the exact directions are, to a few degrees.
    start = starts["net.0.lora.default.lora_A"]
    torch.testing.assert_close(start @ start.T, torch.eye(2), rtol=0, atol=1e-5)
    assert not torch.equal(start, plain_starts["net.0.lora.default.lora_A"])
    metrics = [len((Path(tmp_path) / kind).glob("**/metrics.csv").__next__().read_text().splitlines())
               for kind in ("eva", "True")]  # fmt: skip
    assert metrics[0] == metrics[1]


def test_the_start_of_fit_is_that_of_the_same_batches(tmp_path: Path) -> None:
    model = toys.Toy()
    inputs: list[Tensor] = []
    lora = LoRA(r=2, init_lora_weights="eva", target_modules=["net.0"], merge=None, summary=False)
    trainer = toys.trainer(tmp_path, [lora], max_epochs=1, limit_train_batches=3, precision="bf16-mixed")
    model.on_train_start = lambda: inputs.append(model.net[0].lora["default"].lora_A.detach().clone())  # type: ignore
    trainer.fit(model, toys.loader())
    again = inject(toys.Toy(), eva(r=2, target_modules=["net.0"]))
    initialize_eva(again, [x for x, _ in toys.loader()][:3])
    torch.testing.assert_close(inputs[0], again.net[0].lora["default"].lora_A.detach(), rtol=1e-5, atol=1e-5)


def test_what_is_trained_or_resumed_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lora(**settings: Any) -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [LoRA(r=2, init_lora_weights="eva", summary=False, **settings), keep]

    whole = toys.Toy()
    whole.on_train_start = lambda: whole.trainer.save_checkpoint(tmp_path / "fresh.ckpt")  # type: ignore[method-assign]
    toys.trainer(tmp_path, lora(export_dir=tmp_path / "export"), max_epochs=2).fit(whole, toys.loader())
    monkeypatch.setattr(PrincipalDirections, "update", lambda *_: pytest.fail("the data were looked at again"))
    del whole.on_train_start
    for saved in ("fresh", "epoch=0"):
        resumed = toys.Toy()
        trainer = toys.trainer(tmp_path / saved, lora(), max_epochs=2)
        trainer.fit(resumed, toys.loader(), ckpt_path=tmp_path / f"{saved}.ckpt")
    toys.assert_same_tensors(resumed.state_dict(), whole.state_dict())
    toys.assert_same_tensors(adapter_state_dict(unmerge(resumed)), adapter_state_dict(unmerge(whole)))
    toys.trainer(tmp_path / "c", lora(), max_epochs=1).fit(whole, toys.loader())
    for warm in (tmp_path / "export" / "adapter", tmp_path / "epoch=1.ckpt"):
        toys.trainer(tmp_path / "d", lora(adapter=warm), max_epochs=1).fit(toys.Toy(), toys.loader())
    own = inject(toys.Toy(), eva(r=2))
    monkeypatch.undo()
    initialize_eva(own, [x for x, _ in toys.loader()])
    mine = toys.snapshot(own)["net.0.lora.default.lora_A"]
    own.on_train_start = lambda: toys.assert_same_tensors(  # type: ignore[method-assign]
        {"A": own.net[0].lora["default"].lora_A}, {"A": mine}
    )
    toys.trainer(tmp_path / "e", [LoRA(config=eva(r=2), summary=False)], max_epochs=1).fit(own, toys.loader())


def test_a_learning_rate_finder_does_not_spoil_the_start(tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    model = toys.Toy()
    starts: list[Tensor] = []
    lora = LoRA(r=2, init_lora_weights="eva", target_modules=["net.0"], summary=False)
    trainer = toys.trainer(tmp_path, [lora], max_epochs=1)
    Tuner(trainer).lr_find(model, toys.loader(), num_training=3)
    model.on_train_start = lambda: starts.append(model.net[0].lora["default"].lora_A.detach().clone())  # type: ignore
    trainer.fit(model, toys.loader())
    torch.testing.assert_close(starts[0] @ starts[0].T, torch.eye(2), rtol=0, atol=1e-5)


def test_a_step_that_cannot_be_rehearsed_says_what_to_do(tmp_path: Path) -> None:
    class Direct(toys.Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss.backward()
            return loss

    class Iterating(toys.Toy):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    for model, batches, match in (
        (Direct(), toys.loader(), "self.manual_backward"),
        (Iterating(), toys.loader(), "dataloader_iter"),
        (toys.Toy(), iter(toys.loader()), "cannot start over"),
    ):
        base, log = toys.snapshot(model), model.__dict__.get("log")
        with pytest.raises(ValueError, match=rf"{match}.*initialize_eva\(module, batches, forward\)"):
            toys.trainer(tmp_path, [LoRA(r=2, init_lora_weights="eva", summary=False)]).fit(model, batches)
        assert model.__dict__.get("log") is log
        toys.assert_same_tensors(model.state_dict(), base)
