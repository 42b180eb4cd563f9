"""The callback beside everything else that a Trainer does: the model needs no change, and its base never changes."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.toys import (
    Toy,
    assert_adapter_only,
    assert_same_tensors,
    dataset,
    loader,
    outputs,
    snapshot,
    toy_net,
    trainer,
)
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, adapter_state_dict, load_from_checkpoint, unmerge
from lightning_lora.layers import LoraLayer

TARGETS = ["net.0", "net.4"]


def lora(**settings: Any) -> LoRA:
    return LoRA(**({"r": 4, "target_modules": TARGETS, "summary": False} | settings))


def checkpoint_callback(tmp_path: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**({"dirpath": tmp_path / "checkpoints", "save_last": True} | settings))


def moved(model: nn.Module) -> list[str]:
    """The names of the adapted layers whose B has left zero."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora["default"].lora_B.count_nonzero()
    ]


def assert_trained_and_merged(model: nn.Module, base: dict[str, Tensor], base_outputs: Tensor) -> None:
    """Require that all adapters were trained and folded in, and that below them the base is what it was."""
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert model.state_dict().keys() == base.keys()
    merged = outputs(model)
    assert not torch.allclose(merged, base_outputs, atol=1e-3)
    unmerge(model)
    assert moved(model) == TARGETS
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)


def fit_and_check(model: Toy, the_trainer: L.Trainer) -> None:
    base, base_outputs = snapshot(model), outputs(model)
    the_trainer.fit(model, loader(), loader())
    assert "configure_model" not in vars(model)
    if the_trainer.checkpoint_callback and the_trainer.checkpoint_callback.last_model_path:
        assert_adapter_only(the_trainer.checkpoint_callback.last_model_path, base)
    assert_trained_and_merged(model, base, base_outputs)


class ManualToy(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self._loss(batch, "train_loss")
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "limit_train_batches": 3},
        {"max_epochs": -1, "max_steps": 5},
        {"val_check_interval": 1},
        {"inference_mode": False},
        {"deterministic": True},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_automatic_optimization(tmp_path: Path, settings: dict[str, Any]) -> None:
    fit_and_check(Toy(), trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)], **settings))


def test_manual_optimization(tmp_path: Path) -> None:
    fit_and_check(ManualToy(), trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)]))


def test_manual_optimization_resumes(tmp_path: Path) -> None:
    whole = ManualToy()
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, [lora(merge=None)], max_epochs=3).fit(whole, loader())
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)], max_epochs=1).fit(ManualToy(), loader())
    resumed = ManualToy()
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer(tmp_path, [lora(merge=None)], max_epochs=3).fit(resumed, loader(), ckpt_path=last)
    assert_same_tensors(adapter_state_dict(resumed), adapter_state_dict(whole))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
def test_precision(tmp_path: Path, precision: str) -> None:
    if precision == "16-mixed" and not torch.cuda.is_available():
        pytest.skip("Lightning scales gradients of 16-mixed on CUDA only")
    model = Toy().double() if precision == "64-true" else Toy()
    fit_and_check(model, trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)], precision=precision))


def test_bf16_true(tmp_path: Path) -> None:
    model = Toy(lr=5e-2)
    base = {name: t.bfloat16() if t.is_floating_point() else t for name, t in snapshot(model).items()}
    callbacks = [lora(), checkpoint_callback(tmp_path)]
    trainer(tmp_path, callbacks, precision="bf16-true", max_epochs=4).fit(model, loader())
    assert_adapter_only(callbacks[1].last_model_path, base)
    merged = outputs(model)
    unmerge(model)
    assert moved(model) == TARGETS
    torch.testing.assert_close(outputs(model), merged, rtol=0.05, atol=0.05)
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)


