"""The model card beside an exported adapter, as model hubs expect it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_lora.version import __version__

CARD_FILE = "README.md"
_MARK = "<!-- written by lightning-lora; a card without this line is kept -->"
_AFTER_RUN = "\n\n## Versions"
_PACKAGES = ("torch", "lightning", "transformers")


def write_card(directory: Path, settings: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> None:
    """Write a card for an adapter.

    Args:
        directory: Where the adapter lies.
        settings: What ``adapter_config.json`` holds.
        run: What there is to say of the training run: names and values, such as metrics.
    """
    base = settings.get("base_model_name_or_path")
    header = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", "- lora", "---"]
    shown = {name: value for name, value in sorted(settings.items()) if value not in (None, {}, [], False)}
    loading = f'AutoModelForCausalLM.from_pretrained("{base}")' if base else "..."
    sections = [
        "\n".join(header),
        _MARK,
        f"# LoRA adapter{f' for {base}' if base else ''}",
        "```python\nfrom peft import PeftModel\n\n"
        f"base = {loading}  # the model that the adapter was trained on\n"
        'model = PeftModel.from_pretrained(base, "this directory")\n```',
        "## Settings\n\n" + _table({name: value for name, value in shown.items() if name != "target_modules"}),
        "Adapted modules: " + _summary(settings.get("target_modules")),
        *(["## Training\n\n" + _table(run)] if run else []),
        f"{_AFTER_RUN.strip()}\n\n{_table({'lightning-lora': __version__, **{n: version(n) for n in _PACKAGES}})}",
    ]
    (directory / CARD_FILE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


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


def facts_of(trainer: "pl.Trainer") -> dict[str, Any]:
    """What a card says of a run: how long it was, on what data, and what was measured."""
    data = getattr(trainer, "datamodule", None)
    source = {name: value for name, value in getattr(data, "hparams", {}).items() if name in ("path", "pretrained")}
    return {
        "task": type(trainer.lightning_module).__name__,
        "data": f"{type(data).__name__} {source or ''}".strip() if data is not None else "given to fit",
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        **{name: f"{float(value):.6g}" for name, value in sorted(trainer.callback_metrics.items())},
        **{name: value for each in _callbacks_that_say(trainer) for name, value in each.card_facts().items()},
    }


def _callbacks_that_say(trainer: "pl.Trainer") -> list[Any]:
    """Callbacks with something of their own for the card: a method ``card_facts() -> dict``."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "card_facts")]  # type: ignore[attr-defined]


def _table(rows: Mapping[str, Any]) -> str:
    return f"| | |\n|---|---|\n{_rows(rows)}"


def _rows(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _summary(names: Any) -> str:
    """The ends of module names, each once."""
    if not isinstance(names, list):
        return str(names or "none")
    return ", ".join(sorted({f"`{name.rpartition('.')[2]}`" for name in names})) or "none"
