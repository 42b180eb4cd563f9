"""Runs on a quantized base: checkpoints, resume, the end of fit, and Lightning's own quantization."""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.quantized import NEEDS, dequantize, kinds, needs, quantize
from helpers.toys import assert_same_tensors
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_lora import LoRA, LoraConfig, adapter_state_dict, eject, inject, load_adapter, save_adapter
from lightning_lora.formats.checkpoint import KEY, read_checkpoint
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.peft_wrapped import base_fingerprint
from lightning_lora.model.record import injections_of
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import TargetError
from lightning_lora.trainer import quantized_base

IDS = torch.arange(96).view(8, 12) % 64


class Quantized(L.LightningModule):
    """A small Llama with dropout in its attention, on a base of some kind."""

    def __init__(self, kind: str | None = "nf4", base_dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> None:
        super().__init__()
        self.kind, self.base_dtype, self.dropout = kind, base_dtype, dropout
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        model = tiny_llama(attention_dropout=self.dropout).to(self.base_dtype)
        self.model = quantize(model, self.kind) if self.kind is not None else model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Late(Quantized):
    """One that is built in ``configure_model``."""

    def build(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            super().build()


def fit(path: Path, module: Quantized, *callbacks: Any, ckpt_path: Any = None, plugin: Any = None, **kw: Any) -> Any:
    lora = LoRA(**{"r": 2, "lora_dropout": 0.1, "summary": False, **kw.pop("lora", {})})
    trainer = toys.trainer(path, [lora, *callbacks], **{"max_epochs": 2, **kw})
    if plugin is not None:
        trainer.strategy.precision_plugin = plugin  # Lightning refuses it on a CPU
    torch.manual_seed(3)
    trainer.fit(module, DataLoader(IDS, batch_size=2), ckpt_path=ckpt_path)
    return trainer


@kinds("nf4", "nf4-dq", "int8", "torchao int8", "torchao int4", "torchao nf4", "hqq 4")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, precision: str, tmp_path: Path) -> None:
    # What HQQ computes in does not follow autocast.
    half = precision == "bf16-true" or ("hqq" in kind and precision == "bf16-mixed")
    dtype = torch.bfloat16 if half else torch.float32
    settings: dict[str, Any] = {"precision": precision, "lora": {"merge": None}}
    whole = Quantized(kind, dtype)
    fit(tmp_path / "whole", whole, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), **settings)
    resumed = Quantized(kind, dtype)
    fit(tmp_path / "resumed", resumed, ckpt_path=tmp_path / "epoch=0.ckpt", **settings)
    assert resumed.losses == whole.losses[4:]
    assert_same_tensors(adapter_state_dict(resumed), adapter_state_dict(whole))
    checkpoint = read_checkpoint(tmp_path / "epoch=1.ckpt")
    assert checkpoint["state_dict"].keys() == adapter_state_dict(whole).keys()  # and no packed bits, scales or codes
    assert len(checkpoint["state_dict"]) == 42
    (entry,) = checkpoint[KEY]["adapters"]
    assert sum(format["layers"] for format in entry["quantization"]) == 21
    assert {format["library"] for format in entry["quantization"]} == {NEEDS[kind]}


@kinds()
def test_the_end_of_fit_leaves_the_adapter_at_work_and_exports_a_plain_model(kind: str, tmp_path: Path) -> None:
    module = Quantized(kind, dropout=0.0)
    settings = {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.0, "export_dir": tmp_path / "export"}
    fit(tmp_path, module, max_epochs=1, lora=settings)
    layer = module.model.model.layers[0].mlp.up_proj
    assert layer.active == ("default",) and not layer.merged
    expected = module.model.train()(input_ids=IDS).logits
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "export" / "merged")
    assert {type(each) for each in opened.modules() if isinstance(each, nn.Linear)} == {nn.Linear}
    assert not hasattr(opened.config, "quantization_config")
    torch.testing.assert_close(opened(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    eject(module, merge=True)
    state = load_file(tmp_path / "export" / "merged" / "model.safetensors")
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], layer.weight)


