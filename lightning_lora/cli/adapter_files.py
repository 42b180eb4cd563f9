"""The commands that work on files: ``lightning-lora inspect``, ``export``, ``merge`` and ``diff``.

Each ends with 0, with 1 after an error or, for ``diff``, a difference, and with 2 after a wrong call.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_lora.cli.load_base import open_on_base, tokenizer_of
from lightning_lora.formats.merged import save_merged
from lightning_lora.formats.peft import save_adapter
from lightning_lora.formats.saved_adapter import SavedAdapter, read
from lightning_lora.model.eject import eject
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import TargetError

NAMES = ("inspect", "export", "merge", "diff")
_DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def run(arguments: list[str]) -> int:
    """Run one of the commands.

    Returns:
        The exit code.
    """
    given = _parser().parse_args(arguments)
    try:
        code: int = given.run(given)
    except (CheckpointError, TargetError, OSError, ValueError) as error:
        print(f"lightning-lora {given.command}: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-lora")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_adapter(command: argparse.ArgumentParser, name: str) -> None:
        command.add_argument(
            name, type=Path, metavar="ADAPTER", help="a checkpoint (.ckpt) or a directory in PEFT's format"
        )

    inspect = commands.add_parser("inspect", help="say what is in a saved adapter", description=_inspect.__doc__)
    add_adapter(inspect, "adapter")
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="turn a checkpoint into PEFT's format", description=_export.__doc__)
    merge = commands.add_parser("merge", help="write base and adapter as one model", description=_merge.__doc__)
    for command in (export, merge):
        add_adapter(command, "adapter")
        command.add_argument("target", type=Path, metavar="DIRECTORY", help="where to write; made if it is not there")
        command.add_argument("--base", help="the base model: a hub id or a directory; default: what the adapter names")
        command.add_argument("--gguf-file", help="the file in --base, if the base is a GGUF file")
    merge.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="type of the weights; default: that of the base"
    )
    merge.add_argument("--max-shard-size", default="5GB", help="size above which the file is split; default: 5GB")
    export.set_defaults(run=_export)
    merge.set_defaults(run=_merge)

    diff = commands.add_parser("diff", help="compare two saved adapters", description=_diff.__doc__)
    add_adapter(diff, "adapter")
    add_adapter(diff, "other")
    diff.set_defaults(run=_diff)
    return parser


def _inspect(given: argparse.Namespace) -> int:
    """Say what is in a saved adapter: its settings, its base, its layers with their ranks and sizes."""
    saved = read(given.adapter)
    console = Console()
    console.print(f"{saved.path}: {saved.kind}", highlight=False, soft_wrap=True)
    for name, value in saved.facts.items():
        console.print(f"  {name}: {value}", highlight=False, soft_wrap=True)
    settings = {name: value for name, value in sorted(saved.settings.items()) if value not in (None, {}, [], False)}
    console.print(
        "  settings: " + ", ".join(f"{name}={value!r}" for name, value in settings.items()),
        highlight=False,
        soft_wrap=True,
    )
    table = Table("layers", "r", "parameters", title=f"{len(saved.tensors)} tensors, {saved.size / 1e6:.2f} MB")
    groups: dict[tuple[str, int], list[int]] = {}
    for layer, (lora_A, lora_B) in saved.factors().items():
        group = (".".join("*" if part.isdigit() else part for part in layer.split(".")), len(lora_A))
        groups.setdefault(group, []).append(lora_A.numel() + lora_B.numel())
    for (pattern, r), sizes in groups.items():
        table.add_row(f"{pattern} ({len(sizes)})", str(r), f"{sum(sizes):,}")
    console.print(table)
    return 0


def _export(given: argparse.Namespace) -> int:
    """Write a checkpoint's adapter as a directory that PEFT opens: adapter_config.json, adapter_model.safetensors."""
    saved = read(given.adapter)
    with _steps(2) as begin:
        begin("loading the base")
        model = open_on_base(saved, given.base, given.gguf_file)
        begin("writing the adapter")
        save_adapter(model, given.target)
    print(f"Wrote {given.target}")
    return 0


def _merge(given: argparse.Namespace) -> int:
    """Write base and adapter as one model directory, for from_pretrained, with the tokenizer if there is one."""
    saved = read(given.adapter)
    with _steps(3) as begin:
        begin("loading the base")
        model = open_on_base(saved, given.base, given.gguf_file, _DTYPES[given.dtype])
        begin("folding the adapter in")
        eject(model, merge=True)
        begin("writing the model")
        save_merged(model, given.target, tokenizer_of(saved, given.base), given.max_shard_size)
    print(f"Wrote {given.target}")
    return 0


def _diff(given: argparse.Namespace) -> int:
    """Compare two saved adapters: settings, layers and weights. Ends with 0 if they are the same, else with 1."""
    one, other = read(given.adapter), read(given.other)
    console, different = Console(), False
    for name in sorted(one.settings.keys() & other.settings.keys()):
        if one.settings[name] != other.settings[name]:
            different = True
            console.print(f"{name}: {one.settings[name]!r} | {other.settings[name]!r}", highlight=False, soft_wrap=True)
    factors, others = _by_common_names(one, other)
    for where, missing in ((one.path, others.keys() - factors.keys()), (other.path, factors.keys() - others.keys())):
        if missing:
            different = True
            console.print(
                f"not in {where}: {len(missing)} layers, among them {min(missing)}", highlight=False, soft_wrap=True
            )
    table = Table("layers that differ", "relative distance of the updates")
    for layer in sorted(factors.keys() & others.keys()):
        distance = _distance(factors[layer], others[layer])
        if distance > 0:
            different = True
            table.add_row(layer, f"{distance:.2e}")
    if table.row_count:
        console.print(table)
    console.print("different" if different else "the same")
    return int(different)


Factors = tuple[torch.Tensor, torch.Tensor]


def _by_common_names(one: SavedAdapter, other: SavedAdapter) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """The factors of both, by names without the part by which one is longer, as a LightningModule puts in front."""
    first, second = one.factors(), other.factors()
    for longer, shorter in ((first, second), (second, first)):
        for name in longer:
            ends = [short for short in shorter if name.endswith(f".{short}")]
            if ends:
                extra = len(name) - len(ends[0])
                cut = {layer[extra:]: factors for layer, factors in longer.items()}
                return (cut, shorter) if longer is first else (shorter, cut)
    return first, second


def _distance(one: Factors, other: Factors) -> float:
    products = [lora_B.flatten(1).double() @ lora_A.flatten(1).double() for lora_A, lora_B in (one, other)]
    if products[0].shape != products[1].shape:
        return float("inf")
    size = max(float(torch.linalg.norm(product)) for product in products)
    return float(torch.linalg.norm(products[0] - products[1])) / size if size else 0.0


@contextmanager
def _steps(count: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; what is given is called with what comes next."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=count)

        def begin(description: str) -> None:
            progress.update(task, description=description, advance=1)

        yield begin
