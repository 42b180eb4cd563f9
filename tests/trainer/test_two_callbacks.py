"""Two LoRA callbacks in one Trainer."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.toys import (
    Toy,
    assert_adapter_only,
    assert_same_tensors,
    base_of,
    loader,
    outputs,
    snapshot,
    toy_net,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRA, TargetError, adapter_state_dict, load_from_checkpoint, unmerge
from lightning_lora.layers import LoraLayer


class TwoNets(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = self.net, toy_net(1)
        del self.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


# A model, and what tells the two callbacks apart.
CASES: dict[str, tuple[type[Toy], dict[str, Any], dict[str, Any]]] = {
    "targets": (Toy, {"target_modules": ["net.0"]}, {"target_modules": ["net.4"], "r": 2}),
    "names": (Toy, {"target_modules": ["net.0"]}, {"target_modules": ["net.4"], "adapter_name": "second"}),
    "layers": (Toy, {"target_modules": ["net.0", "net.4"]}, {"target_modules": ["net.0"], "adapter_name": "second"}),
    "modules": (TwoNets, {"module": "left"}, {"module": "right", "r": 2}),
    "saved": (Toy, {"target_modules": ["net.0"]}, {"target_modules": ["net.4"], "modules_to_save": ["net.6"]}),
}


def both(case: str, **settings: Any) -> list[LoRA]:
    return [LoRA(**({"r": 4, "summary": False} | settings | own)) for own in CASES[case][1:]]


def adapted(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("case", CASES)
def test_fit_checkpoint_resume_and_merge(tmp_path: Path, case: str) -> None:
    module_class = CASES[case][0]
    trained_in_full = ("net.6",) if case == "saved" else ()
    model = module_class()
    base = {name: t for name, t in snapshot(model).items() if not name.startswith(trained_in_full or ("-",))}
    L.seed_everything(3, verbose=False)
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    the_trainer = trainer(tmp_path, [*both(case), checkpoints])
    the_trainer.fit(model, loader())
    assert not adapted(model)
    assert "configure_model" not in vars(model)
    checkpoint = torch.load(checkpoints.last_model_path, weights_only=True)
    assert_adapter_only(checkpoint, base)
    assert len(checkpoint["lightning_lora"]["adapters"]) == 2

    merged = outputs(model)
    torch.testing.assert_close(
        outputs(load_from_checkpoint(module_class, checkpoints.last_model_path)), merged, rtol=1e-4, atol=1e-5
    )
    merged_state = snapshot(model)
    (first,) = the_trainer.test(model, loader(), verbose=False)
    (second,) = the_trainer.test(model, loader(), ckpt_path="last", verbose=False)
    assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-4)
    assert not adapted(model)
    assert_same_tensors(snapshot(model), merged_state)

    resumed, whole = module_class(), module_class()
    trainer(tmp_path, both(case), max_epochs=3).fit(resumed, loader(), ckpt_path=checkpoints.last_model_path)
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, both(case), max_epochs=3).fit(whole, loader())
    assert_same_tensors(snapshot(resumed), snapshot(whole))

    unmerge(model)
    assert len(adapted(model)) == (2 if module_class is Toy else 6)
    assert all(tensor.any() for name, tensor in adapter_state_dict(model).items() if name.endswith("lora_B"))
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    assert_same_tensors(base_of(model, base), base)


@pytest.mark.parametrize("case", ["targets", "names", "modules"])
def test_best_of_both(tmp_path: Path, case: str) -> None:
    module_class = CASES[case][0]
    model = module_class()
    checkpoints = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_top_k=-1)
    trainer(tmp_path, [*both(case, merge="best"), checkpoints], max_epochs=3).fit(model, loader(), loader())
    best = outputs(load_from_checkpoint(module_class, checkpoints.best_model_path))
    assert not adapted(model)
    torch.testing.assert_close(outputs(model), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["targets", "names", "modules"])
def test_no_merging(tmp_path: Path, case: str) -> None:
    model = CASES[case][0]()
    base = snapshot(model)
    trainer(tmp_path, both(case, merge=None)).fit(model, loader())
    assert adapted(model)
    assert_same_tensors(base_of(model, base), base)


def test_state_keys_differ() -> None:
    for case in CASES:
        first, second = both(case)
        assert first.state_key != second.state_key


@pytest.mark.parametrize("run", ["fit", "test"])
@pytest.mark.parametrize("r", [4, 2])
def test_the_same_modules_twice(tmp_path: Path, run: str, r: int) -> None:
    model = Toy()
    base, classes = snapshot(model), [type(module) for module in model.modules()]
    callbacks = [
        LoRA(r=4, target_modules=["net.0"], summary=False),
        LoRA(r=r, target_modules=["net.0"], summary=False),
    ]
    with pytest.raises(ValueError, match=r"on the same modules|net\.0 already carry an adapter") as error:
        getattr(trainer(tmp_path, callbacks), run)(model, loader())
    assert "of its own" in str(error.value)
    assert_same_tensors(snapshot(model), base)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "configure_model" not in vars(model)


def test_the_order_of_callbacks_does_not_matter(tmp_path: Path) -> None:
    model, resumed = Toy(), Toy()
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, [*both("saved"), checkpoints]).fit(model, loader())
    trainer(tmp_path, both("saved")[::-1]).test(resumed, loader(), ckpt_path=checkpoints.last_model_path, verbose=False)
    torch.testing.assert_close(outputs(resumed), outputs(model), rtol=1e-4, atol=1e-5)


def test_different_ways_to_merge(tmp_path: Path) -> None:
    first, second = both("modules")
    first.merge = None
    with pytest.raises(ValueError, match="give them the same merge"):
        trainer(tmp_path, [first, second]).fit(TwoNets(), loader())


@pytest.mark.parametrize("order", [("", "right"), ("right", "")])
def test_overlapping_modules(tmp_path: Path, order: tuple[str | None, ...]) -> None:
    callbacks = [LoRA(r=2, module=module or None, summary=False) for module in order]
    with pytest.raises(TargetError, match="already carry an adapter"):
        trainer(tmp_path, callbacks).fit(TwoNets(), loader())


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_adapters_of_one_module_are_found_by_their_names(order: str, tmp_path: Path) -> None:
    def callbacks(names: str) -> list[LoRA]:
        return [LoRA(r=2, adapter_name=name, summary=False, merge=None) for name in names]

    model = Toy()
    run = trainer(tmp_path, callbacks("ab"), max_epochs=1)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    assert not torch.equal(saved["net.4.lora.a.lora_A"], saved["net.4.lora.b.lora_A"])
    other = Toy()
    trainer(tmp_path, callbacks(order)).test(other, loader(), tmp_path / "x.ckpt", verbose=False)
    assert_same_tensors(adapter_state_dict(other), saved)
