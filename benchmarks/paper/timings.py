"""Times of a contender as ratios: a training step to that of full fine-tuning, a forward pass to that of the base.

Those that are compared take turns in one process, so that a machine that drifts drifts for all.
"""

import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from benchmarks.harness import take_turns
from benchmarks.paper.contenders import TASKS, build, kind_of, lora_config, train_only
from lightning_lora import eject, inject
from lightning_lora.model.record import injections

STEPS = 8
PASSES = 30


def measure(task: str, contender: str, weights: str | None) -> dict[str, Any]:
    """Measure a contender.

    Returns:
        ``step`` (a training step over one of full fine-tuning), ``unmerged`` and ``merged`` (a forward pass of one row
        over one of the base; ``merged`` is ``None`` where there is nothing to merge), each the median over the turns,
        and the seconds of the two that are divided by: ``full_step_seconds`` and ``base_seconds``.
    """
    base, data = _built(task, "full", weights)
    full, _ = _built(task, "full", weights)
    module, _ = _built(task, contender, weights)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row = {name: value[:1] for name, value in next(iter(data.val_dataloader())).items() if name != "labels"}
    _choose(task, contender, module)
    steps = take_turns({"full": _stepper(full, batch), "contender": _stepper(module, batch)}, STEPS)
    del full
    passes = {"base": _forward(base, row), "unmerged": _forward(module, row)}
    found: dict[str, Any] = {"task": task, "contender": contender, "threads": torch.get_num_threads()}
    found |= {"full_step_seconds": statistics.median(steps["full"]), "step": _ratio(steps["contender"], steps["full"])}
    if any(True for _ in injections(module)):
        merged, _ = _built(task, contender, weights)
        _choose(task, contender, merged)
        passes["merged"] = _forward(eject(merged, merge=True), row)
    seconds = take_turns(passes, PASSES)
    return found | {
        "base_seconds": statistics.median(seconds["base"]),
        "unmerged": _ratio(seconds["unmerged"], seconds["base"]),
        "merged": _ratio(seconds["merged"], seconds["base"]) if "merged" in seconds else None,
    }


def _built(task: str, contender: str, weights: str | None) -> tuple[Any, L.LightningDataModule]:
    torch.manual_seed(0)
    module, data = build(task, contender, 1e-5, weights)
    module.configure_model()
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
    return module, data


def _choose(task: str, contender: str, module: Any) -> None:
    """Put the adapter in, or freeze what the contender does not train."""
    config = lora_config(task, contender, seed=0)
    part = TASKS[task].trained.get(kind_of(contender))
    if config:
        inject(module, config)
    elif part:
        train_only(module, part)


def _stepper(module: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """Forward, backward and AdamW, as in the training runs."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forward(module: Any, row: dict[str, Any]) -> Callable[[], Any]:
    module.eval()

    @torch.no_grad()
    def forward() -> None:
        module(**row)

    return forward


def _ratio(times: list[float], reference: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, reference))
