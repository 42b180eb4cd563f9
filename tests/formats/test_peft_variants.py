"""Every setting of PEFT's configs: an adapter is read so that it computes what was trained, or refused by name."""

import re
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import peft
import pytest
import torch
from helpers import toys
from helpers.peft_cases import CASES, Case, computed, edit, llama, on_a_quantized_base
from helpers.quantized import dequantize, kinds, needs, quantize
from hypothesis import strategies as st
from torch import nn

from lightning_lora import CheckpointError, LoraConfig, adapters, inject, load_adapter, save_adapter

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # on CPUs, bitsandbytes misreads rows of less than a block
PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_read_right_or_refused_by_name(case: Case, tmp_path: Path) -> None:
    trained, model = case.write(tmp_path), case.make()
    model.requires_grad_(True)
    before, base = toys.snapshot(model), computed(model)
    if case.refused is None:
        torch.testing.assert_close(computed(load_adapter(model, tmp_path)), trained, rtol=1e-4, atol=2e-5)
        assert not torch.allclose(base, trained, atol=1e-3)
    else:
        with pytest.raises(CheckpointError, match=case.refused):
            load_adapter(model, tmp_path)
        toys.assert_same_tensors(toys.snapshot(model), before)
        assert not adapters(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def table() -> str:
    """The table of the page: a line for each setting and outcome."""
    lines: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        outcome = "right" if case.refused is None else "refused by name"
        lines.setdefault((case.field, outcome), []).append(case.value)
    rows = [
        f"| {field}{': ' + ', '.join(value or 'plain' for value in values) if any(values) else ''} | {outcome} |"
        for (field, outcome), values in lines.items()
    ]
    return "\n".join(["| setting of PEFT | here |", "|---|---|", *rows])


def test_the_page_says_so() -> None:
    found = re.search(r"\| setting of PEFT \| here \|\n(?:\|.*\n)+", PAGE.read_text())
    assert found is not None and found[0].strip() == table(), f"The table in {PAGE.name} must be:\n{table()}"


@pytest.mark.parametrize(
    "name",
    ["`save_embedding_layers` a resized vocabulary", "`lora_bias` layers with a bias", "`use_bdlora` B",
     "`ensure_weight_tying` head", "`task_type` \"SEQ_CLS\", RoBERTa", "TRAINABLE_TOKENS tied"],
)  # fmt: skip
def test_what_was_read_goes_out_so_that_peft_reads_it(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if str(case) == name)
    trained = case.write(tmp_path / "theirs")
    save_adapter(load_adapter(case.make(), tmp_path / "theirs"), tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(case.make(), tmp_path / "ours")
    torch.testing.assert_close(computed(opened), trained, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("start", ["gaussian", "mica", "olora"])
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(capitals=st.lists(st.booleans(), min_size=8, max_size=8))
def test_a_start_in_any_case_that_peft_takes(
    start: str, capitals: list[bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("theirs")
    spelled = "".join(letter.upper() if is_capital else letter for letter, is_capital in zip(start, capitals))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=spelled)
    theirs = peft.get_peft_model(llama(), config)
    toys.randomize(theirs)
    theirs.save_pretrained(path)
    torch.testing.assert_close(computed(load_adapter(llama(), path)), computed(theirs), rtol=1e-4, atol=2e-5)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    blocks=st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
    pattern=st.sampled_from([None, [], "layers", "l.*s", "model.layers", ["h", "layers"]]),
    whole=st.sampled_from([[], ["lm_head"], ["model.layers.1.self_attn.k_proj"]]),
    parameters=st.sampled_from([None, ["self_attn.o_proj.weight"]]),
)
def test_blocks_are_chosen_as_peft_chooses_them(
    blocks: Any, pattern: Any, whole: list[str], parameters: list[str] | None, tmp_path_factory: Any
) -> None:
    hypothesis.assume(blocks != [] or not pattern)  # which PEFT refuses
    chosen = {"layers_to_transform": blocks, "layers_pattern": pattern, "target_parameters": parameters}
    targets, path = ["q_proj", *whole], tmp_path_factory.mktemp("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **chosen)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(path)
    torch.testing.assert_close(computed(load_adapter(llama(), path)), computed(theirs), rtol=1e-4, atol=2e-5)


PATTERNS = ["q_proj", "^model.layers.0.*", "layers.1.self_attn.q_proj", r"layers\.\d\.self_attn\.[qv]_proj"]


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    ranks=st.permutations(PATTERNS).flatmap(
        lambda order: st.lists(st.integers(1, 5), min_size=1, max_size=4).map(lambda values: dict(zip(order, values)))
    )
)
def test_ranks_are_those_of_the_first_pattern_though_the_file_has_them_sorted(
    ranks: dict[str, int], tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("peft")
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, rank_pattern=ranks)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(path)
    model = load_adapter(llama(), path)
    torch.testing.assert_close(computed(model), computed(theirs), rtol=1e-4, atol=2e-5)
    save_adapter(model, path / "again")
    again = peft.PeftModel.from_pretrained(llama(), path / "again")
    torch.testing.assert_close(computed(again), computed(theirs), rtol=1e-4, atol=2e-5)


def test_an_order_of_scalings_that_is_lost_is_warned_of(tmp_path: Path) -> None:
    for number, alphas in enumerate(({"q_proj": 2, "v_proj": 4}, {"q_proj": 4, "^model.*": 16})):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, alpha_pattern=alphas)
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(llama(), tmp_path / "0")
    with pytest.warns(UserWarning, match="has several alpha_pattern for 'model.layers.0.self_attn.q_proj'"):
        model = load_adapter(llama(), tmp_path / "1")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "1")
    torch.testing.assert_close(computed(model), computed(theirs), rtol=1e-4, atol=2e-5)


def test_weights_that_were_trained_apart_open_in_a_model_that_is_not_tied(tmp_path: Path) -> None:
    case = next(case for case in CASES if str(case) == "tied weights both trained, apart")
    trained, model = case.write(tmp_path), case.make()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(computed(load_adapter(model, tmp_path)), trained, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("iterations", [1, 3])
@kinds("nf4", "nf4-dq", "nf4 in bfloat16", "torchao nf4")
def test_loftq_opens_on_a_base_that_is_kept_in_its_bits(
    kind: str, iterations: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    on_a_quantized_base(tmp_path)
    edit(tmp_path, loftq_config={"loftq_bits": 4, "loftq_iter": iterations})
    found = computed(load_adapter(quantize(llama(), kind), tmp_path))
    edit(tmp_path, init_lora_weights=True, loftq_config={})
    added = computed(load_adapter(dequantize(quantize(llama(), kind)), tmp_path))
    torch.testing.assert_close(found, added, rtol=1e-4, atol=2e-5)
    assert any("the weights that LoftQ left" in str(each.message) for each in recwarn) == (iterations > 1)


@needs("bitsandbytes")
def test_a_loftq_of_ours_opens_on_such_a_base(tmp_path: Path) -> None:
    model = inject(llama(**WIDE), LoraConfig(r=8, init_lora_weights="loftq", exclude_modules=["lm_head"]))
    toys.randomize(model)
    save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="1[0-9] of its tensors are .* apart"):  # from those before LoftQ
        found = load_adapter(quantize(llama(**WIDE), "nf4"), tmp_path)
    torch.testing.assert_close(computed(found), computed(model), rtol=1e-4, atol=2e-5)
    opened = peft.PeftModel.from_pretrained(quantize(llama(**WIDE), "nf4"), tmp_path)
    torch.testing.assert_close(computed(opened), computed(model), rtol=1e-4, atol=2e-5)


@kinds("fp4", "int8", "torchao int4")
def test_loftq_is_refused_on_a_base_in_other_bits(kind: str, tmp_path: Path) -> None:
    on_a_quantized_base(tmp_path)
    model = quantize(llama(), kind)
    with pytest.raises(CheckpointError, match="quantizes the base itself, and this one is quantized already"):
        load_adapter(model, tmp_path)
    assert not adapters(model)
