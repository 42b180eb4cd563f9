"""Adapters for servers: the portable layout, and what each server would make of any adapter, by its own rules."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import EXPERTS, IDS, mixtral, tiny_llama
from helpers.peft_cases import biased, computed, llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import LoraConfig, inject, load_adapter, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.formats.peft_files import read_files
from lightning_lora.formats.serving import SERVERS, served_otherwise, tensors_of_transformers

QV = ["q_proj", "v_proj"]
Scaling = Callable[[dict[str, Any], int], float]

# What the servers put in front of B A, written down once more from their sources.
SCALINGS: dict[str, Scaling] = {
    "vllm": lambda config, rank: config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1)),
    "sglang": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
    "diffusers": lambda config, rank: 1,
}


def adapted(make: Callable[[], nn.Module] = llama, **values: Any) -> nn.Module:
    model = inject(make(), LoraConfig(**{"r": 4, "target_modules": QV, "modules_to_save": None, **values}))
    toys.randomize(model)
    return model.eval()


def served(directory: Path, scaling: Scaling) -> Tensor:
    """What a server computes that puts this factor in front of each layer's own A and B."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors, model = load_file(directory / "adapter_model.safetensors"), llama()
    for name, lora_A in tensors.items():
        if name.endswith("lora_A.weight"):
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight.data += scaling(config, len(lora_A)) * tensors[name.replace("lora_A", "lora_B")] @ lora_A
    return computed(model)


RANKS = st.dictionaries(st.sampled_from([*QV, "layers.0.self_attn.v_proj"]), st.integers(1, 6), max_size=2)
ALPHAS = st.dictionaries(st.sampled_from([*QV, r".*\.1\..*q_proj"]), st.sampled_from([1, 4, 7.5, 64]), max_size=2)


@given(r=st.integers(1, 6), alpha=st.sampled_from([3, 8, 16]), ranks=RANKS, alphas=ALPHAS, root=st.booleans())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_portable_layout_is_read_alike_by_all(
    r: int, alpha: float, ranks: dict[str, int], alphas: dict[str, float], root: bool, tmp_path: Path
) -> None:
    model = adapted(r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=root)
    for layout in ("peft", "portable"):
        save_adapter(model, tmp_path / layout, layout=layout)  # type: ignore[arg-type]
        files = read_files(tmp_path / layout)
        for server, scaling in SCALINGS.items():
            is_right = torch.allclose(served(tmp_path / layout, scaling), computed(model), rtol=1e-4, atol=1e-5)
            assert is_right or layout == "peft"
            assert is_right is not bool(served_otherwise(files, server)), (server, layout)
    tensors = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    assert len({len(tensor) for name, tensor in tensors.items() if "lora_A" in name}) == 1


def test_peft_and_this_package_read_the_portable_layout(tmp_path: Path) -> None:
    model = adapted(
        rank_pattern={"v_proj": 2, "embed_tokens": 3}, target_modules=[*QV, "embed_tokens"], use_rslora=True
    )
    save_adapter(model, tmp_path, layout="portable")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (4, 4, {}, False)
    for opened in (peft.PeftModel.from_pretrained(llama(), tmp_path), load_adapter(llama(), tmp_path)):
        torch.testing.assert_close(computed(opened), computed(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "values", "what"),
    [
        (llama, {"use_dora": True}, "magnitudes of DoRA"),
        (llama, {"use_vera": True, "r": 16}, "of type 'VERA'"),
        (llama, {"modules_to_save": ["lm_head"]}, "modules that are trained in full"),
        (llama, {"trainable_token_indices": [3]}, "trained rows of an embedding"),
        (biased, {"bias": "lora_only"}, "trained biases"),
        (mixtral, {"target_modules": [], "target_parameters": EXPERTS}, "stacked parameters"),
    ],
)
def test_what_the_portable_layout_cannot_hold_is_said(
    make: Callable[[], nn.Module], values: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"cannot hold .*{what}.*merged model"):
        save_adapter(adapted(make, **values), tmp_path / "adapter", layout="portable")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "values", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"v_proj": 2}}], ids=str
)
def test_what_transformers_serves(values: dict[str, Any], tmp_path: Path) -> None:
    model, opened = adapted(**values), llama()
    save_adapter(model, tmp_path)
    opened.load_adapter(str(tmp_path))
    is_right = torch.allclose(computed(opened), computed(model), rtol=1e-4, atol=1e-5)
    assert is_right is not bool(served_otherwise(read_files(tmp_path), "transformers"))


