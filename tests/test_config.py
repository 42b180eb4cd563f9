import dataclasses

import pytest

from lightning_lora import LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] is -1"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"q": "8"}}, r"alpha_pattern\['q'\] is '8'"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "q_proj("}, "not a valid"),
        ({"target_modules": 3}, "target_modules is of type int"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "best"}, "init_lora_weights is 'best'"),
    ],
)
def test_refuses_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_is_frozen_and_survives_plain_types() -> None:
    config = LoraConfig(r=4, target_modules=("a", "b"), rank_pattern={"a": 2})
    assert config.target_modules == ["a", "b"]
    assert LoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="new_setting"):
        LoraConfig.from_dict({**config.to_dict(), "new_setting": 1})


def test_rank_alpha_and_scaling_by_pattern() -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, rank_pattern={"q_proj": 4, r"layers\.1\.v_proj": 2}, alpha_pattern={"q_proj": 2}
    )
    assert (config.rank("m.layers.0.q_proj"), config.rank("layers.1.v_proj"), config.rank("layers.11.v_proj")) == (
        4,
        2,
        8,
    )
    assert config.rank("m.layers.0.xq_proj") == 8
    assert (config.scaling("q_proj"), config.scaling("k_proj")) == (0.5, 2.0)
    rs = LoraConfig(r=16, lora_alpha=16, use_rslora=True)
    assert rs.scaling("any") == 4.0
