"""Architectures of transformers at tiny sizes, with inputs that they take."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

_SIZES = {
    32: "hidden_size d_model n_embd dim embedding_size image_size max_source_positions max_target_positions",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers type_vocab_size "
    "num_experts_per_tok num_key_value_heads eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    8: "head_dim patch_size d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim state_size",
    48: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim",
    24: "moe_intermediate_size",
    16: "projection_dim q_lora_rank kv_lora_rank shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions",
    99: "vocab_size",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
_CLASSES = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "plain": AutoModel}


def tiny(model_type: str) -> nn.Module:
    """A model of a type, with random weights: for causal or sequence-to-sequence language modeling where it is for it.

    Raises:
        LookupError: If none can be made so small.
    """
    config = _shrunk(CONFIG_MAPPING[model_type]())
    problem: Exception | None = None
    for cls in _CLASSES.values():
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls.from_config(copy.deepcopy(config)).parameters())
            if size > 5e6:
                raise LookupError(f"{size} parameters")
            model: nn.Module = cls.from_config(copy.deepcopy(config)).float()
            with torch.no_grad():
                outputs(model.eval(), inputs_for(model))
            return model.train()
        except Exception as error:  # whatever a class raises that has no such model, or takes other inputs
            problem = error
    raise LookupError(f"{model_type}: {problem}")


def _shrunk(config: Any) -> Any:
    for size, names in _SIZES.items():
        for name in names.split():
            with contextlib.suppress(Exception):  # settings that follow from others, or that are lists
                found = getattr(config, name, None)
                if type(found) is int and found != 0:
                    setattr(config, name, size)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrunk(value)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[:2])
    return config


def inputs_for(model: Any) -> dict[str, Tensor]:
    """Two rows, by what the model says is its main input."""
    name, config, generator = model.main_input_name, model.config, torch.Generator().manual_seed(1)
    if name == "input_ids":
        ids = {"input_ids": torch.randint(3, 90, (2, 7), generator=generator)}
        if getattr(config, "is_encoder_decoder", False):
            ids["decoder_input_ids"] = torch.randint(3, 90, (2, 5), generator=generator)
        return ids
    shapes = {
        "pixel_values": (2, getattr(config, "num_channels", 3), *2 * [getattr(config, "image_size", 32)]),
        "input_values": (2, 8000),
        "input_features": (2, getattr(config, "num_mel_bins", 80), 64),
    }
    return {name: torch.randn(shapes[name], generator=generator)}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All floating-point tensors that a model gives, with the same random numbers each time."""
    torch.manual_seed(3)
    found = list(tensors(model(**inputs)))
    if not found or any(not tensor.isfinite().all() for tensor in found):
        raise LookupError("gives nothing that is finite")
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model gives."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)
