"""Models of transformers that change a layer's output in place train with LoRA's defaults, and as on the plain path."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoraConfig, inject
from lightning_lora.layers import functional

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
}
# With SpecAugment, which writes into the features in place.
SOUND = TEXT | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.5,
    "mask_time_length": 2,
    "mask_feature_prob": 0.3,
    "mask_feature_length": 2,
    "mask_feature_min_masks": 0,
}


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 39, (2, 8)), "labels": torch.tensor([0, 1])}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 1600), "labels": torch.randint(1, 39, (2, 4))}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}


def speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 1600), "labels": torch.randint(3, 39, (2, 6))}


MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "Wav2Vec2ForCTC": (SOUND, sound),
    "HubertForCTC": (SOUND, sound),
    "WavLMForCTC": (SOUND, sound),
    "UniSpeechForCTC": (SOUND | {"num_ctc_classes": 40}, sound),
    "Data2VecAudioForCTC": (SOUND, sound),
    "SEWForCTC": (SOUND | {"squeeze_factor": 2}, sound),
    "SpeechT5ForSpeechToText": (
        SOUND
        | {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "decoder_start_token_id": 2,
        },
        speech,
    ),
    "LongformerForSequenceClassification": (TEXT | {"attention_window": 4, "max_position_embeddings": 64}, ids),
    "DebertaForSequenceClassification": (TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, ids),
    "Swinv2ForImageClassification": (
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4},
        image,
    ),
}


def train_a_step(name: str, activation: str, seed: int) -> dict[str, Tensor]:
    """The adapter after a step."""
    config, inputs = MODELS[name]
    torch.manual_seed(seed)
    model_class = getattr(tf, name)
    settings = model_class.config_class(**config)
    settings.hidden_act = settings.feat_extract_activation = activation
    model: nn.Module = inject(model_class(settings).train(), LoraConfig(r=2))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    batch = inputs()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    loss = model(**batch).loss
    assume(loss.requires_grad)  # or LayerDrop has left out every layer
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    optimizer.step()
    return trained


@settings(max_examples=2)
@pytest.mark.parametrize("name", MODELS)
@given(activation=st.sampled_from(["gelu", "relu", "silu"]), seed=st.integers(0, 1000))
def test_a_step_is_that_of_the_plain_path(name: str, activation: str, seed: int) -> None:
    found = []
    for fast in (True, False):
        np.random.seed(seed)  # SpecAugment draws with it
        with pytest.MonkeyPatch.context() as patch:
            if not fast:
                patch.setattr(functional, "is_plain", lambda *tensors: False)
            found.append(train_a_step(name, activation, seed))
    assert found[0].keys() == found[1].keys()
    for one, other in zip(found[0].values(), found[1].values()):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