class BuiltInConfigureModel(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.built = 0

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = toy_net()
            self.built += 1


class BuiltInSetup(Toy):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = toy_net()


@pytest.mark.parametrize("module_class", [BuiltInConfigureModel, BuiltInSetup])
def test_models_that_are_built_late(tmp_path: Path, module_class: type[Toy]) -> None:
    base, base_outputs = snapshot(Toy()), outputs(Toy())
    model = module_class()
    the_trainer = trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)])
    the_trainer.fit(model, loader(), loader())
    assert "configure_model" not in vars(model)
    last = the_trainer.checkpoint_callback.last_model_path
    assert_adapter_only(last, base)

    # The unbuilt module, an adapter checkpoint and nothing else.
    tested = module_class()
    test_trainer = trainer(tmp_path, [lora()])
    losses = test_trainer.test(tested, loader(), ckpt_path=last, verbose=False)
    assert losses[0]["test_loss"] == pytest.approx(
        the_trainer.test(model, loader(), verbose=False)[0]["test_loss"], rel=1e-4
    )
    resumed = module_class()
    trainer(tmp_path, [lora()], max_epochs=3).fit(resumed, loader(), ckpt_path=last)
    trainer(tmp_path, [lora()], max_epochs=3).fit(model, loader(), ckpt_path=last)
    assert_same_tensors(snapshot(resumed), snapshot(model))
    assert_trained_and_merged(model, base, base_outputs)


def test_late_and_early_built_models_train_alike(tmp_path: Path) -> None:
    results = []
    for module_class in (Toy, BuiltInConfigureModel, BuiltInSetup):
        model = module_class()
        L.seed_everything(3, verbose=False)
        trainer(tmp_path, [lora()]).fit(model, loader())
        results.append(snapshot(model))
    assert_same_tensors(results[1], results[0])
    assert_same_tensors(results[2], results[0])


