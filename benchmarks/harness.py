"""What the benchmarks share: the models that take turns, the turns, their ratios, and the table and file of figures."""

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoraConfig, inject

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGETS = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model like Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 1024


SHAPES = {
    "tiny": Shape(64, 128, 2, 1, 1),
    "small": Shape(512, 1408, 8, 8, 8),
    "135M": Shape(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "1B": Shape(2048, 8192, 16, 32, 8, 128256),  # Llama 3.2 1B
    "7B": Shape(4096, 11008, 32, 32, 32, 32000),  # Llama 2 7B
    "8B": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama 3.1 8B
}


def base(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that a large model is never there in float32
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).to(dtype)
    finally:
        torch.set_default_dtype(before)


def ours(model: nn.Module, r: int, targets: str) -> nn.Module:
    """The model with this package's adapter."""
    return inject(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS[targets]))


def theirs(model: nn.Module, r: int, targets: str, **settings: Any) -> nn.Module:
    """The model with PEFT's."""
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, **settings)


def contenders(
    shape: Shape,
    r: int,
    targets: Sequence[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    full: bool = True,
) -> dict[str, nn.Module]:
    """Floor, full fine-tuning if asked, and for each choice of targets ours and PEFT; all on the same weights."""
    first = base(shape, device, dtype).requires_grad_(False)

    def another() -> nn.Module:
        model = base(shape, "meta", dtype)
        # Frozen or never stepped, so that a model of gigabytes is there once.
        model.load_state_dict(first.state_dict(), assign=True)
        model.model.rotary_emb = first.model.rotary_emb  # has buffers that are in no state
        return model.requires_grad_(True)

    models: dict[str, nn.Module] = {"floor": first}
    for choice in targets:
        models[f"ours, {choice}"] = ours(another(), r, choice)
        models[f"PEFT, {choice}"] = theirs(another(), r, choice)
    if full:
        models["full"] = another()
    return models


def still_adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW with steps of size zero, since the contenders share their weights; ``None`` if nothing is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None


def batch(model: nn.Module, shape: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and labels, in two rows where there are more tokens than one."""
    weight = next(model.parameters())
    rows = 2 if tokens > 1 else 1
    embeddings = torch.randn(rows, tokens // rows, shape.hidden).to(weight.device, weight.dtype)
    return embeddings, torch.randint(0, shape.vocabulary, embeddings.shape[:2], device=weight.device)


def stepper(
    model: nn.Module, shape: Shape, tokens: int, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """One forward and backward pass, to the trained parameters and to the inputs, and the optimizer's step if given."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings, labels = batch(model, shape, tokens)

    def step() -> None:
        inputs = embeddings.clone().requires_grad_()
        model(inputs_embeds=inputs, labels=labels, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return step


def seconds(call: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes by a clock, the device's work included."""
    start = now(device, clock)
    call()
    return now(device, clock) - start


def now(device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """The clock in seconds, once the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return clock()


def take_turns(
    calls: dict[str, Callable[[], Any]],
    turns: int,
    device: str = "cpu",
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each turn. Each turn starts with another one; the first turns do not count."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + warm_up):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            taken = seconds(calls[name], device, clock)
            if turn >= warm_up:
                found[name].append(taken)
    return found


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory in tensors that a call has at once, beyond what was there before it.

    On a CPU, tensors that other threads free (as gloo's do after a collective) count as if they stayed: the least of
    several calls is the truest.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with counted() as allocations:
        call()
    return max(itertools.accumulate(allocations, initial=0))


@contextmanager
def counted() -> Iterator[list[int]]:
    """What is allocated on the CPU within this context, and what is freed, less than zero: there when it is over."""
    allocations: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield allocations
    # The profiler's own table adds up by operator; the single allocations are in what it is made of alone.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore
    events.sort(key=lambda event: event.start_ns())
    allocations += [event.nbytes() for event in events]


def free_port() -> int:
    """A port on which the processes of a run can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, world_size: int, port: int) -> None:
    """Make this process one of several, as torchrun would, so that a Trainer starts none of its own."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "benchmarks",
    }  # fmt: skip


def ratios(times: dict[str, list[float]], to: str) -> dict[str, dict[str, float]]:
    """Of each contender its time over that of ``to`` in the same turn, quartiles, and its median seconds."""
    found = {}
    for name, own in times.items():
        quotients = [one / reference for one, reference in zip(own, times[to])]
        low, median, high = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else 3 * quotients
        found[name] = {"median": median, "low": low, "high": high, "seconds": statistics.median(own)}
    return found


def parser(description: str | None, turns: int | None = None) -> argparse.ArgumentParser:
    """A command line with what all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if turns is not None:
        made.add_argument("--turns", type=int, default=turns, help=f"default {turns}")
    made.add_argument("--json", type=Path, help="where to write the figures; default benchmarks/results/NAME.json")
    return made


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def spread(row: dict[str, float], digits: int = 2) -> str:
    """A ratio with its quartiles."""
    return f"{row['median']:.{digits}f} ({row['low']:.{digits}f} - {row['high']:.{digits}f})"


def variant(name: str, **options: bool) -> str:
    """The name with those of the options that are on, so that each has a file of its own."""
    return "-".join([name, *(option for option, on in options.items() if on)])


def report(
    name: str,
    args: argparse.Namespace,
    rows: dict[str, dict[str, Any]],
    columns: Iterable[str],
    cells: Callable[[dict[str, Any]], Iterable[str]],
) -> None:
    """Print the table, ``cells(row)`` beside each row's name, and write the file."""
    from rich.console import Console
    from rich.table import Table

    settings = {key: value for key, value in vars(args).items() if key != "json"}
    table = Table(title=", ".join([name, *(f"{key}: {value}" for key, value in settings.items())]))
    headings, *lines = shown = [["", *columns], *([label, *cells(row)] for label, row in rows.items())]
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left")
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"settings": settings, "machine": machine(settings.get("device", "cpu")), "rows": rows, "table": shown}
    path.write_text(json.dumps(found, indent=1) + "\n")
