import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, batches, tiny_llama
from helpers.quantized import bitsandbytes_4bit
from helpers.toys import assert_same_tensors, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_lora import (
    CheckpointError,
    LoRA,
    TargetError,
    adapter_state_dict,
    disabled,
    eject,
    load_adapter,
    load_from_checkpoint,
    merge,
    save_adapter,
    set_adapter,
)
from lightning_lora.trainer.peft_wrapped import adopt_wrapped

LAYERS = ["q_proj", "v_proj"]


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_dropout": 0.1, "target_modules": LAYERS, **settings})


def wrap(config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_llama(), config)


def two_adapters() -> nn.Module:
    model = wrap(lora())
    model.add_adapter("other", lora(r=2, modules_to_save=["lm_head"]))
    model.base_model.set_adapter(["default"])
    return model


def injected() -> nn.Module:
    torch.manual_seed(3)
    return peft.inject_adapter_in_model(lora(), tiny_llama())


def added() -> nn.Module:
    torch.manual_seed(3)
    model = peft.inject_adapter_in_model(lora(), tiny_llama())
    model._hf_peft_config_loaded = True  # as transformers' own add_adapter does, which wants a newer PEFT
    return model


ONE: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: wrap(lora()),
    "dora": lambda: wrap(lora(use_dora=True)),
    "modules_to_save": lambda: wrap(lora(modules_to_save=["lm_head"])),
    "tokens": lambda: wrap(lora(trainable_token_indices=[1, 2])),
    "biases": lambda: wrap(lora(bias="all")),
    "ranks": lambda: wrap(lora(rank_pattern={"q_proj": 2}, use_rslora=True)),
    "embedding": lambda: wrap(lora(target_modules=["embed_tokens", "q_proj"])),
    "injected": injected,
    "added": added,
    "vera": lambda: wrap(peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])),
}
OTHERS = {
    "loha": lambda: wrap(peft.LoHaConfig(r=2, target_modules=LAYERS)),
    "ia3": lambda: wrap(peft.IA3Config(target_modules=[*LAYERS, "down_proj"], feedforward_modules=["down_proj"])),
    "prompt": lambda: wrap(peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "two": two_adapters,
}
KINDS = ONE | OTHERS


class Module(L.LightningModule):
    """As people wrap a model with PEFT, with a part of its own beside it that trains too."""

    def __init__(self, kind: str = "lora", build: Any = None) -> None:
        super().__init__()
        self.model = (build or KINDS[kind])()
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss * self.scale
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


DATA = batches(IDS, IDS + 3, IDS + 9, IDS + 20)


def fit(tmp_path: Path, module: Module, *callbacks: Any, ckpt_path: Any = None, **kw: Any) -> L.Trainer:
    trainer = toys.trainer(tmp_path, list(callbacks), **kw)
    torch.manual_seed(5)
    trainer.fit(module, DATA, ckpt_path=ckpt_path)
    return trainer


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_computes_what_it_computes_without_the_callback(tmp_path: Path, kind: str) -> None:
    alone, module = Module(kind), Module(kind)
    before = snapshot(module)
    fit(tmp_path / "alone", alone, enable_checkpointing=False)
    trainer = fit(tmp_path, module, LoRA(summary=False))
    assert_same_tensors(snapshot(module), snapshot(alone))
    small = adapter_state_dict(module)
    moved = {name for name, tensor in snapshot(module).items() if not torch.equal(tensor, before[name])}
    assert moved - {"scale"} <= small.keys()
    assert moved - {"scale"}
    assert type(module.model) is type(alone.model)
    assert trainer.global_step == 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_saves_the_adapter_alone(tmp_path: Path, kind: str) -> None:
    module = Module(kind)
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    light = ModelCheckpoint(tmp_path / "light", save_weights_only=True, every_n_train_steps=8)
    trainer = fit(tmp_path, module, LoRA(summary=False), keep, light)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    files = [*tmp_path.glob("*/*.ckpt"), *tmp_path.glob("*.ckpt")]
    assert len(files) == 5
    own = {name for name in module.state_dict() if name == "scale" or is_pefts(name, kind)}
    for path in files:
        assert read(path)["state_dict"].keys() == own


def is_pefts(name: str, kind: str) -> bool:
    if kind == "biases" and name.endswith("bias"):
        return True
    marks = ("lora_", "vera_", "hada_", "ia3_", ".modules_to_save.", "trainable_tokens_", "prompt_encoder")
    return any(mark in name for mark in marks)


@pytest.mark.parametrize("kind", [*ONE, "loha", "two"])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, kind: str) -> None:
    whole, stopped, resumed = Module(kind), Module(kind), Module(kind)
    fit(tmp_path / "whole", whole, LoRA(summary=False), max_epochs=3)
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    fit(tmp_path / "stopped", stopped, LoRA(summary=False), keep, max_epochs=2)
    fit(tmp_path / "resumed", resumed, LoRA(summary=False), ckpt_path=tmp_path / "kept/last.ckpt", max_epochs=3)
    assert_same_tensors(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize("kind", ONE)
def test_what_is_exported_opens_everywhere(tmp_path: Path, kind: str) -> None:
    module = Module(kind)
    fit(tmp_path, module, LoRA(summary=False, export_dir=tmp_path / "out"))
    trained, before = logits(module.model), snapshot(module)
    opened = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out/adapter")
    torch.testing.assert_close(logits(opened), trained, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), tmp_path / "out/adapter")), trained, rtol=0, atol=1e-6)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out/merged")
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-6)
    assert (logits(tiny_llama()) - trained).abs().max() > 1e-3
    assert_same_tensors(snapshot(module), before)


