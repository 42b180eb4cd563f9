"""Time of a training step: ours, PEFT's, full fine-tuning, and the floor that no LoRA can go below.

The floor is the frozen base's forward and its backward to the inputs. The four take turns in one process, so that a
machine that drifts drifts for all, and what is reported is the median of their ratios to the floor of the same turn.

    python -m benchmarks.step --turns 20 --targets all
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoraConfig, inject

TARGETS = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}


def base(layers: int, hidden: int) -> LlamaForCausalLM:
    """A model shaped like Llama, with random weights, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
    )


def contenders(layers: int, hidden: int, r: int, targets: str) -> dict[str, nn.Module]:
    """The models that take turns."""
    import peft

    chosen = TARGETS[targets]
    ours = inject(base(layers, hidden), LoraConfig(r=r, lora_alpha=2 * r, target_modules=chosen))
    theirs = peft.get_peft_model(
        base(layers, hidden), peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=chosen, task_type="CAUSAL_LM")
    )
    return {
        "floor": base(layers, hidden).requires_grad_(False),
        "ours": ours,
        "PEFT": theirs,
        "full": base(layers, hidden),
    }


def stepper(model: nn.Module, hidden: int, tokens: int) -> Callable[[], None]:
    """One forward and backward pass, to the trained parameters and to the inputs."""
    embeddings = torch.randn(2, tokens // 2, hidden)
    labels = torch.randint(0, 1024, (2, tokens // 2))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        inputs = embeddings.clone().requires_grad_()
        model(inputs_embeds=inputs, labels=labels, use_cache=False).loss.backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def measure(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of each contender in each turn; the first two turns warm up and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each contender's time over the floor's of the same turn: quartiles."""
    found = {}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles([t / floor for t, floor in zip(times, seconds["floor"])], n=4)
        found[name] = {"median": median, "low": low, "high": high, "seconds": statistics.median(times)}
    return found


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="a step")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    models = contenders(args.layers, args.hidden, args.r, args.targets)
    found = ratios(
        measure({name: stepper(model, args.hidden, args.tokens) for name, model in models.items()}, args.turns)
    )
    table = Table(title=f"training step over the floor, r={args.r}, {args.targets}, torch {torch.__version__}")
    for heading in ("", "median", "quartiles", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in found.items():
        table.add_row(name, f"{row['median']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", f"{row['seconds']:.3f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "ratios": found}, indent=2))


if __name__ == "__main__":
    main()