@needs("bitsandbytes")
def test_the_end_of_fit_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, Quantized(), max_epochs=1)
    assert sum("the adapter stays at work" in record.getMessage() for record in caplog.records) == 1


@kinds("nf4", "int8", "torchao int8", "hqq 4")
def test_the_adapter_in_peft_on_the_same_base(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = quantize(tiny_llama(), kind).train()
    inject(ours, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    toys.randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(quantize(tiny_llama(), kind), tmp_path / "ours").train()
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(quantize(tiny_llama(), kind).train(), tmp_path / "theirs")
    assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


@kinds("nf4", "torchao int8", "hqq 4", "buffers")
def test_the_fingerprint_is_the_same_where_peft_has_wrapped_the_base(kind: str) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = (quantize(tiny_llama(), kind) for _ in range(2))
    inject(ours, LoraConfig(r=2))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert base_fingerprint(wrapped).short == fingerprint(injections_of(ours)[0]).short


def print_of(kind: str | None, **quantizer: Any) -> Any:
    model = tiny_llama() if kind is None else quantize(tiny_llama(), kind)
    inject(model, LoraConfig(r=2))
    return fingerprint(injections_of(model)[0])


@needs("bitsandbytes")
def test_the_fingerprint_is_that_of_the_values_however_they_are_stored() -> None:
    assert print_of("nf4").short == print_of("nf4 in bfloat16").short
    model = dequantize(quantize(tiny_llama(), "nf4"))
    inject(model, LoraConfig(r=2))
    assert print_of("nf4").fits(fingerprint(injections_of(model)[0]))
    prints = [print_of(kind) for kind in ("nf4", "nf4-dq", "fp4", "int8", None)]
    assert not any(one.fits(other) for one in prints for other in prints if one is not other)


@needs("bitsandbytes")
def test_an_adapter_of_another_format_is_refused_with_both_named(tmp_path: Path) -> None:
    model = quantize(tiny_llama(), "nf4")
    inject(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    for other, named in (("fp4", "quant_type=fp4"), ("int8", "bits=8"), (None, "this one is not quantized")):
        base = tiny_llama() if other is None else quantize(tiny_llama(), other)
        with pytest.raises(CheckpointError, match=rf"quant_type=nf4.*{named}"):
            load_adapter(base, tmp_path)
        assert not [name for name, _ in base.named_parameters() if "lora" in name]
        with pytest.warns(UserWarning, match=r"21 of its tensors are \d+\.\d% apart"):
            load_adapter(base, tmp_path, other_format=True)


@needs("bitsandbytes")
def test_an_adapter_of_the_unquantized_base_is_taken_with_a_warning(tmp_path: Path) -> None:
    model = tiny_llama()
    inject(model, LoraConfig(r=2))
    toys.randomize(model)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=r"was not quantized, and this one is quantized: 21 layers by bitsandbytes"):
        load_adapter(quantize(tiny_llama(), "nf4"), tmp_path)
    other = tiny_llama()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.02)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(quantize(other, "nf4"), tmp_path)


@needs("bitsandbytes")
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
@pytest.mark.parametrize("module_class", [Quantized, Late])
@pytest.mark.parametrize("ignored", [set(), {"model.lm_head"}], ids=["all", "but the head"])
def test_lightnings_plugin(mode: str, module_class: type, ignored: set[str], tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    plugin = BitsandbytesPrecision(mode, None if mode == "int8" else torch.float32, ignored)
    module = module_class(None)
    if ignored and module_class is Late:
        with pytest.raises(RuntimeError, match="ignore_modules"):  # as without LoRA
            fit(tmp_path, module, plugin=plugin)
        return
    trainer = fit(tmp_path, module, plugin=plugin, max_steps=3, max_epochs=-1, lora={"merge": None})
    layer = module.model.model.layers[0].mlp.up_proj
    assert layer.packed["weight"].dtype == (torch.int8 if mode == "int8" else torch.uint8)
    assert type(module.model.lm_head).__name__ == ("Linear" if ignored else type(module.model.lm_head).__name__)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad} and len(held) == 2 * 7 * 3
    assert layer.lora["default"].lora_B.abs().sum() > 0 and len(module.losses) == 3
    assert nn.Linear is torch.nn.modules.linear.Linear and "module_init_context" not in vars(plugin)
    fit(tmp_path, module, plugin=plugin, max_steps=1, max_epochs=-1, lora={"merge": None})
    assert module.model.model.layers[0].mlp.up_proj is layer


@needs("bitsandbytes")
def test_lightnings_plugin_after_inject_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    module = Quantized(None)
    inject(module, LoraConfig(r=2))
    with pytest.raises(ValueError, match="in the place of those that have adapters"):
        fit(tmp_path, module, plugin=BitsandbytesPrecision("nf4", torch.float32))
    assert not any("4bit" in type(each).__name__ for each in module.modules())


@needs("bitsandbytes")
def test_layers_that_are_quantized_late_are_so_before_the_adapters_come(tmp_path: Path) -> None:
    import bitsandbytes

    module = Quantized(None)
    layers = module.model.model.layers
    for block in layers:
        block.mlp.up_proj = bitsandbytes.nn.Linear4bit(32, 48, bias=False, quant_type="nf4")
    fit(tmp_path, module, max_epochs=1, lora={"merge": None, "target_modules": ["up_proj"]})
    assert layers[0].mlp.up_proj.packed["weight"].quant_state.shape == (48, 32)


@needs("bitsandbytes")
@pytest.mark.parametrize(("precision", "fine"), [("16-true", False), ("bf16-true", True), ("bf16-mixed", True)])
def test_a_precision_that_would_cast_packed_bits_is_refused(precision: Any, fine: bool, tmp_path: Path) -> None:
    module = Quantized("nf4 in bfloat16", torch.bfloat16 if "true" in precision else torch.float32)
    expected = contextlib.nullcontext() if fine else pytest.raises(ValueError, match="would cast them to torch.float16")
    with expected:
        fit(tmp_path, module, precision=precision, max_epochs=1)
    assert any("lora" in name for name, _ in module.named_parameters()) == fine


@kinds("hqq 4")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_a_precision_that_a_format_cannot_compute_in_is_refused(kind: str, precision: Any, tmp_path: Path) -> None:
    module = Quantized(kind)
    with pytest.raises(ValueError, match=r"q_proj' computes in torch.float32 alone, .* for torch\.b?float16"):
        fit(tmp_path, module, precision=precision, max_epochs=1)
    assert not any("lora" in name for name, _ in module.named_parameters()) and module.losses == []


@needs("torchao")
def test_a_format_without_a_backward_pass_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = Quantized(None)
    quantize_(module.model.model.layers[2], Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TargetError, match="quantize activations too"):
        fit(tmp_path, module)
    assert module.losses == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_base_in_half_precision_under_adapters_in_full(precision: Any, tmp_path: Path) -> None:
    module, saved = Quantized(None), ["norm"] if precision == "bf16-mixed" else None
    lora = {"base_dtype": "bfloat16", "merge": None, "modules_to_save": saved, "lora_dropout": 0.0}
    trainer = fit(tmp_path, module, ModelCheckpoint(tmp_path, save_last=True), precision=precision, lora=lora)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 3 + (saved is not None)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)
    state = trainer.optimizers[0].state
    assert all(moments["exp_avg"].dtype == torch.float32 for moments in state.values()) and len(state) == len(trained)
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
    again = Quantized(None)
    fit(tmp_path, again, precision=precision, max_epochs=3, lora=lora, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(again.model.model.embed_tokens.weight, module.model.model.embed_tokens.weight)
    assert load_adapter(Quantized(None), tmp_path / "last.ckpt")  # in float32 it is the same base


def test_two_types_without_a_mixed_precision_are_refused(tmp_path: Path) -> None:
    module = Quantized(None)
    with pytest.raises(ValueError, match='norm.weight.* trained in full.*use precision="bf16-mixed"'):
        fit(tmp_path, module, lora={"base_dtype": "bfloat16", "modules_to_save": ["norm"]})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert type(module.model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_base_in_half_precision_leaves_what_is_outside_of_the_module_and_ties(tmp_path: Path) -> None:
    module = Quantized(None)
    module.head = nn.Linear(4, 4)
    module.model.tie_weights()
    fit(tmp_path, module, lora={"base_dtype": "bfloat16", "module": "model", "merge": None}, max_epochs=1)
    assert module.head.weight.dtype == torch.float32 and module.head.weight.requires_grad
    assert module.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="base_dtype is 'int8'"):
        LoRA(base_dtype="int8")


class Adam8bit(Quantized):
    """One whose optimizer keeps its moments in 8 bits."""

    optimizer = "bitsandbytes.optim.AdamW8bit"

    def configure_optimizers(self) -> Any:
        module, _, name = self.optimizer.rpartition(".")
        small = {"block_size": 32} if module == "torchao.optim" else {"min_8bit_size": 32}
        made: Any = getattr(importlib.import_module(module), name)
        return made([p for p in self.parameters() if p.requires_grad], lr=1e-2, **small)


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "optimizer",
    [
        "bitsandbytes.optim.AdamW8bit",
        "bitsandbytes.optim.PagedAdamW8bit",
        pytest.param("torchao.optim.AdamW8bit", marks=pytest.mark.slow),
    ],
)
def test_optimizers_in_eight_bits_resume_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip(optimizer.partition(".")[0])
    whole, resumed = Adam8bit("nf4"), Adam8bit("nf4")
    whole.optimizer = resumed.optimizer = optimizer
    # torchao keeps tensors of fewer than 4096 numbers as they are.
    lora = {"merge": None, "r": 128 if "torchao" in optimizer else 2}
    fit(tmp_path, whole, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), lora=lora)
    fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt", lora=lora)
    assert resumed.losses == whole.losses[4:]
    assert_same_tensors(adapter_state_dict(resumed), adapter_state_dict(whole))
    (states,) = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)["optimizer_states"]
    kept = [tensor for _, tensor in toys.tensors_in(states)]
    assert any(tensor.dtype == torch.uint8 or type(tensor) is not Tensor for tensor in kept)


