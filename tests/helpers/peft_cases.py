"""What PEFT may have written: one case for each setting of its configs, with what becomes of it here."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import toys
from helpers.models import IDS
from lightning_lora import LoraConfig, inject, save_adapter

QV = ["q_proj", "v_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        field: The setting, for the table in the documentation.
        value: Its value there.
        make: Makes the base model.
        write: Writes the adapter into a directory, and gives what it computes.
        refused: What the error says, if it is refused.
    """

    field: str
    value: str
    make: Callable[[], Any]
    write: Callable[[Path], Tensor]
    refused: str | None = None

    def __str__(self) -> str:
        return f"{self.field} {self.value}".strip()


def llama(cls: Any = tf.LlamaForCausalLM, **settings: Any) -> Any:
    torch.manual_seed(0)
    return cls(tf.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **settings})).eval()


def classifier() -> Any:
    return llama(tf.LlamaForSequenceClassification, num_labels=3)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def biased() -> Any:
    return llama(attention_bias=True)


def gpt2() -> Any:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def moe(expert_size: int = 24) -> Any:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": expert_size, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **sizes)).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **sizes)).eval()


def llava() -> Any:
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**SIZES), vision_config=vision, image_token_index=63)
    return tf.LlavaForConditionalGeneration(config).eval()


def bert(cls: Any) -> Any:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    config = (tf.RobertaConfig if cls is tf.RobertaForSequenceClassification else tf.BertConfig)(**sizes)
    return cls(config).eval()


@torch.no_grad()
def computed(model: Any) -> Tensor:
    """What a model makes of some tokens."""
    out = model.eval()(input_ids=IDS)
    return out.logits if "logits" in out else out.start_logits


def edit(directory: Path, **settings: Any) -> None:
    """Change entries of an ``adapter_config.json``; those that are ``...`` are taken out."""
    path = directory / "adapter_config.json"
    values = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def by_peft(
    make: Callable[[], Any],
    kind: Any,
    settings: dict[str, Any],
    edited: dict[str, Any],
    prepare: Callable[[Any, Any], None] | None,
    save: dict[str, Any],
) -> Callable[[Path], Tensor]:
    """Write what PEFT saves of an adapter with these settings, all of whose parameters were trained."""

    def write(directory: Path) -> Tensor:
        torch.manual_seed(0)
        base, config = make(), kind(**settings)
        if prepare is not None:
            prepare(base, config)
        model = peft.get_peft_model(base, config)
        toys.randomize(model)
        model.save_pretrained(directory, **save)
        edit(directory, **edited)
        return computed(model)

    return write


def case(
    field: str,
    value: str = "",
    make: Callable[[], Any] = llama,
    *,
    kind: Any = peft.LoraConfig,
    edited: dict[str, Any] | None = None,
    prepare: Callable[[Any, Any], None] | None = None,
    save: dict[str, Any] | None = None,
    refused: str | None = None,
    **settings: Any,
) -> Case:
    settings = settings if "target_modules" in settings else {"target_modules": QV, **settings}
    return Case(field, value, make, by_peft(make, kind, settings, edited or {}, prepare, save or {}), refused)