@pytest.mark.parametrize("kind", ["lora", "two", "injected"])
def test_a_checkpoint_rebuilds_the_module(tmp_path: Path, kind: str) -> None:
    module = Module(kind)
    trainer = fit(tmp_path, module, LoRA(summary=False))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for rebuilt in (
        load_from_checkpoint(Module, tmp_path / "x.ckpt", kind=kind),
        load_adapter(Module(kind), tmp_path / "x.ckpt"),
    ):
        assert_same_tensors(adapter_state_dict(rebuilt), adapter_state_dict(module))
        torch.testing.assert_close(logits(rebuilt.model), logits(module.model), rtol=0, atol=0)
    fresh = Module(kind)
    metrics = toys.trainer(tmp_path, [LoRA(summary=False)]).test(fresh, DATA, tmp_path / "x.ckpt", verbose=False)
    assert metrics == toys.trainer(tmp_path, [LoRA(summary=False)]).test(module, DATA, verbose=False)


class Two(Module):
    """A model and a judge of it, both wrapped, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.judge = peft.get_peft_model(tiny_llama(), lora(r=2), adapter_name="judge")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.judge(input_ids=batch, labels=batch).loss


def test_two_wrapped_models_of_one_module(tmp_path: Path) -> None:
    module = Two()
    callbacks = [LoRA(module="model", summary=False), LoRA(module="judge", adapter_name="judge", summary=False)]
    fit(tmp_path, module, *callbacks).save_checkpoint(tmp_path / "x.ckpt")
    for rebuilt in (load_from_checkpoint(Two, tmp_path / "x.ckpt"), load_adapter(Two(), tmp_path / "x.ckpt")):
        assert_same_tensors(adapter_state_dict(rebuilt), adapter_state_dict(module))
        assert any("judge" in name for name in adapter_state_dict(rebuilt))


def test_several_adapters_are_exported_beside_each_other(tmp_path: Path) -> None:
    module = Module("two")
    fit(tmp_path, module, LoRA(summary=False, export_dir=tmp_path / "out"))
    for name in ("default", "other"):
        module.model.set_adapter(name)
        opened = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out/adapter" / name)
        torch.testing.assert_close(logits(opened), logits(module.model), rtol=0, atol=0)
        here = load_adapter(tiny_llama(), tmp_path / "out/adapter" / name)
        torch.testing.assert_close(logits(here), logits(module.model), rtol=0, atol=1e-6)


def test_the_best_adapter_comes_back_at_the_end(tmp_path: Path) -> None:
    module = Module()
    keep = ModelCheckpoint(tmp_path, monitor="loss", mode="max", filename="best")  # which the first epoch is
    fit(tmp_path, module, LoRA(summary=False, merge="best", export_dir=tmp_path / "out"), keep, max_epochs=3)
    best = read(tmp_path / "best.ckpt")
    assert best["global_step"] < 12
    assert_same_tensors({n: t for n, t in snapshot(module).items() if n in best["state_dict"]}, best["state_dict"])
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out/merged")
    torch.testing.assert_close(logits(merged), logits(module.model), rtol=0, atol=1e-6)


def test_without_merging_only_the_adapter_is_exported(tmp_path: Path) -> None:
    fit(tmp_path, Module("prompt"), LoRA(summary=False, merge=None, export_dir=tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter"]
    module = Module("prompt")
    trainer = fit(tmp_path, module, LoRA(summary=False, merge=None))
    save_adapter(module, tmp_path / "prompt")
    opened = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "prompt")
    torch.testing.assert_close(logits(opened), logits(module.model), rtol=0, atol=0)
    assert trainer.global_step


def test_pefts_own_functions_work_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Module()
    fit(tmp_path, module, LoRA(summary=False))
    trained = logits(module.model)
    module.model.print_trainable_parameters()
    assert "trainable params: 1,344" in capsys.readouterr().out
    with module.model.disable_adapter():
        torch.testing.assert_close(logits(module.model), logits(tiny_llama()), rtol=0, atol=0)
    module.model.save_pretrained(tmp_path / "own")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "own")), trained, rtol=0, atol=0
    )
    module.model = module.model.merge_and_unload()
    torch.testing.assert_close(logits(module.model), trained, rtol=0, atol=1e-6)
    assert type(module.model) is LlamaForCausalLM


def test_ours_say_that_the_adapters_are_pefts(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, LoRA(summary=False))
    before = snapshot(module)
    for call in (eject, merge, lambda model: set_adapter(model, "default"), lambda model: disabled(model).__enter__()):
        with pytest.raises(ValueError, match="are PEFT's, which has functions of its own"):
            call(module)
    save_adapter(module, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="PEFT has wrapped this model, so .* is for PEFT's own load_adapter"):
        load_adapter(module, tmp_path / "mine")
    assert_same_tensors(snapshot(module), before)


def test_copies_and_pickles_are_of_the_same_kind(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, LoRA(summary=False))
    module.trainer = None
    for twin in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))):
        assert_same_tensors(adapter_state_dict(twin), adapter_state_dict(module.model))


def test_a_resized_scaling_and_another_base_are_refused(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(tmp_path, module, LoRA(summary=False))
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    def other_base() -> nn.Module:
        model = wrap(lora())
        nn.init.normal_(model.base_model.model.lm_head.weight)
        return model

    fit(
        tmp_path, Module(build=lambda: wrap(lora(lora_dropout=0.3))), LoRA(summary=False), ckpt_path=tmp_path / "x.ckpt"
    )
    for build, message in (
        (lambda: wrap(lora(lora_alpha=3)), r"default\.lora_alpha \(8 saved, 3 here\)"),
        (lambda: wrap(lora(target_modules=["q_proj"])), "left over: .*v_proj"),
        (other_base, "trained on a"),
        (two_adapters, r"other\.r \(None saved, 2 here\)"),
    ):
        other = Module(build=build)
        before = snapshot(other)
        with pytest.raises(CheckpointError, match=message):
            fit(tmp_path, other, LoRA(summary=False), ckpt_path=tmp_path / "x.ckpt", max_epochs=3)
        assert_same_tensors(snapshot(other), before)
    with pytest.raises(CheckpointError, match="this LlamaForCausalLM is not wrapped"):
        load_adapter(Module(build=tiny_llama), tmp_path / "x.ckpt")
    ours = LoRA(r=4, target_modules=LAYERS, module="model", summary=False)
    with pytest.raises(CheckpointError, match="adapters that PEFT had put in, and here this package has: build"):
        fit(tmp_path, Module(build=tiny_llama), ours, ckpt_path=tmp_path / "x.ckpt")
    ours = LoRA(r=4, target_modules=LAYERS, module="model", summary=False, merge=None)
    fit(tmp_path, Module(build=tiny_llama), ours).save_checkpoint(tmp_path / "ours.ckpt")
    with pytest.raises(CheckpointError, match="adapters that this package had put in, and here PEFT has: build"):
        fit(tmp_path, module, LoRA(module="model", summary=False), ckpt_path=tmp_path / "ours.ckpt")


def test_what_cannot_be_done_is_said_before_the_run(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = wrap(lora())

    merged = Module()
    merged.model.merge_adapter()
    for module, settings, error, message in (
        (Two(), {}, TargetError, r"has wrapped 'model', 'teacher': name one by LoRA\(module=...\)"),
        (Module(), {"r": 4}, TargetError, r"Give LoRA\(\) no settings of an adapter"),
        (Module(), {"adapter": tmp_path}, ValueError, r"LoRA\(adapter=...\) is for adapters of this package"),
        (Module(), {"base_dtype": "bfloat16"}, ValueError, r"LoRA\(base_dtype=...\) is for adapters of this package"),
        (Module("prompt"), {"export_dir": tmp_path / "out"}, ValueError, "PROMPT_TUNING changes no weights"),
        (merged, {}, TargetError, "PEFT has merged an adapter into .*q_proj"),
    ):
        before = snapshot(module)
        with pytest.raises(error, match=message):
            fit(tmp_path, module, LoRA(summary=False, **settings))
        assert_same_tensors(snapshot(module), before)
    two = Two()
    teacher = snapshot(two.teacher)
    trainer = fit(tmp_path, two, LoRA(module="model", summary=False))
    assert_same_tensors(snapshot(two.teacher), teacher)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    names = read(tmp_path / "two.ckpt")["state_dict"]
    assert {name for name in names if name.startswith("teacher.")} == {f"teacher.{name}" for name in teacher}


def test_a_quantized_base_is_trained_on_and_not_merged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def build() -> nn.Module:
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.q_proj = bitsandbytes_4bit(layer.self_attn.q_proj, quant_type="nf4")
        return peft.get_peft_model(model, lora())

    with pytest.raises(ValueError, match="merged/ cannot be written: the base is quantized"):
        fit(tmp_path, Module(build=build), LoRA(summary=False, export_dir=tmp_path / "out"))
    module = Module(build=build)
    trainer = fit(tmp_path, module, LoRA(summary=False, export_dir=tmp_path / "out", merge=None))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert all("lora_" in name or name == "scale" for name in read(tmp_path / "x.ckpt")["state_dict"])
    rebuilt = load_adapter(Module(build=build), tmp_path / "x.ckpt")
    torch.testing.assert_close(logits(rebuilt.model), logits(module.model), rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"trained on a base that was quantized: 3 layers"):
        load_adapter(tiny_llama(), tmp_path / "out/adapter", other_format=True)


def test_strategies_that_shard_are_refused() -> None:
    class Sharded:
        trainer = SimpleNamespace(strategy=FSDPStrategy())

    with pytest.raises(ValueError, match="FSDPStrategy shards the model, and PEFT's adapters are supported on one"):
        adopt_wrapped(LoRA(), Sharded(), {"model": wrap(lora())})


def test_the_summary_and_the_watch_over_gradients_know_pefts_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unused(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                out = self.model(input_ids=batch, labels=batch).loss
            return out * next(p for n, p in self.model.named_parameters() if "embed" in n and p.requires_grad).sum()

    fit(tmp_path, Module(), LoRA())
    shown = capsys.readouterr().out
    assert "Linear of PEFT" in shown
    assert "model.model.layers.*" in shown
    build = lambda: wrap(lora(target_modules=["q_proj", "embed_tokens"]))  # noqa: E731
    with pytest.warns(UserWarning, match="gave 3 of 4 adapted layers no gradient, among them .*q_proj"):
        fit(tmp_path, Unused(build=build), LoRA(summary=False))


def test_statistics_that_peft_lets_move_are_saved(tmp_path: Path) -> None:
    class Convolutions(toys.Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net = peft.get_peft_model(self.net, peft.LoraConfig(r=2, target_modules=["0"]))

    def run(path: Path, **kw: Any) -> Convolutions:
        module = Convolutions()
        torch.manual_seed(2)
        trainer = toys.trainer(path, [LoRA(summary=False), ModelCheckpoint(path, save_last=True)], **kw)
        trainer.fit(module, toys.loader(), ckpt_path=kw.pop("ckpt", None))
        return module

    torch.manual_seed(0)
    module = run(tmp_path, max_epochs=1)
    saved = read(tmp_path / "last.ckpt")["state_dict"]
    assert {"running_mean", "running_var", "num_batches_tracked"} < {name.rpartition(".")[2] for name in saved}
    assert not any("base_layer" in name for name in saved)
    assert module.net.base_model.model[1].num_batches_tracked > 7
