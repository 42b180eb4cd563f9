"""The loss at learned positions alone is that of the whole, for every kind of model and of head."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lora import LoraConfig, inject
from lightning_lora.tasks import chunked_losses, label_losses, language_model_loss

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}


def causal(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    sizes = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    model.final_logits_bias.normal_()
    return model


def of_two_encoders() -> Any:
    half = transformers.BertConfig(**SMALL)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


MODELS: dict[str, Any] = {
    "plain": lambda: causal("Llama"),
    "capped": lambda: causal("Gemma2", final_logit_softcapping=0.5),
    "scaled up": lambda: causal("Cohere", logit_scale=3.7),
    "scaled down": lambda: causal("Granite", logits_scaling=3.0),
    "tied": gpt2,
    "experts": lambda: causal("Mixtral", **EXPERTS),
    "input of the head scaled": t5,
    "biased": bart,
    "of two encoders": of_two_encoders,
}
OTHERS: dict[str, Any] = {"experts, balanced": lambda: causal("Mixtral", output_router_logits=True, **EXPERTS)}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = (MODELS | OTHERS)[name]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # for logits whose cap and scale matter
    return model.double().eval()


def batch(model: Any, rows: int = 3) -> dict[str, Tensor]:
    """Rows of which some positions, one whole row at the end, are not learned."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (rows, 9), generator=generator)
    labels = torch.randint(2, VOCABULARY, (rows, 7), generator=generator) if encodes(model) else ids.clone()
    labels[0, :4] = labels[1, -2:] = labels[-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def encodes(model: Any) -> bool:
    return model.config.is_encoder_decoder


def expected(model: Any, given: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    """The losses of all positions out of the logits of all, by the model's own forward pass."""
    logits, labels = model(**given).logits.double(), given["labels"]
    if not encodes(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=label_smoothing)
    return losses if encodes(model) else nn.functional.pad(losses, (1, 0))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def rows_at(head: nn.Module) -> Iterator[list[int]]:
    """How many rows the head gets at a time."""
    seen: list[int] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append(output[..., 0].numel()))
    yield seen
    hook.remove()


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_all_logits(name: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_losses, "_CPU_CHUNK", 4 * VOCABULARY)
    model = build(name)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(head == "trained")
    given = batch(model)
    losses = expected(model, given)
    count = (losses != 0).sum()
    torch.testing.assert_close(model(**given).loss.double(), losses.sum() / count, rtol=1e-4, atol=1e-4)
    wanted = gradients(model, losses.sum() / count)
    found = language_model_loss(model, given)
    torch.testing.assert_close(found, losses.sum() / count, rtol=1e-12, atol=1e-12)
    for parameter, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-9, atol=1e-12, msg=parameter)
    assert wanted.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    with rows_at(model.get_output_embeddings()) as seen:
        language_model_loss(model, given)
    assert sum(seen) == count + 1  # and not by the model's own loss


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}},
        {"target_modules": "all-linear"},
    ],
)
def test_adapted_heads(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_losses, "_CPU_CHUNK", 4 * VOCABULARY)
    model = inject(build("plain"), LoraConfig(r=2, **settings))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
    given, weights = batch(model), torch.randn(3, 9, dtype=torch.double)
    wanted = gradients(model, (expected(model, given, 0.1) * weights).sum())
    found = gradients(model, (label_losses(model, given, label_smoothing=0.1) * weights).sum())
    assert found.keys() == wanted.keys() == trained
    for name in trained:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_at_the_head_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_losses, "_CPU_CHUNK", 4 * VOCABULARY)
    model = inject(build("plain"), LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)).train()
    nn.init.normal_(model.lm_head.lora["default"].lora_B)
    given = batch(model)
    language_model_loss(model, given)  # the first looks at the model

    def loss(shift: float) -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            model.lm_head.lora["default"].lora_B.add_(shift)
        return language_model_loss(model, given)

    found = gradients(model, loss(0.0))["lm_head.lora.default.lora_B"].sum()
    step = 1e-6
    slope = (loss(step) - loss(-2 * step)) / (2 * step)  # the same masks forward and backward
    torch.testing.assert_close(found, slope.detach(), rtol=1e-5, atol=1e-8)


@given(
    learned=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    size=st.integers(1, 20),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    trained=st.booleans(),
)
@settings(max_examples=40)
def test_any_positions_in_any_chunks(
    learned: list[list[bool]], size: int, label_smoothing: float, trained: bool
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(5, 11).double().requires_grad_(trained)
    hidden = torch.randn(len(learned), 6, 5, dtype=torch.double, requires_grad=True)
    where = torch.tensor(learned)
    labels = torch.randint(11, where.shape)[where]
    weights = torch.randn(len(labels), dtype=torch.double)
    inputs = [hidden, *head.parameters()] if trained else [hidden]

    def found(losses: Tensor) -> tuple[Tensor, ...]:
        return losses, *torch.autograd.grad((losses * weights).sum(), inputs)

    def transform(logits: Tensor) -> Tensor:
        return torch.tanh(logits / 2) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_losses, "_CPU_CHUNK", 11 * size)
        ours = found(chunked_losses.token_losses(head, hidden[where], labels, transform, label_smoothing))
    logits = transform(head(hidden[where]))
    theirs = found(cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_logits_are_made_where_something_is_learned_alone(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_losses, "_CPU_CHUNK", 4 * VOCABULARY)
    model = build("plain")
    model.lm_head.requires_grad_(head == "trained")
    given = batch(model)
    language_model_loss(model, given)
    with rows_at(model.lm_head) as seen:
        loss = language_model_loss(model, given)
        assert sorted(seen) == [1, 3, 4, 4]  # 5 and 6 of 27, and one that the model's own forward pass goes on with
        loss.backward()
    assert sum(seen) == {"frozen": 12, "trained": 23}[head]  # a trained head's are made again
    with torch.no_grad(), rows_at(model.lm_head) as seen:
        language_model_loss(model, given)
    assert sorted(seen) == [1, 3, 4, 4]


def test_micro_batches_weigh_as_one_batch() -> None:
    model = build("plain")
    given = batch(model)
    whole = gradients(model, language_model_loss(model, given))
    tokens = int((given["labels"][:, 1:] != -100).sum())
    model.zero_grad()
    for row in range(3):  # of 5, 6 and no tokens
        micro = {name: value[row : row + 1] for name, value in given.items()}
        language_model_loss(model, micro, tokens=tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-12)


def test_nothing_to_learn_is_no_loss() -> None:
    model = build("plain")
    given = batch(model)
    given["labels"][:] = -100
    loss = language_model_loss(model, given)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision(autocast: bool) -> None:
    model = build("scaled up").float() if autocast else build("scaled up").bfloat16()
    model.lm_head.requires_grad_(False)
    given = batch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = model(**given).loss, language_model_loss(model, given)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted, found = gradients(model, theirs), gradients(model, ours)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max()))


