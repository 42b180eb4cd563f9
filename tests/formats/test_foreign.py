"""Adapters of other libraries: loralib itself, and the files that litgpt and torchtune write."""

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import yaml
from helpers.models import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_lora import CheckpointError, eject
from lightning_lora.formats.foreign import load_foreign_adapter
from lightning_lora.layers import LoraLayer

R, ALPHA = 4, 6


def random(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.2


class Plain(nn.Module):
    """What loralib's model below is without LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(self.embedding(x))))


class Theirs(Plain):
    def __init__(self) -> None:
        super().__init__()
        settings = {"r": R, "lora_alpha": ALPHA, "merge_weights": False}
        made = {
            "embedding": loralib.Embedding(10, 8, **settings),
            "qkv": loralib.MergedLinear(8, 24, enable_lora=[True, False, True], **settings),
            "out": loralib.Linear(24, 3, **settings),
        }
        for name, layer in made.items():
            layer.load_state_dict(getattr(self, name).state_dict(), strict=False)
            setattr(self, name, layer)
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                parameter.data = random(*parameter.shape)


def test_loralib_itself(tmp_path: Path) -> None:
    theirs, x = Theirs(), torch.arange(6)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "lora.pt")
    ours = load_foreign_adapter(Plain(), tmp_path / "lora.pt", lora_alpha=ALPHA)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), Plain()(x), atol=1e-2)
    torch.testing.assert_close(eject(ours, merge=True)(x), theirs(x))


def updates(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.lora["default"].delta_weight() for name, layer in layers.items()}


@pytest.mark.parametrize("parts", ["qv", "qkv", "k"])
def test_litgpt(parts: str, tmp_path: Path) -> None:
    """Two heads of queries for each of keys and values, so that the parts differ in size."""
    torch.manual_seed(0)
    model = tiny_llama()
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    sizes = {"q": config.hidden_size, "k": kv, "v": kv}
    factors = {part: (random(R, config.hidden_size), random(sizes[part], R)) for part in parts}
    mlp = (random(R, config.hidden_size), random(config.intermediate_size, R))
    state = {
        "transformer.h.1.attn.qkv.lora_A": torch.cat([A for A, _ in factors.values()]),
        "transformer.h.1.attn.qkv.lora_B": torch.cat([B for _, B in factors.values()]),
        "transformer.h.0.mlp.fc_2.lora_A": mlp[0],
        "transformer.h.0.mlp.fc_2.lora_B": mlp[1],
    }
    torch.save({"model": state}, tmp_path / "lit_model.pth.lora")
    settings = {"lora_r": R, "lora_alpha": ALPHA, "lora_query": "q" in parts, "lora_key": "k" in parts}
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump({**settings, "lora_value": "v" in parts}))
    found = updates(load_foreign_adapter(model, tmp_path / "lit_model.pth.lora"))
    expected = {f"model.layers.1.self_attn.{part}_proj": ALPHA / R * B @ A for part, (A, B) in factors.items()}
    expected["model.layers.0.mlp.up_proj"] = ALPHA / R * mlp[1] @ mlp[0]
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update)


def to_torchtune(weight: Tensor, heads: int) -> Tensor:
    """A projection as torchtune stores it: in each head, row i of the first half next to row i of the second."""
    by_head = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack([by_head[:, 0], by_head[:, 1]], dim=2).reshape(weight.shape)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torchtune(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    wanted, state = {}, {}
    for theirs, name in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("output_proj", "o_proj")):
        weight = model.get_submodule(f"model.layers.2.self_attn.{name}").weight
        A, B = random(R, weight.shape[1]), random(weight.shape[0], R)
        wanted[f"model.layers.2.self_attn.{name}"] = ALPHA / R * B @ A
        state[f"layers.2.attn.{theirs}.lora_a.weight"] = A
        state[f"layers.2.attn.{theirs}.lora_b.weight"] = to_torchtune(B, heads[name]) if name in heads else B
    path = tmp_path / f"adapter_0{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": ALPHA}))
    found = updates(load_foreign_adapter(model, path))
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update)


def model_of(model_type: str, heads: int, groups: int, head_dim: int) -> Any:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim, "hidden_size": 16}
    config = AutoConfig.for_model(
        model_type, vocab_size=10, intermediate_size=16, num_hidden_layers=1, pad_token_id=0, **sizes
    )
    return AutoModelForCausalLM.from_config(config)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from(["llama", "mistral", "gemma", "qwen2", "qwen3"]),
    groups=st.integers(1, 2),
    shared=st.integers(1, 2),
    half=st.sampled_from([2, 4]),
)
def test_the_rows_of_torchtune_are_in_its_models_order(
    model_type: str, groups: int, shared: int, half: int, tmp_path: Path
) -> None:
    # Qwen2 has no head_dim of its own.
    head_dim = 16 // (groups * shared) if model_type == "qwen2" else 2 * half
    model = model_of(model_type, groups * shared, groups, head_dim)
    wanted, state = {}, {}
    for name, heads in (("q_proj", groups * shared), ("k_proj", groups)):
        A, B = random(R, 16), random(heads * head_dim, R)
        wanted[f"model.layers.0.self_attn.{name}"] = ALPHA / R * B @ A
        state[f"layers.0.attn.{name}.lora_a.weight"] = A
        state[f"layers.0.attn.{name}.lora_b.weight"] = B if model_type.startswith("qwen") else to_torchtune(B, heads)
    torch.save(state, tmp_path / "adapter_0.pt")
    found = updates(load_foreign_adapter(model, tmp_path / "adapter_0.pt", ALPHA))
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update)


@pytest.mark.parametrize(
    ("make", "names", "match"),
    [
        (
            lambda: model_of("granite", 2, 2, 8),
            ("layers.0.attn.q_proj", "lora_a.weight"),
            "rows in a 'granite' model is",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            ("layers.0.attn.q_proj", "lora_a.weight"),
            "a Sequential without such",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ("transformer.h.0.attn.proj", "lora_A"), "a Sequential without such"),
        (lambda: model_of("gpt_neox", 2, 2, 8), ("transformer.h.0.attn.proj", "lora_A"), "GPTNeoXForCausalLM does not"),
        (lambda: model_of("mistral", 3, 3, 2), ("layers.0.attn.q_proj", "lora_a.weight"), "of another shape"),
    ],
)
def test_other_models_are_refused_by_name(make: Any, names: tuple[str, str], match: str, tmp_path: Path) -> None:
    layer, matrix = names
    other = matrix.replace("_a", "_b").replace("_A", "_B")
    torch.save({f"{layer}.{matrix}": random(R, 16), f"{layer}.{other}": random(16, R)}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=match):
        load_foreign_adapter(make(), tmp_path / "lora.pt", ALPHA)


class Pickled:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "alpha", "match"),
    [
        ({"out.lora_A": random(R, 24), "out.lora_B": random(3, R)}, None, "does not say its alpha"),
        ({"out.lora_A": random(R, 24)}, 6, "one of A and B for 'out', and not the other"),
        ({"nope.lora_A": random(R, 24), "nope.lora_B": random(3, R)}, 6, "adapts 'nope', which Plain does not have"),
        ({"out.lora_A": random(R, 23), "out.lora_B": random(3, R)}, 6, "of another shape: .*out.lora_A"),
        ({"out.weight": random(3, 24)}, 6, "holds 0 tensors of an adapter and 1 others"),
        ({"out.lora_A": Pickled()}, 6, "cannot be read as a checkpoint"),
    ],
)
def test_what_does_not_fit(content: Any, alpha: Any, match: str, tmp_path: Path, capsys: Any) -> None:
    torch.save(content, tmp_path / "lora.pt")
    model = Plain()
    with pytest.raises(CheckpointError, match=match):
        load_foreign_adapter(model, tmp_path / "lora.pt", lora_alpha=alpha)
    assert "executed" not in capsys.readouterr().out
    assert type(model.out) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())


ODD = [
    torch.zeros(1).expand(1 << 20, 8),  # 33 MB in four bytes, and as much again by its rank
    torch.eye(4).to_sparse(), torch.empty(4, 8, device="meta"), torch.zeros(4), torch.zeros(4, 8, dtype=torch.int64),
    3, "x", None, [torch.zeros(4, 8)], {"a": 1},
]  # fmt: skip


@given(
    odd=st.sampled_from(ODD),
    key=st.sampled_from(["out.lora_A", "out.lora_B", 3, "out." + "lora_" * 1000]),
    inside=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_matrix_is_refused(odd: Any, key: Any, inside: bool, tmp_path: Path) -> None:
    content = {"out.lora_A": torch.zeros(4, 8), "out.lora_B": torch.zeros(3, 4), key: odd}
    torch.save({"model": content} if inside else content, tmp_path / "lora.pt")
    model = Plain()
    with pytest.raises(CheckpointError, match=r"lora\.pt"):
        load_foreign_adapter(model, tmp_path / "lora.pt", lora_alpha=ALPHA)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


@pytest.mark.parametrize("kind", ["litgpt", "torchtune"])
@given(text=st.one_of(st.text(max_size=10), st.sampled_from(["[", "[" * 5000, "[1]", '{"lora_alpha": "x"}', "a: *b"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_beside_a_file(kind: str, text: str, tmp_path: Path) -> None:
    names = {
        "litgpt": ("hyperparameters.yaml", "transformer.h.0.mlp.proj", "lora_A", "lora_B"),
        "torchtune": ("adapter_config.json", "layers.0.mlp.w2", "lora_a.weight", "lora_b.weight"),
    }
    beside, layer, first, second = names[kind]
    (tmp_path / beside).write_text(text, encoding="utf-8")
    torch.save({f"{layer}.{first}": torch.zeros(2, 64), f"{layer}.{second}": torch.zeros(32, 2)}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError):
        load_foreign_adapter(tiny_llama(), tmp_path / "lora.pt")
