"""Small models of transformers, each the same every time."""

from typing import Any

import lightning as L
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def tiny_llama(**settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **settings,
        )
    )


def tiny_classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3
    )
    return BertForSequenceClassification(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))


class Wrapped(L.LightningModule):
    """A transformers model inside of a LightningModule, as users have it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = tiny_llama()
        if seed:
            nn.init.normal_(self.model.model.layers[0].mlp.up_proj.weight)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches(*ids: torch.Tensor) -> DataLoader:
    return DataLoader(list(ids), batch_size=None)  # type: ignore[arg-type]


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, max_position_embeddings=32, d_model=16, scale_embedding=True, **sizes, **ffn)
    )


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, pad_token_id=0,
        )
    )  # fmt: skip


IDS = torch.arange(16).view(2, 8)
EXPERT_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERT_SIZES, num_local_experts=4, num_experts_per_tok=2))


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=4))
