import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from toys import Toy, assert_adapter_only, assert_same_tensors, inputs, loader, snapshot

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    load_from_checkpoint,
    unmerge,
)
from lightning_lora.trainer.strategy import AdapterCheckpoints, install


def fit(tmp_path: Path, *callbacks: Any, model: Any = None, lora: Any = None, **kw: Any) -> tuple[Toy, Any]:
    model = model or Toy()
    trainer = toys.trainer(tmp_path, [lora or LoRA(r=2, summary=False), *callbacks], **kw)
    trainer.fit(model, loader(), loader())
    return model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The last checkpoint of a run, and the trained adapter."""
    path = tmp_path_factory.mktemp("run")
    model, _ = fit(path, ModelCheckpoint(path, save_last=True))
    unmerge(model)
    return path / "last.ckpt", {k: v.clone() for k, v in adapter_state_dict(model).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_train_steps": 1, "save_top_k": -1},
        {"save_last": True},
        {"save_weights_only": True, "save_last": True},
        {"monitor": "val_loss", "save_top_k": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_model_checkpoint_holds_the_adapter_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = snapshot(Toy())
    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, **settings))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert_adapter_only(checkpoint, base)
        assert checkpoint["state_dict"].keys() == adapter_state_dict(unmerge(model)).keys()
        assert ("optimizer_states" not in checkpoint) == bool(settings.get("save_weights_only"))
        assert set(checkpoint["lightning_lora"]["adapters"][0]) >= {"config", "base_fingerprint", "adapter_name"}


@pytest.mark.parametrize("when", ["during", "after, merged", "after, not merged"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_trainer_save_checkpoint(tmp_path: Path, when: str, weights_only: bool) -> None:
    base = snapshot(Toy())
    path = tmp_path / "own.ckpt"

    class Save(toys.L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(path, weights_only=weights_only)

    lora = LoRA(r=2, summary=False, merge="last" if when == "after, merged" else None)
    model, trainer = fit(tmp_path, *([Save()] if when == "during" else []), lora=lora, enable_checkpointing=False)
    if when != "during":
        trainer.save_checkpoint(path, weights_only=weights_only)
    assert_adapter_only(path, base)
    collected = trainer.strategy.lightning_module_state_dict()  # a sharded base must not even be gathered
    assert collected.keys() == torch.load(path, weights_only=True)["state_dict"].keys()
    out = unmerge(model).eval()(inputs())
    assert torch.equal(load_from_checkpoint(Toy, path).eval()(inputs()), out)


def test_checkpoint_on_an_exception(tmp_path: Path) -> None:
    class Fails(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 5:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, ModelCheckpoint(tmp_path, save_on_exception=True), OnExceptionCheckpoint(tmp_path), model=model)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) >= 2
    for file in files:
        assert_adapter_only(file, snapshot(Toy()))


def test_asynchronous_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), plugins=[AsyncCheckpointIO()])
    assert_adapter_only(tmp_path / "last.ckpt", snapshot(Toy()))


def test_size_is_that_of_adapter_and_moments(tmp_path: Path) -> None:
    class Wide(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[4] = torch.nn.Sequential(torch.nn.Linear(16, 4096), torch.nn.Linear(4096, 16))

    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), model=Wide(), lora=LoRA(r=8, summary=False))
    adapter = sum(t.numel() * t.element_size() for t in adapter_state_dict(unmerge(model)).values())
    size = os.path.getsize(tmp_path / "last.ckpt")
    assert 3 * adapter <= size <= 1.02 * 3 * adapter + 64 * 1024


def test_a_run_with_a_module_of_its_own_keeps_the_rest(tmp_path: Path) -> None:
    model, _ = fit(
        tmp_path,
        ModelCheckpoint(tmp_path, save_last=True),
        lora=LoRA(r=2, module="net.0", summary=False),
    )
    keys = set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert keys == {"net.0.lora.default.lora_A", "net.0.lora.default.lora_B"} | {
        name for name in Toy().state_dict() if not name.startswith("net.0.")
    }
    rebuilt = load_from_checkpoint(Toy, tmp_path / "last.ckpt")
    assert torch.equal(rebuilt.eval()(inputs()), unmerge(model).eval()(inputs()))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint_on_the_untouched_base(
    tmp_path: Path, run: tuple[Path, dict[str, torch.Tensor]], stage: str
) -> None:
    path, adapter = run
    model = Toy()
    base = snapshot(model)
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False)])
    result = getattr(trainer, stage)(model, loader(), ckpt_path=path)
    assert_same_tensors(adapter_state_dict(model), adapter)
    if stage == "predict":
        expected = load_from_checkpoint(Toy, path).eval()(inputs())
        torch.testing.assert_close(torch.cat(result), expected)
    assert_same_tensors(eject(model).state_dict(), base)


def test_best_is_merged_and_tested(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    model = Toy(lr=0.3)  # high, so that the last step is not the best
    model, trainer = fit(tmp_path, best, model=model, lora=LoRA(r=2, merge="best", summary=False), max_epochs=6)
    assert best.best_model_path
    merged = model.eval()(inputs())
    expected = load_from_checkpoint(Toy, best.best_model_path).eval()(inputs())
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    loss = trainer.test(model, loader(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(float(best.best_model_score), rel=1e-5)
    torch.testing.assert_close(model.eval()(inputs()), merged, rtol=1e-4, atol=1e-4)


def test_merging_the_best_needs_a_best(tmp_path: Path) -> None:
    lora = LoRA(r=2, merge="best", summary=False)
    with pytest.raises(ValueError, match="the Trainer keeps none"):
        fit(tmp_path, lora=lora, enable_checkpointing=False)
    model = Toy()
    with pytest.raises(CheckpointError, match='merge="best" needs a best checkpoint'):
        fit(tmp_path, ModelCheckpoint(tmp_path, save_top_k=0), lora=lora, model=model)
    assert "lora" in dict(model.net[0].named_children())


def test_a_place_that_cannot_be_exported_to_is_found_out_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fit(tmp_path, lora=LoRA(r=2, export_dir=tmp_path / "file" / "export"), limit_train_batches=0)


def refused(tmp_path: Path, path: Path, match: str, model: Any = None, lora: Any = None) -> None:
    """The checkpoint is refused with one paragraph, and the model is as it came."""
    model = model or Toy()
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    trainer = toys.trainer(tmp_path, [lora or LoRA(r=2, summary=False)])
    for run in (trainer.fit, trainer.test):
        with pytest.raises(CheckpointError, match=match) as error:
            run(model, loader(), ckpt_path=path)
        assert "\n" not in str(error.value)
        assert_same_tensors(model.state_dict(), before)
        assert [type(m) for m in model.modules()] == classes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert "configure_model" not in vars(model)


def test_other_settings_are_refused(tmp_path: Path, run: tuple[Path, Any]) -> None:
    refused(tmp_path, run[0], r"r \(2 saved, 4 here\)", lora=LoRA(r=4, summary=False))
    refused(tmp_path, run[0], r"lora_alpha \(16 saved, 8 here\)", lora=LoRA(r=2, lora_alpha=8, summary=False))
    refused(tmp_path, run[0], r"left over: net\.4", lora=LoRA(r=2, target_modules=["0", "6"], summary=False))
    refused(tmp_path, run[0], "'default' on the whole module", lora=LoRA(r=2, module="net", summary=False))


def test_another_base_is_refused(tmp_path: Path, run: tuple[Path, Any]) -> None:
    refused(tmp_path, run[0], "trained on another base model: its fingerprint", model=Toy(seed=1))
    with pytest.raises(CheckpointError, match="another base model"):
        load_from_checkpoint(Toy, run[0], seed=1)
    base = Toy(seed=1)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(base, run[0])


def test_a_full_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, [ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(Toy(), loader())
    refused(tmp_path, tmp_path / "last.ckpt", "is no adapter checkpoint: it holds 11 tensors")
    with pytest.raises(CheckpointError, match="is no adapter checkpoint"):
        load_from_checkpoint(Toy, tmp_path / "last.ckpt")


def test_a_file_cut_short_is_refused(tmp_path: Path, run: tuple[Path, Any]) -> None:
    whole = run[0].read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        short = tmp_path / "short.ckpt"
        short.write_bytes(whole[:size])
        refused(tmp_path, short, "cannot be read as a checkpoint")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load_from_checkpoint(Toy, short)


def test_a_newer_format_is_refused(tmp_path: Path, run: tuple[Path, Any]) -> None:
    checkpoint = torch.load(run[0], weights_only=True)
    checkpoint["lightning_lora"]["format_version"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    refused(tmp_path, tmp_path / "newer.ckpt", "format version 99")


def test_the_same_base_in_bfloat16_is_the_same_base(tmp_path: Path, run: tuple[Path, Any]) -> None:
    model = Toy()
    toys.trainer(tmp_path, [LoRA(r=2, summary=False)], precision="bf16-true").test(model, loader(), ckpt_path=run[0])
    model = load_adapter(Toy().bfloat16(), run[0])
    assert torch.isfinite(model.eval()(inputs().bfloat16())).all()


def test_warm_start_from_a_checkpoint_and_from_a_directory(tmp_path: Path, run: tuple[Path, Any]) -> None:
    from lightning_lora import save_adapter

    path, adapter = run
    save_adapter(load_from_checkpoint(Toy, path), tmp_path / "adapter")

    class Look(toys.L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            assert_same_tensors(adapter_state_dict(module), adapter)
            self.looked = True

    for source in (path, tmp_path / "adapter"):
        look = Look()
        _, trainer = fit(tmp_path, look, lora=LoRA(r=2, adapter=source, summary=False), max_epochs=1)
        assert look.looked
        assert trainer.global_step == 4
    with pytest.raises(CheckpointError, match=r"r \(2 saved, 3 here\)"):
        fit(tmp_path, lora=LoRA(r=3, adapter=path, summary=False))
    with pytest.raises(CheckpointError, match="scales the update of net.0 by 8"):
        fit(tmp_path, lora=LoRA(r=3, adapter=tmp_path / "adapter", summary=False))


def test_a_strategy_without_the_seam_fails_loudly() -> None:
    class Changed:
        def save_checkpoint(self) -> None: ...

    with pytest.raises(RuntimeError, match="Changed has no lightning_module_state_dict, load_checkpoint"):
        install(Changed(), AdapterCheckpoints)


def test_inject_by_hand_then_the_callback(tmp_path: Path) -> None:
    model = inject(Toy(), LoraConfig(r=2))
    model, _ = fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), model=model)
    assert_adapter_only(tmp_path / "last.ckpt", snapshot(Toy()))


def test_an_unknown_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module='backbone'.*own submodules are: net"):
        fit(tmp_path, lora=LoRA(module="backbone"))
