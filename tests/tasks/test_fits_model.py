"""Whether a model can take the rows of the data."""

import pytest
import torch
from helpers.texts import word_model
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, RobertaConfig, RobertaModel

from lightning_lora.tasks.fits_model import require_fit

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BART = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=20)), 20),
        (lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=22, pad_token_id=1)), 20),
        (lambda: BartForConditionalGeneration(BartConfig(**BART, decoder_ffn_dim=32, max_position_embeddings=20)), 20),
    ],
)
def test_rows_are_no_longer_than_there_are_positions(model: object, positions: int) -> None:
    built = model().eval()  # type: ignore[operator]
    longest = [5] * positions
    require_fit(built, 5, positions)
    with torch.no_grad():
        built(input_ids=torch.tensor([longest]))
    with pytest.raises(ValueError, match=rf"Found rows of {positions + 1} tokens and \w+ with {positions} positions"):
        require_fit(built, 5, positions + 1)


def test_tokens_have_an_embedding() -> None:
    model = word_model()
    last = model.config.vocab_size - 1
    require_fit(model, last, 5000)  # positions by rotation have no end
    with pytest.raises(
        ValueError, match=rf"Found the token id {last + 1} in the data and LlamaForCausalLM with {last + 1}"
    ):
        require_fit(model, last + 1, 2)
