"""What the commands on saved adapters do; see also ``compare`` and ``new_adapters``."""

import argparse
import sys

import torch
from rich.table import Table

from lightning_lora.cli.compare import amplification, draw, similarities
from lightning_lora.cli.diff import by_common_names, diff
from lightning_lora.cli.load_base import base_of, gguf_tokenizer_of, local_base, open_on_base, tokenizer_of
from lightning_lora.cli.new_adapters import extract, resize
from lightning_lora.cli.terminal import console, on_one_line, printable, steps
from lightning_lora.formats.diffusers_adapter import save_diffusers_adapter, save_kohya_adapter
from lightning_lora.formats.gguf_adapter import save_gguf_adapter
from lightning_lora.formats.gguf_model import save_gguf
from lightning_lora.formats.hub import push_to_hub
from lightning_lora.formats.merged import save_merged
from lightning_lora.formats.modelfile import write_modelfile
from lightning_lora.formats.peft import not_portable_of, save_adapter
from lightning_lora.formats.peft_files import read_files
from lightning_lora.formats.portable import not_portable
from lightning_lora.formats.saved_adapter import read
from lightning_lora.formats.serving import served_otherwise
from lightning_lora.model.eject import eject
from lightning_lora.model.quantization import is_quantized
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.model.targets import TargetError

_OTHER_FORMATS = {"gguf": save_gguf_adapter, "diffusers": save_diffusers_adapter, "kohya": save_kohya_adapter}


def run(given: argparse.Namespace) -> int:
    """Do what the parsed arguments say; gives the exit code."""
    commands = {
        "inspect": _inspect,
        "export": _export,
        "merge": _merge,
        "diff": diff,
        "compare": _compare,
        "check": _check,
        "resize": resize,
        "extract": extract,
        "push": _push,
    }
    try:
        return commands[given.command](given)
    except (CheckpointError, TargetError, OSError, ValueError) as error:
        text = str(error)
        if isinstance(error, FileNotFoundError) and error.filename is not None:  # the system's own
            text = f"Found no file or directory {str(error.filename)!r}. Correct the path."
        print(f"lightning-lora {given.command}: {printable(text)}", file=sys.stderr)
        return 1


def _inspect(given: argparse.Namespace) -> int:
    saved = read(given.adapter)
    out = console()
    out.print(on_one_line(f"{saved.path}: {saved.kind}"), soft_wrap=True)
    for name, value in saved.facts.items():
        out.print(f"  {name}: {on_one_line(value)}", soft_wrap=True)
    settings = {name: value for name, value in sorted(saved.settings.items()) if value not in (None, {}, [], False)}
    out.print(
        "  settings: " + printable(", ".join(f"{name}={value!r}" for name, value in settings.items())),
        soft_wrap=True,
    )
    table = Table("layers", "r", "parameters", title=f"{len(saved.tensors)} tensors, {saved.size / 1e6:.2f} MB")
    groups: dict[tuple[str, int], list[int]] = {}
    for layer, (lora_A, lora_B) in saved.factors().items():
        group = (".".join("*" if part.isdigit() else part for part in layer.split(".")), len(lora_A))
        groups.setdefault(group, []).append(lora_A.numel() + lora_B.numel())
    for (pattern, r), sizes in groups.items():
        table.add_row(on_one_line(f"{pattern} ({len(sizes)})"), str(r), f"{sum(sizes):,}")
    out.print(table)
    return 0


def _export(given: argparse.Namespace) -> int:
    saved = read(given.adapter)
    with steps(2) as begin:
        begin("loading the base")
        base = base_of(saved, given.base, given.gguf_file)
        model = open_on_base(saved, base)
        begin("writing the adapter")
        if given.format in _OTHER_FORMATS:
            _OTHER_FORMATS[given.format](model, given.target)
            place = local_base(base) if given.format == "gguf" else None
            written = [given.target, *([write_modelfile(given.target, place)] if place is not None else [])]
            print(f"Wrote {' and '.join(map(str, written))}")
            return 0
        problems = not_portable_of(model)
        if problems and given.layout is None:
            print(f"PEFT's layout is kept, since the portable one cannot hold {', '.join(problems)}.", file=sys.stderr)
        save_adapter(model, given.target, layout=given.layout or ("peft" if problems else "portable"))
    print(f"Wrote {given.target}")
    return 0


def _merge(given: argparse.Namespace) -> int:
    saved, as_gguf = read(given.adapter), given.format == "gguf"
    with steps(3) as begin:
        begin("loading the base")
        base = base_of(saved, given.base, given.gguf_file)
        tokenizer = (gguf_tokenizer_of if as_gguf else tokenizer_of)(saved, base)
        dtype = "auto" if as_gguf else getattr(torch, given.dtype, "auto")
        model = open_on_base(saved, base, dtype, given.onto == "original")
        begin("folding the adapter in")
        if not (as_gguf or is_quantized(model)):  # which are done as they are written
            eject(model, merge=True)
        begin("writing the model")
        if as_gguf:
            save_gguf(model, given.target, tokenizer, None if given.dtype == "auto" else given.dtype)
            write_modelfile(given.target)
        else:
            save_merged(model, given.target, tokenizer, given.max_shard_size)
    print(f"Wrote {given.target}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    one, other = read(given.adapter), read(given.other)
    found = similarities(*by_common_names(one.factors(), other.factors()))
    if not found:
        raise ValueError(f"{one.path} and {other.path} have no adapted layer of one shape in common.")
    if given.output is not None:
        draw(found, given.output, (str(one.path), str(other.path)))
    amplified = amplification(open_on_base(one, base_of(one, given.base, given.gguf_file))) if given.base else {}
    table = Table("layers", "phi(1, 1)", "phi(r, r)", *(["amplified"] if amplified else []))
    for layer, phi in found.items():
        last = min(phi.shape)
        row = [f"{phi[i - 1, i - 1]:.2f}" for i in (1, last)]
        ends = [value for name, value in amplified.items() if name == layer or name.endswith(f".{layer}")]
        table.add_row(on_one_line(layer), *row, *([f"{ends[0]:.1f}" if ends else ""] if amplified else []))
    console().print(table)
    return 0


def _check(given: argparse.Namespace) -> int:
    files = read_files(given.adapter)
    problems = served_otherwise(files, given.server)
    for problem in problems:
        print(printable(f"{given.server} {problem}"))
    if problems and not not_portable(files.settings, files.tensors):
        print(f"lightning-lora export ... --layout portable writes it so that {given.server} serves what was trained.")
    elif problems:
        print("lightning-lora merge ... writes the merged model, which serves what was trained anywhere.")
    else:
        print(f"{given.server} serves it as it was trained.")
    return int(bool(problems))


def _push(given: argparse.Namespace) -> int:
    print(f"Uploaded: {push_to_hub(given.folder, given.repo_id, private=given.private or None)}")
    return 0
