"""``lightning-lora fit``, ``validate``, ``test``, ``predict``: runs from a YAML file, by Lightning's own CLI."""

import inspect
import sys
import warnings
from argparse import ArgumentError
from contextlib import ExitStack
from difflib import get_close_matches
from functools import partial
from pydoc import locate
from typing import Any, Literal

from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT  # what Trainer's own signature names
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora import shipped_recipes
from lightning_lora.callback import LoRA
from lightning_lora.callbacks.graceful_interrupt import GracefulInterrupt
from lightning_lora.callbacks.prediction_writer import PredictionWriter, resumable_from
from lightning_lora.cli import config_files, memory
from lightning_lora.cli.help import RUNS
from lightning_lora.cli.quiet import quiet
from lightning_lora.cli.setting_errors import explained
from lightning_lora.cli.shown_data import show
from lightning_lora.data.from_files import FileData
from lightning_lora.fake_tensors import FakeTensors
from lightning_lora.pretrained import without_weights
from lightning_lora.trainer.memory import MemoryEstimate, estimate, fake_tensors
from lightning_lora.trainer.precision import fitting_precision

_SHOW = "show_data"  # what ``data`` is in the parser, where that name is of the data module's settings
_PARSERS = {_SHOW if name == "data" else name: name for name in RUNS}


class RecipeTrainer(Trainer):
    """Lightning's Trainer, for which the command line chooses the precision that fits the machine unless one is set."""

    def __init__(self, *, precision: _PRECISION_INPUT | Literal["auto"] | None = "auto", **settings: Any) -> None:
        super().__init__(precision=None if precision == "auto" else precision, **settings)

    def show_data(self, model: LightningModule, datamodule: LightningDataModule | None = None, rows: int = 3) -> None:
        """Show what a fit would learn.

        Args:
            model: Whose tokenizer and labels the data take.
            datamodule: The data.
            rows: How many rows are shown.

        Raises:
            TypeError: If the data module is not one of ``lightning_lora.data``.
        """
        if not isinstance(datamodule, FileData):
            raise TypeError(
                f"Found {type(datamodule).__name__}, expected a data module of lightning_lora.data to show."
            )
        self.strategy.connect(model)
        datamodule.trainer = self
        datamodule.setup("fit")
        show(datamodule, rows)

    def memory(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, fakes: FakeTensors | None = None
    ) -> MemoryEstimate:
        """Estimate what a fit would hold in memory; ``fakes`` is in which the model was made."""
        with without_weights(), fakes or fake_tensors() as running:
            return estimate(self, model, datamodule, running)


