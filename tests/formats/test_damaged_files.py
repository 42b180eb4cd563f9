"""Files that are damaged or made up, by somebody who knows the format: refused by one kind of error, at once, whole."""

import copy
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.models import IDS, Wrapped, batches, tiny_llama
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import CheckpointError, LoRA, LoraConfig, adapters, inject, load_adapter, save_adapter
from lightning_lora.formats.checkpoint import inject_from_checkpoint, load_from_checkpoint, read_checkpoint
from lightning_lora.formats.open_file import open_file
from lightning_lora.formats.saved_adapter import read

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="none")
    model = inject(tiny_llama(), config)
    toys.randomize(model)
    return save_adapter(model, tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    lora = LoRA(r=2, target_modules=["q_proj"], summary=False, merge=None)
    trainer = toys.trainer(path, [lora], max_epochs=1)
    trainer.fit(Wrapped(), batches(IDS))
    trainer.save_checkpoint(path / "good.ckpt")
    return path / "good.ckpt"


def assert_refused_whole(
    model: nn.Module, path: Path, match: str = "", load: Callable[[nn.Module, Path], Any] = load_adapter
) -> None:
    """Require a CheckpointError that names the file, and a model that is bit for bit as it came."""
    before, trainable = toys.snapshot(model), [p.requires_grad for p in model.parameters()]
    classes = [type(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=match) as refused:
        load(model, path)
    assert str(path) in str(refused.value)
    toys.assert_same_tensors(toys.snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert [type(module) for module in model.modules()] == classes
    assert not adapters(model)


# Values that a key may be given: of every plain type, large ones, and what looks like something else.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from(["(([a-z._0-9]+)+)+!", "[", "all-linear", "q_proj", "\x1b[2J", "default.x", "pissa_niter_9999999"]),
    st.lists(st.one_of(st.integers(-3, 99), st.text(max_size=8), st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", "(a+)+b", "[", "x"]), st.one_of(st.integers(-2, 2**40), st.none()),
                    max_size=2),
)  # fmt: skip


def changed_settings_and_tensors(data: st.DataObject, directory: Path, target: Path) -> nn.Module:
    """Write a directory like a good one, but for a few of its settings and a tensor; return a model to load it into."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    config = json.loads((directory / CONFIG).read_text())
    for _ in range(data.draw(st.integers(0, 2), "changed keys")):
        key = data.draw(st.sampled_from([*config, "loftq_config", "use_bdlora", "lora_bias", "peft_version", "new"]))
        config[key] = data.draw(VALUES, "value")
    (target / CONFIG).write_text(json.dumps(config))
    tensors = load_file(directory / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(tensors)), "tensor")
    match data.draw(st.sampled_from(["none", "drop", "shape", "dtype", "rename", "more", "nan", "scalar"])):
        case "drop":
            del tensors[name]
        case "shape":
            tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=4)))
        case "dtype":
            tensors[name] = tensors[name].to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.bfloat16])))
        case "rename":
            tensors[data.draw(st.text(max_size=20)) + name[data.draw(st.integers(0, len(name))) :]] = tensors.pop(name)
        case "more":
            tensors[f"{name.rpartition('.')[0]}.{data.draw(st.sampled_from(['bias', 'base_layer.weight']))}"] = (
                IDS * 1.0
            )
        case "nan":
            tensors[name][0] = float("nan")
        case "scalar":
            tensors[name] = torch.tensor(1.0)
    keys = st.sampled_from(["lightning_lora_base", "lightning_lora_base_samples", "lightning_lora_checksums", "other"])
    meta = data.draw(st.dictionaries(keys, st.text(max_size=8), max_size=2), "metadata")
    save_file(tensors, target / WEIGHTS, {"format": "pt", **meta})
    return tiny_llama()


def changed_bytes(data: st.DataObject, directory: Path, target: Path) -> nn.Module:
    shutil.copytree(directory, target, dirs_exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        content = bytearray((directory / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        (target / name).write_bytes(content[: data.draw(st.sampled_from([len(content), 9, 0]))])
    return tiny_llama()


def changed_checkpoint(data: st.DataObject, checkpoint: Path, target: Path) -> nn.Module:
    content = torch.load(checkpoint, weights_only=True)
    entry = content["lightning_lora"]["adapters"][0]
    places: dict[str, dict[str, Any]] = {
        "top": content, "metadata": content["lightning_lora"], "entry": entry, "config": entry["config"],
        "tensors": content["state_dict"],
    }  # fmt: skip
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        place = places[data.draw(st.sampled_from(sorted(places)), "place")]
        key = data.draw(st.sampled_from(sorted(place)), "key")
        if data.draw(st.booleans(), "drop"):
            place.pop(key)
        else:
            tensors = st.sampled_from(
                [torch.zeros(3), torch.zeros(2, 32).to_sparse(), torch.empty(2, 32, device="meta")]
            )
            place[key] = data.draw(st.one_of(VALUES, tensors), "value")
        places = {name: place for name, place in places.items() if place}
    torch.save(content, target)
    return Wrapped()


KINDS = {
    "settings and tensors": ("directory", changed_settings_and_tensors),
    "bytes": ("directory", changed_bytes),
    "checkpoint": ("checkpoint", changed_checkpoint),
}


def any_file_is_read_or_refused(kind: str, data: st.DataObject, request: pytest.FixtureRequest, path: Path) -> None:
    good, change = KINDS[kind]
    read_or_refused(change(data, request.getfixturevalue(good), path), path)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@FUZZ
def test_any_file_is_read_or_refused(
    kind: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    any_file_is_read_or_refused(kind, data, request, tmp_path / "changed")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(FUZZ, max_examples=700)
def test_two_thousand_files_are_read_or_refused(
    kind: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """``--hypothesis-show-statistics`` tells how many were refused."""
    any_file_is_read_or_refused(kind, data, request, tmp_path / "changed")


def read_or_refused(model: nn.Module, path: Path) -> None:
    """Require of every reader that it reads or refuses, and that a model is never left in between."""
    before, refused = toys.snapshot(model), ""
    try:
        read(path)
        load_adapter(model, path)
    except CheckpointError as error:
        refused = str(error)
    if currently_in_test_context():
        event("refused" if refused else "read")
    if refused:
        assert str(path) in refused
        toys.assert_same_tensors(toys.snapshot(model), before)
        assert not adapters(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def changed(directory: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(directory, target, dirs_exist_ok=True)
    config = json.loads((directory / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**config, **values}))
    return target


@pytest.mark.parametrize("r", [50_000_000, 2**52])
def test_a_rank_that_is_not_there_takes_no_memory(directory: Path, checkpoint: Path, tmp_path: Path, r: int) -> None:
    lying = changed(directory, tmp_path / "lying", r=r)
    content = torch.load(checkpoint, weights_only=True)
    content["lightning_lora"]["adapters"][0]["config"]["r"] = r
    torch.save(content, tmp_path / "lying.ckpt")
    for key, tensor in content["state_dict"].items():  # and tensors that say so too, of a single value
        shape = [r if size == 2 else size for size in tensor.shape]
        content["state_dict"][key] = torch.zeros(1).expand(shape)
    torch.save(content, tmp_path / "expanded.ckpt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused_whole(tiny_llama(), lying, "has rank")
    assert_refused_whole(Wrapped(), tmp_path / "lying.ckpt", "has rank")
    for reader in (read, lambda path: load_adapter(Wrapped(), path)):
        with pytest.raises(CheckpointError, match="has fewer values in the file than its shape"):
            reader(tmp_path / "expanded.ckpt")
    with pytest.raises(CheckpointError, match="has rank"):
        load_from_checkpoint(Wrapped, tmp_path / "lying.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kilobytes


def test_modules_that_are_not_there_are_not_copied(directory: Path, tmp_path: Path) -> None:
    lying = changed(directory, tmp_path / "lying", modules_to_save=["model"], target_modules="dummy-target-modules",
                    trainable_token_indices=None)  # fmt: skip
    assert_refused_whole(tiny_llama(), lying, "adapter")


# What re needs hours for, and what the package for regular expressions needs them for too.
@pytest.mark.parametrize("pattern", ["(([a-z._0-9]+)+)+!", "(?:[a-z._0-9]|[a-z._0-9]{2})+[!?]"])
@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_no_expression_hangs(directory: Path, tmp_path: Path, setting: str, pattern: str) -> None:
    value = {pattern: 2} if setting.endswith("_pattern") else pattern
    read_or_refused(tiny_llama(), changed(directory, tmp_path / "bomb", **{setting: value}))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"r": "8"}, r"adapter_config\.json .*r is '8', and must be int"),
        ({"r": True}, r"r is True, and must be int"),
        ({"target_modules": ["q_proj", 3]}, r"target_modules\[1\] is 3, and must be str"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\] is 'x', and must be int"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has .* not a valid one"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"init_lora_weights": "new_start"}, "init_lora_weights='new_start'.*not known here"),
        ({"peft_type": None}, "peft_type is None, and must be str"),
    ],
)
def test_an_error_names_file_and_field(directory: Path, tmp_path: Path, values: dict[str, Any], match: str) -> None:
    assert_refused_whole(tiny_llama(), changed(directory, tmp_path / "bad", **values), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("state_dict"), "state_dict is None, and must be dict"),
        (lambda c: c.update(state_dict=[1]), r"state_dict is \[1\]"),
        (lambda c: c["lightning_lora"].pop("adapters"), "lightning_lora has no 'adapters'"),
        (lambda c: c["lightning_lora"]["adapters"][0].pop("module"), r"adapters\[0\] has no 'module'"),
        (lambda c: c["lightning_lora"]["adapters"][0].update(module="absent"), "no such module"),
        (lambda c: c["lightning_lora"]["adapters"][0]["config"].update(r="2"), r"adapters\[0\]\.config, .*r is '2'"),
        (lambda c: c["lightning_lora"]["adapters"][0].update(adapter_name="a.b"), "adapter|rank"),
        (lambda c: [tensor.fill_(torch.nan) for tensor in c["state_dict"].values()], "holds a NaN"),
        (lambda c: c.update(state_dict={k: v.to(torch.int8) for k, v in c["state_dict"].items()}), "int8 found"),
        (lambda c: c.update(state_dict={k: v.to("meta") for k, v in c["state_dict"].items()}), "without values"),
        (lambda c: c["state_dict"].update({next(iter(c["state_dict"])): torch.zeros(1).expand(2, 32)}), "fewer values"),
        (lambda c: c.update(state_dict={k: v.to_sparse() for k, v in c["state_dict"].items()}), "sparse"),
    ],
)
def test_a_changed_checkpoint_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "bad.ckpt")
    assert_refused_whole(Wrapped(), tmp_path / "bad.ckpt", match)
    if match != "holds a NaN":  # a run that has diverged goes on so
        lora = LoRA(r=2, target_modules=["q_proj"], summary=False, merge=None)
        trainer = toys.trainer(tmp_path, [lora], max_epochs=1)
        with pytest.raises(CheckpointError):
            trainer.fit(Wrapped(), batches(IDS), ckpt_path=tmp_path / "bad.ckpt")


def test_of_several_adapters_none_is_left(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    entries = content["lightning_lora"]["adapters"]
    entries.append({**copy.deepcopy(entries[0]), "module": "absent"})
    assert_refused_whole(
        Wrapped(), checkpoint, load=lambda model, path: inject_from_checkpoint(model, content, str(path))
    )


def test_a_changed_bit_is_told(directory: Path, checkpoint: Path, tmp_path: Path) -> None:
    target = shutil.copytree(directory, tmp_path / "copy")
    content = bytearray((target / WEIGHTS).read_bytes())
    content[-7] ^= 1  # in the last tensor
    (target / WEIGHTS).write_bytes(content)
    assert_refused_whole(tiny_llama(), target, "is not what was written")
    content = bytearray(checkpoint.read_bytes())
    at = content.index(torch.load(checkpoint, weights_only=True)["state_dict"].popitem()[1].numpy().tobytes())
    content[at + 5] ^= 1
    (tmp_path / "bit.ckpt").write_bytes(content)
    torch.load(tmp_path / "bit.ckpt", weights_only=True)  # says nothing
    assert_refused_whole(Wrapped(), tmp_path / "bit.ckpt", "checksum is another")
    with pytest.raises(RuntimeError, match="checksum is another"):
        open_file(tmp_path / "bit.ckpt", "refuse")


def test_files_without_checksums_are_read(directory: Path, tmp_path: Path) -> None:
    target = shutil.copytree(directory, tmp_path / "old")
    save_file(load_file(target / WEIGHTS), target / WEIGHTS, {"format": "pt"})
    assert adapters(load_adapter(tiny_llama(), target))


@pytest.mark.parametrize("content", [b"", b"no tensors", b'{"prompt": "hi"}\n'])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rows\.jsonl cannot be read as a checkpoint: torch\.save did not write"):
        read_checkpoint(path)


@pytest.mark.parametrize("piece", [".base_layer", "lora_", ".lora.default", "x"])
@given(length=st.integers(1001, 200_000))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_long_names_take_no_time(directory: Path, checkpoint: Path, tmp_path: Path, piece: str, length: int) -> None:
    name = "base_model.model." + (piece * length)[:length] + "!"
    path = Path(shutil.copytree(directory, tmp_path / "long", dirs_exist_ok=True))
    save_file({**load_file(directory / WEIGHTS), name: torch.ones(2, 2)}, path / WEIGHTS)
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][name] = torch.ones(2, 2)
    torch.save(content, tmp_path / "long.ckpt")
    for each, model in ((path, tiny_llama()), (tmp_path / "long.ckpt", Wrapped())):
        assert_refused_whole(model, each, "characters")
        with pytest.raises(CheckpointError, match="characters"):
            read(each)


@pytest.mark.parametrize("key", ["lightning_lora_checksums", "lightning_lora_base_config", CONFIG])
@given(depth=st.integers(5_000, 200_000), opened=st.sampled_from(["[", '{"a":']))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_of_any_depth(directory: Path, tmp_path: Path, key: str, depth: int, opened: str) -> None:
    path = Path(shutil.copytree(directory, tmp_path / "deep", dirs_exist_ok=True))
    meta = {"format": "pt"}
    if key == CONFIG:
        (path / CONFIG).write_text(opened * depth)
    else:
        meta[key] = opened * depth
    save_file(load_file(directory / WEIGHTS), path / WEIGHTS, meta)
    assert_refused_whole(tiny_llama(), path)
