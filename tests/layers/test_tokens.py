"""Rows of an embedding trained in full: against an explicit weight with other rows, and beside PEFT."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, Wrapped, bart, batches, gemma, tiny_classifier, tiny_gpt2, tiny_llama
from helpers.toys import randomize
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from lightning_lora import (
    CheckpointError,
    LoRA,
    LoraConfig,
    TargetError,
    adapter_state_dict,
    adapters_for,
    add_adapter,
    delete_adapter,
    eject,
    inject,
    load_adapter,
    load_adapter_state_dict,
    merge,
    param_groups,
    save_adapter,
    set_adapter,
    unmerge,
)  # fmt: skip
from lightning_lora.model.summary import print_summary

TOKENS = [3, 11, 0, 7]  # in no order, and with the padding of some models; 3, 7, 0 and 11 are in IDS


def tied_llama() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def masked_bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))
    nn.init.normal_(model.cls.predictions.bias)
    return model


def run(model: Any) -> Tensor:
    extra = {"decoder_input_ids": IDS + 2} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **extra).logits


# By name: how to build the model, settings, how many modules share the rows.
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "llama": (tiny_llama, {"target_modules": ["q_proj"]}, 1),
    "llama, tied": (tied_llama, {"target_modules": ["q_proj"]}, 2),
    "llama, no layers": (tied_llama, {"target_modules": []}, 2),
    "llama, all-linear": (tied_llama, {"target_modules": "all-linear", "use_dora": True}, 2),
    "llama, by name": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}}, 1),
    "llama, both ends": (
        tiny_llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [9]}},
        2,
    ),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn"]}, 2),
    "gemma, scaled": (gemma, {"target_modules": ["v_proj"]}, 2),
    "bart": (bart, {"target_modules": ["v_proj"]}, 4),
    "t5": (t5, {"target_modules": ["v"]}, 4),
    "classifier": (tiny_classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}, 1),
}


def settings(name: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "trainable_token_indices": TOKENS, "modules_to_save": None, **CASES[name][1]}


def ours(name: str) -> Any:
    return inject(CASES[name][0](), LoraConfig(**settings(name))).eval()


def trained_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("trainable_tokens")}


@pytest.mark.parametrize("name", CASES)
def test_peft_opens_what_we_save_and_has_the_same_gradients(name: str, tmp_path: Path) -> None:
    model = ours(name)
    before = run(model)
    randomize(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(CASES[name][0](), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(run(theirs), run(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, run(model), atol=1e-3)
    for one in (model, theirs):
        run(one).square().mean().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    other = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(mine) == len(other)
    rows = {n.replace(".lora.default.trainable_tokens", ""): g for n, g in mine.items() if n.endswith("_tokens")}
    there = {n.removeprefix("base_model.model.").split(".token_adapter")[0]: g
             for n, g in other.items() if "trainable_tokens" in n}  # fmt: skip
    assert rows.keys() == there.keys()
    for key, gradient in rows.items():
        torch.testing.assert_close(gradient, there[key], rtol=1e-4, atol=1e-6)
        assert gradient.any()

    theirs.save_pretrained(tmp_path / "again")
    one, again = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "again"))
    toys.assert_same_tensors(one, again)


@pytest.mark.parametrize("name", CASES)
def test_we_open_what_peft_saves(name: str, tmp_path: Path) -> None:
    # PEFT's own value for a LoRA config that adapts no layer.
    chosen = {**settings(name), "target_modules": settings(name)["target_modules"] or "dummy-target-modules"}
    theirs: Any = peft.get_peft_model(CASES[name][0](), peft.LoraConfig(**chosen)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    opened: Any = load_adapter(CASES[name][0](), tmp_path).eval()
    torch.testing.assert_close(run(opened), run(theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(eject(opened, merge=True)), run(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_fresh_rows_change_nothing_and_ties_survive(name: str, dtype: torch.dtype) -> None:
    make, _, shared = CASES[name]
    plain = make().to(dtype).eval().requires_grad_(False)  # T5's attention rounds otherwise with a frozen bias
    before, bits = run(plain), toys.snapshot(plain)
    model: Any = inject(make().to(dtype).eval(), LoraConfig(**settings(name)))
    assert torch.equal(run(model), before)
    for parameter in trained_rows(model).values():
        assert parameter.dtype == torch.float32
        parameter.data.add_(torch.randn_like(parameter))
    changed = run(model)
    assert not torch.allclose(changed, before, atol=1e-2)

    weights = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "lora" not in n}
    ties = {n: sorted(other for other, p in weights.items() if p is weights[n]) for n in weights}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for fold in (merge, lambda m: eject(m, merge=True)):
        fold(model)
        merged = {n: p for n, p in model.named_parameters(remove_duplicate=False) if "lora" not in n}
        assert {n: sorted(other for other, p in merged.items() if p is merged[n]) for n in merged} == ties
        torch.testing.assert_close(run(model), changed, **tolerance)
        unmerge(model)
        assert torch.equal(run(model), changed)
    adapters = {id(m.lora) for m in model.modules() if hasattr(m, "lora")}
    assert len([m for m in model.modules() if hasattr(m, "lora")]) - len(adapters) == shared - len(trained_rows(model))
    eject(model)
    toys.assert_same_tensors(model.state_dict(), bits)
    assert torch.equal(run(model.requires_grad_(False)), before)


def test_only_the_rows_change() -> None:
    layer: Any = nn.Embedding(12, 5)
    weight = layer.weight.detach().clone()
    inject(layer, LoraConfig(target_modules=[], trainable_token_indices=[4, 1]))
    rows = layer.lora["default"].trainable_tokens
    assert torch.equal(rows, weight[[4, 1]])
    rows.data.normal_()
    expected = weight.index_copy(0, torch.tensor([4, 1]), rows.detach())
    for x in (torch.arange(12), torch.arange(12).view(3, 4).t(), torch.tensor(4), torch.zeros(0, 2, dtype=torch.int32)):
        assert torch.equal(layer(x), expected[x.long()])
    upstream = torch.randn(3, 5)
    layer(torch.tensor([4, 4, 2])).backward(upstream)
    assert torch.equal(rows.grad, torch.stack([upstream[0] + upstream[1], torch.zeros(5)]))
    assert layer.weight.grad is None
    assert torch.equal(merge(layer).weight, expected)
    assert torch.equal(unmerge(layer).weight, weight)


def test_a_tied_head_with_a_bias_keeps_it() -> None:
    """PEFT 0.21 leaves the bias out."""
    model = masked_bert().eval()
    inject(model, LoraConfig(r=2, target_modules=["query"], trainable_token_indices=TOKENS))
    randomize(model)
    weight = model.get_input_embeddings().weight.detach().clone()
    (rows,) = trained_rows(model).values()
    weight[TOKENS] = rows.detach()
    head = model.cls.predictions.decoder
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(head(x), nn.functional.linear(x, weight, head.bias), rtol=1e-5, atol=1e-5)


def test_no_tensor_of_the_size_of_the_embedding_or_of_the_logits_is_kept() -> None:
    model = nn.Sequential(nn.Embedding(4096, 8), nn.Linear(8, 4096, bias=False))
    model[1].weight = model[0].weight
    inject(model, LoraConfig(target_modules=[], trainable_token_indices={"0": [1, 2, 3]}))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(torch.arange(4))
    assert max(t.numel() for t in kept if t.data_ptr() != model[0].weight.data_ptr()) < 100


def test_copies_share_the_rows_too() -> None:
    model = ours("llama, tied")
    randomize(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), run(model))
        assert copied.lm_head.lora.default is copied.model.embed_tokens.lora.default


def test_state_and_groups() -> None:
    model = ours("llama, tied")
    fresh = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    assert {name.rpartition(".")[2] for name in fresh} == {"lora_A", "lora_B", "trainable_tokens"}
    randomized = copy.deepcopy(model)
    randomize(randomized)
    changed = run(randomized)
    load_adapter_state_dict(model, adapter_state_dict(randomized))
    assert torch.equal(run(model), changed)
    load_adapter_state_dict(model, fresh)
    assert not torch.equal(run(model), changed)
    (rows,) = trained_rows(model).values()
    groups = param_groups(model, lr=1e-3, weight_decay=0.1)
    (group,) = (group for group in groups if any(p is rows for p in group["params"]))
    assert group["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_every_process_has_a_gradient() -> None:
    model = inject(tiny_llama(), LoraConfig(target_modules=[], trainable_token_indices=[60]))
    run(model).sum().backward()
    (rows,) = trained_rows(model).values()
    assert rows.grad is not None and not rows.grad.any()


def test_a_run_resumes_merges_and_exports(tmp_path: Path) -> None:
    def module() -> Wrapped:
        wrapped = Wrapped()
        wrapped.model = tied_llama()
        return wrapped

    def lora() -> LoRA:
        return LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS, export_dir=tmp_path / "export",
                    summary=False)  # fmt: skip

    whole = module()
    toys.trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path / "a", save_last=True)]).fit(whole, batches(IDS, IDS + 1))
    half = [lora(), ModelCheckpoint(tmp_path / "b", save_last=True)]
    toys.trainer(tmp_path, half, max_epochs=1).fit(module(), batches(IDS, IDS + 1))
    resumed = module()
    toys.trainer(tmp_path, [lora()]).fit(resumed, batches(IDS, IDS + 1), ckpt_path=tmp_path / "b" / "last.ckpt")
    toys.assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    base = toys.snapshot(module())["model.lm_head.weight"]
    moved = (resumed.model.lm_head.weight != base).any(1)
    assert moved.nonzero().flatten().tolist() == sorted(TOKENS)

    checkpoint = tmp_path / "a" / "last.ckpt"
    assert checkpoint.stat().st_size < 60_000
    rebuilt = load_adapter(tied_llama(), tmp_path / "export" / "adapter").eval()
    torch.testing.assert_close(run(rebuilt), run(whole.model.eval()), rtol=1e-4, atol=1e-5)
    plain = type(whole.model).from_pretrained(tmp_path / "export" / "merged").eval()
    assert plain.config.tie_word_embeddings
    assert torch.equal(run(plain), run(whole.model.eval()))
    theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "export" / "adapter").eval()
    torch.testing.assert_close(run(theirs), run(plain), rtol=1e-4, atol=1e-5)

    other = LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=sorted(TOKENS), summary=False)
    with pytest.raises(CheckpointError, match=r"trainable_token_indices \(\[3, 11, 0, 7\] saved, \[0, 3, 7, 11\] here"):
        toys.trainer(tmp_path, [other]).fit(module(), batches(IDS), ckpt_path=checkpoint)


def test_an_adapter_of_other_tokens_is_refused(tmp_path: Path) -> None:
    save_adapter(ours("llama, tied"), tmp_path)
    model = inject(tied_llama(), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3, 4]))
    with pytest.raises(CheckpointError, match=r"rows of the tokens \[3, 11, 0, 7\].*\[1, 2, 3, 4\]"):
        load_adapter(model, tmp_path)


def test_the_summary_counts_tied_rows_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = ours("llama, no layers")
    print_summary(model)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "4 rows" in line]
    assert [(row[0], row[-1]) for row in rows] == [("model.embed_tokens", "128"), ("lm_head", "0")]
    assert f"trainable {4 * 32:,} " in out


@pytest.mark.parametrize("indices", [[], [-1], [1, 1], [1.0], [True], "1", {"a": []}, {"a": 3}, {"a": [2, 2]}])
def test_what_no_indices_are(indices: Any) -> None:
    with pytest.raises(ValueError, match="it must be a list of token indices, each an integer of at least 0"):
        LoraConfig(trainable_token_indices=indices)


@pytest.mark.parametrize(
    ("make", "config", "match"),
    [
        (tiny_llama, {"trainable_token_indices": [64]}, "index 64 is none of its 64 rows"),
        (tiny_llama, {"trainable_token_indices": {"embed_token": [1]}}, r"has no such module.*\('embed_tokens'\)"),
        (tiny_llama, {"trainable_token_indices": {"norm": [1]}}, "only nn.Embedding and nn.Linear have rows"),
        (tiny_llama, {"target_modules": ["embed_tokens"]}, "the targets match it too"),
        (tied_llama, {"target_modules": ["lm_head"]}, r"'lm_head' \(tied to 'model.embed_tokens'\).*match it too"),
        (tied_llama, {"modules_to_save": ["lm_head"]}, r"'lm_head' \(tied to .*modules_to_save trains it as a whole"),
        (tied_llama, {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "other indices than what it"),
        (lambda: nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(4, 2)]), {"target_modules": []}, "has 2 .'0', '1'"),
        (lambda: nn.Linear(4, 2), {}, "has 0: pass a dict"),
        (lambda: nn.Sequential(nn.Embedding(20, 2, sparse=True)), {"target_modules": []}, "sparse and scale_grad"),
        (lambda: nn.Sequential(nn.Embedding(20, 2, device="meta")), {"target_modules": []}, "load the weights first"),
        (lambda: bart().model.encoder, {"trainable_token_indices": {"embed_positions": [1]}}, "forward of its own"),
        (tiny_llama, {"target_modules": ["nope"]}, "matches no module"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_what_cannot_be_right_is_refused(make: Any, config: dict[str, Any], match: str) -> None:
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=f"(?s){match}.*Nothing was changed"):
        inject(model, LoraConfig(**{"trainable_token_indices": TOKENS, "target_modules": "all-linear", **config}))
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_row_of_the_padding() -> None:
    with pytest.warns(UserWarning, match="holds the padding_idx of '0', whose row gets no gradient"):
        model = inject(
            nn.Sequential(nn.Embedding(4, 2, padding_idx=1)), LoraConfig(target_modules=[], trainable_token_indices=[1])
        )
    model(torch.tensor([1, 1, 2])).sum().backward()
    (rows,) = trained_rows(model).values()
    assert not rows.grad.any()


@hypothesis_settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.sets(st.integers(0, 63), min_size=1, max_size=5), min_size=2, max_size=3), tied=st.booleans())
def test_several_adapters_have_rows_of_their_own(
    rows: list[set[int]], tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("adapters")
    base = tiny_llama(tie_word_embeddings=tied)
    model, start, alone = copy.deepcopy(base), run(base), {}
    for number, tokens in enumerate(rows):
        name = f"adapter_{number}"
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=sorted(tokens))
        alone[name] = inject(copy.deepcopy(base), config)
        randomize(alone[name], scale=0.1 * (number + 1))
        save_adapter(alone[name], path / name)
        load_adapter(model, path / name, name)
    for name, one in alone.items():
        set_adapter(model, name)
        torch.testing.assert_close(run(model), run(one), rtol=0, atol=0)
        torch.testing.assert_close(run(merge(model)), run(one), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(unmerge(model)), run(one), rtol=0, atol=0)
        save_adapter(model, path / "again", name)
        saved, again = (load_file(path / each / "adapter_model.safetensors") for each in (name, "again"))
        toys.assert_same_tensors(again, saved)
    with pytest.raises(ValueError, match=r"active together, since both set (lm_head|model\.embed_tokens) as a whole"):
        set_adapter(model, ["adapter_0", "adapter_1"])
    with pytest.raises(TargetError, match="so no other can be active with it: use add_adapter"):
        inject(model, LoraConfig(target_modules=[], trainable_token_indices=[5]), "beside")
    with adapters_for(model, ["adapter_1", "adapter_0"]):
        logits = model(input_ids=IDS[:1].expand(2, -1)).logits
    for row, name in zip(logits, ("adapter_1", "adapter_0")):
        torch.testing.assert_close(row, alone[name](input_ids=IDS[:1]).logits[0], rtol=1e-4, atol=1e-5)
    for name in alone:
        delete_adapter(model, name)
    torch.testing.assert_close(run(model), start, rtol=0, atol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("first", ["rows", "lora"])
def test_rows_and_a_lora_of_the_embedding_cannot_share_it(first: str) -> None:
    configs = {
        "rows": LoraConfig(target_modules=[], trainable_token_indices=TOKENS),
        "lora": LoraConfig(r=2, target_modules=["embed_tokens"]),
    }
    model = inject(tiny_llama(), configs.pop(first), "first")
    before, out = {**model.state_dict()}, run(model)
    with pytest.raises(TargetError, match=r"embed_tokens has an adapter of a kind that cannot share a layer"):
        add_adapter(model, configs.popitem()[1], "second")
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(run(model), out, rtol=0, atol=0)
