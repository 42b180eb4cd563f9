"""The two files of an adapter in PEFT's format, opened and checked before anything is made of them.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_lora.config import quantization
from lightning_lora.formats.peft_keys import LOFTQ_ITERATIONS
from lightning_lora.formats.schema import require_names, require_type
from lightning_lora.model.fingerprint import Fingerprint
from lightning_lora.model.finite import DTYPES
from lightning_lora.model.state_dict import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLED_FILE = "adapter_model.bin"
_FINGERPRINT, _SAMPLES = "lightning_lora_base_fingerprint", "lightning_lora_base_samples"
_SKETCHES, _CONFIG = "lightning_lora_base_sketches", "lightning_lora_base_config"
_QUANTIZATION = "lightning_lora_base_quantization"
_BASE = "lightning_lora_base"
_CHECKSUMS = "lightning_lora_checksums"
_WRAPPED = re.compile(r"\.(original_module|modules_to_save)\.")
# The layer, how often PEFT has wrapped it, and what an adapter has: A and B, a magnitude, the vectors of VeRA.
OF_LAYER = re.compile(
    rf"{re.escape(PREFIX)}(?P<layer>.+?)(?P<depth>(?:\.base_layer)*)\.(?P<inner>(?:lora_|vera_lambda).+)"
)


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What the files hold.

    Attributes:
        directory: Where they are.
        settings: What ``adapter_config.json`` says.
        tensors: The tensors by their names in the file, on the CPU.
        meta: The metadata of their file.
    """

    directory: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    meta: dict[str, str]

    @property
    def config_file(self) -> str:
        """Where the settings are, for errors."""
        return str(self.directory / CONFIG_FILE)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The base's, if this package wrote the files."""
        if _FINGERPRINT not in self.meta:
            return None
        config = json.loads(self.meta[_CONFIG]) if _CONFIG in self.meta else None
        return Fingerprint(self.meta[_FINGERPRINT], self.meta.get(_SAMPLES), self.meta.get(_SKETCHES), config)

    @property
    def is_trained_by_peft(self) -> bool:
        """Whether the tensors mean what PEFT makes of them, and not what this package does where the two differ."""
        return self.fingerprint is None or bool(self.settings.get("peft_version"))

    @property
    def quantization(self) -> list[dict[str, Any]]:
        """How the base was quantized, as :func:`~lightning_lora.model.quantization.quantization` says it."""
        found: list[dict[str, Any]] = json.loads(self.meta.get(_QUANTIZATION, "[]"))
        return found

    @property
    def start(self) -> str | None:
        """The start that quantized the base, if this package wrote the files and there was one."""
        return self.meta.get(_BASE)


def read_files(directory: Path) -> PeftFiles:
    """Open an adapter in PEFT's format.

    Raises:
        CheckpointError: If a file is missing, damaged, or no adapter's.
    """
    _require_files(directory)
    settings = _read_settings(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    with _opened(path) as file:
        # With bias="all", PEFT writes the biases of modules_to_save twice more, under names of its own wrapper.
        require_names(file.keys(), str(path))
        names = [name for name in file.keys() if not _WRAPPED.search(name)]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
        meta = dict(file.metadata() or {})
    _require_undamaged(tensors, meta, path)
    _require_plain(meta, path)
    start = meta.get(_BASE)
    if start is not None and (quantization(start) or (0, LOFTQ_ITERATIONS + 1))[1] > LOFTQ_ITERATIONS:
        raise CheckpointError(
            f"{path} says {_BASE}={start[:80]!r}, which is no start that quantizes a base: the file is damaged or was "
            "made up. Nothing was loaded."
        )
    return PeftFiles(directory, settings, tensors, meta)


def layers_in(tensors: Mapping[str, Any]) -> list[str]:
    """The names of the layers that tensors under PEFT's names are adapters of."""
    return list(dict.fromkeys(found["layer"] for found in map(OF_LAYER.fullmatch, tensors) if found is not None))


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    fingerprint: Fingerprint | None,
    start: str | None = None,
    quantized: list[dict[str, Any]] | None = None,
) -> None:
    """Write the tensors of an adapter, with a checksum of each, and what they say of their base.

    Args:
        path: The file.
        tensors: By their names in PEFT, on the CPU; no two share memory.
        fingerprint: Of the base, if it is known.
        start: The start that quantized the base, if one did.
        quantized: How the base came quantized, if it did.
    """
    meta = {"format": "pt"}
    if fingerprint is not None:
        meta[_FINGERPRINT] = fingerprint.short
        if fingerprint.samples is not None:
            meta[_SAMPLES] = fingerprint.samples
        if fingerprint.sketches is not None:
            meta[_SKETCHES] = fingerprint.sketches
        if fingerprint.config:
            meta[_CONFIG] = json.dumps(fingerprint.config, sort_keys=True)
    if start is not None:
        meta[_BASE] = start
    if quantized:
        meta[_QUANTIZATION] = json.dumps(quantized)
    meta[_CHECKSUMS] = json.dumps({name: _checksum(tensor) for name, tensor in sorted(tensors.items())})
    save_file(dict(tensors), path, meta)


def _require_files(directory: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            pickled = name == WEIGHTS_FILE and (directory / _PICKLED_FILE).is_file()
            raise CheckpointError(
                f"{directory} has no {name}, so it is no adapter in PEFT's format: give the directory that holds "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}."
                + (
                    f" Its {_PICKLED_FILE} can run code where it is opened: if you trust it, open it with PEFT and "
                    "save it again with safe_serialization=True."
                    if pickled
                    else ""
                )
                + " Nothing was loaded."
            )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}): it is damaged or cut short, so copy it again. Nothing was "
            "loaded."
        ) from error
    require_type(settings, dict[str, Any], str(path))
    require_type(settings.get("peft_type"), str, str(path), "peft_type")
    return settings  # type: ignore[no-any-return]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged or cut short, so copy it again. Nothing was loaded."
        ) from error


def _require_undamaged(tensors: Mapping[str, Tensor], meta: Mapping[str, str], path: Path) -> None:
    for name, tensor in tensors.items():
        # Other tensors are of modules that are trained in full, whose buffers may count.
        if tensor.dtype not in DTYPES and (tensor.is_floating_point() or OF_LAYER.fullmatch(name)):
            raise CheckpointError(
                f"{path} holds {name!r} as {tensor.dtype}, and an adapter's tensors are floating-point numbers of 16 "
                "bits or more: it is damaged, or no adapter. Nothing was loaded."
            )
    if _CHECKSUMS not in meta:  # an older file, or PEFT's
        return
    try:
        checksums: Any = json.loads(meta[_CHECKSUMS])
    except (ValueError, RecursionError):
        checksums = None
    require_type(checksums, dict[str, int], str(path), _CHECKSUMS)
    changed = [name for name, value in checksums.items() if name in tensors and _checksum(tensors[name]) != value]
    if changed:
        raise CheckpointError(
            f"{path} is damaged: {changed[0]!r} is not what was written ({len(changed)} of {len(tensors)} tensors). "
            "Take another copy of it. Nothing was loaded."
        )


def _require_plain(meta: Mapping[str, str], path: Path) -> None:
    for name, hint, default in ((_QUANTIZATION, list[dict[str, Any]], "[]"), (_CONFIG, dict[str, Any], "{}")):
        try:
            found: Any = json.loads(meta.get(name, default))
        except (ValueError, RecursionError):
            found = None
        require_type(found, hint, str(path), name)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
