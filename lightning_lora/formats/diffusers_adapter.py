"""An adapter of a model of diffusers, as its pipelines read it: ``pytorch_lora_weights.safetensors``.

A tensor is named ``unet.<module>.lora_A.weight`` or ``transformer.<module>.lora_A.weight``, by the part of a pipeline
that the model is. https://huggingface.co/docs/diffusers/api/loaders/lora
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.formats.peft import adapter_contents
from lightning_lora.formats.peft_files import PREFIX
from lightning_lora.formats.portable import as_portable
from lightning_lora.formats.publish import whole_directory
from lightning_lora.model.targets import is_of_diffusers

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"


def save_diffusers_adapter(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> Path:
    """Write an adapter of a UNet or a diffusion transformer for ``pipeline.load_lora_weights(directory)``.

    The model alone takes it by ``load_lora_adapter(directory, prefix="unet", use_safetensors=True)``, or by the prefix
    ``"transformer"``. Diffusers takes the scaling of such a file for one, so the scaling is a part of B in it.

    Args:
        model: A model of diffusers with adapters, or a module with one such in it.
        directory: Made if it is not there.
        adapter_name: Which adapter; may be left out if there is one.

    Returns:
        The directory.

    Raises:
        ValueError: If the adapter is not one of a model of diffusers, or has more than the portable layout can hold;
            see :func:`~lightning_lora.save_adapter`.
    """
    return _write(directory, *_contents(model, adapter_name))


def save_kohya_adapter(model: nn.Module, directory: str | Path, adapter_name: str | None = None) -> Path:
    """The same under the names of kohya's scripts, for AUTOMATIC1111, ComfyUI and others. Needs diffusers.

    Raises:
        ValueError: If it is not the adapter of a UNet, of which alone diffusers knows these names.
    """
    from diffusers.utils import state_dict_utils

    to_kohya: Any = state_dict_utils.convert_state_dict_to_kohya
    part, tensors = _contents(model, adapter_name)
    if part != "unet":
        raise ValueError("Kohya's names are known for a UNet alone: use --format diffusers, or the merged model.")
    named = {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    return _write(directory, "", to_kohya(named))


def _contents(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, Tensor]]:
    """The part of a pipeline that the model is, and by the names in it the adapter's tensors, for a scaling of one."""
    settings, tensors, base = adapter_contents(model, adapter_name)
    if not is_of_diffusers(base):
        raise ValueError(
            f"The adapter is one of a {type(base).__name__}, and diffusers' layout is for its own models: put it on "
            "the UNet or the transformer of a pipeline (LoRA(module=...)), or use PEFT's layout."
        )
    _, tensors = as_portable(settings, tensors)
    part = "unet" if "UNet" in type(base).__name__ else "transformer"
    return part, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _write(directory: str | Path, prefix: str, tensors: Mapping[str, Tensor]) -> Path:
    named = {f"{prefix}.{name}".lstrip("."): tensor.contiguous() for name, tensor in tensors.items()}
    with whole_directory(Path(directory)) as new:
        save_file(named, new / WEIGHTS_FILE, {"format": "pt"})
    return Path(directory)