class LoraCLI(LightningCLI):
    """``LightningCLI`` with the subcommands that run a model, and short ways to reach the LoRA callback."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands() | {
            _SHOW: {"model", "datamodule"},
            "memory": {"model", "datamodule", "fakes"},
        }
        return {name: every[name] for name in _PARSERS}

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
        parser.add_argument(
            "--resume", type=bool, default=False, help="For predict: whether to go on with a file that was not finished"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Note where the arguments come from, and say in one paragraph what is wrong with them."""
        self._args = args
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise self._explained(error) from error

    def instantiate_classes(self) -> None:
        """Make what the settings name, for ``memory`` without values, and explain what a class does not take."""
        with ExitStack() as stack:
            if self.subcommand == "memory":
                self.save_config_callback = None
                self._fakes = fake_tensors()
                stack.enter_context(without_weights())
                stack.enter_context(self._fakes)
            try:
                super().instantiate_classes()
            except ValueError as error:
                if str(error).startswith("Does not validate against"):
                    raise self._explained(error) from error
                raise

    def _explained(self, error: Exception) -> ArgumentError:
        given = sys.argv[1:] if self._args is None else self._args
        parsers = map(self._parser, self.subcommands())  # Lightning's own look-up by name
        known = [str(name) for one in parsers for name in one.get_defaults().keys()]  # noqa: SIM118 - by path
        place = partial(config_files.place, given if isinstance(given, list) else [])
        return ArgumentError(None, explained(str(error), known, place))

    def before_instantiate_classes(self) -> None:
        """Put ``--lora`` and ``--output`` where they belong, and choose a precision: the saved config is complete."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.lora:
            try:
                _change_lora(config.trainer.callbacks or [], config.lora)
            except ArgumentError as error:
                raise self._explained(error) from error
            config.lora = None
        if config.output is not None and self.subcommand != "predict":
            raise ValueError(f"Found --output with {self.subcommand}, expected it with predict. Take it out.")
        if config.resume and config.output is None:
            raise ValueError(
                f"Found --resume with {self.subcommand} and no --output, expected it to go on with a file of "
                "predictions. A fit is resumed by --ckpt_path last."
            )
        if self.subcommand == _SHOW:
            settings = {"logger": False, "precision": None, "accelerator": "cpu", "devices": 1, "strategy": "auto"}
            for name, value in settings.items():
                config.trainer[name] = value
        elif config.trainer.precision == "auto":
            self._choose_precision(config.trainer)
        if self.subcommand == "memory":
            self._of_processes = memory.prepare(config.trainer)

    def _choose_precision(self, trainer: Any) -> None:
        if not isinstance(trainer.accelerator, str) or _has_own_precision(trainer):
            trainer.precision = None  # Lightning's default, or what the plugin says
            return
        trainer.precision, reason = fitting_precision(trainer.accelerator)
        rank_zero_info(f"precision: {trainer.precision}, since {reason}. --trainer.precision sets another.")
        if self._args is None:
            # The processes that Lightning starts by this command line must not come to another decision.
            sys.argv += ["--trainer.precision", trainer.precision]

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, with a writer of predictions if there is a file for them, and a Ctrl-C that saves."""
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            trainer.callbacks.append(GracefulInterrupt())  # type: ignore[attr-defined]  # set by a connector
        output = self._get(self.config, "output")
        if output is not None:
            start = self._rows_done(output) if self._get(self.config, "resume") else None
            trainer.callbacks.append(PredictionWriter(output, start))  # type: ignore[attr-defined]  # set by a connector
        return trainer

    def _rows_done(self, output: str) -> int:
        """Have the data begin where an earlier run's predictions end."""
        if not isinstance(self.datamodule, FileData):
            raise TypeError(
                f"Found --resume with {type(self.datamodule).__name__}, expected a data module of lightning_lora.data, "
                "which can begin at any row. Leave it out."
            )
        self.datamodule.predict_from = resumable_from(output, self.datamodule.batch_size)
        rank_zero_info(f"Goes on from row {self.datamodule.predict_from + 1}, of which the first batch is compared.")
        return self.datamodule.predict_from

    def memory(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Show what a fit would hold in memory."""
        trainer: Any = self.trainer
        memory.show(trainer.memory(model, datamodule, self._fakes), self._of_processes)

    def predict(self, model: LightningModule, ckpt_path: str | None = None, **options: Any) -> Any:
        """Predict with a checkpoint, or with the base alone where that is asked for.

        Raises:
            ValueError: If no checkpoint is named, or there is no last one.
        """
        if ckpt_path is None:
            raise ValueError(f"Found no --ckpt_path, expected the checkpoint that answers. {_WAYS}")
        with warnings.catch_warnings():
            # Lightning goes on without one, as it is right for a first fit.
            warnings.filterwarnings("error", ".*no last checkpoint available")
            try:
                return self.trainer.predict(model, ckpt_path=None if ckpt_path == "none" else ckpt_path, **options)
            except UserWarning:
                raise ValueError(f"Found --ckpt_path last and no checkpoint of an earlier fit. {_WAYS}") from None


_WAYS = (
    "Name a file, or --ckpt_path last in the folder of the run that trained it; --ckpt_path none asks the base alone, "
    "without what was trained."
)


def run(args: ArgsType = None) -> None:
    """Run the command line, or ``args`` in its place."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        given = config_files.with_recipes_found(_with_config(given))
        if given[1:] == ["--help", "all"]:
            given = given[:2]
    if args is None:
        # Where Lightning looks by itself, and from where it starts the processes of DDP.
        sys.argv[1:] = given
    else:
        args = given
    with quiet():
        LoraCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=RecipeTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False}
            | {
                name: {"usage": f"lightning-lora {command} --config NAME [options]"}
                for name, command in _PARSERS.items()
            },
            args=args,
        )


def _has_own_precision(trainer: Any) -> bool:
    """Whether a plugin in the config says what to compute in, so that ``precision`` must not."""
    given = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
    classes = [locate(plugin.class_path) for plugin in given if hasattr(plugin, "class_path")]
    own = any(isinstance(found, type) and issubclass(found, Precision) for found in classes)
    strategy: Any = getattr(trainer.strategy, "init_args", None) or {}
    return own or strategy.get("precision_plugin") is not None


def _change_lora(callbacks: list[Any], settings: dict[str, Any]) -> None:
    mine = [callback for callback in callbacks if callback.class_path.rpartition(".")[2] == LoRA.__name__]
    if not mine:
        raise ValueError("Found --lora, but no LoRA callback in the config to change. Add one to trainer.callbacks.")
    known = set(inspect.signature(LoRA).parameters)
    unknown = sorted(settings.keys() - known)
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        instead = f" Did you mean --lora.{near[0]}?" if near else ""
        raise ValueError(f"Found --lora.{unknown[0]}, expected one of {', '.join(sorted(known))}.{instead}")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LoRA, "lora")
    parser.parse_object({"lora": settings})  # refuses values of other types, by their names
    for callback in mine:
        for name, value in settings.items():
            callback.init_args[name] = value


def _with_config(arguments: list[str]) -> list[str]:
    """The arguments of ``data``, with a recipe, or a file that one is to learn, after the option that it means."""
    match arguments:
        case ["data", name, *others] if not name.startswith("-"):
            if name.endswith((".yaml", ".yml")) or name in shipped_recipes.recipes():
                return [_SHOW, "--config", name, *others]
            named = any(other.partition("=")[0] in config_files.OPTIONS for other in others)
            return [_SHOW, *([] if named else ["--config", "chat_sft"]), *others, "--data.path", name]
        case ["data", *others]:
            return [_SHOW, *others]
    return arguments
