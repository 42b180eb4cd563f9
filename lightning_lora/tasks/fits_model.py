"""Whether a model can take the rows that it is to learn."""

from typing import Any

from torch import nn


def require_fit(model: Any, highest: int, longest: int) -> None:
    """Require that each token of some rows has an embedding, and each of their places a position.

    Args:
        model: A model of transformers.
        highest: The greatest token id in the rows, or -1 if they have none.
        longest: Tokens of the longest row.

    Raises:
        ValueError: If the model has fewer tokens than the tokenizer, or rows are longer than it has positions.
    """
    config = getattr(model.config, "encoder", None) or model.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"Found the token id {highest} in the data and {type(model).__name__} with {vocabulary} tokens, expected a "
            "tokenizer that belongs to the model. Set data.pretrained to the model's checkpoint, or leave it out."
        )
    positions = min(map(_positions, _position_embeddings(model)), default=None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"Found rows of {longest} tokens and {type(model).__name__} with {positions} positions, expected no longer "
            f"ones. Set data.max_length to {positions} or less."
        )


def _position_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings of absolute positions, by the names that transformers gives them."""
    names = ("position_embeddings", "embed_positions", "wpe")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in names
    ]


def _positions(embedding: nn.Embedding) -> int:
    # RoBERTa's first position follows that of padding; BART's are two further.
    padding = embedding.padding_idx
    offset = getattr(embedding, "offset", 0) if padding is None else padding + 1
    return embedding.num_embeddings - int(offset)
