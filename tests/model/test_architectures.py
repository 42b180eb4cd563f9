"""Many transformers architectures under one table: adapted, trained, resumed, merged, taken out, and opened by PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import peft
import pytest
import torch
import transformers as tf
from helpers import toys
from helpers.toys import randomize
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRA,
    LoraConfig,
    adapter_state_dict,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from lightning_lora.layers import LoraLayer

Inputs = dict[str, Tensor]
OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")
DEFAULTS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text() -> Inputs:
    return {"input_ids": 3 + torch.arange(14).view(2, 7)}


def text_to_text() -> Inputs:
    return {**text(), "decoder_input_ids": 20 + torch.arange(10).view(2, 5)}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def image() -> Inputs:
    return {"pixel_values": _normal(2, 3, 32, 32)}


def text_and_image() -> Inputs:
    return {**text(), **image()}


def sound() -> Inputs:
    return {"input_values": _normal(2, 800)}


def spectrum_to_text() -> Inputs:
    return {"input_features": _normal(2, 8, 16), "decoder_input_ids": text_to_text()["decoder_input_ids"]}


class Row(NamedTuple):
    """One architecture.

    Attributes:
        model: Name of the transformers model class.
        config: Settings of its config, over :data:`DEFAULTS`.
        inputs: Makes a batch.
        unreached: Ends of the names of adapted layers on which the output does not depend.
        peft_error: What PEFT says that refuses the saved adapter.
        read: Ends of the names of layers whose weights the model's code reads, where PEFT does not adapt them.
        lora: Settings of the adapter, over ``target_modules="all-linear"``.
    """

    model: str
    config: dict[str, Any] = {}
    inputs: Callable[[], Inputs] = text
    unreached: tuple[str, ...] = ()
    peft_error: str | None = None
    read: tuple[str, ...] = ()
    lora: dict[str, Any] = {}

    def build(self) -> Any:
        """The model, the same in every call."""
        model_class = getattr(tf, self.model)
        torch.manual_seed(0)
        return model_class(model_class.config_class(**{**DEFAULTS, **self.config}))

    def settings(self) -> dict[str, Any]:
        """The settings of the adapter."""
        return {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **self.lora}


MAMBA_REFUSED = r"'out_proj' is incompatible with Mamba-based models"  # though adapters on it work without kernels
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
GQA = {"num_key_value_heads": 1, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
D_MODEL = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
}
PATCHES = {**NO_DROPOUT, "image_size": 32, "patch_size": 16}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "layer_scale_init_value": 1.0}
WAVES = {
    **NO_DROPOUT,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
CLIP = {
    "text_config": DEFAULTS,
    "vision_config": {**DEFAULTS, "image_size": 32, "patch_size": 16},
    "projection_dim": 16,
}

TABLE: dict[str, Row] = {
    # Decoders
    "llama": Row("LlamaForCausalLM", GQA),
    "qwen3": Row("Qwen3ForCausalLM", GQA),
    "gemma2": Row("Gemma2ForCausalLM", GQA),
    "mistral": Row("MistralForCausalLM", GQA),
    "mixtral": Row("MixtralForCausalLM", {**GQA, "num_local_experts": 4}),
    "qwen2_moe": Row("Qwen2MoeForCausalLM", {**GQA, **MOE, "num_experts": 4}),
    "gpt2": Row("GPT2LMHeadModel", {**GPT2, **GPT2_DROPOUT}),
    "gpt_neox": Row("GPTNeoXForCausalLM"),
    "gpt_neo": Row(
        "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "opt": Row("OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0}),
    "bloom": Row("BloomForCausalLM", {"n_layer": 2, "n_head": 2}, read=("dense", "dense_4h_to_h")),
    "falcon": Row("FalconForCausalLM"),
    "phi": Row("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "mpt": Row("MptForCausalLM", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}),
    "starcoder2": Row("Starcoder2ForCausalLM", {**GQA, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "mamba": Row("MambaForCausalLM", {"state_size": 4, "time_step_rank": 4}, peft_error=MAMBA_REFUSED),
    "mamba2": Row(
        "Mamba2ForCausalLM", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}, peft_error=MAMBA_REFUSED
    ),
    "falcon_mamba": Row("FalconMambaForCausalLM", {"state_size": 4, "time_step_rank": 4}, peft_error=MAMBA_REFUSED),
    # Encoders
    "bert": Row("BertModel", NO_DROPOUT, unreached=("pooler.dense",)),
    "roberta": Row("RobertaForMaskedLM", NO_DROPOUT),
    "deberta_v2": Row(
        "DebertaV2ForMaskedLM",
        {**NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 16},
    ),
    "distilbert": Row(
        "DistilBertForMaskedLM",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "electra": Row("ElectraModel", {**NO_DROPOUT, "embedding_size": 8}),
    "albert": Row("AlbertForMaskedLM", {**NO_DROPOUT, "embedding_size": 8}),
    # Encoders with decoders
    "t5": Row(
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
        text_to_text,
    ),
    "bart": Row("BartForConditionalGeneration", D_MODEL, text_to_text),
    "whisper": Row(
        "WhisperForConditionalGeneration",
        {**D_MODEL, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        spectrum_to_text,
    ),
    # Images and sound
    "clip": Row("CLIPModel", CLIP, text_and_image),
    "vit": Row("ViTModel", PATCHES, image, unreached=("pooler.dense",)),
    "dinov2": Row("Dinov2Model", PATCHES, image),
    "swin": Row(
        "SwinModel",
        {
            **NO_DROPOUT,
            "image_size": 32,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_attention_heads": [2, 2],
            "window_size": 4,
        },
        image,
    ),
    "convnext": Row("ConvNextModel", STAGES, image),
    "resnet": Row(
        "ResNetForImageClassification", {**STAGES, "embedding_size": 8}, image, lora={"modules_to_save": None}
    ),
    "wav2vec2": Row("Wav2Vec2Model", WAVES, sound),
    "wavlm": Row("WavLMModel", WAVES, sound, read=("q_proj", "k_proj", "v_proj", "out_proj")),
    # New heads
    "bert, sequence classification": Row("BertForSequenceClassification", NO_DROPOUT),
    "llama, sequence classification": Row("LlamaForSequenceClassification", GQA),
    "roberta, token classification": Row("RobertaForTokenClassification", NO_DROPOUT),
}


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The first of :data:`OUTPUTS` that the model has."""
    found = model(**inputs)
    return next(found[name] for name in OUTPUTS if found.get(name) is not None)