def test_hooks_on_the_head_see_what_it_gets_and_give_back() -> None:
    model = build("plain")
    given = batch(model)
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: 2 * output)
    torch.testing.assert_close(language_model_loss(model, given), expected(model, given).sum() / 11)
    handle.remove()
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_an_error_leaves_no_hook() -> None:
    model = build("plain")
    language_model_loss(model, batch(model))
    for broken in ({"input_ids": torch.full((1, 9), VOCABULARY + 5)}, {"no_such": 1}):
        with pytest.raises((IndexError, TypeError)):
            language_model_loss(model, {**batch(model, 1), **broken})
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    assert model.training is False


class Odd(nn.Module):
    """A model whose logits are more than those of its head, scaled, capped and shifted."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, labels: Any = None, **inputs: Any) -> Any:
        logits = self.inner(**inputs).logits.square()
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class Penalized(Odd):
    """A model that adds something to the cross-entropy of ordinary logits."""

    def forward(self, labels: Any = None, **inputs: Any) -> Any:
        output = self.inner(**inputs, labels=labels)
        return SimpleNamespace(logits=output.logits, loss=None if labels is None else output.loss + 0.1)


class Headless(nn.Module):
    """A model of which nothing is known but its loss."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def compiled(model: Any) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("how", ["router", "odd", "penalized", "headless", "compiled", "compiled in place"])
def test_other_models_have_their_own_loss(how: str) -> None:
    inner = build("experts, balanced" if how == "router" else "plain").float()
    wrap: dict[str, Any] = {"odd": Odd, "penalized": Penalized, "headless": Headless, "compiled in place": compiled}
    wrap["compiled"] = lambda model: torch.compile(model, backend="eager")
    model = wrap.get(how, lambda model: model)(inner)
    given = batch(inner)
    theirs = model(**given).loss
    assert torch.equal(language_model_loss(model, given), theirs)
    if "compiled" not in how:
        with rows_at(inner.get_output_embeddings()) as seen:
            language_model_loss(model, given)
        assert seen == [given["labels"].numel()]
    losses = label_losses(model, given)
    assert losses.shape == given["labels"].shape and bool((losses[given["labels"] == -100] == 0).all())
    if how not in ("router", "penalized"):
        torch.testing.assert_close(losses.sum() / 11, theirs)
        torch.testing.assert_close(language_model_loss(model, given, tokens=22), theirs / 2)


def test_a_decoder_that_reads_something_else_has_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("input of the head scaled")
    shift = type(model)._shift_right
    monkeypatch.setattr(model, "_shift_right", lambda labels: shift(model, labels).clamp(max=7))
    monkeypatch.setattr(model, "prepare_decoder_input_ids_from_labels", lambda labels: shift(model, labels))
    given = batch(model)
    assert torch.equal(language_model_loss(model, given), model(**given).loss)
    losses = label_losses(model, given)
    torch.testing.assert_close(losses.sum() / (given["labels"] != -100).sum(), model(**given).loss.double())


def test_what_a_decoder_masks_is_found_by_rows_without_it() -> None:
    model = build("of two encoders")
    given = batch(model)
    language_model_loss(model, {**given, "labels": given["labels"].clamp(min=2)})
    torch.testing.assert_close(language_model_loss(model, given), model(**given).loss.double(), rtol=1e-5, atol=1e-5)
    assert given["labels"][0, 0] == -100  # which the decoder must not see


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(2, 5), min_size=2, max_size=4), smoothing=st.sampled_from([0.0, 0.1]))
def test_packed_rows_do_not_see_each_other(lengths: list[int], smoothing: float) -> None:
    model = causal("Llama")
    rows = [torch.randint(0, 40, (1, length)) for length in lengths]
    labels = [row.clone().index_fill(1, torch.tensor([0]), -100) for row in rows]
    packed = {
        "input_ids": torch.cat(rows, 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    alone = [
        label_losses(model, {"input_ids": row, "labels": own}, label_smoothing=smoothing).sum()
        for row, own in zip(rows, labels)
    ]
    want = torch.stack(alone).sum()
    found = language_model_loss(model, packed, label_smoothing=smoothing)
    torch.testing.assert_close(found, want / (sum(lengths) - len(lengths)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(label_losses(model, packed, label_smoothing=smoothing).sum(), want, rtol=1e-5, atol=1e-6)