def on_a_quantized_base(directory: Path) -> Tensor:
    """As PEFT's LoftQ leaves it, which asks for CUDA: without this package's note, and with PEFT's settings."""
    model = inject(llama(), LoraConfig(r=8, lora_alpha=8, target_modules=QV, init_lora_weights="loftq"))
    toys.randomize(model)
    save_adapter(model, directory)
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    edit(directory, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    return computed(model)


def written(
    directory: Path, tensors: dict[str, Tensor], targets: Any, r: int, alpha: float = 8, **settings: Any
) -> None:
    """Write an adapter by hand."""
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": targets, **settings}
    (directory / "adapter_config.json").write_text(json.dumps(values))


def factors(out_features: int, in_features: int, r: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, in_features, generator=generator) / 4, torch.randn(out_features, r, generator=generator) / 4


def single_experts(
    make: Callable[[], Any], place: str, names: dict[str, tuple[str, int]], ranks: dict[str, int]
) -> Callable[[Path], Tensor]:
    """Experts as layers of their own, as transformers 4 had them, each with its own update of the stacked weight.

    Args:
        make: Makes the model of today.
        place: Where the experts were.
        names: By what their layers were called, the parameter that they are a part of, and which part.
        ranks: Ranks of theirs that are other than 2.
    """

    def write(directory: Path) -> Tensor:
        model, tensors, seed = make(), {}, 0
        experts = model.model.layers[0].mlp.experts
        for expert in range(experts.num_experts):
            for name, (parameter, part) in names.items():
                weight = getattr(experts, parameter).data[expert]
                rows = len(weight) // max(1 + p for other, p in names.values() if other == parameter)
                r, seed = ranks.get(name, 2), seed + 1
                lora_A, lora_B = factors(rows, weight.shape[1], r, seed)
                tensors[f"model.layers.0.{place}.{expert}.{name}.lora_A.weight"] = lora_A
                tensors[f"model.layers.0.{place}.{expert}.{name}.lora_B.weight"] = lora_B
                weight[part * rows : (part + 1) * rows] += 8 / r * lora_B @ lora_A
        lora_A, lora_B = factors(32, 32, 2, 99)
        model.model.layers[0].self_attn.q_proj.weight.data += 8 / 2 * lora_B @ lora_A
        tensors |= {f"model.layers.0.self_attn.q_proj.lora_{x}.weight": y for x, y in (("A", lora_A), ("B", lora_B))}
        written(
            directory, tensors, [*names, "q_proj"], 2, rank_pattern=ranks, layers_to_transform=[0], lora_dropout=0.1
        )
        return computed(model)

    return write


def stacked_experts_of_peft_0_18(expert_size: int) -> Callable[[Path], Tensor]:
    """PEFT before 0.19 took every stack for ``(experts, in, out)``: delta[e] = (B[:, :, e] A[e])^T."""

    def write(directory: Path) -> Tensor:
        model, tensors = moe(expert_size), {}
        for block, layer in enumerate(model.model.layers):
            for depth, parameter in enumerate(("down_proj", "gate_up_proj")):
                weight = getattr(layer.mlp.experts, parameter).data
                count, first, last = weight.shape
                lora_A, lora_B = factors(last, first, 2 * count, 10 * block + depth)
                by_expert = lora_B.view(last, 2, count), lora_A.view(count, 2, first)
                weight += 4 * torch.einsum("ore,eri->eio", *by_expert)
                name = f"model.layers.{block}.mlp.experts{'.base_layer' * depth}"
                tensors |= {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        written(directory, tensors, [], 2, target_parameters=experts, peft_version="0.18.1")
        return computed(model)

    return write


def of_llava_before_4_52(directory: Path) -> Tensor:
    model, tensors = llava(), {}
    places = {
        "language_model.model.layers.0.self_attn.q_proj": model.model.language_model.layers[0].self_attn.q_proj,
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": model.model.vision_tower,
    }
    for seed, (name, place) in enumerate(places.items()):
        layer = place if isinstance(place, nn.Linear) else next(m for n, m in place.named_modules() if "q_proj" in n)
        lora_A, lora_B = factors(*layer.weight.shape, 2, seed)
        layer.weight.data += 4 * lora_B @ lora_A
        tensors |= {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
    written(directory, tensors, r"(language_model|vision_tower).*layers\.0\.self_attn\.q_proj", 2)
    return computed(model)


def of_the_text_model_alone(directory: Path) -> Tensor:
    lora_A, lora_B = factors(32, 32, 2, 0)
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
    written(directory, tensors, r".*language_model.*layers\.0\..*q_proj", 2)
    return computed(llava())


def resized() -> Any:
    model = llama()
    torch.manual_seed(1)
    model.resize_token_embeddings(66, mean_resizing=False)
    return model.eval()


def of_a_resized_vocabulary(directory: Path) -> Tensor:
    model = peft.get_peft_model(resized(), peft.LoraConfig(target_modules=QV))
    toys.randomize(model)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.data[64:] += 0.1
    model.save_pretrained(directory, save_embedding_layers=True)
    return computed(model)


EDITED = "file edited"
CASES = [
    case("`target_modules`", "list"),
    case("`target_modules`", "regular expression", target_modules=r".*layers\.[01]\..*(q|v)_proj"),
    case("`target_modules`", '"all-linear"', target_modules="all-linear"),
    case("`target_modules`", "by architecture", target_modules=None),
    case("`target_modules`", "embedding", target_modules=["embed_tokens"]),
    case("`target_modules`", "head", target_modules=["lm_head", "q_proj"]),
    case("`exclude_modules`", "list", exclude_modules=["layers.1.self_attn.q_proj"]),
    case("`exclude_modules`", "regular expression", exclude_modules=r".*layers\.1\..*"),
    case("`r`", r=3),
    case("`lora_alpha`", lora_alpha=32),
    case("`lora_alpha`", "left out", edited={"lora_alpha": ...}),
    case("`lora_dropout`", lora_dropout=0.5),
    case("`fan_in_fan_out`", "Linear", fan_in_fan_out=True),
    case("`fan_in_fan_out`", "Conv1D", gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    case("`bias`", '"all"', biased, bias="all"),
    case("`bias`", '"lora_only"', biased, bias="lora_only"),
    case("`use_rslora`", use_rslora=True),
    case("`modules_to_save`", "head", modules_to_save=["lm_head"]),
    case("`modules_to_save`", "embedding and head", modules_to_save=["embed_tokens", "lm_head"]),
    case("`modules_to_save`", "norms", modules_to_save=["input_layernorm"]),
    case("`modules_to_save`", "ends of names", modules_to_save=["norm"]),
    case("`task_type`", '"CAUSAL_LM"', task_type="CAUSAL_LM"),
    case("`task_type`", '"SEQ_CLS", Llama', classifier, task_type="SEQ_CLS"),
    *[
        case("`task_type`", f'"{task}", {name}', lambda cls=cls: bert(cls), target_modules=["query"], task_type=task)
        for name, cls, task in (
            ("BERT", tf.BertForSequenceClassification, "SEQ_CLS"),
            ("RoBERTa", tf.RobertaForSequenceClassification, "SEQ_CLS"),
            ("BERT", tf.BertForTokenClassification, "TOKEN_CLS"),
            ("BERT", tf.BertForQuestionAnswering, "QUESTION_ANS"),
        )
    ],
    *[
        case("`init_lora_weights`", repr(start), init_lora_weights=start)
        for start in (False, "gaussian", "olora", "pissa", "orthogonal", "mica", "eva")
    ],
    case("`init_lora_weights`", "'pissa_niter_4'", init_lora_weights="pissa_niter_4", refused="a random decomposition"),
    case("`init_lora_weights`", "'corda'", edited={"init_lora_weights": "corda"}, refused="chosen by its data"),
    case("`init_lora_weights`", "'lora_ga'", edited={"init_lora_weights": "lora_ga"}, refused="gradients on its data"),
    Case("`init_lora_weights`", "'loftq' to 4 bits", llama, on_a_quantized_base),
    case(
        "`init_lora_weights`",
        "'loftq' to 2 or 8 bits",
        edited={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
        refused="only that to 4 bits",
    ),
    case("`loftq_config`", "without LoftQ", loftq_config={"loftq_bits": 4}),
    case("`eva_config`", edited={"eva_config": {"rho": 2.0}}),
    case("`corda_config`", edited={"corda_config": {"corda_method": "kpm"}}),
    case("`lora_ga_config`", edited={"lora_ga_config": {"direction": "ArB2r"}}),
    case("`layers_to_transform`", "index", layers_to_transform=1),
    case("`layers_to_transform`", "list", layers_to_transform=[0]),
    case("`layers_to_transform`", "beside whole names", layers_to_transform=[0], target_modules=["q_proj", "lm_head"]),
    case("`layers_to_transform`", "none", layers_to_transform=[]),
    case("`layers_pattern`", "string", layers_to_transform=[0], layers_pattern="layers"),
    case("`layers_pattern`", "list", layers_to_transform=[0], layers_pattern=["layers", "h"]),
    case("`layers_pattern`", "expression", layers_to_transform=[0], layers_pattern="l.*s"),
    case("`rank_pattern`", rank_pattern={"v_proj": 4}),
    case("`rank_pattern`", "anchored", rank_pattern={"^model.layers.1.self_attn.q_proj": 2}),
    case("`alpha_pattern`", alpha_pattern={"v_proj": 4}),
    case("`alpha_pattern`", "with rsLoRA", use_rslora=True, alpha_pattern={"^model.layers.1.self_attn.q_proj": 2}),
    case("`megatron_core`", megatron_core="other.core"),
    case("`megatron_config`", edited={"megatron_config": {"a": 1}}, refused="layers of Megatron"),
    case("`trainable_token_indices`", "list", trainable_token_indices=[3, 5]),
    case("`trainable_token_indices`", "dict", trainable_token_indices={"embed_tokens": [3, 5]}),
    case("`trainable_token_indices`", "tied", tied, trainable_token_indices=[3, 5]),
    case("`trainable_token_indices`", "two", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 7]}),
    case("`use_dora`", "linear", use_dora=True),
    case("`use_dora`", "embedding", target_modules=["embed_tokens", "q_proj"], use_dora=True),
    case("`velora_config`", velora_config=peft.VeloraConfig(num_groups=4)),
    case(
        "`alora_invocation_tokens`", task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], refused="Activated LoRA"
    ),
    case("`qalora_group_size`", qalora_group_size=8),
    case("`use_qalora`", edited={"use_qalora": True}, refused="QA-LoRA"),
    case(
        "`monteclora_config`",
        monteclora_config=peft.MontecloraConfig(num_samples=2, buffer_size=4),
        refused="MonteCLoRA",
    ),
    case("`kasa_config`", kasa_config=peft.KasaConfig(), refused="KaSA"),
    case("`arrow_config`", edited={"arrow_config": {"top_k": 2}}, refused="Arrow"),
    case("`layer_replication`", layer_replication=[[0, 2], [1, 2]], refused="a base whose layers are repeated"),
    case("`lora_bias`", "layers with a bias", biased, lora_bias=True),
    case("`lora_bias`", "layers without", lora_bias=True, refused="has no bias here"),
    case("`target_parameters`", "experts", moe, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]),
    case("`target_parameters`", "some experts", moe, target_parameters=["experts.down_proj"]),
    case("`target_parameters`", "of Linear", target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"]),
    case("`use_bdlora`", "B", use_bdlora=peft.BdLoraConfig(target_modules_bd_b=QV, nblocks=2)),
    case(
        "`use_bdlora`",
        "A",
        target_modules=["o_proj"],
        use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2),
    ),
    case("`use_bdlora`", "one block", use_bdlora=peft.BdLoraConfig(target_modules_bd_b=QV, nblocks=1)),
    case("`ensure_weight_tying`", "modules_to_save", tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    case("`ensure_weight_tying`", "embedding", tied, target_modules=["embed_tokens"], ensure_weight_tying=True),
    case("`ensure_weight_tying`", "head", tied, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    case("`ensure_weight_tying`", "tokens", tied, trainable_token_indices=[3, 5], ensure_weight_tying=True),
    case("tied weights", "embedding trained alone", tied, modules_to_save=["embed_tokens"]),
    case("tied weights", "head adapted alone", tied, target_modules=["q_proj", "lm_head"]),
    case("tied weights", "both trained, apart", tied, modules_to_save=["embed_tokens", "lm_head"],
         refused="trained apart and are one weight in this model"),
    case("`revision`", revision="abc"),
    case("a key of a newer PEFT", "set", edited={"use_shiny_variant": True}, refused="use_shiny_variant=True"),
    case("a key of a newer PEFT", "empty", edited={"use_shiny_variant": None}),
    case("`save_embedding_layers`", "True", save={"save_embedding_layers": True}),
    Case("`save_embedding_layers`", "a resized vocabulary", resized, of_a_resized_vocabulary),
    case("`adapter_model.bin`", save={"safe_serialization": False}, refused="can run code where it is opened"),
    case("VeRA", kind=peft.VeraConfig, r=16),
    case("VeRA", "`save_projection=False`", kind=peft.VeraConfig, r=16, save_projection=False),
    case("VeRA", "`d_initial`, key, bias", biased, kind=peft.VeraConfig, r=16, d_initial=0.5, projection_prng_key=3,
         bias="vera_only"),
    case("VeRA", "`layers_to_transform`", kind=peft.VeraConfig, r=16, layers_to_transform=[0]),
    case("VeRA", "`init_weights=False`", kind=peft.VeraConfig, r=16, init_weights=False),
    case("TRAINABLE_TOKENS", kind=peft.TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=[3, 5]),
    case("TRAINABLE_TOKENS", "tied", tied, kind=peft.TrainableTokensConfig, target_modules=None, token_indices=[3, 5]),
    *[
        case(name, kind=getattr(peft, f"{config}Config"), refused=f"of type '{name}'", **settings)
        for name, config, settings in (
            ("LOHA", "LoHa", {}), ("LOKR", "LoKr", {}), ("ADALORA", "AdaLora", {"total_step": 10}),
            ("IA3", "IA3", {"feedforward_modules": []}), ("OFT", "OFT", {}), ("HIRA", "Hira", {}),
            ("RANDLORA", "RandLora", {}), ("PVERA", "Pvera", {"r": 16}), ("DELORA", "Delora", {}),
            ("MISS", "Miss", {"r": 8}), ("ROAD", "Road", {"group_size": 16, "target_modules": ["q_proj"]}),
        )
    ],
    Case("names of transformers 4", "LLaVA before 4.52", llava, of_llava_before_4_52),
    Case("names of transformers 4", "experts of Mixtral", mixtral, single_experts(
        mixtral, "block_sparse_moe.experts",
        {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)},
        {})),
    Case("names of transformers 4", "experts of Qwen3-MoE, several ranks", moe, single_experts(
        moe, "mlp.experts",
        {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)},
        {"up_proj": 4})),
    Case("names of transformers 4", "of the text model alone, on one with vision", llava, of_the_text_model_alone,
         "missing: .*language_model.*left over: .*model.layers.0"),
    Case("experts of PEFT before 0.19", "", moe, stacked_experts_of_peft_0_18(24)),
    Case("experts of PEFT before 0.19", "square", lambda: moe(16), stacked_experts_of_peft_0_18(16)),
]  # fmt: skip
