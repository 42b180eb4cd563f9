"""What ``lightning-lora resize`` and ``extract`` do."""

import argparse

from rich.table import Table

from lightning_lora.cli.load_base import load_base
from lightning_lora.cli.terminal import console, printable, steps
from lightning_lora.formats.peft import save_adapter
from lightning_lora.formats.resized import resize_adapter
from lightning_lora.fqn import listed
from lightning_lora.model.extract import extract_adapter


def resize(given: argparse.Namespace) -> int:
    """Write an adapter at smaller ranks, and say how far each layer is from what it was."""
    done = resize_adapter(given.adapter, given.target, given.rank, given.energy)
    table = Table("layers", "r before", "r", "relative error of the update")
    for layer, found in done.items():
        table.add_row(printable(layer), str(found.before), str(found.after), f"{found.error:.2e}")
    console().print(table)
    print(f"Wrote {given.target}")
    return 0


def extract(given: argparse.Namespace) -> int:
    """Write the adapter that makes a base, as far as a rank can, what it was fine-tuned to."""
    with steps(3) as begin:
        begin("loading the two models")
        base, tuned = (load_base(name, None, "auto", None) for name in (given.adapter, given.tuned))
        begin("decomposing what has changed")
        found = extract_adapter(base, tuned, given.rank)
        begin("writing the adapter")
        save_adapter(base, given.target)
    table = Table("layers", "relative error of the change")
    for layer, error in found.errors.items():
        table.add_row(printable(layer), f"{error:.2e}")
    console().print(table)
    if found.left_out:
        most = sorted(found.left_out.items(), key=lambda each: -each[1])
        shown = [f"{name} (changed by {share:.1%})" for name, share in most]
        print(printable(f"Not in the adapter, since they are no linear layers of their own: {listed(shown)}"))
    print(f"Wrote {given.target}")
    return 0
