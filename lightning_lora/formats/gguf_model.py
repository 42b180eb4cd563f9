"""The merged model as a GGUF file, for llama.cpp and what is built on it, such as Ollama and LM Studio.

The layout is that of llama.cpp's own converter: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from lightning_lora.formats.gguf_names import GgufNames
from lightning_lora.formats.gguf_tokenizer import tokenizer_entries
from lightning_lora.formats.merged import Part, one_inside, parts_of
from lightning_lora.formats.publish import whole_file
from lightning_lora.model.merge import surrounding_dtype
from lightning_lora.sharding import is_sharded

GgufDtype = Literal["float32", "float16", "bfloat16", "q8_0"]
# By their names here: the names in the package gguf of a tensor's type, and of a file's.
_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_BLOCK = 32  # numbers of a row that Q8_0 takes together
_STATIC = ("default", "linear", "llama3")  # rotary frequencies that are the same for each length of text


def save_gguf(model: nn.Module, path: str | Path, tokenizer: Any, dtype: GgufDtype | None = None) -> Path:
    """Write a merged model of the families Llama, Mistral, Qwen 2 or Qwen 3 as a GGUF file that llama.cpp opens.

    Adapters that are at work are merged on the way, one layer after the other, and quantized weights are made ordinary
    ones, so that one tensor at a time is in memory beside the model, which stays as it is. Needs the package ``gguf``.

    Args:
        model: A model with or without adapters, or what holds one.
        path: The file; it is written as a whole, or stays as it was.
        tokenizer: A fast tokenizer of transformers that merges pairs of bytes, as those of Llama 3, SmolLM and Qwen
            do, or the path of a GGUF file whose tokenizer is taken over.
        dtype: Of the matrices: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"q8_0"``, 8 bits and a factor for each
            32 numbers. ``None`` is that of most of the model. Vectors, such as those of norms, are in float32.

    Returns:
        The file.

    Raises:
        ValueError: If llama.cpp has no place for the model, its settings or its tokenizer, or a weight is not finite in
            that type. Nothing is written then.
    """
    root = one_inside(model)
    names = GgufNames(root)
    _require_supported(root, names)
    if is_sharded(model):
        raise ValueError("The processes share this model: write it by save_merged, and that as GGUF.")
    chosen = dtype or str(surrounding_dtype(root)).removeprefix("torch.")
    if chosen not in _TYPES:
        raise ValueError(f"A GGUF file in {chosen} is not supported: choose one of {', '.join(_TYPES)}.")
    parts = {_name(part.name, names): part for part in parts_of(root, None)}
    factors = _position_factors(root.config)
    if factors is not None:
        parts["rope_freqs.weight"] = Part("rope_freqs", factors.shape, factors.dtype, lambda: factors)
    entries = tokenizer_entries(tokenizer, parts["token_embd.weight"].shape[0])
    with whole_file(Path(path)) as new:
        _write(new, root.config, names, chosen, parts, entries)
    return Path(path)


def _name(name: str, names: GgufNames) -> str:
    found = names.name_of(name)
    if found is None:
        raise ValueError(f"llama.cpp has no place for {name!r} in a model of architecture {names.architecture}.")
    return found


def _require_supported(model: Any, names: GgufNames) -> None:
    config = model.config
    window, kind = getattr(config, "sliding_window", None), config.rope_parameters["rope_type"]
    partial = config.rope_parameters.get("partial_rotary_factor") or 1.0
    problem = None
    if model.get_output_embeddings() is None:
        problem = f"{type(model).__name__} has no head for tokens"
    elif config.hidden_act != "silu":
        problem = f"hidden_act={config.hidden_act!r}"
    elif window is not None and window < config.max_position_embeddings:
        problem = f"sliding_window={window}"
    elif partial != 1 or not (kind == "default" or (kind in _STATIC and names.family.scales_positions)):
        problem = f"rope_type={kind!r} (partial_rotary_factor={partial})"
    if problem is not None:
        raise ValueError(f"llama.cpp has no such model of architecture {names.architecture}: {problem}.")


def _position_factors(config: Any) -> Tensor | None:
    """By what the rotary frequencies are divided, ``None`` if they are those of their base alone."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, size = config.rope_parameters["rope_type"], _head_size(config)
    if kind == "default":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    base = torch.tensor(config.rope_parameters["rope_theta"])
    return base ** -(torch.arange(0, size, 2) / size) / frequencies


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write(
    path: Path, config: Any, names: GgufNames, dtype: str, parts: Mapping[str, Part], entries: Mapping[str, Any]
) -> None:
    import gguf
    from gguf.quants import quant_shape_to_byte_shape, quantize

    matrix, file_type = _TYPES[dtype]
    types = {name: gguf.GGMLQuantizationType[_type_of(part.shape, matrix)] for name, part in parts.items()}
    with closing(gguf.GGUFWriter(os.fspath(path), names.architecture)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, config, parts["token_embd.weight"].shape[0])
        for key, value in entries.items():
            _add_entry(writer, key, value)
        for name, part in parts.items():
            size = math.prod(quant_shape_to_byte_shape(part.shape, types[name]))
            writer.add_tensor_info(name, part.shape, numpy.dtype("float32"), size, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, part in parts.items():
            rows = names.in_order(part.name.rpartition(".")[0], part.values().detach().cpu().float())
            if not (rows if matrix != "F16" else rows.half()).isfinite().all():
                raise ValueError(f"{part.name!r} holds values that are not finite in {dtype}. Nothing was written.")
            writer.write_tensor_data(quantize(rows.contiguous().numpy(), types[name]))


def _type_of(shape: Sequence[int], matrix: str) -> str:
    if len(shape) == 1:
        return "F32"
    return "F16" if matrix == "Q8_0" and shape[-1] % _BLOCK else matrix


def _add_sizes(writer: Any, config: Any, rows: int) -> None:
    writer.add_name(Path(getattr(config, "_name_or_path", "") or "model").name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)


def _add_entry(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
