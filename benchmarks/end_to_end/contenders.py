"""The contenders: the recipes by the command line, and TRL's and transformers' trainers with PEFT on the same rows."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.end_to_end.meter import Meter
from lightning_lora import shipped_recipes
from lightning_lora.data import ChatData, LabelledTextData
from lightning_lora.data.packing import unpack

RECIPES = {"chat": "chat_sft", "classify": "sequence_classification"}
# What the recipes do before and after training, and what needs their validation, which is left out.
LEFT_OUT = ("BeforeAfter", "Report", "monitor")


@dataclass(frozen=True)
class Run:
    """A run of a contender.

    Args:
        task: ``chat`` or ``classify``.
        contender: One of :data:`CONTENDERS` of the task.
        length: Most tokens of a row, or of a pack of rows.
        rows: Of a batch.
        warm_up: Steps that do not count.
        steps: Steps that do.
        turn: Which of the turns of the contenders it belongs to.
        dropout: Of the adapter.
        isa: The instruction set that torch uses.
    """

    task: str
    contender: str
    length: int
    rows: int
    warm_up: int
    steps: int
    turn: int
    dropout: float
    isa: str


def recipe(run: Run, base: str, figures: str) -> dict[str, Any]:
    """The settings of the recipe for a run: no validation, no warm-up of the rate, and no export at the end."""
    settings: dict[str, Any] = yaml.safe_load(shipped_recipes.recipes()[RECIPES[run.task]].read_text())
    trainer, model, data = settings["trainer"], settings["model"]["init_args"], settings["data"]["init_args"]
    meter = {"path": figures, "warm_up": run.warm_up, "steps": run.steps}
    trainer |= {
        "precision": "32-true",
        "max_steps": run.warm_up + run.steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "callbacks": [
            *(each for each in trainer["callbacks"] if not any(word in str(each) for word in LEFT_OUT)),
            {"class_path": "benchmarks.end_to_end.meter.MeterCallback", "init_args": meter},
        ],
    }
    lora = next(each for each in trainer["callbacks"] if each["class_path"] == "lightning_lora.LoRA")["init_args"]
    lora |= {"lora_dropout": run.dropout, "export_dir": None, "merge": None}
    model |= {"pretrained": base, "warmup_steps": 0}
    model.pop("gguf_file", None)
    if run.task == "classify":
        model["class_weights"] = None  # transformers' Trainer has none
    data |= {"batch_size": run.rows, "max_length": run.length}
    return settings


def ours(run: Run, base: str, figures: str) -> None:
    """The recipe, by the command line."""
    from lightning_lora.cli.main import main

    settings = recipe(run, base, figures)
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "recipe.yaml"])


def data_of(settings: dict[str, Any]) -> Any:
    """The recipe's data, ready."""
    classes = {"ChatData": ChatData, "LabelledTextData": LabelledTextData}
    options, model = dict(settings["data"]["init_args"]), settings["model"]["init_args"]
    if "labels" in model:
        options["labels"] = model["labels"]
    kind = classes[settings["data"]["class_path"].rpartition(".")[2]]
    data = kind(**options, pretrained=model["pretrained"])
    data.setup("fit")
    return data


def learned_rows(data: Any, run: Run) -> list[Any]:
    """The rows of a run in the order in which the recipe learns them."""
    order = list(data.train_dataloader().sampler)[: (run.warm_up + run.steps) * run.rows]
    if len(order) < (run.warm_up + run.steps) * run.rows:
        raise ValueError(f"Found {len(order)} rows, expected enough for {run}.")
    return [data.train_rows[index] for index in order]


def tokens(rows: list[Any], run: Run) -> int:
    """How many tokens the steps have that count, without padding."""
    return sum(len(row["input_ids"]) for row in rows[run.warm_up * run.rows :])


