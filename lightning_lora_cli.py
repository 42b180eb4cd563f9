"""The command ``lightning-lora``, outside of the package so that its help need not import Lightning first."""

import sys

HELP = """usage: lightning-lora <command> [options]

LoRA for PyTorch Lightning: complete runs from a YAML file.

commands:
  fit        train, and leave small checkpoints, the adapter and the merged model
  validate   measure on the validation data
  test       measure on the test data
  predict    write predictions to a file (--output FILE)
  recipes    list the recipes that come with the package, or copy one out
  inspect    say what is in a checkpoint or an adapter directory
  export     turn a checkpoint into PEFT's format
  merge      write base and adapter as one model directory
  diff       compare two adapters

a run:
  lightning-lora fit --config quickstart              a recipe by its name, or any YAML file
  lightning-lora fit --config my.yaml --trainer.max_steps 50 --lora.r 16 --model.lr 1e-3 --data.path my.jsonl
  lightning-lora fit --config my.yaml --config ddp    a second file changes the first
  lightning-lora fit --config my.yaml --ckpt_path last
  lightning-lora fit --config my.yaml --print_config  every setting with its value

  lightning-lora <command> --help lists all options of a command.
"""


def main() -> None:
    """Print the help at once, or run the command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    from lightning_lora.cli import main as run

    run()


if __name__ == "__main__":
    main()