def loss(model: nn.Module, inputs: Inputs) -> Tensor:
    found = output(model, inputs)
    return nn.functional.mse_loss(found, _normal(*found.shape))


def base_of(model: nn.Module) -> Inputs:
    """Copies of all parameters and buffers, those too that no checkpoint holds."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


class Module(L.LightningModule):
    def __init__(self, row: Row) -> None:
        super().__init__()
        self.model = row.build()

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        return loss(self.model, batch)

    def configure_optimizers(self) -> Any:
        # Without decay, a tensor moves only if it has a gradient.
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


def train(row: Row, path: Path, ckpt_path: Path | None = None) -> Module:
    """Two steps, each an epoch of its own; the model comes back merged."""
    module = Module(row).train()
    lora = LoRA(**row.settings(), summary=False)
    keep = ModelCheckpoint(path, filename="{step}", save_top_k=-1)
    data = DataLoader([row.inputs()], batch_size=None)  # type: ignore[arg-type]
    toys.trainer(path, [lora, keep], max_steps=2).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("name", TABLE)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    row = TABLE[name]
    model = row.build().eval().requires_grad_(False)  # for what wants a gradient, torch may choose other kernels
    before = output(model, row.inputs())
    assert torch.equal(output(inject(model, LoraConfig(**row.settings())), row.inputs()), before)


@pytest.mark.parametrize("name", TABLE)
def test_a_run_moves_the_adapters_alone(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    fresh = Module(row)
    before, classes = base_of(fresh), [type(module).__name__ for module in fresh.modules()]
    first = toys.snapshot(inject(fresh, LoraConfig(**row.settings())))

    module = train(row, tmp_path / "whole").eval()
    merged = output(module.model, row.inputs())
    unmerge(module)
    adapters = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
    stuck = {name for name, tensor in adapters.items() if torch.equal(tensor, first[name])}
    unreached = {end: {name for name in adapters if f".{end}.lora." in name} for end in row.unreached}
    assert all(unreached.values())
    assert stuck == set().union(*unreached.values())

    (one, two) = (tmp_path / "whole" / f"step={step}.ckpt" for step in (1, 2))
    toys.assert_same_tensors(torch.load(two, weights_only=True)["state_dict"], adapters)
    toys.assert_adapter_only(one, {name: tensor for name, tensor in before.items() if name not in adapters})
    resumed = unmerge(train(row, tmp_path / "resumed", one))
    toys.assert_same_tensors(adapter_state_dict(resumed), adapters)

    adapted = output(module.model, row.inputs())
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    eject(module)
    toys.assert_same_tensors(base_of(module), before)
    assert [type(module).__name__ for module in module.modules()] == classes
    assert not torch.allclose(output(module.model, row.inputs()), adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TABLE)
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    settings = {**row.settings(), "exclude_modules": list(row.read)} if row.read else row.settings()
    model = inject(row.build().eval(), LoraConfig(**settings))
    randomize(model)
    save_adapter(model, tmp_path)
    loss(model, row.inputs()).backward()
    adapted = output(model, row.inputs())
    torch.testing.assert_close(output(merge(model), row.inputs()), adapted, rtol=1e-4, atol=1e-4)

    if row.peft_error:
        with pytest.raises(ValueError, match=row.peft_error):
            peft.PeftModel.from_pretrained(row.build(), tmp_path)
        return
    other = peft.PeftModel.from_pretrained(row.build(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(other, row.inputs()), adapted, rtol=1e-4, atol=1e-5)
    loss(other, row.inputs()).backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if "lora_" in name}
    for layer_name, layer in model.named_modules():
        for matrix in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
            gradient = gradients.pop(f"base_model.model.{layer_name}.{matrix}.default.weight")
            own = getattr(layer.lora["default"], matrix).grad
            assert (own is None) == layer_name.endswith(row.unreached)
            torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-6)
    assert not gradients
    other.save_pretrained(tmp_path / "theirs")
    opened = load_adapter(row.build().eval(), tmp_path / "theirs")
    torch.testing.assert_close(output(opened, row.inputs()), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_torch_encoders_use_their_adapters_in_eval_mode(padded: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]]) if padded else None
    attributes = [list(module.__dict__) for module in model.modules()]

    def out() -> Tensor:
        found: Tensor = model(_normal(2, 5, 16), src_key_padding_mask=padding)
        return found[:, :4]

    before = out()
    inject(model, LoraConfig(r=3))
    torch.testing.assert_close(out(), before)
    randomize(model)
    adapted = out()
    assert not torch.allclose(adapted, before, atol=1e-2)
    model.train()
    torch.testing.assert_close(out(), adapted)
    eject(model.eval(), merge=True)
    torch.testing.assert_close(out(), adapted)
    unmerge(model)
    assert torch.equal(out(), adapted)
    eject(model)
    assert torch.equal(out(), before)
    assert [list(module.__dict__) for module in model.modules()] == attributes
    assert model.use_nested_tensor and all(layer.activation_relu_or_gelu == 1 for layer in model.layers)
