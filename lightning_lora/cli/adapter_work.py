"""What ``lightning-lora inspect``, ``export``, ``merge`` and ``diff`` do."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_lora.cli.load_base import open_on_base, tokenizer_of
from lightning_lora.formats.merged import save_merged
from lightning_lora.formats.peft import save_adapter
from lightning_lora.formats.saved_adapter import SavedAdapter, read
from lightning_lora.model.eject import eject
from lightning_lora.model.quantization import is_quantized
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import TargetError


def run(given: argparse.Namespace) -> int:
    """Do what the parsed arguments say.

    Returns:
        The exit code.
    """
    commands = {"inspect": _inspect, "export": _export, "merge": _merge, "diff": _diff}
    try:
        return commands[given.command](given)
    except (CheckpointError, TargetError, OSError, ValueError) as error:
        print(f"lightning-lora {given.command}: {error}", file=sys.stderr)
        return 1


def _inspect(given: argparse.Namespace) -> int:
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
    saved = read(given.adapter)
    with _steps(2) as begin:
        begin("loading the base")
        model = open_on_base(saved, given.base, given.gguf_file)
        begin("writing the adapter")
        save_adapter(model, given.target)
    print(f"Wrote {given.target}")
    return 0


def _merge(given: argparse.Namespace) -> int:
    saved = read(given.adapter)
    with _steps(3) as begin:
        begin("loading the base")
        dtype = getattr(torch, given.dtype, "auto")
        model = open_on_base(saved, given.base, given.gguf_file, dtype, given.onto == "original")
        begin("folding the adapter in")
        if not is_quantized(model):  # which is done as it is written
            eject(model, merge=True)
        begin("writing the model")
        save_merged(model, given.target, tokenizer_of(saved, given.base), given.max_shard_size)
    print(f"Wrote {given.target}")
    return 0


def _diff(given: argparse.Namespace) -> int:
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
