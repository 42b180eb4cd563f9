from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from helpers.models import tiny_llama
from helpers.quantized import bitsandbytes_4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRA, LoraConfig, eject, inject, load_adapter
from lightning_lora.cli.main import main
from lightning_lora.formats.diffusers_adapter import save_diffusers_adapter, save_kohya_adapter
from lightning_lora.formats.merged import save_merged

diffusers = pytest.importorskip("diffusers")
TARGETS = ["to_q", "to_v", "to_out.0"]


def unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 2}
    return diffusers.UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=8, attention_head_dim=2).eval()


def dit() -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    others = {"caption_projection_dim": 8, "joint_attention_dim": 8, "pooled_projection_dim": 8, "in_channels": 4}
    return diffusers.SD3Transformer2DModel(**sizes, **others, out_channels=4, pos_embed_max_size=8).eval()


def outputs(model: Any) -> Tensor:
    torch.manual_seed(1)
    given = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1])}
    given["encoder_hidden_states"] = torch.randn(1, 3, 8)
    if "UNet" in type(model).__name__:
        given["sample"] = given.pop("hidden_states")
    else:
        given["pooled_projections"] = torch.randn(1, 8)
    with torch.no_grad():
        return model(**given).sample


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": TARGETS, **settings}))
    toys.randomize(model)
    return model


def pipeline(model: Any) -> Any:
    scheduler = diffusers.DDIMScheduler()
    if "UNet" in type(model).__name__:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        return diffusers.StableDiffusionPipeline(
            unet=model, scheduler=scheduler, **parts, requires_safety_checker=False
        )
    parts = dict.fromkeys(("vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))))
    return diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **parts)


@pytest.mark.parametrize("build", [unet, dit])
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"to_v": 2}, "use_rslora": True}], ids=["plain", "ranks"])
def test_pipelines_and_models_read_what_was_trained(tmp_path: Path, build: Any, settings: dict[str, Any]) -> None:
    model = adapted(build(), **settings)
    save_diffusers_adapter(model, tmp_path)
    assert (outputs(build()) - outputs(model)).abs().max() > 1e-3
    part = "unet" if build is unet else "transformer"
    alone = build()
    alone.load_lora_adapter(tmp_path, prefix=part, use_safetensors=True)
    torch.testing.assert_close(outputs(alone), outputs(model), rtol=1e-4, atol=1e-5)
    pipe = pipeline(build())
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(outputs(getattr(pipe, part)), outputs(model), rtol=1e-4, atol=1e-5)


def test_kohyas_names_too(tmp_path: Path) -> None:
    model = adapted(unet(), rank_pattern={"to_v": 2})
    save_kohya_adapter(model, tmp_path)
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    pipe = pipeline(unet())
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(outputs(pipe.unet), outputs(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Kohya's names are known for a UNet alone"):
        save_kohya_adapter(adapted(dit()), tmp_path / "dit")


def test_convolutions_too(tmp_path: Path) -> None:
    model = adapted(unet(), target_modules=["to_q", "conv1", "conv_in"])
    save_diffusers_adapter(model, tmp_path)
    alone = unet()
    alone.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    torch.testing.assert_close(outputs(alone), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [unet, dit])
def test_a_merged_model_is_a_directory_of_diffusers(tmp_path: Path, build: Any) -> None:
    model = adapted(build())
    expected = outputs(model)
    save_merged(eject(model, merge=True), tmp_path / "merged")
    opened = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(opened), expected, rtol=1e-4, atol=1e-5)
    save_merged(model, tmp_path / "merged", max_shard_size="10KB")  # over the first
    torch.testing.assert_close(
        outputs(type(model).from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_quantized_base_is_merged_on_the_way(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")

    def quantized() -> Any:
        model = unet()
        for attention in [module for name, module in model.named_modules() if name.endswith(("attn1", "attn2"))]:
            attention.to_q = bitsandbytes_4bit(attention.to_q, quant_type="nf4")
        return model

    model = adapted(quantized())
    for size in ("5GB", "4KB"):
        save_merged(model, tmp_path / "merged", max_shard_size=size)
        opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(outputs(opened), outputs(model), rtol=1e-3, atol=1e-4)


def test_a_run_exports_both(tmp_path: Path) -> None:
    class Denoise(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            out = self.unet(batch, torch.ones(len(batch)), torch.ones(len(batch), 3, 8)).sample
            return nn.functional.mse_loss(out, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Denoise()
    lora = LoRA(r=2, target_modules=TARGETS, export_dir=tmp_path / "out", summary=False)
    trainer = toys.trainer(tmp_path, lora, max_epochs=1)
    trainer.fit(module, DataLoader(torch.randn(4, 4, 8, 8), batch_size=2))
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/merged")
    torch.testing.assert_close(outputs(opened), outputs(module.unet), rtol=1e-4, atol=1e-5)
    alone = load_adapter(unet(), tmp_path / "out/adapter")
    torch.testing.assert_close(outputs(alone), outputs(opened), rtol=1e-4, atol=1e-5)
    unet().save_pretrained(tmp_path / "base")
    checkpoint = str(trainer.checkpoint_callback.best_model_path)
    arguments = ["export", checkpoint, str(tmp_path / "cli"), "--base", str(tmp_path / "base")]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--format", "diffusers"])
    assert not stop.value.code
    again = unet()
    again.load_lora_adapter(tmp_path / "cli", prefix="unet", use_safetensors=True)
    torch.testing.assert_close(outputs(again), outputs(opened), rtol=1e-4, atol=1e-5)


def test_other_models_and_kinds_are_refused(tmp_path: Path) -> None:
    model = inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="one of a LlamaForCausalLM, and diffusers' layout is for its own models"):
        save_diffusers_adapter(model, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot hold the magnitudes of DoRA"):
        save_diffusers_adapter(adapted(unet(), use_dora=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
