"""The commands by name, and the texts that help with them."""

import difflib

RUNS = {
    "fit": "train, and leave small checkpoints, the adapter and the merged model",
    "validate": "measure on the validation data",
    "test": "measure on the test data",
    "predict": "write predictions to a file (--output FILE)",
    "data": "show what fit would learn: counts, lengths, and rows with what is learned in them in color",
    "memory": "say what fit would hold in memory: base, adapters, gradients, moments, activations, peak",
}
REPORTS = {"report": "write a page on a run: whether it worked, why, what to try next"}
RECIPES = {"recipes": "list the recipes that come with the package, or copy one out"}
ADAPTER_FILES = {
    "inspect": "say what is in a checkpoint or an adapter directory",
    "export": "turn a checkpoint into PEFT's format",
    "merge": "write base and adapter as one model directory",
    "diff": "compare two adapters",
    "compare": "draw how far two adapters of one base learned the same directions",
    "check": "say what a server would make of an adapter",
    "resize": "write an adapter at smaller ranks",
    "extract": "make an adapter of a full fine-tune",
    "push": "upload an exported directory to the Hugging Face Hub",
}
_COMMANDS = RUNS | REPORTS | RECIPES | ADAPTER_FILES

HELP = f"""usage: lightning-lora <command> [options]

LoRA for PyTorch Lightning: complete runs from a YAML file.

commands:
{"".join(f"  {name:<9}  {purpose}{chr(10)}" for name, purpose in _COMMANDS.items())}
a run:
  lightning-lora fit --config quickstart              a recipe by its name, or any YAML file
  lightning-lora fit --config my.yaml --trainer.max_steps 50 --lora.r 16 --model.lr 1e-3 --data.path my.jsonl
  lightning-lora fit --config my.yaml --config ddp    a second file changes the first
  lightning-lora fit --config my.yaml --ckpt_path last
  lightning-lora fit --config my.yaml --print_config  every setting with its value
  lightning-lora report runs/quickstart               the page on it again, runs/quickstart/report.html
  lightning-lora data my.jsonl                        what chat_sft would learn of a file; or any file of settings

  --debug shows where an error comes from.
  lightning-lora <command> --help says what a command takes, and lightning-lora --version which version this is.
"""

_RUN_HELP = """usage: lightning-lora {command} --config NAME [--config OVERLAY] [options]

{purpose}

  --config NAME       a recipe by its name, or a YAML file; a second one changes the first
  --ckpt_path PATH    the checkpoint to start from: last, or a file; for predict also none, the base alone
  --output FILE       for predict: the JSONL file that predictions go to
  --resume true       for predict: go on with a file that was not finished
  --debug             show where an error comes from
  --print_config      print every setting with its value, and do nothing else
  --print_config=comments
                      the same, with what each setting means; a file to start from

any setting of the file can be changed, for example:
  --seed_everything N
  --trainer.max_epochs N    --trainer.max_steps N    --trainer.accumulate_grad_batches N
  --trainer.devices N       --trainer.accelerator cpu    --trainer.precision bf16-mixed
  --model.pretrained ID     --model.lr X
  --data.path FILE          --data.batch_size N      --data.on_error skip
  --lora.r N                --lora.lora_alpha X      --lora.target_modules "[q_proj, v_proj]"

more:
  lightning-lora {command} --help all
  lightning-lora {command} --model.help lightning_lora.tasks.CausalLM
  lightning-lora {command} --data.help lightning_lora.data.ChatData
  lightning-lora {command} --trainer.callbacks.help lightning_lora.LoRA
"""


def run_help(command: str) -> str:
    """What one of the ``RUNS`` takes."""
    return _RUN_HELP.format(command=command, purpose=RUNS[command])


def no_such_command(name: str) -> str:
    """What to say of a command that is not there."""
    near = difflib.get_close_matches(name, _COMMANDS, 1)
    instead = f" Did you mean {near[0]}?" if near else ""
    return f"Found the command {name!r}, expected one of {', '.join(_COMMANDS)}.{instead}"
