"""``lightning-lora``: who answers a command line."""

import sys
from typing import TYPE_CHECKING

from lightning_lora.cli import adapter_files, help, recipes
from lightning_lora.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: "ArgsType" = None) -> None:
    """Run the command line, or ``args`` in its place."""
    given = sys.argv[1:] if args is None else args
    match given:
        case [] | ["-h" | "--help" | "help"]:
            print(help.HELP, end="")
        case ["--version"]:
            print(f"lightning-lora {__version__}")
        case [command, "-h" | "--help"] if command in help.RUNS:
            print(help.run_help(command), end="")
        case ["recipes", *others]:
            recipes.run(others)
        case [command, *_] if command in help.ADAPTER_FILES:
            raise SystemExit(adapter_files.run(given))
        case _:
            from lightning_lora.cli import runs

            runs.run(args)
