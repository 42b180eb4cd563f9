"""Strategies that shard the model, beside one process on the same global batches."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.distributed import sharded
from helpers.distributed.llama import Llama, build
from helpers.distributed.processes import run_processes
from helpers.toys import assert_adapter_only
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import LlamaForCausalLM

from lightning_lora import LoRA, load_adapter
from lightning_lora.formats.checkpoint import read_checkpoint
from lightning_lora.model.record import injections_of

WORLDS = {
    "one": 1, "ddp": 2, "fsdp": 2, "fsdp sharded": 2, "fsdp SHARD_GRAD_OP": 2, "fsdp HYBRID_SHARD": 2,
    "fsdp2": 2, "fsdp2 distributed": 2, "tp": 2, "tp distributed": 2, "fsdp2 and tp": 4,
}  # fmt: skip
QUICK = ["fsdp", "fsdp sharded", "fsdp2", "tp distributed"]
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "merged": {"merge": "last", "export": True},
    "late": {"model": {"late": True}, "max_steps": 4},
    "meta": {"model": {"late": True, "meta": True}, "max_steps": 4},
}


def world_of(settings: dict[str, Any]) -> int:
    return WORLDS.get(settings["strategy"], 2)


def run(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What :func:`sharded.fit` returned in the first process for each of the settings, each world started once."""
    found: dict[str, Any] = {}
    for world in sorted(set(map(world_of, runs.values()))):
        mine = {name: settings for name, settings in runs.items() if world_of(settings) == world}
        ranks = run_processes("sharded.several", list(mine.values()), world_size=world, limit=60 + 20 * len(mine))
        for name, *results in zip(mine, *(rank["runs"] for rank in ranks)):
            takes = [result.pop("saving takes", 0) for result in results]
            assert all(result == results[0] for result in results)  # whichever rows they had
            found[name] = {**results[0], "saving takes": max(takes)}
    return found


def run_kinds(path: Path, strategies: list[str], kinds: list[str]) -> dict[str, Any]:
    return run(
        {
            f"{strategy}/{kind}": {"directory": str(path / strategy / kind), "strategy": strategy, **KINDS[kind]}
            for strategy in strategies
            for kind in kinds
        }
    )


def resume(path: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Resume the run of each pair's first strategy at the end of its first epoch, under the second."""
    runs = {
        f"{source} to {target}": {
            "directory": str(path / f"{source} to {target}"),
            "strategy": target,
            "ckpt_path": str(path / source / "whole" / "step=4.ckpt"),
        }
        for source, target in pairs
    }
    return dict(zip(pairs, map(run(runs).__getitem__, runs)))


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(abs(a - b) < 1e-5 for a, b in zip(found, expected))


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected
    )


def checkpoint_of(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "step=4.ckpt")