def arguments(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """What the recipe sets, in the words of transformers' ``TrainingArguments``."""
    return {
        "output_dir": "out",
        "per_device_train_batch_size": run.rows,
        "max_steps": run.warm_up + run.steps,
        "learning_rate": float(settings["model"]["init_args"]["lr"]),
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
    }


def lora_config(run: Run, settings: dict[str, Any], task_type: str) -> Any:
    """The recipe's adapter, as PEFT's settings."""
    from peft import LoraConfig

    callbacks = settings["trainer"]["callbacks"]
    lora = next(each for each in callbacks if each["class_path"] == "lightning_lora.LoRA")["init_args"]
    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["lora_alpha"],
        lora_dropout=run.dropout,
        target_modules=lora["target_modules"],
        task_type=task_type,
    )


def metered(trainer: type, meter: Meter) -> type:
    """A trainer of transformers that tells its steps and losses."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            meter.begin(model)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            meter.end_step(losses.pop())

    class Metered(trainer):  # type: ignore[misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named, callbacks=[Steps()])

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            losses.append(float(loss.detach()))
            return loss

    losses: list[float] = []
    return Metered


def trl(run: Run, base: str, figures: str, padding_free: bool = True, checkpointing: bool = True) -> None:
    """``SFTTrainer`` on the recipe's packs.

    Args:
        run: The run.
        base: The folder of the base.
        figures: Where to write the figures.
        padding_free: Whether it joins the packs of a batch to one row, as it does unless it is given a collator.
        checkpointing: Whether it computes activations again in the backward pass, as it does unless told otherwise.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    settings = recipe(run, base, figures)
    data = data_of(settings)
    packs = learned_rows(data, run)
    given: dict[str, Any] = {} if padding_free else {"data_collator": data.collate}
    rows = [
        {
            "input_ids": pack["input_ids"],
            "labels": pack["labels"],
            "seq_lengths": [len(row["input_ids"]) for row in unpack(pack)],
        }
        for pack in packs
    ]
    trainer = metered(SFTTrainer, Meter(figures, run.warm_up, run.steps))(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(
            **arguments(run, settings),
            packing=padding_free,
            max_length=run.length,
            gradient_checkpointing=checkpointing,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=padding_free,
        ),
        train_dataset=Dataset.from_list(rows if padding_free else packs),
        processing_class=data.tokenizer,
        peft_config=lora_config(run, settings, "CAUSAL_LM"),
        **given,
    )
    trainer.train()


def trl_without_checkpointing(run: Run, base: str, figures: str) -> None:
    """The same, where activations are kept."""
    trl(run, base, figures, checkpointing=False)


def trl_packs_apart(run: Run, base: str, figures: str) -> None:
    """The same, where each pack stays a row of its own, by the recipe's collator."""
    trl(run, base, figures, padding_free=False, checkpointing=False)


def transformers_trainer(run: Run, base: str, figures: str) -> None:
    """transformers' ``Trainer`` with PEFT on the recipe's rows."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    settings = recipe(run, base, figures)
    data = data_of(settings)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    trainer = metered(Trainer, Meter(figures, run.warm_up, run.steps))(
        model=get_peft_model(model, lora_config(run, settings, "SEQ_CLS")),
        args=TrainingArguments(**arguments(run, settings), remove_unused_columns=False),
        train_dataset=learned_rows(data, run),
        data_collator=data.collate,
    )
    trainer.train()


CONTENDERS: dict[str, dict[str, Callable[[Run, str, str], None]]] = {
    "chat": {
        "ours": ours,
        "TRL": trl,
        "TRL, no checkpointing": trl_without_checkpointing,
        "TRL, no checkpointing, packs apart": trl_packs_apart,
    },
    "classify": {"ours": ours, "transformers": transformers_trainer},
}


def measure(run: Run, base: str, figures: str) -> int:
    """Train, and say how many tokens were in the steps that count. The figures are in the file then."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    CONTENDERS[run.task][run.contender](run, base, figures)
    return tokens(learned_rows(data_of(recipe(run, base, figures)), run), run)
