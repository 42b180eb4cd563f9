"""Tokens a second of a whole run: ours and PEFT's in the same LightningModule, Trainer and data.

Each row begins with a prompt whose tokens are in no loss. The loss is once that of transformers, which makes logits of
all positions, and once made of the learned positions alone. The first steps of a run do not count.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --shape 1B --rows 8 --length 1024 --device cuda --dtype bfloat16
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES
from lightning_lora import LoRA

WARM_UP = 3  # steps


def loss_everywhere(model: Any, rows: Tensor, labels: Tensor) -> Tensor:
    """What transformers computes."""
    loss: Tensor = model(input_ids=rows, labels=labels, use_cache=False).loss
    return loss


def loss_at_learned_positions(model: Any, rows: Tensor, labels: Tensor) -> Tensor:
    """The same, with logits of those positions alone whose next token is learned."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1]
    learned = labels[:, 1:] != -100
    return nn.functional.cross_entropy(causal_lm.lm_head(hidden[learned]).float(), labels[:, 1:][learned])


LOSSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "": loss_everywhere,
    ", loss at learned positions": loss_at_learned_positions,
}


class Module(L.LightningModule):
    """A model on random tokens.

    Args:
        model: A causal language model.
        loss: Of the model, rows and labels.
        shape: Rows and tokens of a batch.
        vocabulary: How many tokens there are.
        prompt: How many of a row's first tokens are not learned.
    """

    def __init__(self, model: nn.Module, loss: Any, shape: tuple[int, int], vocabulary: int, prompt: int) -> None:
        super().__init__()
        self.model, self.loss, self.shape, self.vocabulary, self.prompt = model, loss, shape, vocabulary, prompt

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = batch.clone()
        labels[:, : self.prompt] = -100
        loss: Tensor = self.loss(self.model, batch, labels)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-5)

    def train_dataloader(self) -> DataLoader:
        rows = torch.randint(self.vocabulary, self.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader([rows] * 1000, batch_size=None, pin_memory=torch.cuda.is_available())  # type: ignore[arg-type]


class Clock(Callback):
    """Starts once the first steps are done, and stops with the last, before the Trainer moves the model away."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.started = harness.now(trainer.strategy.root_device.type)
        elif trainer.global_step == trainer.max_steps:
            self.ended = harness.now(trainer.strategy.root_device.type)


def train(module: Module, steps: int, device: str, callbacks: list[Callback]) -> float:
    """Seconds of a step, on average over ``steps`` after the first."""
    clock = Clock()
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return (clock.ended - clock.started) / steps


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=3)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--prompt", type=float, default=0.75, help="share of a row that is not learned")
    parser.add_argument("--steps", type=int, default=8, help="that count, of each run")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shape = SHAPES[args.shape]
    base = partial(harness.base, shape, args.device, DTYPES[args.dtype])
    models = {"PEFT": harness.theirs(base(), args.r, "all"), "ours": base()}
    modules = {
        name + where: Module(model, loss, (args.rows, args.length), shape.vocabulary, int(args.prompt * args.length))
        for name, model in models.items()
        for where, loss in LOSSES.items()
    }
    times: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(args.turns):
        for name in list(modules)[:: 1 if turn % 2 else -1]:
            settings = {"r": args.r, "lora_alpha": 2 * args.r, "merge": None, "summary": False}
            lora: list[Callback] = [LoRA(**settings)] if name.startswith("ours") else []
            times[name].append(train(modules[name], args.steps, args.device, lora))
    rows: dict[str, dict[str, Any]] = {}
    for name, row in harness.ratios(times, to="PEFT").items():
        rows[name] = {**row, "tokens a second": args.rows * args.length / row["seconds"]}
    harness.report(
        "throughput",
        args,
        rows,
        ("over PEFT's step (quartiles)", "seconds of a step", "tokens a second"),
        lambda row: (harness.spread(row, 3), f"{row['seconds']:.4f}", f"{row['tokens a second']:,.0f}"),
    )


if __name__ == "__main__":
    main()