def same_training(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same parameters and optimizer's state, so that they resume alike."""
    moments, expected_moments = (
        {f"{i} {key}": value for i, state in c["optimizer_states"][0]["state"].items() for key, value in state.items()}
        for c in (found, expected)
    )
    return same_tensors(found["state_dict"], expected["state_dict"]) and same_tensors(moments, expected_moments)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(path: Path) -> dict[str, Any]:
    return {kind: sharded.fit(str(path / "one" / kind), "one", **KINDS[kind]) for kind in ("whole", "merged")}


@pytest.fixture(scope="module")
def quick(path: Path) -> dict[str, Any]:
    return run_kinds(path, QUICK, ["whole", "merged"])


@pytest.mark.parametrize("strategy", QUICK)
def test_losses_are_those_of_one_process(one: dict[str, Any], quick: dict[str, Any], strategy: str) -> None:
    here = quick[f"{strategy}/whole"]
    assert close(here["losses"], one["whole"]["losses"])
    assert here["losses"][0] != here["losses"][-1]
    assert here["initial"] == one["whole"]["initial"]
    assert here["fingerprints"] == one["whole"]["fingerprints"]


@pytest.mark.parametrize("strategy", QUICK)
def test_checkpoints_hold_whole_tensors_of_the_adapter_alone(
    path: Path, one: dict[str, Any], quick: dict[str, Any], strategy: str
) -> None:
    saved, expected = (checkpoint_of(path / name / "whole") for name in (strategy, "one"))
    assert same_training(saved, expected)
    base = {f"model.{name}": tensor for name, tensor in build().state_dict().items()}
    assert_adapter_only(saved, base)


def test_a_directory_holds_no_tensor_of_the_base(path: Path, quick: dict[str, Any]) -> None:
    adapter = sum(tensor.numel() for tensor in torch.load(path / "fsdp" / "whole" / "adapter.pt").values())
    for name in ("fsdp sharded", "tp distributed"):
        stored = FileSystemReader(path / name / "whole" / "step=4.ckpt").read_metadata().state_dict_metadata
        assert sum(entry.size.numel() for entry in stored.values()) == 3 * adapter  # parameters and two moments


@pytest.mark.parametrize("strategy", QUICK)
def test_merged_model_and_adapter_are_those_of_one_process(
    path: Path, one: dict[str, Any], quick: dict[str, Any], strategy: str
) -> None:
    ours, expected = (path / name / "merged" / "export" for name in (strategy, "one"))
    assert same_tensors(
        load_file(ours / "adapter" / "adapter_model.safetensors"),
        load_file(expected / "adapter" / "adapter_model.safetensors"),
    )
    models = [LlamaForCausalLM.from_pretrained(folder / "merged") for folder in (ours, expected)]
    assert same_tensors(*(model.state_dict() for model in models))
    assert not same_tensors(models[0].state_dict(), build().state_dict())
    split = ours.parent / "split"
    assert same_tensors(LlamaForCausalLM.from_pretrained(split).state_dict(), models[0].state_dict())
    sizes = [file.stat().st_size for file in split.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 140_000
    adapted = load_adapter(build().eval(), ours / "adapter")  # checks the base's fingerprint too
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(adapted(ids).logits, models[0].eval()(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_runs_resume_under_other_strategies(path: Path, one: dict[str, Any], quick: dict[str, Any]) -> None:
    """Optimizer state included, or the losses would part."""
    pairs = [
        ("fsdp", "fsdp2"),
        ("tp distributed", "fsdp2"),
        ("fsdp2", "fsdp"),
        ("one", "fsdp"),
        ("fsdp sharded", "one"),
    ]
    for pair, resumed in resume(path, pairs).items():
        assert close(resumed["losses"], one["whole"]["losses"][4:]), pair


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_of_strategies(path: Path, one: dict[str, Any], quick: dict[str, Any]) -> None:
    """Every strategy with every other one's checkpoints, and every way to build the model."""
    strategies = list(WORLDS)
    found = {**run_kinds(path, [s for s in strategies if s not in QUICK], list(KINDS)), **quick}
    found |= run_kinds(path, QUICK, ["late", "meta"])
    # Files of whole tensors are one another's equals, so one of them stands for all.
    files = [strategy for strategy in strategies if (path / strategy / "whole" / "step=4.ckpt").is_file()]
    assert all(same_training(checkpoint_of(path / s / "whole"), checkpoint_of(path / "one" / "whole")) for s in files)
    sources = ["one", *(strategy for strategy in strategies if strategy not in files)]
    assert len(sources) == 4
    pairs = resume(path, list(itertools.product(sources, strategies)))
    rows = {}
    for strategy in strategies:
        resumed = [pairs[source, strategy] for source in sources]
        merged = path / strategy / "merged" / "export" / "merged" / "model.safetensors"
        expected = path / "one" / "merged" / "export" / "merged" / "model.safetensors"
        rows[strategy] = [
            cell(found[f"{strategy}/whole"], close(found[f"{strategy}/whole"]["losses"], one["whole"]["losses"])),
            cell(resumed[0], all(close(r.get("losses", []), one["whole"]["losses"][4:]) for r in resumed)),
            cell(found[f"{strategy}/merged"], merged.exists() and same_tensors(load_file(merged), load_file(expected))),
            *(
                cell(each, close(each.get("losses", []), one["whole"]["losses"][:4]))
                for each in (found[f"{strategy}/late"], found[f"{strategy}/meta"])
            ),
        ]
    (path / "table.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1, ensure_ascii=False))
    assert {name: cells for name, cells in table().items() if name in rows} == rows


def cell(result: dict[str, Any], passes: bool) -> str:
    return "error" if "error" in result else ("✓" if passes else "✗")


def table() -> dict[str, list[str]]:
    """The cells behind each name in the table of strategies of docs/several-processes.md."""
    page = (ROOT / "docs" / "several-processes.md").read_text()
    lines = page.split("<!-- strategies -->\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.split("`")[1]: cells for name, *cells in rows}


@pytest.mark.parametrize("strategy", QUICK)
def test_saving_makes_the_adapter_whole_and_nothing_of_the_base(
    path: Path, quick: dict[str, Any], strategy: str
) -> None:
    adapter = sum(tensor.nbytes for tensor in torch.load(path / strategy / "whole" / "adapter.pt").values())
    base = sum(parameter.nbytes for parameter in build().parameters())
    saving = quick[f"{strategy}/whole"]["saving takes"]
    # The adapter, two moments, and what is small: the states of the random number generators, and lists of names.
    assert adapter < saving < 4 * adapter + 160 * 1024 < base


@pytest.mark.slow
def test_what_cannot_join_a_sharded_model_says_so(tmp_path: Path) -> None:
    fsdp2: dict[str, Any] = {"strategy": "fsdp2", "max_steps": 1}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "dora": ({**fsdp2, "lora": {"use_dora": True}}, "module that is named shard"),
        "pissa": ({**fsdp2, "lora": {"init_lora_weights": "pissa"}}, "module that is named shard"),
        "tokens": ({**fsdp2, "lora": {"trainable_token_indices": [1, 2]}}, "module that is named shard"),
        "dora in tp": ({"strategy": "tp", "lora": {"use_dora": True}}, "cut up by tensor parallelism"),
        "vera in tp": ({"strategy": "tp", "lora": {"use_vera": True}}, "cut up by tensor parallelism"),
        "before tp": ({"strategy": "tp", "early": True}, "call parallelize_module first, then inject"),
        "outside": (
            {**fsdp2, "lora": {"target_modules": ["lm_head"]}, "model": {"outermost": False}},
            "model.lm_head.lora.default.lora_A and 1 more would be trained outside",
        ),
        "no shard": ({"strategy": "fsdp NO_SHARD"}, "FSDP shards nothing here"),
        "tied": (
            {**fsdp2, "lora": {"target_modules": ["lm_head"]}, "model": {"tied": True}, "merge": "last"},
            "is tied to an adapted weight",
        ),
    }
    runs = {name: {"directory": str(tmp_path / name), **settings} for name, (settings, _) in cases.items()}
    for name, result in run(runs).items():
        assert cases[name][1] in result["error"], name


@pytest.mark.slow
def test_variants_are_those_of_one_process(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "in full": {"modules_to_save": ["lm_head"]},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "pissa": {"init_lora_weights": "pissa"},
        "tokens": {"trainable_token_indices": [1, 5, 7]},
        "parameters": {"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]},
    }
    runs = {
        f"{name}/{strategy}": {
            "directory": str(tmp_path / name / strategy), "strategy": strategy.partition(",")[0], "lora": lora,
            "early": strategy == "fsdp2", "shard": strategy == "fsdp2, shard", "max_steps": 2, "merge": "last",
            "export": True,
        }
        for name, lora in variants.items()
        for strategy in ("fsdp", "fsdp2", "fsdp2, shard", "one")
    }  # fmt: skip
    results = run(runs)
    for key in [key for key in runs if not key.endswith("/one")]:
        name = key.partition("/")[0]
        assert close(results[key]["losses"], results[f"{name}/one"]["losses"]), key
        for file in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
            ours, expected = (tmp_path / folder / "export" / file for folder in (key, f"{name}/one"))
            assert same_tensors(load_file(ours), load_file(expected)), f"{key}: {file}"


@pytest.mark.slow
def test_the_model_is_tested_and_trained_on_after_it_was_merged(tmp_path: Path) -> None:
    expected = sharded.fit_test_fit(str(tmp_path / "one"), "one")
    for rank in run_processes("sharded.fit_test_fit_under", str(tmp_path), ["fsdp", "fsdp2"]):
        for strategy, found in rank.items():
            assert close(found.pop("losses"), expected["losses"]), strategy
            for key, value in found.items():
                assert close([value], [expected[key]]), f"{strategy}: {key}"


@pytest.mark.parametrize(
    ("lora", "callbacks", "message"),
    [
        (LoRA(init_lora_weights="eva"), [], "compute the start on one device"),
        (LoRA(), [WeightAveraging()], "WeightAveraging keeps a second copy"),
        (LoRA(), [StochasticWeightAveraging(1e-3)], "StochasticWeightAveraging keeps a second copy"),
    ],
)
def test_what_needs_the_whole_model_is_refused(lora: LoRA, callbacks: list[Any], message: str) -> None:
    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[lora, *callbacks])
    module = Llama()
    with pytest.raises(ValueError, match=message):
        lora.setup(trainer, module, "fit")
    assert not injections_of(module)


SWITCHED = [
    {"r": 2, "target_modules": ["body.0", "body.1"], "modules_to_save": ["head"]},
    {"r": 2, "target_modules": ["body.0", "body.1"], "modules_to_save": None, "bias": "lora_only"},
    {"r": 2, "target_modules": ["body.0", "body.1"], "modules_to_save": None, "init_lora_weights": "pissa"},
]


def test_what_was_trained_comes_back_when_adapters_are_off_and_on_again() -> None:
    for rank in run_processes("sharded.switch_all", ["ddp", "fsdp", "fsdp2"], SWITCHED):
        assert len(rank) == 9
        for case, found in rank.items():
            assert found["learned"] > 1e-3, case
            assert found["adapted again"] == found["base again"] == found["state"] == 0, case
            assert found["from the base"] < 1e-6, case


def test_layers_that_are_units_of_their_own_can_be_adapted() -> None:
    for found in run_processes("sharded.inject_into_sharded_layers"):
        assert found == {"off": 0, "on": 0}


@pytest.mark.parametrize("kind", ["fsdp2", "FULL_SHARD", "SHARD_GRAD_OP"])
def test_merging_lets_go_of_what_a_forward_pass_has_left_whole(kind: str) -> None:
    for found in run_processes("sharded.merge_after_a_forward_pass", kind):
        assert found.pop("adapter") > 0.1
        assert max(found.values()) < 1e-5
