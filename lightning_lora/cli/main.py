"""``lightning-lora``: complete runs from a YAML file, by Lightning's own CLI."""

import inspect
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_lora import shipped_recipes
from lightning_lora.callback import LoRA
from lightning_lora.callbacks.prediction_writer import PredictionWriter
from lightning_lora.cli import adapter_files
from lightning_lora.config import LoraConfig

_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_CONFIG = ("--config", "-c")


class LoraCLI(LightningCLI):
    """``LightningCLI`` with the subcommands that run a model, and short ways to reach the LoRA callback."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in _SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a list of callbacks is hard to reach by."""
        parser.add_argument(
            "--lora",
            type=dict[str, Any] | None,
            default=None,
            help="Settings of the LoRA callback that differ from the file's, such as --lora.r 16",
        )
        parser.add_argument(
            "--output", type=str | None, default=None, help="For predict: the JSONL file that predictions go to"
        )

    def before_instantiate_classes(self) -> None:
        """Put ``--lora`` and ``--output`` where they belong, so that the saved config is complete without them."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.lora:
            _change_lora(config.trainer.callbacks or [], config.lora)
            config.lora = None
        if config.output is not None and self.subcommand != "predict":
            raise ValueError(f"Found --output with {self.subcommand}, expected it with predict. Take it out.")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, with a writer of predictions if there is a file for them."""
        trainer = super().instantiate_trainer(**kwargs)
        output = self._get(self.config, "output")
        if output is not None:
            trainer.callbacks.append(PredictionWriter(output))  # type: ignore[attr-defined]  # set by a connector
        return trainer


def main(args: ArgsType = None) -> None:
    """Run the command line, or ``args`` in its place."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        if given[:1] == ["recipes"]:
            _recipes(given[1:])
            return
        if given[:1] and given[0] in adapter_files.NAMES:
            raise SystemExit(adapter_files.run(given))
        given = _with_recipes_found(given)
        if given[1:] == ["--help", "all"]:
            given = given[:2]
    if args is None:
        # Where Lightning looks by itself, and from where it starts the processes of DDP.
        sys.argv[1:] = given
    else:
        args = given
    _explain_settings()
    LoraCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={name: {"usage": f"lightning-lora {name} --config NAME [options]"} for name in _SUBCOMMANDS},
        args=args,
    )


def _explain_settings() -> None:
    """Give ``LoRA``'s docstring, where the parser looks for words, those of ``LoraConfig`` on the settings of both."""
    mine, theirs = inspect.getdoc(LoRA) or "", inspect.getdoc(LoraConfig) or ""
    reference = "    r: See :class:`~lightning_lora.LoraConfig`, as for all arguments up to ``seed``.\n"
    LoRA.__doc__ = mine.replace(reference, theirs.partition("Args:\n")[2].partition("\n\n")[0] + "\n")


def _change_lora(callbacks: list[Any], settings: dict[str, Any]) -> None:
    mine = [callback for callback in callbacks if callback.class_path.rpartition(".")[2] == LoRA.__name__]
    if not mine:
        raise ValueError("Found --lora, but no LoRA callback in the config to change. Add one to trainer.callbacks.")
    known = set(inspect.signature(LoRA).parameters)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"Found --lora.{unknown[0]}, expected one of {', '.join(sorted(known))}.")
    for callback in mine:
        for name, value in settings.items():
            callback.init_args[name] = value


def _with_recipes_found(arguments: list[str]) -> list[str]:
    """The arguments, with the names of shipped_recipes recipes after ``--config`` turned into paths."""
    found = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in _CONFIG:
            found.append(f"{option}={_config_path(value)}")
        elif index and arguments[index - 1] in _CONFIG:
            found.append(_config_path(argument))
        else:
            found.append(argument)
    return found


def _config_path(value: str) -> str:
    # A file of one's own goes first.
    if Path(value).exists():
        return value
    return str(shipped_recipes.recipes().get(value.removesuffix(".yaml"), value))


def _recipes(arguments: list[str]) -> None:
    """List the shipped_recipes recipes, or copy one: ``lightning-lora recipes [copy NAME [TARGET]]``."""
    import argparse

    parser = argparse.ArgumentParser(
        "lightning-lora recipes", description="List the shipped_recipes recipes, or copy one out."
    )
    actions = parser.add_subparsers(dest="action")
    copy = actions.add_parser("copy", help="copy a recipe out, to change it")
    copy.add_argument("name", choices=shipped_recipes.recipes(), metavar="NAME", help="its name in the list")
    copy.add_argument("target", nargs="?", type=Path, help="where to; default: NAME.yaml in this folder")
    given = parser.parse_args(arguments)
    if given.action is None:
        _list_recipes()
        return
    target = given.target or Path(f"{given.name}.yaml")
    if target.exists():
        parser.error(f"{target} is there already: name another file, or remove it.")
    target.write_text(shipped_recipes.recipes()[given.name].read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {target}. Run it: lightning-lora fit --config {target}")


def _list_recipes() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("recipe", "what")
    for name, path in shipped_recipes.recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        table.add_row(name, Text(first.removeprefix("#").strip()))
    console = Console()
    console.print(table)
    console.print(Text("lightning-lora fit --config NAME runs one, lightning-lora recipes copy NAME copies it here."))
