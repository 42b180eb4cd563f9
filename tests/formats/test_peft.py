"""Side by side with PEFT: the same A and B give the same outputs and gradients, and each opens what the other saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import toys
from helpers.models import IDS, Wrapped, batches, tiny_classifier, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import CheckpointError, LoRA, LoraConfig, eject, inject, load_adapter, save_adapter
from lightning_lora.formats.checkpoint import load_from_checkpoint

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama, every linear layer": (tiny_llama, {"target_modules": "all-linear"}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "classifier": (tiny_classifier, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "rsLoRA": (tiny_llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 3, r"model\.layers\.0\.self_attn\.q_proj": 1},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "regular expression": (tiny_llama, {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"}),
    "biases": (tiny_classifier, {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    "all biases": (tiny_classifier, {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
}


# PEFT stores these biases under their plain names too.
REDUNDANT = tuple(f"base_model.model.classifier.{wrapper}." for wrapper in ("modules_to_save", "original_module"))


def ours(name: str, model: nn.Module | None = None) -> nn.Module:
    make, settings = CASES[name]
    return inject(model or make(), LoraConfig(r=4, lora_alpha=6, **{"modules_to_save": None, **settings}))


def theirs(name: str) -> Any:
    make, settings = CASES[name]
    return peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **settings))


@pytest.mark.parametrize("name", CASES)
def test_peft_opens_what_we_save(name: str, tmp_path: Path) -> None:
    model = ours(name).eval()
    toys.randomize(model)
    save_adapter(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(CASES[name][0](), tmp_path).eval()
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(CASES[name][0]().eval()(IDS).logits, model(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_we_open_what_peft_saves(name: str, tmp_path: Path) -> None:
    model = theirs(name).eval()
    toys.randomize(model)
    model.save_pretrained(tmp_path)
    opened = load_adapter(CASES[name][0](), tmp_path).eval()
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    merged = eject(opened, merge=True)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_same_tensors_go_round(name: str, tmp_path: Path) -> None:
    model = ours(name)
    toys.randomize(model)
    save_adapter(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(CASES[name][0](), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    one, other = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    other = {key: tensor for key, tensor in other.items() if not key.startswith(REDUNDANT)}
    toys.assert_same_tensors(one, other)


@pytest.mark.parametrize("name", ["llama, every linear layer", "gpt2", "patterns"])
def test_gradients_equal_pefts(name: str, tmp_path: Path) -> None:
    model = ours(name).train(False)
    toys.randomize(model)
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(CASES[name][0](), tmp_path, is_trainable=True).eval()
    for one in (model, other):
        one(IDS, labels=IDS).loss.backward()
    gradients = {n.replace(".lora_A.default.weight", ".lora.default.lora_A").replace(
        ".lora_B.default.weight", ".lora.default.lora_B").removeprefix("base_model.model."): p.grad
        for n, p in other.named_parameters() if p.requires_grad}  # fmt: skip
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients.keys()
    for key, gradient in mine.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-4, atol=1e-6)


def test_a_run_exports_for_peft_and_for_transformers(tmp_path: Path) -> None:
    module = Wrapped()
    settings = {"max_epochs": 1, "enable_checkpointing": True}
    lora = LoRA(r=2, target_modules=["q_proj", "lm_head"], export_dir=tmp_path / "export", summary=False)
    toys.trainer(tmp_path, [lora], **settings).fit(module, batches(IDS, IDS + 1, IDS + 2))
    merged = module.model.eval()(IDS).logits
    opened = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "export" / "adapter").eval()
    torch.testing.assert_close(opened(IDS).logits, merged, rtol=1e-4, atol=1e-5)
    plain = type(module.model).from_pretrained(tmp_path / "export" / "merged").eval()
    assert torch.equal(plain(IDS).logits, merged)
    assert not [name for name in load_file(tmp_path / "export" / "merged" / "model.safetensors") if "lora" in name]
    again = load_adapter(Wrapped(), tmp_path / "export" / "adapter")
    torch.testing.assert_close(again.model.eval()(IDS).logits, opened(IDS).logits, rtol=1e-5, atol=1e-5)
    bare = load_adapter(tiny_llama(), tmp_path / "export" / "adapter")
    torch.testing.assert_close(bare.eval()(IDS).logits, opened(IDS).logits, rtol=1e-5, atol=1e-5)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    rebuilt = load_from_checkpoint(Wrapped, checkpoint)
    torch.testing.assert_close(rebuilt.model.eval()(IDS).logits, opened(IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(Wrapped(seed=1), tmp_path / "export" / "adapter")


def test_a_merged_model_with_an_untied_head_opens_untied(tmp_path: Path) -> None:
    class Tied(Wrapped):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama(tie_word_embeddings=True)

    module = Tied()
    lora = LoRA(r=2, target_modules=["lm_head"], export_dir=tmp_path / "export", summary=False)
    toys.trainer(tmp_path, [lora], max_epochs=1).fit(module, batches(IDS))
    plain = type(module.model).from_pretrained(tmp_path / "export" / "merged").eval()
    assert torch.equal(plain(IDS).logits, module.model.eval()(IDS).logits)
    assert module.model.config.tie_word_embeddings is True


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(ours("llama"), tmp_path / "adapter")


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unreadable_directories_are_refused(saved: Path, tmp_path: Path) -> None:
    def refuses(match: str, **values: Any) -> None:
        model = tiny_llama()
        before = toys.snapshot(model)
        directory = shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True)
        change_config(directory, **values)
        with pytest.raises(CheckpointError, match=match):
            load_adapter(model, directory)
        toys.assert_same_tensors(model.state_dict(), before)

    refuses("type 'IA3'", peft_type="IA3")
    refuses("sets use_qalora=True: QA-LoRA", use_qalora=True)
    refuses(r"of another shape: .*q_proj\.lora_A", r=9)
    refuses(r"missing: .*k_proj", target_modules=["q_proj", "v_proj", "k_proj"])
    refuses(r"left over: .*v_proj", target_modules=["q_proj"])
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(tiny_llama(), saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tiny_llama(), saved)


def test_bfloat16_files_load(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    layer = load_adapter(tiny_llama(), saved).model.layers[0].self_attn.q_proj
    assert layer.lora["default"].lora_A.dtype == torch.float32


def test_a_model_without_an_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 0: inject or load one first"):
        save_adapter(tiny_llama(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("other", [{"lora_alpha": 5}, {"use_rslora": True}])
def test_another_scaling_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(inject(tiny_llama(), LoraConfig(r=4, lora_alpha=6)), tmp_path)
    model = inject(tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 6, **other}))
    before = toys.snapshot(model)
    with pytest.raises(CheckpointError, match=r"scales the update of .* by 1\.5, and this model's adapter by"):
        load_adapter(model, tmp_path)
    toys.assert_same_tensors(toys.snapshot(model), before)


def test_transformers_opens_what_we_save(tmp_path: Path) -> None:
    """By its own ``load_adapter``, without a PeftModel around it."""
    model = ours("llama").eval()
    toys.randomize(model)
    save_adapter(model, tmp_path)
    opened = tiny_llama().eval()
    opened.load_adapter(str(tmp_path))
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


class WithHead(nn.Module):
    """A transformers model, and a layer beside it that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()
        torch.manual_seed(1)
        self.head = nn.Linear(self.model.config.vocab_size, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": None}, {"target_modules": ["q_proj", "head"]}])
def test_what_is_beside_a_pretrained_model_is_found_by_its_name(settings: dict[str, Any], tmp_path: Path) -> None:
    """The names in a file are those of the pretrained model if all that is trained is in it, and else of the whole."""
    model = inject(WithHead(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})).eval()
    toys.randomize(model)
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(load_adapter(WithHead(), tmp_path / "ours").eval()(IDS), model(IDS))
    theirs = peft.get_peft_model(WithHead(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]))
    toys.randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_adapter(WithHead(), tmp_path / "theirs").eval()
    torch.testing.assert_close(read(IDS), theirs.eval()(IDS), rtol=1e-4, atol=1e-5)
