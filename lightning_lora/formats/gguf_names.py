"""The families of models that llama.cpp has, and what it calls and how it orders their tensors.

As its own converters do: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Family(NamedTuple):
    """How llama.cpp has a family of models of transformers.

    Attributes:
        architecture: Its name in the package ``gguf``.
        turns_heads: Whether rows of queries and keys are in another order there.
        scales_positions: Whether there is a place for factors of its rotary frequencies.
    """

    architecture: str
    turns_heads: bool
    scales_positions: bool


_FAMILIES = {
    "llama": Family("LLAMA", True, True),
    "mistral": Family("LLAMA", True, True),
    "qwen2": Family("QWEN2", False, False),
    "qwen3": Family("QWEN3", False, False),
}


class GgufNames:
    """The names and the order of a model's tensors in a GGUF file.

    Args:
        model: A model of transformers.

    Attributes:
        family: Of the model.
        architecture: The name of the family in files.

    Raises:
        ValueError: If it is of no family that is known here.
        ModuleNotFoundError: If the package ``gguf`` is not installed, with the command that does.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        family = _FAMILIES.get(str(getattr(config, "model_type", None)))
        if family is None:
            raise ValueError(
                f"A model of class {type(model).__name__} cannot be written as GGUF: known are {', '.join(_FAMILIES)}. "
                "Write the merged model and convert that by llama.cpp's convert_hf_to_gguf.py."
            )
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("GGUF files need the package gguf: run pip install gguf.") from error
        self.family = family
        self.architecture: str = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.architecture]]
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def name_of(self, name: str) -> str | None:
        """The name of a weight or a bias in a file, ``None`` if there is no place for it."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def in_order(self, layer: str, rows: Tensor) -> Tensor:
        """Rows of a layer's outputs in the order of llama.cpp's rotary embedding for Llama.

        It turns neighbors against each other, and transformers' one half of a head against the other, so the two
        halves are interleaved.

        Args:
            layer: The name of the layer in transformers.
            rows: Any tensor whose first dimension is that of the layer's outputs.
        """
        heads = self._heads.get(layer.rpartition(".")[2])
        if heads is None or not self.family.turns_heads:
            return rows
        return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