@kinds("nf4", "torchao int8", "hqq 4")
def test_the_best_checkpoint_is_at_work_when_fit_ends(kind: str, tmp_path: Path) -> None:
    class Validated(Quantized):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))  # the first epoch is the best

        def val_dataloader(self) -> Any:
            return DataLoader(IDS, batch_size=2)

    module = Validated(kind)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = fit(tmp_path, module, best, lora={"merge": "best"}, num_sanity_val_steps=0)
    assert Path(best.best_model_path).name.startswith("epoch=0")
    state = read_checkpoint(best.best_model_path)["state_dict"]
    assert_same_tensors(adapter_state_dict(module), state)
    before = len(module.losses)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, DataLoader(IDS, batch_size=2))
    assert len(module.losses) > before and not module.model.model.layers[0].mlp.up_proj.merged


@pytest.mark.parametrize("own", [None, ["net.0.bias"]])
def test_what_a_module_keeps_from_ddp_is_its_own_again(own: list[str] | None) -> None:
    module = toys.Toy()
    ignored = "_ddp_params_and_buffers_to_ignore"
    if own is not None:
        setattr(module, ignored, own)
    trainer = L.Trainer(strategy=DDPStrategy(), accelerator="cpu", devices=1, logger=False)
    for packed in ([], ["net.4.codes", "net.4.scales"]):
        with pytest.MonkeyPatch.context() as patch:
            parts = {"codes": torch.zeros(1), "scales": torch.zeros(1), "settings": {}}
            layers = [("net.4", None, SimpleNamespace(broadcasts=False), parts)] if packed else []
            patch.setattr(quantized_base, "quantized_layers", lambda _, layers=layers: iter(layers))
            quantized_base.leave_out_of_ddp(trainer, module)
        assert list(vars(module).get(ignored, [])) == [*(own or []), *packed]
        quantized_base.as_before(trainer, module)
        assert vars(module).get(ignored) is own
