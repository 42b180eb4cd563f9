"""Whether to follow what ``AdapterMonitor`` advises: an encoder trained anew as it says, over several seeds.

The task is that of the recipe sequence_classification: three labels, 563 rows to learn and 220 held out. Each seed
draws the head, the adapter and the order of the rows anew; the differences are taken within a seed. What chance does
is in the row of a run that differs in the adapter's seed alone.

    python -m benchmarks.advice
"""

import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from benchmarks import harness
from benchmarks.paper.contenders import build
from lightning_lora import LoRA
from lightning_lora.layers.spectrum import decomposed
from lightning_lora.model.learned import Update, updates_of
from lightning_lora.model.record import named_injections

R = 16
RATE, TOO_HIGH = 1e-3, 3e-3  # learning rates
START = "r=16"
START_HIGH = "r=16, learning rate 3e-3"


def train(order: int, lr: float = RATE, **settings: Any) -> tuple[dict[str, float], L.LightningModule, L.Trainer, Any]:
    """Train with a LoRA of these settings, all of one ``lora_alpha``, and measure on the rows held out."""
    L.seed_everything(order, verbose=False)
    module, data = build("encoder", "all-16", lr)
    data.setup("fit")
    data.seed = order  # the split is made; this is the order of the rows
    settings = {"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear", "seed": order, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=5,
        gradient_clip_val=1.0,
        limit_val_batches=1.0,
        check_val_every_n_epoch=5,
        callbacks=[LoRA(**settings, merge=None, summary=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return measured(module, trainer, data), module, trainer, data


def measured(module: L.LightningModule, trainer: L.Trainer, data: Any) -> dict[str, float]:
    """Loss and Matthews correlation on the rows held out, and how many parameters the adapter needs for it."""
    (found,) = trainer.validate(module, data, verbose=False)
    updates = updates_of(module)
    weights = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    return {
        "loss": found["val_loss"],
        "mcc": found["val_mcc"],
        "parameters": weights,
        "largest": max(update.relative_norm or 0.0 for update in updates),
    }


@torch.no_grad()
def resize_(module: L.LightningModule, energy: float) -> int:
    """Keep the leading part of each update that holds this share of its squares; how many parameters that needs."""
    needed = 0
    for _, injection in named_injections(module):
        for _, layer in injection.layers():
            adapter = layer.lora[injection.adapter_name]
            left, values, right = decomposed((adapter.lora_A, adapter.lora_B))
            kept = values[: enough(values.tolist(), energy)].sqrt()
            for factor, value in (
                (adapter.lora_A.t(), right[: len(kept)].t() * kept),
                (adapter.lora_B, left[:, : len(kept)] * kept),
            ):
                factor.zero_()
                factor[:, : len(kept)] = value
            needed += len(kept) * (len(left) + right.shape[1])
    return needed


def enough(values: list[float], energy: float) -> int:
    """The smallest rank that holds this share of the squares."""
    squares = torch.tensor(values, dtype=torch.float64).square()
    return int((squares.cumsum(0) / squares.sum() < energy - 1e-12).sum()) + 1


def ranks(updates: list[Update], energy: float) -> dict[str, int]:
    """A rank for each layer that holds this share of its update."""
    return {re.escape(update.layer): enough(update.values, energy) for update in updates}


def quarter(updates: list[Update], most: bool) -> list[str]:
    """The layers that moved the most, or the least, relative to their weights."""
    inner = [update for update in updates if ".encoder." in update.layer]
    in_order = sorted(inner, key=lambda update: update.relative_norm or 0.0, reverse=most)
    return [update.layer for update in in_order[: len(in_order) // 4]]


def one_seed(seed: int, say: Callable[[str, dict[str, float]], None]) -> None:
    """Train as a start, and then as it advises."""
    first, module, trainer, data = train(seed)
    say(START, first)
    updates = updates_of(module)
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" in name}
    for energy in (0.99, 0.9):
        module.load_state_dict(weights, strict=False)
        needed = resize_(module, energy)
        say(f"resized to {energy:.0%} of the energy", measured(module, trainer, data) | {"parameters": needed})
    say("r=16, drawn anew", train(seed, seed=seed + 100)[0])
    for energy in (0.99, 0.9):
        found = train(seed, rank_pattern=ranks(updates, energy))[0]
        say(f"anew, at the ranks of {energy:.0%}", found)
    say("anew, r=4", train(seed, r=4)[0])
    for most in (False, True):
        found = train(seed, exclude_modules=quarter(updates, most))[0]
        say(f"anew, without the quarter that moved {'most' if most else 'least'}", found)
    say(START_HIGH, train(seed, TOO_HIGH)[0])
    say("anew, learning rate 1.5e-3", train(seed, TOO_HIGH / 2)[0])


def main() -> None:
    """Run, print the table, write the file."""
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}

    def say(name: str, row: dict[str, float]) -> None:
        found.setdefault(name, []).append(row)
        print(json.dumps({"seed": seed, "name": name, **row}), flush=True)

    for seed in range(args.seeds):
        one_seed(seed, say)
    harness.report(
        "advice", args, summed(found), ["loss", "less the start's", "Matthews", "largest update", "parameters"], cells
    )


def summed(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """The mean over the seeds, and the loss less that of the start, in each seed."""
    rows = {}
    for name, each in found.items():
        start = found[START_HIGH if "1.5e-3" in name else START]
        rows[name] = {key: statistics.fmean(row[key] for row in each) for key in each[0]}
        rows[name]["less"] = [row["loss"] - other["loss"] for row, other in zip(each, start)]
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """What the table shows of a row."""
    less = ", ".join(f"{value:+.3f}" for value in row["less"])
    return [f"{row['loss']:.3f}", less, f"{row['mcc']:.2f}", f"{row['largest']:.0%}", f"{row['parameters']:,.0f}"]


if __name__ == "__main__":
    main()
