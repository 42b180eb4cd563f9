"""What the configs of transformers models say that changes what the models compute."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.model.targets import pretrained_models

# What says nothing of the function: where the model is from, how it is run, generation, labels, and what shapes say.
_ELSEWHERE = {
    "name_or_path", "transformers_version", "architectures", "model_type", "auto_map", "torch_dtype", "dtype",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "num_labels",
    "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
    "initializer_range", "quantization_config", "max_position_embeddings", "vocab_size", "tie_word_embeddings",
    "is_encoder_decoder", "attn_implementation", "experts_implementation", "gradient_checkpointing",
    "chunk_size_feed_forward", "finetuning_task", "task_specific_params", "pretraining_tp", "initializer_factor",
    "layer_types",
}  # fmt: skip
_PLAIN = (int, float, str, bool)


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The settings of each transformers model inside a module, by its name and theirs."""
    found = {}
    for name, hf_model in pretrained_models(model).items():
        config: Any = getattr(hf_model, "config", None)
        if hasattr(config, "to_dict"):
            found[name] = _plain(config.to_dict())
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name): _plain(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if str(name) not in _ELSEWHERE and "dropout" not in str(name) and not str(name).startswith("_")
        if isinstance(value, (*_PLAIN, dict))
    }


def changed_settings(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs, in words, of the settings that both have: others came with another version of transformers."""
    found = []
    for name in saved.keys() & here.keys():
        one, two = saved[name], here[name]
        if isinstance(one, dict) and isinstance(two, dict):
            found += changed_settings(one, two)
        elif (type(one) is type(two) and one != two) or isinstance(one, bool) != isinstance(two, bool):
            found.append(f"{name} ({one!r} there, {two!r} here)")
    return sorted(found)
