"""What is trained, in one table."""

import re
from collections import Counter

from torch import nn

from lightning_lora.fqn import clean_fqn
from lightning_lora.model.peft_wrapped import PeftInjection
from lightning_lora.model.quantization import described, quantization, quantized_layers
from lightning_lora.model.record import injections, named_injections
from lightning_lora.model.state_dict import adapter_tensors
from lightning_lora.sharding import full_shape, named_tensors


def print_summary(model: nn.Module) -> None:
    """Print a table of the adapted layers, grouped by pattern, and of the parameter counts.

    Args:
        model: A model with adapters.
    """
    from rich.console import Console
    from rich.table import Table

    sizes = _sizes(model)
    groups: Counter[tuple[str, str, str]] = Counter()
    parameters: Counter[tuple[str, str, str]] = Counter()
    counted: set[nn.Parameter] = set()  # what is tied counts once
    for root_name, injection in named_injections(model):
        for name, layer in injection.layers():
            adapter = layer.adapter(injection.adapter_name)
            pattern = re.sub(r"\.\d+(?=\.)", ".*", f"{root_name}.{name}".strip("."))
            size = ", ".join(sorted({part.size() for part in layer.parts(injection.adapter_name)}))
            group = (pattern, type(layer).__name__, size)
            groups[group] += 1
            parameters[group] += sum(sizes[id(p)] for p in adapter.parameters() if p not in counted)
            counted.update(adapter.parameters())
        for name, module, ranks in injection.wrapped() if isinstance(injection, PeftInjection) else ():
            trained = [p for p in module.parameters() if p.requires_grad and p not in counted]
            pattern = re.sub(r"\.\d+(?=\.)", ".*", f"{root_name}.{name}".strip("."))
            group = (pattern, f"{type(module).__name__} of PEFT", ranks)
            groups[group] += 1
            parameters[group] += sum(sizes[id(p)] for p in trained)
            counted.update(trained)
    table = Table(title="LoRA", title_justify="left")
    for heading in ("adapted modules", "layer"):
        table.add_column(heading)
    for heading in ("r", "layers", "parameters"):
        table.add_column(heading, justify="right")
    for (pattern, kind, r), count in groups.items():
        table.add_row(pattern, kind, r, str(count), f"{parameters[pattern, kind, r]:,}")
    console = Console()
    console.print(table)
    for line in _totals(model):
        console.print(line)


def _sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers each parameter and buffer has, also where this process holds a part; by identity, so once."""
    sizes = {id(getattr(module, name)): full_shape(module, name).numel() for _, module, name in named_tensors(model)}
    for _, module, storage, packed in quantized_layers(model):
        here = storage.packed(module)  # which may be another one than the base's
        if storage.parts[0] in here:
            sizes.update((id(tensor), 0) for tensor in storage.tensors(here))
            sizes[id(storage.codes(here))] = storage.shape(module, packed).numel()
    return sizes


def _totals(model: nn.Module) -> list[str]:
    sizes = _sizes(model)
    trainable = sum(sizes[id(parameter)] for parameter in model.parameters() if parameter.requires_grad)
    total = sum(sizes[id(parameter)] for parameter in model.parameters())
    names = set(map(clean_fqn, adapter_tensors(model)))
    stored = {
        id(t): t for name, module, inner in named_tensors(model) if name in names for t in [getattr(module, inner)]
    }
    size = sum(sizes[key] * tensor.element_size() for key, tensor in stored.items())
    saved = [f"{root}.{name}".strip(".") for root, injection in named_injections(model) for name in injection.saved]
    biases = sum(len(injection.trained) for injection in injections(model) if injection.config.bias != "none")
    lines = [
        f"trainable {trainable:,} | frozen {total - trainable:,} | total {total:,} | "
        f"{100 * trainable / max(total, 1):.3f}% trained | {size / 1e6:.2f} MB on disk",
    ]
    formats = quantization(model)
    if formats:
        lines.append(f"the base is {described(formats)}")
    if saved:
        lines.append(f"trained in full and stored with the adapter: {', '.join(saved)}")
    if biases:
        lines.append(f"biases trained: {biases}")
    return lines
