"""Prefix tuning of a causal language model: trained keys and values in front of every layer's own.

Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190. The prefix knows
nothing of LoRA, and LoRA nothing of it: a module beside the pretrained model is what ``modules_to_save="auto"`` trains
in full and stores with the adapter.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.eval_mode import evaluating
from lightning_lora.tasks.causal_lm import CausalLM


def cache_name(model: Any) -> str:
    """What a model calls the keys and values of tokens before its own, as an argument and in its output.

    It is ``past_key_values``, and ``cache`` in those versions of transformers that have renamed it.
    """
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class Prefix(nn.Module):
    """Keys and values of some tokens that are in no text.

    They start at those that the model makes of real words, which is the better start (section 7.4 of the paper).

    Args:
        model: A causal language model of transformers.
        input_ids: The words, shape ``(tokens,)``.
    """

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        super().__init__()
        with torch.no_grad(), evaluating(model):
            output = model(input_ids[None].to(model.device), use_cache=True)
        cache = getattr(output, cache_name(model))
        layers = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
        # Shape (layers, keys and values, heads, tokens, dimensions of a head).
        self.keys_values = nn.Parameter(torch.stack(layers).float())

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.keys_values.shape[3]

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        """What a model takes as the keys and values of the tokens before a batch of so many rows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.keys_values.to(dtype)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache


class PrefixCausalLM(CausalLM):
    """A causal language model behind a trained prefix; with a ``LoRA`` callback, both are trained and stored together.

    Args:
        pretrained: See :class:`CausalLM`, as for all but the last.
        prefix_text: The words at whose keys and values the prefix starts; their tokens are its length.
    """

    def __init__(
        self,
        pretrained: str,
        gguf_file: str | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        prefix_text: str = "Answer the question in the style of the examples, short and to the point.",
    ) -> None:
        super().__init__(pretrained, gguf_file, lr, weight_decay, warmup_steps, dtype, max_new_tokens)
        self.save_hyperparameters()
        self.prefix_text = prefix_text
        self.prefix: Any = None
        self._cache_name = ""

    def build(self, dtype: torch.dtype) -> Any:
        """Load the model, and make the prefix of it."""
        model = super().build(dtype)
        ids = self.tokenizer(self.prefix_text, return_tensors="pt")["input_ids"][0]
        self.prefix = Prefix(model, ids)
        self._cache_name = cache_name(model)  # before a strategy puts a wrapper around it
        return model

    def shard(self) -> None:
        """Nothing to do on one process.

        Raises:
            ValueError: With a device mesh: the prefix has no forward pass that could gather its shards.
        """
        if self.device_mesh is not None:
            raise ValueError(
                "Found ModelParallelStrategy, expected one that leaves the model whole: a prefix is not sharded. "
                "Set --trainer.strategy ddp."
            )

    def forward(self, **batch: Tensor) -> Any:
        """Output of the model behind the prefix.

        Raises:
            ValueError: If the batch holds packed rows, which would each need a prefix.
        """
        if "position_ids" in batch:
            raise ValueError(
                "Found packed rows (position_ids), expected one text in each: a prefix belongs in front of every text, "
                "so turn packing off in the data."
            )
        cache = self.prefix.cache(len(batch["input_ids"]), self.model.dtype)
        batch = {**batch, "attention_mask": self._behind_prefix(batch["attention_mask"])}
        return self.model(**batch, **{self._cache_name: cache})

    def _behind_prefix(self, rows: Tensor) -> Tensor:
        """Rows of a mask, or of token ids, with ones in the place of the prefix."""
        return torch.cat([rows.new_ones(len(rows), self.prefix.tokens), rows], dim=1)

    def _continue(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **given: Any) -> list[str]:
        given[self._cache_name] = self.prefix.cache(len(input_ids), self.model.dtype)
        # The ids in the prefix's place are never looked at: their keys and values are there already.
        input_ids, attention_mask = self._behind_prefix(input_ids), self._behind_prefix(attention_mask)
        return super()._continue(input_ids, attention_mask, max_new_tokens, **given)
