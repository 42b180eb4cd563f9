"""An adapter as a GGUF file, for llama.cpp and what is built on it, such as Ollama and LM Studio.

The layout is that of llama.cpp's own converter: https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
"""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_lora.formats.gguf_names import GgufNames
from lightning_lora.formats.peft import adapter_contents
from lightning_lora.formats.peft_files import OF_LAYER
from lightning_lora.formats.portable import as_portable
from lightning_lora.formats.publish import whole_file


def save_gguf_adapter(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> Path:
    """Write an adapter of a Llama- or Qwen-like model of transformers as a GGUF file.

    Use it with the base as GGUF: ``llama-cli -m base.gguf --lora adapter.gguf``, or ``ADAPTER ./adapter.gguf`` in a
    Modelfile of Ollama. Needs the package ``gguf``.

    Args:
        model: A model with adapters.
        path: The file; it is written as a whole, or stays as it was.
        adapter_name: Which adapter; may be left out if there is one.

    Returns:
        The file.

    Raises:
        ValueError: If llama.cpp has no place for the adapter: it is of another family of models, adapts an embedding
            or a head that is tied to one, or holds more than the portable layout can (see
            :func:`~lightning_lora.save_adapter`).
    """
    settings, tensors, base = adapter_contents(model, adapter_name)
    settings, tensors = as_portable(settings, tensors)
    names = GgufNames(base)
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    named = _in_gguf_names(tensors, names, "lm_head" if tied else None)
    with whole_file(Path(path)) as new:
        _write(new, names.architecture, float(settings["lora_alpha"]), named)
    return Path(path)


def _in_gguf_names(tensors: Mapping[str, Tensor], names: GgufNames, tied_head: str | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = OF_LAYER.fullmatch(name)
        assert match is not None  # the portable layout has nothing else
        layer, inner = match["layer"], match["inner"]
        own_name = names.name_of(f"{layer}.weight")
        if own_name is None or inner.startswith("lora_embedding") or layer == tied_head:
            raise ValueError(
                f"llama.cpp has no place for an adapter of {layer!r}"
                + (", which is tied to the embedding" if layer == tied_head else "")
                + ": leave it out of target_modules, or write the merged model."
            )
        matrix = inner.removesuffix(".weight").lower()
        if matrix == "lora_b":
            tensor = names.in_order(layer, tensor)
        found[f"{own_name}.{matrix}"] = tensor.float().contiguous()
    return found


def _write(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
