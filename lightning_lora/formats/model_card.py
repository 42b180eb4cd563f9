"""The model card beside an exported adapter or merged model, as model hubs expect it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_lora.version import __version__

CARD_FILE = "README.md"
_MARK = "<!-- written by lightning-lora; a card without this line is kept -->"
_AFTER_RUN = "\n\n## Versions"
_PACKAGES = ("torch", "lightning", "transformers")


class Run(NamedTuple):
    """What there is to say of a training run.

    Attributes:
        facts: Names and values, such as metrics.
        pictures: By its caption, what draws a picture into a directory and returns its name, ``None`` if there is none.
    """

    facts: Mapping[str, Any]
    pictures: Mapping[str, Callable[[Path], str | None]] = {}


def write_card(directory: Path, settings: Mapping[str, Any], run: Run | None = None) -> None:
    """Write a card for an adapter, with its pictures.

    Args:
        directory: Where the adapter lies.
        settings: What ``adapter_config.json`` holds.
        run: What there is to say of the training run.
    """
    base = settings.get("base_model_name_or_path")
    shown = {name: value for name, value in sorted(settings.items()) if value not in (None, {}, [], False)}
    # A name may come from somebody else's file, and this is code that people run.
    loading = f"AutoModelForCausalLM.from_pretrained({json.dumps(str(base))})" if base else "..."
    sections = [
        f"# LoRA adapter{f' for {base}' if base else ''}",
        "```python\nfrom peft import PeftModel\n\n"
        f"base = {loading}  # the model that the adapter was trained on\n"
        'model = PeftModel.from_pretrained(base, "this directory")\n```',
        "## Settings\n\n" + _table({name: value for name, value in shown.items() if name != "target_modules"}),
        "Adapted modules: " + _summary(settings.get("target_modules")),
    ]
    _write(directory, "peft", base, sections, run)


def write_merged_card(directory: Path, library: str | None, model: str, base: str | None, run: Run | None) -> None:
    """Write a card for a merged model, with its pictures.

    Args:
        directory: Where the model lies.
        library: ``"transformers"`` or ``"diffusers"``, whose class it is; ``None`` for any other model.
        model: The name of its class.
        base: The name of the model that the adapters were trained on, if it is known.
        run: What there is to say of the training run.
    """
    opened = f'```python\nfrom {library} import {model}\n\nmodel = {model}.from_pretrained("this directory")\n```'
    if library is None:
        opened = f"The state dict of a `{model}`, with no adapters in it."
    _write(directory, library, base, [f"# {base or model} with LoRA adapters merged in", opened], run)


def _write(directory: Path, library: str | None, base: str | None, sections: Sequence[str], run: Run | None) -> None:
    header = [
        "---",
        *([f"base_model: {base}"] if base and _is_of_hub(base) else []),
        *([f"library_name: {library}"] if library else []),
        *("tags:", "- lora", "---"),
    ]
    drawn = {caption: draw(directory) for caption, draw in (run.pictures if run else {}).items()}
    pictures = [f"![{caption}]({name})" for caption, name in drawn.items() if name is not None]
    training = ["\n\n".join(["## Training", *pictures, *([_table(run.facts)] if run.facts else [])])] if run else []
    versions = _table({"lightning-lora": __version__, **{name: version(name) for name in _PACKAGES}})
    whole = ["\n".join(header), _MARK, *sections, *training, f"{_AFTER_RUN.strip()}\n\n{versions}"]
    (directory / CARD_FILE).write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def _is_of_hub(name: str) -> bool:
    """Whether a base is named as hubs know it, which refuse a card that names another."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def add_to_card(directory: Path, facts: Mapping[str, Any]) -> None:
    """Add facts of the training run to a card that this package has written."""
    path = directory / CARD_FILE
    if path.exists() and not has_own_card(directory):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(_AFTER_RUN, f"\n{_rows(facts)}{_AFTER_RUN}", 1), encoding="utf-8")


def has_own_card(directory: Path) -> bool:
    """Whether a directory has a card that somebody else wrote, which is to stay as it is."""
    path = directory / CARD_FILE
    return path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")


def run_of(trainer: "pl.Trainer") -> Run:
    """What a card says of a run: how long it was, on what data, what was measured, and what callbacks know of it.

    They say so by methods ``card_facts() -> dict`` and ``card_picture(trainer, directory) -> name | None``.
    """
    data = getattr(trainer, "datamodule", None)
    source = {name: value for name, value in getattr(data, "hparams", {}).items() if name in ("path", "pretrained")}
    facts = {
        "task": type(trainer.lightning_module).__name__,
        "data": f"{type(data).__name__} {source or ''}".strip() if data is not None else "given to fit",
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        **{name: f"{float(value):.6g}" for name, value in sorted(trainer.callback_metrics.items())},
        **{name: value for each in _callbacks_with(trainer, "card_facts") for name, value in each.card_facts().items()},
    }
    drawing = _callbacks_with(trainer, "card_picture")
    return Run(facts, {type(each).__name__: partial(each.card_picture, trainer) for each in drawing})


def _callbacks_with(trainer: "pl.Trainer", method: str) -> list[Any]:
    return [callback for callback in trainer.callbacks if hasattr(callback, method)]  # type: ignore[attr-defined]


def _table(rows: Mapping[str, Any]) -> str:
    return f"| | |\n|---|---|\n{_rows(rows)}"


def _rows(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _summary(names: Any) -> str:
    """The ends of module names, each once."""
    if not isinstance(names, list):
        return str(names or "none")
    return ", ".join(sorted({f"`{name.rpartition('.')[2]}`" for name in names})) or "none"
