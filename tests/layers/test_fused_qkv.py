"""Chosen parts of fused projections of query, key and value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from helpers import toys
from helpers.models import gpt2
from torch import Tensor, nn

from lightning_lora import CheckpointError, LoraConfig, TargetError, eject, inject, load_adapter, merge, save_adapter
from lightning_lora.layers.fused_qkv import qkv_rows

OUTPUTS = ("c_proj", "dense", "o_proj", "out_proj")


IDS = torch.arange(12).view(2, 6)


SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt_neox() -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, intermediate_size=24))


def bloom() -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4))


def falcon() -> nn.Module:
    config = tf.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2, bias=True)
    return tf.FalconForCausalLM(config)


def falcon_multi_query() -> nn.Module:
    return tf.FalconForCausalLM(tf.FalconConfig(**SIZES, multi_query=True, new_decoder_architecture=False))


def falcon_plain() -> nn.Module:
    return tf.FalconForCausalLM(tf.FalconConfig(**SIZES, multi_query=False, new_decoder_architecture=False))


def phi3() -> nn.Module:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, intermediate_size=24, num_key_value_heads=2, pad_token_id=0))


def mpt() -> nn.Module:
    return tf.MptForCausalLM(tf.MptConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=32, max_seq_len=16))


def gpt_bigcode() -> nn.Module:
    config = tf.GPTBigCodeConfig(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=4, multi_query=True)
    return tf.GPTBigCodeForCausalLM(config)


def persimmon() -> nn.Module:
    return tf.PersimmonForCausalLM(tf.PersimmonConfig(**SIZES, intermediate_size=24, pad_token_id=0))


MODELS: list[Callable[[], nn.Module]] = [
    gpt2, gpt_neox, bloom, falcon, falcon_multi_query, falcon_plain, phi3, mpt, gpt_bigcode, persimmon,
]  # fmt: skip


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    names = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    modules = dict(model.named_modules())
    return [(m, modules[n.rpartition(".")[0]]) for n, m in modules.items() if n.rpartition(".")[2] in names]


@pytest.mark.parametrize("make", MODELS)
def test_the_parts_are_what_they_are_said_to_be(make: Callable[[], nn.Module]) -> None:
    """Told by the attention itself, by what happens when the outputs of one part are made zero at one position.

    The queries of a position matter to this position alone; its keys and values to the later ones too; and without
    values anywhere, nothing comes out of the attention, whatever the queries and keys.
    """
    model = made(make)
    layer, holder = projections(model)[-1]
    rows = qkv_rows(layer, holder)
    assert rows is not None
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(sum(map(len, rows.values()))))
    attended: list[Tensor] = []
    output = next(child for name, child in holder.named_children() if name in OUTPUTS)
    output.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0]))

    def attention(part: str | None, where: Any = slice(None)) -> Tensor:
        def clear(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            if part is not None:
                out[(slice(None), where)] = out[(slice(None), where)].index_fill(-1, rows[part], 0.0)
            return out

        handle = layer.register_forward_hook(clear)
        attended.clear()
        with torch.no_grad():
            model(IDS)
        handle.remove()
        return attended[-1].view(2, 6, -1)

    whole = attention(None)
    changed = (attention("q", 3) - whole).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False] * 3 + [True] + [False] * 2
    changed = (attention("k", 3) - whole).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False] * 3 + [True] * 3
    assert not attention("v").any()
    assert attention("k").any() and attention("q").any()


@pytest.mark.parametrize("make", [gpt2, gpt_neox, phi3])
@pytest.mark.parametrize("parts", [["q", "v"], ["k"], ["v", "k", "q"]])
def test_only_the_chosen_parts_move(make: Callable[[], nn.Module], parts: list[str], tmp_path: Path) -> None:
    model = made(make)
    base = toys.snapshot(model)
    before = model(IDS).logits
    targets = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if m in dict(projections(model))})
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, fused_qkv=parts)
    inject(model, config)
    assert torch.equal(model(IDS).logits, before)
    toys.randomize(model)
    adapted = model(IDS).logits
    layer, holder = projections(model)[0]
    rows = qkv_rows(layer, holder)
    adapter = layer.lora["default"]
    delta = adapter.delta_weight()
    delta = delta.T if make is gpt2 else delta
    blocks = iter(range(3))
    position = 0
    for part in ("q", "k", "v"):
        if part in parts:
            i = next(blocks)
            A, B = adapter.lora_A[2 * i : 2 * i + 2], adapter.lora_B[position : position + len(rows[part])]
            torch.testing.assert_close(delta[rows[part]], 1.5 * B @ A)
            position += len(rows[part])
        else:
            assert not delta[rows[part]].any()
    adapted.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    torch.testing.assert_close(merge(model)(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(made(make), tmp_path).eval()
    torch.testing.assert_close(opened(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_adapter(made(make), tmp_path)(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    again = inject(made(make), config)
    torch.testing.assert_close(load_adapter(again, tmp_path)(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    other = inject(made(make), LoraConfig(r=2, lora_alpha=3, target_modules=targets, fused_qkv=["q", "k"]))
    if parts == ["q", "v"]:
        with pytest.raises(CheckpointError, match="not one of the parts of fused_qkv alone"):
            load_adapter(other, tmp_path)
        assert torch.equal(other(IDS).logits, before)
    toys.assert_same_tensors(toys.snapshot(eject(model)), base)


def test_no_fused_projection_is_an_error() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, intermediate_size=24))
    with pytest.raises(TargetError, match=r"fused_qkv=\['q', 'v'\].*none of the 4 targets is one.*query_key_value"):
        inject(model, LoraConfig(target_modules=["q_proj", "v_proj"], fused_qkv=["v", "q"]))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"fused_qkv": ["x"]}])
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fused_qkv"):
        LoraConfig(**{"fused_qkv": ["q"], **settings})
