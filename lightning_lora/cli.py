"""``lightning-lora``: complete runs from a YAML file, by Lightning's own CLI."""

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI

_SUBCOMMANDS = ("fit", "validate", "test", "predict")


class LoraCLI(LightningCLI):
    """``LightningCLI`` with the subcommands that run a model: fit, validate, test and predict."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in _SUBCOMMANDS}


def main(args: ArgsType = None) -> None:
    """Run the command line, or ``args`` in its place."""
    LoraCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=args,
    )