class FromMethods(Toy):
    """With loaders of its own, whose batch size can be tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return loader(batch_size=self.batch_size)


@pytest.mark.parametrize("lora_first", [True, False])
def test_learning_rate_finder(tmp_path: Path, lora_first: bool) -> None:
    model = FromMethods()
    base, base_outputs = snapshot(model), outputs(model)
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1.0, num_training_steps=25, early_stop_threshold=None)
    callbacks = [lora(), finder] if lora_first else [finder, lora()]
    the_trainer = trainer(tmp_path, [*callbacks, checkpoint_callback(tmp_path)])
    at_start: dict[str, Tensor] = {}

    class Spy(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if len(trainer.callbacks) > 1:  # the finder's own run has one
                at_start.update({name: t.clone() for name, t in adapter_state_dict(pl_module).items()})
                assert all(p.requires_grad for group in trainer.optimizers[0].param_groups for p in group["params"])

    the_trainer.callbacks.append(Spy())
    the_trainer.fit(model)
    assert len(finder.optimal_lr.results["lr"]) >= 25
    assert model.lr == finder.optimal_lr.suggestion()
    assert at_start and all(not tensor.any() for name, tensor in at_start.items() if name.endswith("lora_B"))
    assert not list(tmp_path.glob(".lr_find*"))
    assert_adapter_only(the_trainer.checkpoint_callback.last_model_path, base)
    assert_trained_and_merged(model, base, base_outputs)


@pytest.mark.parametrize("lora_first", [True, False])
def test_batch_size_finder(tmp_path: Path, lora_first: bool) -> None:
    model = FromMethods()
    base, base_outputs = snapshot(model), outputs(model)
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    the_trainer = trainer(tmp_path, [lora(), finder] if lora_first else [finder, lora()])
    the_trainer.fit(model)
    assert model.batch_size == finder.optimal_batch_size > 2
    assert_trained_and_merged(model, base, base_outputs)


ORDERS = list(itertools.permutations(["lora", "checkpoint", "stopping", "monitor"]))


@pytest.mark.parametrize("order", ORDERS[::5], ids="-".join)
def test_callbacks_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    callbacks = {
        "lora": lora(),
        "checkpoint": checkpoint_callback(tmp_path, monitor="val_loss"),
        "stopping": EarlyStopping("val_loss", patience=1, min_delta=1e6),
        "monitor": LearningRateMonitor(),
    }
    logger = CSVLogger(tmp_path)
    the_trainer = trainer(tmp_path, [callbacks[name] for name in order], logger=logger, max_epochs=9)
    fit_and_check(Toy(), the_trainer)
    assert the_trainer.current_epoch == 2  # stopped early
    assert "lr-AdamW" in Path(logger.log_dir, "metrics.csv").read_text()


def test_fit_twice_with_one_trainer(tmp_path: Path) -> None:
    model = Toy()
    base, base_outputs = snapshot(model), outputs(model)
    the_trainer = trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)])
    the_trainer.fit(model, loader())
    first = outputs(model)
    the_trainer.fit_loop.max_epochs = 4
    the_trainer.fit(model, loader())
    assert the_trainer.current_epoch == 4
    assert not torch.allclose(outputs(model), first, atol=1e-4)
    assert_adapter_only(the_trainer.checkpoint_callback.last_model_path, base)
    assert_trained_and_merged(model, base, base_outputs)


def test_fit_again_with_another_trainer_goes_on_with_the_adapter(tmp_path: Path) -> None:
    model = Toy()
    base, base_outputs = snapshot(model), outputs(model)
    trainer(tmp_path, [lora()]).fit(model, loader())
    first = outputs(model)

    class Spy(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            torch.testing.assert_close(outputs(pl_module), first, rtol=1e-4, atol=1e-5)

    trainer(tmp_path, [lora(), Spy()]).fit(model, loader())
    assert_trained_and_merged(model, base, base_outputs)


@pytest.mark.parametrize("which", [None, "best", "last", "path"])
def test_fit_then_evaluate(tmp_path: Path, which: str | None) -> None:
    model = Toy()
    base, base_outputs = snapshot(model), outputs(model)
    # The highest loss is that of the first epoch, so that "best" is not "last".
    checkpoints = checkpoint_callback(tmp_path, monitor="val_loss", mode="max", save_top_k=-1)
    the_trainer = trainer(tmp_path, [lora(), checkpoints], max_epochs=3)
    the_trainer.fit(model, loader(), loader())
    path = checkpoints.best_model_path if which in ("best", "path") else checkpoints.last_model_path
    ckpt_path = path if which == "path" else which
    expected_outputs = outputs(load_from_checkpoint(Toy, path))
    expected_loss = nn.functional.mse_loss(expected_outputs, dataset().tensors[1]).item()
    best_outputs = outputs(load_from_checkpoint(Toy, checkpoints.best_model_path))
    assert not torch.allclose(best_outputs, outputs(model), atol=1e-3)

    for _ in range(2):
        losses = the_trainer.validate(model, loader(), ckpt_path=ckpt_path, verbose=False)
        assert losses[0]["val_loss"] == pytest.approx(expected_loss, rel=1e-4)
        losses = the_trainer.test(model, loader(), ckpt_path=ckpt_path, verbose=False)
        assert losses[0]["test_loss"] == pytest.approx(expected_loss, rel=1e-4)
        predicted = the_trainer.predict(model, loader(), ckpt_path=ckpt_path)
        torch.testing.assert_close(torch.cat(predicted), expected_outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(model), expected_outputs, rtol=1e-4, atol=1e-5)
    assert "configure_model" not in vars(model)
    assert_trained_and_merged(model, base, base_outputs)


def test_fit_then_test_then_fit(tmp_path: Path) -> None:
    model, other = Toy(), Toy()
    base, base_outputs = snapshot(model), outputs(model)
    the_trainer = trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)])
    L.seed_everything(3, verbose=False)
    the_trainer.fit(model, loader())
    the_trainer.test(model, loader(), verbose=False)
    the_trainer.fit_loop.max_epochs = 4
    the_trainer.fit(model, loader(), ckpt_path="last")
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, [lora()], max_epochs=4).fit(other, loader())
    assert_same_tensors(snapshot(model), snapshot(other))
    assert_trained_and_merged(model, base, base_outputs)


def test_evaluating_an_untrained_model_computes_the_base(tmp_path: Path) -> None:
    model = Toy()
    base_outputs = outputs(model)
    predicted = trainer(tmp_path, [lora()]).predict(model, loader())
    assert torch.equal(torch.cat(predicted), base_outputs)


class WithBackbone(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:6], toy_net(1)[6]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_module_adapts_a_part_and_the_rest_trains(tmp_path: Path) -> None:
    model = WithBackbone()
    base = snapshot(model.backbone)
    head = snapshot(model.head)
    callbacks = [lora(module="backbone", target_modules=["0", "4"]), checkpoint_callback(tmp_path)]
    the_trainer = trainer(tmp_path, callbacks)
    L.seed_everything(3, verbose=False)
    the_trainer.fit(model, loader(), loader())
    checkpoint = torch.load(callbacks[1].last_model_path, weights_only=True)
    assert_adapter_only(checkpoint, base)
    assert {"head.weight", "head.bias"} < checkpoint["state_dict"].keys()
    assert all(name.startswith("head.") or ".lora." in name for name in checkpoint["state_dict"])
    assert all(not torch.equal(model.head.state_dict()[name], head[name]) for name in head)
    assert all(parameter.requires_grad for parameter in model.head.parameters())

    resumed = WithBackbone()
    trainer(tmp_path, [callbacks[0]], max_epochs=3).fit(resumed, loader(), ckpt_path=callbacks[1].last_model_path)
    whole = WithBackbone()
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, [lora(module="backbone", target_modules=["0", "4"])], max_epochs=3).fit(whole, loader(), loader())
    assert_same_tensors(snapshot(resumed), snapshot(whole))
    merged = outputs(model)
    unmerge(model)
    assert moved(model) == ["backbone.0", "backbone.4"]
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    state = model.backbone.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)


class FailsInSetup(L.Callback):
    def setup(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("on purpose")


class FailsInTraining(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise ZeroDivisionError("on purpose")


def test_exception_in_the_middle_of_training(tmp_path: Path) -> None:
    model = Toy()
    base = snapshot(model)
    checkpoints = checkpoint_callback(tmp_path, save_on_exception=True, save_top_k=0, save_last=False)
    the_trainer = trainer(tmp_path, [lora(), checkpoints, FailsInTraining()])
    with pytest.raises(ZeroDivisionError):
        the_trainer.fit(model, loader())
    assert "configure_model" not in vars(model)
    assert moved(model) == TARGETS
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert_adapter_only(saved, base)
    assert_same_tensors(torch.load(saved)["state_dict"], adapter_state_dict(model))
    # And it goes on from there.
    resumed = Toy()
    trainer(tmp_path, [lora()]).fit(resumed, loader(), ckpt_path=saved)
    trainer(tmp_path, [lora()]).fit(model, loader(), ckpt_path=saved)
    assert_same_tensors(snapshot(resumed), snapshot(model))


def marks(model: nn.Module) -> list[tuple[str, type, list[bool], bool]]:
    """What injection changes beside tensors: each module's class and mode, and its parameters' flags."""
    return [
        (name, type(module), [p.requires_grad for p in module.parameters(recurse=False)], module.training)
        for name, module in model.named_modules()
    ]


def no_optimizer(self: Toy) -> Any:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("kind", ["path", "optimizer", "setup"])
@pytest.mark.parametrize("module", [None, "net"])
def test_exception_before_training_leaves_the_model_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str | None
) -> None:
    model = Toy()
    model.net[4].weight.requires_grad_(False)
    before, base = marks(model), snapshot(model)
    callbacks = [lora(module=module, target_modules=["0", "4"]), checkpoint_callback(tmp_path, save_on_exception=True)]
    ckpt_path, error = None, ZeroDivisionError
    if kind == "path":
        ckpt_path, error = tmp_path / "absent.ckpt", FileNotFoundError
    elif kind == "optimizer":
        monkeypatch.setattr(Toy, "configure_optimizers", no_optimizer)
    else:
        callbacks.append(FailsInSetup())
    with pytest.raises(error):
        trainer(tmp_path, callbacks).fit(model, loader(), ckpt_path=ckpt_path)
    assert marks(model) == before
    assert_same_tensors(snapshot(model), base)
    assert "configure_model" not in vars(model)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize("run", ["fit", "test", "validate", "predict"])
def test_wrong_path_after_fit_leaves_a_merged_model_merged(tmp_path: Path, run: str) -> None:
    model = Toy()
    the_trainer = trainer(tmp_path, [lora(), checkpoint_callback(tmp_path)])
    the_trainer.fit(model, loader())
    before, merged = marks(model), snapshot(model)
    with pytest.raises(FileNotFoundError):
        getattr(the_trainer, run)(model, loader(), ckpt_path=tmp_path / "absent.ckpt")
    assert marks(model) == before
    assert_same_tensors(snapshot(model), merged)
    assert the_trainer.test(model, loader(), verbose=False)


class ListsParametersTooEarly(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.listed = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.listed, lr=1e-2)


def test_parameters_listed_before_injection(tmp_path: Path) -> None:
    early, late = ListsParametersTooEarly(), ListsParametersTooEarly()
    late.configure_optimizers = lambda: torch.optim.AdamW(late.parameters(), lr=1e-2)  # type: ignore[method-assign]
    for model in (early, late):
        L.seed_everything(0, verbose=False)
        trainer(tmp_path, [lora()]).fit(model, loader())
    assert_same_tensors(snapshot(early), snapshot(late))
    assert any(not torch.equal(a, b) for a, b in zip(early.parameters(), ListsParametersTooEarly().parameters()))


def test_an_optimizer_that_has_made_its_state_before_injection(tmp_path: Path) -> None:
    model = ListsParametersTooEarly()
    before = marks(model)
    early = torch.optim.Adagrad(model.listed, lr=1e-2)
    model.configure_optimizers = lambda: early  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"None of the 4 trainable parameters.*Make the list in configure_optim"):
        trainer(tmp_path, [lora()]).fit(model, loader())
    assert marks(model) == before


class WithGroups(Toy):
    """The first group holds frozen parameters only; each group has a schedule of its own."""

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        heads = [parameter for name, parameter in named.items() if name.startswith("net.6")]
        others = [parameter for name, parameter in named.items() if not name.startswith("net.6")]
        optimizer = torch.optim.AdamW([{"params": heads, "lr": 1.0}, {"params": others}], lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.5**epoch])
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_frozen_parameters_leave_the_optimizer(tmp_path: Path) -> None:
    model = WithGroups()
    base, base_outputs = snapshot(model), outputs(model)
    callbacks = [lora(), checkpoint_callback(tmp_path)]
    the_trainer = trainer(tmp_path, callbacks, max_epochs=3)
    L.seed_everything(3, verbose=False)
    the_trainer.fit(model, loader())
    checkpoint = torch.load(callbacks[1].last_model_path, weights_only=True)
    assert_adapter_only(checkpoint, base)
    (state,) = checkpoint["optimizer_states"]
    assert [group["params"] for group in state["param_groups"]] == [[], [0, 1, 2, 3]]
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([1.0, 1e-2 / 8])
    shapes = [tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()]
    assert [tuple(state["state"][index]["exp_avg"].shape) for index in range(4)] == shapes
    assert state["state"].keys() == {0, 1, 2, 3}

    resumed, whole = WithGroups(), WithGroups()
    trainer(tmp_path, [lora()], max_epochs=4).fit(resumed, loader(), ckpt_path=callbacks[1].last_model_path)
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, [lora()], max_epochs=4).fit(whole, loader())
    assert_same_tensors(snapshot(resumed), snapshot(whole))
    assert_trained_and_merged(model, base, base_outputs)


class TinyLlama(L.LightningModule):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
            )
        )
        self.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_trains_every_adapter(tmp_path: Path, use_reentrant: bool) -> None:
    model = TinyLlama(use_reentrant)
    base = snapshot(model)
    tokens = torch.utils.data.TensorDataset(torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0)))
    hooks = list(model.model.get_input_embeddings()._forward_hooks)
    callback = LoRA(r=2, summary=False, merge=None)
    trainer(tmp_path, [callback], max_steps=2, max_epochs=-1).fit(model, DataLoader(tokens, batch_size=2))
    adapted = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    assert len(adapted) == 2 * 7
    assert moved(model) == adapted
    assert list(model.model.get_input_embeddings()._forward_hooks) == hooks
    if hooks:  # transformers' own, which it can still take out
        model.model.disable_input_require_grads()
        assert not model.model.get_input_embeddings()._forward_hooks
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in base}, base)
