"""The commands that work on files, as a user runs them."""

import json
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helpers.quantized
import lightning as L
import pytest
import torch
from helpers import toys
from helpers.models import EXPERTS, IDS, mixtral, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRA, LoraConfig, eject, inject, load_adapter, save_adapter
from lightning_lora.cli.diff import _distance, by_common_names
from lightning_lora.cli.load_base import load_base
from lightning_lora.cli.main import main
from lightning_lora.pretrained import quantization_config


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(params=[{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=["lora", "pissa", "dora"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A finished run: its checkpoint, its base on disk, and what it computes."""
    lora = LoRA(r=4, target_modules=["q_proj", "v_proj"], summary=False, merge=None, **request.param)
    trainer = toys.trainer(tmp_path, lora, max_epochs=1)
    task = Task()
    trainer.fit(task, DataLoader(IDS, batch_size=1))
    tiny_llama().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        logits = task.eval().model(IDS).logits
    path = Path(trainer.checkpoint_callback.best_model_path)
    return {"ckpt": str(path), "base": str(tmp_path / "base"), "logits": logits, "out": str(tmp_path / "out")}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_export_then_open_anywhere(run: dict[str, Any]) -> None:
    assert call("export", run["ckpt"], run["out"], "--base", run["base"]) == 0
    opened = load_adapter(tiny_llama().eval(), run["out"])
    torch.testing.assert_close(opened(IDS).logits, run["logits"], rtol=1e-4, atol=1e-5)
    assert json.loads((Path(run["out"]) / "adapter_config.json").read_text())["base_model_name_or_path"] == run["base"]


@pytest.mark.parametrize("by_directory", [False, True])
def test_merge_writes_an_ordinary_model(run: dict[str, Any], by_directory: bool, tmp_path: Path) -> None:
    arguments = [run["ckpt"], run["out"], "--base", run["base"]]
    if by_directory:
        assert call("export", run["ckpt"], str(tmp_path / "adapter"), "--base", run["base"]) == 0
        arguments = [str(tmp_path / "adapter"), run["out"]]  # which names its base
    assert call("merge", *arguments, "--max-shard-size", "20KB") == 0
    files = sorted(path.name for path in Path(run["out"]).iterdir())
    assert "model.safetensors.index.json" in files and len([f for f in files if f.endswith(".safetensors")]) > 1
    model = AutoModelForCausalLM.from_pretrained(run["out"]).eval()
    torch.testing.assert_close(model(IDS).logits, run["logits"], rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name in model.state_dict())
    assert call("merge", *arguments, "--dtype", "bfloat16") == 0
    assert AutoModelForCausalLM.from_pretrained(run["out"], dtype="auto").dtype == torch.bfloat16


def test_inspect(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", run["ckpt"]) == 0
    said = capsys.readouterr().out
    for part in ("Lightning checkpoint", "step 2", "base fingerprint", "r=4", "*.self_attn.q_proj (3)"):
        assert part in said
    call("export", run["ckpt"], run["out"], "--base", run["base"])
    capsys.readouterr()
    assert call("inspect", run["out"]) == 0
    said = capsys.readouterr().out
    assert "in PEFT's format" in said and f"base model: {run['base']}" in said.replace("\n", "")


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    toys.randomize(model)
    save_adapter(model, tmp_path / "one")
    assert call("diff", str(tmp_path / "one"), str(tmp_path / "one")) == 0
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora["default"].lora_B.mul_(1.5)
    save_adapter(model, tmp_path / "two")
    capsys.readouterr()
    assert call("diff", str(tmp_path / "one"), str(tmp_path / "two")) == 1
    said = capsys.readouterr().out
    assert "layers.1.self_attn.q_proj" in said and "layers.0" not in said and "3.33e-01" in said
    eject(model)
    save_adapter(inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=3)), tmp_path / "three")
    assert call("diff", str(tmp_path / "one"), str(tmp_path / "three")) == 1
    said = capsys.readouterr().out
    assert "lora_alpha: 16" in said and "not in" in said


KINDS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 7},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "VeRA": {"use_vera": True},
    "parameters": {"target_modules": [], "target_parameters": ["down_proj.weight"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_and_its_export_are_the_same(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task()
    lora = LoRA(**{"r": 2, "target_modules": ["q_proj"], "summary": False, "merge": None} | KINDS[kind])
    trainer = toys.trainer(tmp_path, lora, max_epochs=1)
    trainer.fit(task, DataLoader(IDS, batch_size=1))
    toys.randomize(task)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    one, other = str(tmp_path / "one.ckpt"), tmp_path / "adapter"
    save_adapter(task, other)
    assert call("diff", one, str(other)) == 0
    if kind in ("ranks", "rsLoRA"):
        save_adapter(task, tmp_path / "portable", layout="portable")
        assert call("diff", one, str(tmp_path / "portable")) == 0
    # In memory, for the file that is mapped is written anew.
    tensors = {name: each.clone() for name, each in load_file(other / "adapter_model.safetensors").items()}
    for name in tensors.keys() - {"base_model.vera_A", "base_model.vera_B"}:
        changed = tensors | {name: tensors[name] * 1.01 + 0.01}
        save_file(changed, other / "adapter_model.safetensors")  # without the hashes of what was written
        capsys.readouterr()
        assert call("diff", one, str(other)) == 1, name
        assert "e-0" in capsys.readouterr().out


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stacked=st.booleans(),
    near=st.sampled_from([0.0, 1e-9, 1e-5, 1.0]),
    seed=st.integers(0, 99),
)
def test_updates_are_compared_by_their_factors(
    shape: tuple[int, int, int], ranks: tuple[int, int], stacked: bool, near: float, seed: int
) -> None:
    torch.manual_seed(seed)
    front, (out, inner) = shape[: int(stacked)], shape[1:]
    pairs = [(torch.randn(*front, r, inner), torch.randn(*front, out, r)) for r in ranks]
    (A, B), rest = pairs[0], pairs[1]
    # The same update at a larger rank, and a part of another one.
    pairs[1] = torch.cat([A, rest[0]], -2), torch.cat([B, near * rest[1]], -1)
    first, second = ((b.double() @ a.double()) for a, b in pairs)
    expected = float((first - second).norm() / max(first.norm(), second.norm()))
    assert _distance(*pairs) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_a_diff_takes_no_more_memory_than_its_files(tmp_path: Path) -> None:
    save_adapter(inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "one")
    tensors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 40_000),
        "base_model.model.a.lora_B.weight": torch.ones(40_000, 1),
    }
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert call("diff", str(tmp_path / "one"), str(tmp_path / "one")) == 0  # 12.8 GB if it were multiplied out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes


@given(
    front=st.text("ab.", max_size=4), names=st.lists(st.text("abc.", min_size=1, max_size=6), unique=True, max_size=6)
)
def test_names_in_common(front: str, names: list[str]) -> None:
    short = {name: 1 for name in names if not name.startswith(".") and not name.endswith(".")}
    long = {f"x{front}.{name}": 1 for name in short}
    cut, same = by_common_names(long, short)
    assert same is short and len(cut) == len(long)
    assert not long or cut.keys() & short.keys()


@pytest.mark.parametrize("command", ["inspect", "export", "merge", "diff"])
def test_help_and_wrong_calls(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert "ADAPTER" in capsys.readouterr().out
    assert call(command) == 2


class Pickled:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_pickled_objects_are_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"lightning_lora": Pickled(), "state_dict": {}}, tmp_path / "bad.ckpt")
    for arguments in (["inspect"], ["export"], ["merge"]):
        target = [] if arguments == ["inspect"] else [str(tmp_path / "out"), "--base", "nowhere"]
        assert call(*arguments, str(tmp_path / "bad.ckpt"), *target) == 1
        said = capsys.readouterr()
        assert "executed" not in said.out and "holds more than tensors and plain types" in said.err


def test_errors_end_with_one_line_and_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.trainer(tmp_path, None, max_epochs=1).fit(full := Task(), DataLoader(IDS, batch_size=1))
    (path,) = tmp_path.rglob("*.ckpt")
    assert call("inspect", str(path)) == 1
    assert "is no adapter checkpoint" in capsys.readouterr().err
    assert call("inspect", str(tmp_path / "nothing")) == 1
    assert "Found no file or directory" in (said := capsys.readouterr().err) and "nothing" in said
    assert isinstance(full, nn.Module)
    save_adapter(inject(tiny_llama(), LoraConfig(r=2)), tmp_path / "adapter")
    assert call("merge", str(tmp_path / "adapter"), str(tmp_path / "out")) == 1
    assert "does not say what its base model is: name it with --base" in capsys.readouterr().err


def test_what_a_file_says_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_adapter(inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")
    path = directory / "adapter_config.json"
    saved = json.loads(path.read_text())
    for name, shown in (("acme/model[/v2]", "acme/model[/v2]"), ("[red]x\x1b[2J\u202e", r"[red]x\x1b[2J\u202e")):
        path.write_text(json.dumps({**saved, "base_model_name_or_path": name, "target_modules": r".*\.[a-z]_proj"}))
        assert call("inspect", str(directory)) == 0
        out = capsys.readouterr().out
        assert f"base model: {shown}" in out and "[a-z]_proj" in out and "\x1b" not in out
    path.write_text(json.dumps({**saved, "base_model_name_or_path": "a\n  base fingerprint: made up"}))
    assert call("inspect", str(directory)) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  base fingerprint:") for line in said) == 1
    path.write_text(json.dumps({**saved, "peft_type": "\x1b[2J"}))
    assert call("export", str(directory), str(tmp_path / "out"), "--base", "x\x1b") == 1
    assert "\x1b" not in capsys.readouterr().err


def test_adapters_of_experts_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    model = inject(mixtral(), config)
    for scale in (0.1, 0.2):
        toys.randomize(model, scale)
        save_adapter(model, tmp_path / str(scale))
    assert call("diff", str(tmp_path / "0.1"), str(tmp_path / "0.1")) == 0
    assert call("diff", str(tmp_path / "0.1"), str(tmp_path / "0.2")) == 1
    assert "experts" in capsys.readouterr().out


@pytest.fixture(params=["nf4-dq", "int8"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A finished run on a quantized base: its adapter, its base on disk unquantized, and what it computes."""
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path / "base")
    config = quantization_config(request.param, torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).train()
    inject(model, LoraConfig(r=4))
    toys.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    names = {"adapter": str(tmp_path / "adapter"), "base": str(tmp_path / "base"), "out": str(tmp_path / "out")}
    return {**names, "logits": model(IDS).logits, "model": model}


def test_merge_quantizes_the_base_as_it_was(quantized: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", quantized["adapter"], quantized["out"], "--base", quantized["base"]) == 0
    opened = AutoModelForCausalLM.from_pretrained(quantized["out"])
    assert {type(layer) for layer in opened.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(opened(IDS).logits, quantized["logits"], rtol=0, atol=1e-5)
    assert call("inspect", quantized["adapter"]) == 0
    assert "base: quantized: 21 layers by bitsandbytes (bits=" in capsys.readouterr().out


def test_merge_onto_the_original(quantized: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="21 of its tensors are"):
        assert (
            call("merge", quantized["adapter"], quantized["out"], "--base", quantized["base"], "--onto", "original")
            == 0
        )
    plain, layer = tiny_llama(), quantized["model"].model.layers[0].mlp.up_proj
    opened = AutoModelForCausalLM.from_pretrained(quantized["out"])
    expected = plain.model.layers[0].mlp.up_proj.weight + layer.lora["default"].delta_weight()
    torch.testing.assert_close(opened.model.layers[0].mlp.up_proj.weight, expected, rtol=0, atol=1e-6)


def test_a_quantization_that_cannot_be_made_again_is_named(
    quantized: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = helpers.quantized.quantize(tiny_llama(), "torchao int8") if find_spec("torchao") else pytest.skip("torchao")
    inject(model, LoraConfig(r=4))
    save_adapter(model, tmp_path / "other")
    assert call("merge", str(tmp_path / "other"), quantized["out"], "--base", quantized["base"]) == 1
    assert "by torchao" in (said := capsys.readouterr().err) and "--onto original" in said


def test_resize_and_extract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
    toys.randomize(model)
    save_adapter(model, tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "base")
    eject(model, merge=True).save_pretrained(tmp_path / "tuned")
    assert call("resize", str(tmp_path / "adapter"), str(tmp_path / "small"), "--rank", "2") == 0
    assert "relative error of the update" in capsys.readouterr().out
    assert call("extract", str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "out"), "--rank", "4") == 0
    shown = capsys.readouterr().out
    assert "Not in the adapter" not in shown
    assert "model.layers.2.self_attn.q_proj" in shown
    again = load_adapter(tiny_llama().eval(), tmp_path / "out")
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert call("resize", str(tmp_path / "base"), str(tmp_path / "no"), "--rank", "2") == 1
    assert "has no adapter_config.json" in capsys.readouterr().err


STATUS = Path("/proc/self/status")


def own_memory() -> int:
    """Bytes that this process holds and that are no file's."""
    return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not STATUS.is_file(), reason="the system does not say so")
def test_models_stay_in_their_files_until_they_are_read(tmp_path: Path) -> None:
    """So `extract`, which goes from layer to layer, takes the memory of a few."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 16, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    warm = load_base(str(tmp_path), None, "auto", None)
    before = own_memory()
    models = [load_base(str(tmp_path), None, "auto", None) for _ in range(2)]
    assert own_memory() - before < size / 4
    assert torch.equal(models[1].lm_head.weight, warm.lm_head.weight)
