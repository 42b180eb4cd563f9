"""An adapter as a GGUF file, for llama.cpp and what is built on it, such as Ollama and LM Studio.

The layout is that of llama.cpp's own converter: https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.formats.peft import adapter_contents
from lightning_lora.formats.peft_files import OF_LAYER
from lightning_lora.formats.portable import as_portable
from lightning_lora.formats.publish import partial_path, publish, remove


class _Family(NamedTuple):
    """How llama.cpp has a family of models of transformers: its name there, and whether queries and keys are turned."""

    architecture: str
    turns_heads: bool


# As llama.cpp's convert_hf_to_gguf.py has them: it permutes queries and keys of Llama and Mistral, and not of Qwen.
_FAMILIES = {
    "llama": _Family("LLAMA", True),
    "mistral": _Family("LLAMA", True),
    "qwen2": _Family("QWEN2", False),
    "qwen3": _Family("QWEN3", False),
}


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
    config: Any = getattr(base, "config", None)
    family = _FAMILIES.get(str(getattr(config, "model_type", None)))
    if family is None:
        raise ValueError(
            f"An adapter of a {type(base).__name__} cannot be written as GGUF: known are {', '.join(_FAMILIES)}. Write "
            "the merged model and convert that by llama.cpp's convert_hf_to_gguf.py."
        )
    named = _in_gguf_names(tensors, config, family)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        _write(partial, family, float(settings["lora_alpha"]), named)
        publish(partial, path)
    finally:
        remove(partial)
    return path


def _in_gguf_names(tensors: Mapping[str, Tensor], config: Any, family: _Family) -> dict[str, Tensor]:
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied_head = "lm_head" if getattr(config, "tie_word_embeddings", False) else None
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = OF_LAYER.fullmatch(name)
        assert match is not None  # the portable layout has nothing else
        layer, inner = match["layer"], match["inner"]
        own_name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if own_name is None or inner.startswith("lora_embedding") or layer == tied_head:
            raise ValueError(
                f"llama.cpp has no place for an adapter of {layer!r}"
                + (", which is tied to the embedding" if layer == tied_head else "")
                + ": leave it out of target_modules, or write the merged model."
            )
        matrix = inner.removesuffix(".weight").lower()
        kind = layer.rpartition(".")[2]
        if family.turns_heads and matrix == "lora_b" and kind in heads:
            tensor = _neighbors(tensor, heads[kind])
        found[f"{own_name}.{matrix}"] = tensor.float().contiguous()
    return found


def _neighbors(lora_B: Tensor, heads: int) -> Tensor:
    """Rows of B in the order of llama.cpp's rotary embedding for Llama, which turns neighbors against each other.

    Transformers' turns one half of a head against the other, so the two halves are interleaved.
    """
    return lora_B.view(heads, 2, -1, lora_B.shape[1]).transpose(1, 2).reshape(lora_B.shape)


def _write(path: Path, family: _Family, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(os.fspath(path), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.architecture]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
