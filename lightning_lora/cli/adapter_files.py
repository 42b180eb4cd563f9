"""The commands that work on saved adapters: ``inspect``, ``export``, ``merge``, ``diff``, ``check`` and so on.

Each ends with 0, with 1 after an error, after a difference (``diff``) or where an adapter would not be served as it was
trained (``check``), and with 2 after a wrong call.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from lightning_lora.cli.arguments import Parser
from lightning_lora.cli.help import ADAPTER_FILES

_DESCRIPTIONS = {
    "inspect": "Say what is in a saved adapter: its settings, its base, its layers with their ranks and sizes.",
    "export": "Write a checkpoint's adapter as a directory that PEFT opens, or as a GGUF file for llama.cpp.",
    "merge": "Write base and adapter as one model directory, for from_pretrained, with the tokenizer if there is one, "
    "or as a GGUF file for llama.cpp.",
    "check": "Say what a server would refuse of an adapter, or compute otherwise. Ends with 0 if nothing, else with 1.",
    "compare": "Say how far two adapters of one base learned the same directions, layer by layer, by the similarity of "
    "the subspaces of their A (Hu et al., 2021, section 7), and draw it; with --base, also by how much an update "
    "amplifies what it adds to.",
    "resize": "Write an adapter at smaller ranks: of each layer's update, the best approximation. Says how far it is.",
    "extract": "Make an adapter of what a full fine-tune has changed in linear layers, and say what it leaves out.",
    "push": "Upload an exported adapter or merged model to the Hugging Face Hub, in one commit. It needs a token: run "
    "`hf auth login`, or set HF_TOKEN.",
    "diff": "Compare two saved adapters: settings, layers and weights. Ends with 0 if they are the same, else with 1.",
}


def run(arguments: list[str]) -> int:
    """Run one of the commands; gives the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "merge" and given.dtype == "q8_0" and given.format != "gguf":
        parser.error("--dtype q8_0 is for --format gguf")
    from lightning_lora.cli import adapter_work

    return adapter_work.run(given)


def _parser() -> Parser:
    parser = Parser("lightning-lora")
    added = parser.add_subparsers(dest="command", required=True)
    for name, purpose in ADAPTER_FILES.items():
        _ARGUMENTS[name](added.add_parser(name, help=purpose, description=_DESCRIPTIONS[name]))
    return parser


def _adapter(command: ArgumentParser, of: str = "a checkpoint (.ckpt) or a directory in PEFT's format") -> None:
    command.add_argument("adapter", type=Path, metavar="ADAPTER", help=of)


def _target(command: ArgumentParser, what: str = "the directory to write") -> None:
    command.add_argument("target", type=Path, metavar="TARGET", help=what)


def _base(command: ArgumentParser, otherwise: str = "") -> None:
    command.add_argument("--base", help=f"the base model: a hub id or a directory{otherwise}")
    command.add_argument("--gguf-file", help="the file in --base, if the base is a GGUF file")


def _export(command: ArgumentParser) -> None:
    _adapter(command)
    _target(command, "the directory or file to write; made if it is not there")
    _base(command, "; default: what the adapter names")
    command.add_argument(
        "--format",
        choices=("peft", "gguf", "diffusers", "kohya"),
        default="peft",
        help="peft: a directory; gguf: a file for llama.cpp, Ollama and LM Studio; diffusers, kohya: a directory "
        "for pipelines of diffusers, by its names or by kohya's; default: peft",
    )
    command.add_argument(
        "--layout",
        choices=("portable", "peft"),
        help="portable: one rank and a scaling of one, which all servers read alike; peft: as it was trained; "
        "default: portable, or peft where the adapter has more than that can hold",
    )


def _merge(command: ArgumentParser) -> None:
    _adapter(command)
    _target(command, "the directory or file to write; made if it is not there")
    _base(command, "; default: what the adapter names")
    command.add_argument(
        "--format",
        choices=("directory", "gguf"),
        default="directory",
        help="directory: for from_pretrained; gguf: a file for llama.cpp, Ollama and LM Studio; default: directory",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "q8_0"),
        default="auto",
        help="type of the weights, q8_0 for a GGUF file alone; default: that of the base",
    )
    command.add_argument(
        "--onto",
        choices=("quantized", "original"),
        default="quantized",
        help="of an adapter that was trained on a quantized base, what to add it to: the values that the base had "
        "then, or those before; default: quantized",
    )
    command.add_argument("--max-shard-size", default="5GB", help="size above which the file is split; default: 5GB")


def _check(command: ArgumentParser) -> None:
    _adapter(command)
    servers = ("vllm", "sglang", "llama.cpp", "transformers", "diffusers")
    command.add_argument("--for", dest="server", choices=servers, required=True, help="what is to serve the adapter")


def _compare(command: ArgumentParser) -> None:
    _diff(command)
    command.add_argument("--output", type=Path, help="the picture to write, such as subspaces.png")
    _base(command)


def _resize(command: ArgumentParser) -> None:
    _adapter(command, "a directory in PEFT's format")
    _target(command)
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the rank of all layers that have a larger one")
    size.add_argument("--energy", type=float, help="in place of it, the part of each update's squares to keep: 0.99")


def _extract(command: ArgumentParser) -> None:
    command.add_argument("adapter", metavar="BASE", help="the model before: a hub id or a directory")
    command.add_argument("tuned", metavar="TUNED", help="the fine-tuned one: a hub id or a directory")
    _target(command)
    command.add_argument("--rank", type=int, default=16, help="the rank of all layers; default: 16")


def _push(command: ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="the directory that was written")
    command.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it is not there")
    command.add_argument("--private", action="store_true", help="whether the repository is to be private")


def _diff(command: ArgumentParser) -> None:
    _adapter(command)
    command.add_argument("other", type=Path, metavar="ADAPTER", help="the one to compare it with")


_ARGUMENTS: dict[str, Callable[[ArgumentParser], None]] = {
    "inspect": _adapter,
    "export": _export,
    "merge": _merge,
    "check": _check,
    "compare": _compare,
    "resize": _resize,
    "extract": _extract,
    "push": _push,
    "diff": _diff,
}
