"""Adapters are merged and taken out of what the model has by then, whatever others did to it since."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.toys import Toy, loader, outputs, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

from lightning_lora import LoRA, LoraConfig, eject, inject, load_adapter, merge, save_adapter, unmerge
from lightning_lora.model.freeze import FrozenNorm

PUT_ON: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "weight_norm": (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "old spectral_norm": (spectral_norm, remove_spectral_norm),
    "old weight_norm": (weight_norm, remove_weight_norm),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


class During(toys.L.Callback):
    """Does something to a layer while it is trained, and notes what the model gives when training is over."""

    def __init__(self, start: Any, end: Any = None) -> None:
        self.start, self.end = start, end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start(pl_module.net[4])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.end is not None:
            self.end(pl_module.net[4])
        self.outputs = outputs(pl_module)


@pytest.mark.parametrize("taken_off", [False, True])
@pytest.mark.parametrize("kind", PUT_ON)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_computes_a_weight_is_put_on_in_fit(kind: str, taken_off: bool, tmp_path: Path) -> None:
    on, off = PUT_ON[kind]
    model, during = Toy(), During(on, off if taken_off else None)
    if taken_off:
        toys.trainer(tmp_path, [LoRA(r=2, summary=False), during]).fit(model, loader())
    else:
        with pytest.warns(UserWarning, match=r"'net.4.weight' was computed of others"):
            toys.trainer(tmp_path, [LoRA(r=2, summary=False), during]).fit(model, loader())
    torch.testing.assert_close(outputs(model), during.outputs, rtol=1e-4, atol=1e-5)
    assert type(model.net[4]) is nn.Linear
    assert isinstance(model.net[4].weight, nn.Parameter)
    torch.testing.assert_close(outputs(unmerge(model)), during.outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PUT_ON)
@pytest.mark.parametrize("bias_too", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_it_was_taken_off_stays_frozen(kind: str, bias_too: bool) -> None:
    """And what computes a bias, to which nothing is added, stays."""
    model = inject(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2))
    toys.randomize(model)
    PUT_ON[kind][0](model[0])
    if bias_too:
        parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    x = torch.randn(3, 8)
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match=r"'0.weight' was computed of others"):
        merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.lora.default.lora_A",
        "0.lora.default.lora_B",
    ]
    assert parametrize.is_parametrized(model[0], "bias") == bias_too


def test_a_pruned_model_is_merged(tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=False)
    model = Toy()
    toys.trainer(tmp_path, [LoRA(r=2, summary=False), pruning]).fit(model, loader())
    merged = outputs(model)
    torch.testing.assert_close(outputs(unmerge(model)), merged, rtol=1e-4, atol=1e-5)


def test_a_layer_that_something_took_the_place_of_is_named(tmp_path: Path) -> None:
    class Replace(toys.L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[4] = nn.Identity()

    model = Toy()
    with pytest.warns(UserWarning, match=r"in the place of 'net.4'"):
        toys.trainer(tmp_path, [LoRA(r=2, summary=False), Replace()]).fit(model, loader())
    assert not [name for name, _ in model.named_modules() if "lora" in name]


@pytest.mark.parametrize("outer_first", [False, True])
def test_callbacks_whose_modules_overlap(outer_first: bool, tmp_path: Path) -> None:
    class Nested(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*self.net[:4], nn.Sequential(*self.net[4:]))

    def callbacks(**kw: Any) -> list[Any]:
        lora = [
            LoRA(r=2, module="net", summary=False, **kw),
            LoRA(r=2, module="net.4", adapter_name="two", summary=False, **kw),
        ]
        return lora if outer_first else lora[::-1]

    model, base = Nested(), snapshot(Nested())
    trainer = toys.trainer(tmp_path, [*callbacks(), ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(model, loader())
    merged = outputs(model)
    assert {type(module).__name__ for module in model.net[4]} == {"Linear", "ReLU"}
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    assert torch.equal(outputs(model), merged)
    toys.assert_same_tensors(torch.load(tmp_path / "merged.ckpt")["state_dict"], model.state_dict())
    toys.assert_adapter_only(tmp_path / "last.ckpt", base)
    resumed = Nested()
    toys.trainer(tmp_path, callbacks(merge=None)).test(
        resumed, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    torch.testing.assert_close(outputs(resumed), merged, rtol=1e-4, atol=1e-5)
    toys.assert_same_tensors(snapshot(eject(resumed)), base)
    unmerge(model)
    torch.testing.assert_close(outputs(model), merged, rtol=1e-4, atol=1e-5)
    toys.assert_same_tensors(snapshot(eject(model)), base)


class Converts(SingleDeviceStrategy):
    """Puts SyncBatchNorm in at the point of a run at which Lightning's strategies of several devices do."""

    def setup(self, trainer: Any) -> None:
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        super().setup(trainer)


@pytest.mark.parametrize("settings", [{}, {"module": "net"}, {"modules_to_save": ["net.6"]}])
def test_norms_that_a_strategy_puts_in_are_frozen_too(settings: dict[str, Any], tmp_path: Path) -> None:
    model, base = Toy(), snapshot(Toy())

    class Look(toys.L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert isinstance(pl_module.net[1], nn.SyncBatchNorm)
            assert isinstance(pl_module.net[1], FrozenNorm)

    lora = LoRA(r=2, summary=False, **settings)
    toys.trainer(tmp_path, [lora, Look()], strategy=Converts("cpu")).fit(model, loader())
    assert type(model.net[1]) is nn.SyncBatchNorm
    toys.assert_same_tensors(model.net[1].state_dict(), {n[6:]: t for n, t in base.items() if n.startswith("net.1.")})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_in_full_that_is_tied_to_another(tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match=r"'model.embed_tokens.weight' is tied to 'lm_head.weight'"):
        model = inject(tiny_llama(tie_word_embeddings=True).eval(), config)
    toys.randomize(model)
    logits = model(ids).logits
    save_adapter(model, tmp_path / "ours")
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    theirs = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids).logits, logits)
    peft_config = PeftConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = get_peft_model(tiny_llama(tie_word_embeddings=True), peft_config).eval()
    toys.randomize(theirs)
    logits = theirs(ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tiny_llama(tie_word_embeddings=True).eval(), tmp_path / "theirs")
    torch.testing.assert_close(loaded(ids).logits, logits)
    torch.testing.assert_close(eject(loaded, merge=True)(ids).logits, logits)


def test_a_second_name_of_a_module_is_no_tie() -> None:
    model = Toy()
    model.head = model.net[6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.6"]))
    assert torch.equal(model.head.weight, model.net[6].weight)
