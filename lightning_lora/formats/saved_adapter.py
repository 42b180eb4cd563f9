"""Saved adapters as files, read without the model that they belong to."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.formats.checkpoint import KEY, read_checkpoint
from lightning_lora.formats.dcp import is_directory
from lightning_lora.formats.peft_files import PREFIX, WEIGHTS_FILE, read_files
from lightning_lora.model.quantization import described


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """What a checkpoint or a directory in PEFT's format holds.

    Attributes:
        path: Where it was read.
        kind: What it is, in words.
        settings: The LoRA settings; of several adapters, those of the first.
        tensors: The tensors, by their names in the file.
        facts: What else it says of itself, in words.
        quantization: How its base was quantized: each format in plain types; empty if it was not.
    """

    path: Path
    kind: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, str]
    quantization: list[dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer, by a name that is the same in both formats."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            short = name.removeprefix(PREFIX).removesuffix(".weight").replace("lora_embedding_", "lora_")
            layer, _, matrix = short.rpartition(".")
            if matrix in ("lora_A", "lora_B") and tensor.dim() > 1:
                found.setdefault(layer.partition(".lora.")[0], {})[matrix] = tensor
        return {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in found.items() if len(pair) == 2}


def read(path: str | Path) -> SavedAdapter:
    """Read a Lightning checkpoint or a directory in PEFT's format; objects beside the adapter stay unopened.

    Raises:
        CheckpointError: If it is damaged, holds no adapter, or cannot be read without opening objects.
        FileNotFoundError: If it is not there.
    """
    path = Path(path)
    return _directory(path) if path.is_dir() and not is_directory(path) else _checkpoint(path)


def _directory(path: Path) -> SavedAdapter:
    files = read_files(path)
    settings = files.settings
    facts = {
        "base model": str(settings.get("base_model_name_or_path") or "not named"),
        "base fingerprint": str(files.fingerprint or "not there (not written by lightning-lora)"),
        **({"base": described(files.quantization)} if files.quantization else {}),
        "file": f"{(path / WEIGHTS_FILE).stat().st_size / 1e6:.2f} MB",
    }
    kind = f"{settings['peft_type']} adapter in PEFT's format"
    return SavedAdapter(path, kind, settings, files.tensors, facts, files.quantization)


def _checkpoint(path: Path) -> SavedAdapter:
    checkpoint = read_checkpoint(path)
    entries = checkpoint[KEY]["adapters"]
    quantization = entries[0].get("quantization", []) if entries else []
    facts = {
        "adapters": ", ".join(f"{e['adapter_name']} on {e['module'] or 'the whole module'}" for e in entries),
        "base fingerprint": ", ".join(sorted({entry["base_fingerprint"] for entry in entries})) or "none",
        **({"base": described(quantization)} if quantization else {}),
        "progress": f"epoch {checkpoint.get('epoch')}, step {checkpoint.get('global_step')}",
        "Lightning": str(checkpoint.get("pytorch-lightning_version", "unknown")),
        "optimizer state": "no" if _is_empty(checkpoint.get("optimizer_states")) else "yes",
        "file": f"{path.stat().st_size / 1e6:.2f} MB",
    }
    tensors = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    settings = entries[0]["config"] if entries else {}
    if entries and entries[0].get("peft"):
        settings = next(iter(entries[0]["peft"].values()))
    return SavedAdapter(path, "Lightning checkpoint of adapters", settings, tensors, facts, quantization)


def _is_empty(states: Any) -> bool:
    return not isinstance(states, list) or not states