@given(
    minor=st.integers(0, 40),
    tensor=st.sampled_from(["lora_A.weight", "lora_embedding_B", "weight", "bias", "lora_magnitude_vector"]),
)
def test_which_tensors_a_version_of_transformers_reads(minor: int, tensor: str) -> None:
    pattern = tensors_of_transformers(f"5.{minor}.0.dev0")
    is_read = tensor.startswith(("lora_A", "lora_e")) or (minor >= 19 and "magnitude" not in tensor)
    assert is_read is (re.fullmatch(pattern, f"base_model.model.layers.0.q_proj.{tensor}") is not None)


@pytest.mark.parametrize(
    ("server", "values", "said"),
    [
        ("vllm", {"use_dora": True}, "refuses DoRA"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "refuses modules trained in full"),
        ("vllm", {"trainable_token_indices": [3]}, "refuses 1 tensors, such as .*trainable_tokens_delta"),
        ("sglang", {"use_dora": True}, "ignores 4 tensors, such as .*lora_magnitude_vector"),
        ("llama.cpp", {"modules_to_save": ["lm_head"]}, "refuses 1 tensors, such as .*lm_head.weight"),
        ("transformers", {"use_vera": True, "r": 16}, "refuses an adapter of type 'VERA'"),
        ("diffusers", {}, "scales the updates of 4 layers by 1, which were trained with 4"),
    ],
)
def test_each_server_s_rules(server: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_adapter(adapted(**values), tmp_path)
    problems = "\n".join(served_otherwise(read_files(tmp_path), server))
    assert re.search(said, problems), problems


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_check_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base, trained = str(tmp_path / "base"), str(tmp_path / "trained")
    model = inject(tiny_llama(), LoraConfig(r=4, target_modules=QV, alpha_pattern={"v_proj": 3}))
    toys.randomize(model)
    save_adapter(model, trained)
    assert call("check", trained, "--for", "sglang") == 1
    assert "which were trained with 0.75" in (out := capsys.readouterr().out) and "--layout portable" in out
    assert call("export", trained, str(tmp_path / "served"), "--base", base) == 0
    for server in SERVERS:
        assert call("check", str(tmp_path / "served"), "--for", server) == 0
    opened = load_adapter(tiny_llama().eval(), tmp_path / "served")
    torch.testing.assert_close(opened(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    assert call("export", trained, str(tmp_path / "kept"), "--base", base, "--layout", "peft") == 0
    assert json.loads((tmp_path / "kept" / "adapter_config.json").read_text())["alpha_pattern"]


def test_an_export_that_cannot_be_portable_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(inject(tiny_llama(), LoraConfig(r=4, target_modules=QV, use_dora=True)), tmp_path / "trained")
    arguments = ("export", str(tmp_path / "trained"), str(tmp_path / "out"), "--base", str(tmp_path / "base"))
    assert call(*arguments) == 0
    assert "PEFT's layout is kept, since the portable one cannot hold the magnitudes of DoRA" in capsys.readouterr().err
    assert call("check", str(tmp_path / "out"), "--for", "vllm") == 1
    assert "merge" in capsys.readouterr().out
    assert call(*arguments, "--layout", "portable") == 1
    assert "cannot hold the magnitudes of DoRA" in capsys.readouterr().err


@pytest.mark.slow
def test_diffusers_reads_the_portable_layout(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def unet() -> Any:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
        sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 2}
        model = diffusers.UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=8, attention_head_dim=2)
        return model.eval()

    def outputs(model: Any) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return model(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 3, 8)).sample

    model = inject(unet(), LoraConfig(r=4, target_modules=["to_q", "to_v"], rank_pattern={"to_v": 2}))
    toys.randomize(model)
    for layout, is_right in (("peft", False), ("portable", True)):
        save_adapter(model, tmp_path / layout, layout=layout)  # type: ignore[arg-type]
        opened = unet()
        opened.load_lora_adapter(tmp_path / layout, weight_name="adapter_model.safetensors", prefix="base_model.model")
        assert torch.allclose(outputs(opened), outputs(model), rtol=1e-4, atol=1e-5) is is_right
        assert bool(served_otherwise(read_files(tmp_path / layout), "diffusers")) is not is_right
