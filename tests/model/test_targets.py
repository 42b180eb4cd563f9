import pytest
from helpers.models import tiny_classifier, tiny_llama
from torch import nn

from lightning_lora import LoraConfig, TargetError, inject
from lightning_lora.model.targets import find_modules_to_save, find_targets


def names(model: nn.Module, **settings: object) -> list[str]:
    return list(find_targets(model, LoraConfig(**settings)))  # type: ignore[arg-type]


def test_suffixes_globs_and_regular_expressions() -> None:
    model = tiny_llama()
    every_q = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert names(model, target_modules=["q_proj"]) == every_q
    assert names(model, target_modules=["self_attn.q_proj"]) == every_q
    assert names(model, target_modules=["*.layers.[01].*.q_proj"]) == every_q[:2]
    assert names(model, target_modules=r".*\.[12]\..*q_proj") == every_q[1:]
    assert names(model, target_modules=["q_proj"], exclude_modules=["*.1.*"]) == [every_q[0], every_q[2]]
    assert names(model, target_modules=["q_proj"], layers_to_transform=[2]) == every_q[2:]
    assert names(model, target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers") == every_q[:1]
    assert names(model, target_modules=["q_proj"], layers_to_transform=0, layers_pattern=["h", "layers"]) == every_q[:1]
    with pytest.raises(TargetError):
        names(model, target_modules=["roj"])


def test_all_linear_leaves_out_the_output_head_and_new_heads() -> None:
    llama = names(tiny_llama())
    assert len(llama) == 3 * 7
    assert "lm_head" not in llama
    bert = names(tiny_classifier())
    assert "classifier" not in bert
    assert "bert.pooler.dense" in bert
    assert len(bert) == 2 * 6 + 1
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]
    assert names(nn.Linear(2, 2)) == [""]


def test_new_heads_are_found_and_pretrained_ones_are_not() -> None:
    auto = LoraConfig()
    assert list(find_modules_to_save(tiny_classifier(), auto)) == ["classifier"]
    assert list(find_modules_to_save(tiny_llama(), auto)) == []
    assert list(find_modules_to_save(nn.Sequential(nn.Linear(2, 2)), auto)) == []
    assert list(find_modules_to_save(tiny_classifier(), LoraConfig(modules_to_save=None))) == []

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny_classifier().bert
            self.head = nn.Linear(32, 2)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    assert list(find_modules_to_save(Own(), auto)) == ["head"]
    explicit = LoraConfig(target_modules=["query", "head"])
    assert list(find_modules_to_save(Own(), explicit)) == []
    assert "head" in find_targets(Own(), explicit)


def test_nothing_matched_names_what_is_near_and_what_there_is() -> None:
    model = tiny_llama()
    keys = list(model.state_dict())
    with pytest.raises(
        TargetError, match=r"'q_prj'.*matches no module.*'q_proj'.*q_proj \(3\).*lm_head \(1\).*all-linear"
    ):
        inject(model, LoraConfig(target_modules=["q_prj"]))
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_dead_pattern_is_named() -> None:
    with pytest.warns(UserWarning, match="'nope' matched nothing"):
        find_targets(tiny_llama(), LoraConfig(target_modules=["q_proj", "nope"]))


def test_an_unsupported_kind_is_named_and_nothing_changes() -> None:
    model = tiny_llama()
    with pytest.raises(TargetError, match=r"'model\.norm'.*LlamaRMSNorm.*supported are .*torch\.nn\.Linear"):
        inject(model, LoraConfig(target_modules=["q_proj", "model.norm"]))
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_whose_weight_is_read_without_a_call() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert names(model) == ["self_attn", "linear1", "linear2"]
    with pytest.raises(TargetError, match=r"'self_attn\.out_proj'.*the MultiheadAttention around it reads its weight"):
        inject(model, LoraConfig(target_modules=["linear1", "out_proj"]))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert names(model, target_modules=["linear1", "out_proj"], exclude_modules=["out_proj"]) == ["linear1"]


def test_unknown_module_to_save() -> None:
    with pytest.raises(TargetError, match=r"'classifer'.*near it are 'classifier'"):
        inject(tiny_classifier(), LoraConfig(modules_to_save=["classifer"]))


def test_tied_weights_are_said_to_be_tied() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"'lm_head' is tied to 'model\.embed_tokens\.weight'"):
        inject(model, LoraConfig(target_modules=["lm_head"]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2), nn.ReLU())
        self.mix = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "norm": nn.LayerNorm(2)})
        self.table = nn.ModuleDict({"rows": nn.Embedding(3, 2)})


def test_the_name_of_a_wrapper_means_the_layers_inside_of_it() -> None:
    model = nn.ModuleList([Block(), Block()])
    assert names(model, target_modules=["conv"]) == ["0.conv.0", "0.mix.conv", "1.conv.0", "1.mix.conv"]
    assert names(
        model, target_modules=["0.*"], exclude_modules=["*.mix.*", "*.norm", "*.2", "*.conv.1", "*table*"]
    ) == ["0.conv.0"]
    for nothing_inside in ("norm", "table"):
        with pytest.raises(TargetError, match=nothing_inside):
            find_targets(model, LoraConfig(target_modules=["conv", nothing_inside]))


def test_what_a_word_means_but_cannot_be_adapted_is_left_out_and_named() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1, groups=3), nn.Conv1d(3, 2, 1), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"all-linear\+conv leaves out '0': it has groups=3"):
        assert names(model, r=2, target_modules="all-linear+conv") == ["1", "2"]


@pytest.mark.parametrize("word", ["all-linear+cov", "all-linear+", "all-linear,conv"])
def test_words_that_are_none(word: str) -> None:
    with pytest.raises(ValueError, match=r"'\+conv' and '\+recurrent'"):
        LoraConfig(target_modules=word)
    with pytest.raises(ValueError, match="is for target_modules"):
        LoraConfig(exclude_modules="all-linear")
