"""``lightning-lora``: who answers a command line."""

import sys
from argparse import ArgumentError
from typing import TYPE_CHECKING

from lightning_lora.cli import adapter_files, help, recipes, report
from lightning_lora.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType


def main(args: "ArgsType" = None) -> None:
    """Run the command line, or ``args`` in its place.

    What goes wrong on the command line is printed as one paragraph, with ``--debug`` as a traceback; with ``args``, it
    is raised.
    """
    if args is not None:
        _answer(args)
        return
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    command = sys.argv[1:2]
    try:
        _answer(None)
    except Exception as error:
        from lightning_lora.cli.terminal import printable

        if debug:
            raise
        kind = (
            "" if isinstance(error, (ValueError, OSError, ImportError, ArgumentError)) else f"{type(error).__name__}: "
        )
        text = printable(f"{' '.join(['lightning-lora', *command])}: {kind}{error} (--debug shows where)")
        print(text, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ArgumentError) else 1) from None


def _answer(args: "ArgsType") -> None:
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
        case ["report", *others]:
            report.run(others)
        case [command, *_] if command in help.ADAPTER_FILES:
            raise SystemExit(adapter_files.run(given))
        case [command, *_] if isinstance(given, list) and not command.startswith("-") and command not in help.RUNS:
            raise ArgumentError(None, help.no_such_command(command))
        case _:
            from lightning_lora.cli import runs

            runs.run(args)
