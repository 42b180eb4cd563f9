"""Saved adapters as files, read without the model that they belong to."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.config import LoraConfig
from lightning_lora.formats.checkpoint import KEY, read_checkpoint
from lightning_lora.formats.dcp import is_directory
from lightning_lora.formats.metadata import config_of
from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_files
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
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def named(self) -> dict[str, Tensor]:
        """The tensors by names that are the same in both formats, such as ``model.q_proj.lora_A``."""
        return {_common_name(name): tensor for name, tensor in self.tensors.items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer, by a name that is the same in both formats."""
        named = self.named()
        pairs = {name.rpartition(".lora_A")[0]: (a, named.get(f"{name[:-1]}B")) for name, a in named.items()}
        return {layer: (a, b) for layer, (a, b) in pairs.items() if layer and b is not None and a.dim() > 1}

    def config(self) -> LoraConfig:
        """The settings of the adapter, of the first of several.

        Raises:
            CheckpointError: If they describe an adapter that this package does not have.
        """
        if "peft_type" in self.settings:
            return config_from_peft(self.settings, str(self.path / CONFIG_FILE))
        return config_of({"config": self.settings}, str(self.path))


def _common_name(name: str) -> str:
    name = re.sub(r"(^|\.)lora\.[^.]+\.(weight\.)?", r"\1", name.removeprefix(PREFIX))  # with the adapter's name
    name = name.replace("lora_embedding_", "lora_").replace("token_adapter.trainable_tokens_delta", "trainable_tokens")
    return re.sub(r"(lora_\w+)\.weight$", r"\1", name)


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
