"""An adapter of a model of diffusers, as its pipelines read it: ``pytorch_lora_weights.safetensors``.

A tensor is named ``unet.<module>.lora_A.weight`` or ``transformer.<module>.lora_A.weight``, by the part of a pipeline
that the model is. https://huggingface.co/docs/diffusers/api/loaders/lora
"""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

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
    settings, tensors, base = adapter_contents(model, adapter_name)
    if not is_of_diffusers(base):
        raise ValueError(
            f"The adapter is one of a {type(base).__name__}, and diffusers' layout is for its own models: put it on "
            "the UNet or the transformer of a pipeline (LoRA(module=...)), or use PEFT's layout."
        )
    _, tensors = as_portable(settings, tensors)
    part = "unet" if "UNet" in type(base).__name__ else "transformer"
    with whole_directory(Path(directory)) as new:
        save_file(
            {f"{part}.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()},
            new / WEIGHTS_FILE,
            {"format": "pt"},
        )
    return Path(directory)
