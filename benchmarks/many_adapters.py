"""What work with one adapter costs beside many others on the same base, in CPU time: python -m benchmarks.many_adapters

Adapters are added one after the other. At each count, every operation is done with one of them: it should cost what it
touches, and so the same however many there are. PEFT's own operations stand beside, as far as it has them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import SHAPES, TARGETS, Shape, base, parser, report, seconds
from lightning_lora import (
    LoraConfig,
    adapters,
    adapters_for,
    add_adapter,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

OPERATIONS = ("add", "all added", "choose", "batch", "save", "load", "delete", "merge", "unmerge")
COUNTS = (1, 16, 64, 256, 1000)


cpu_seconds = partial(seconds, clock=time.process_time)


class Ours:
    """Adapters of this package, and what is done with one of them."""

    def __init__(self, shape: Shape, r: int) -> None:
        self.model, self.r = base(shape), r

    def add(self, name: str) -> None:
        put = add_adapter if adapters(self.model) else inject
        put(self.model, LoraConfig(r=self.r, target_modules=TARGETS["all"]), name)

    def operations(self, name: str, saved: Path) -> dict[str, Callable[[], Any]]:
        """By name, in the order in which they are to be done."""

        def batch() -> None:
            with adapters_for(self.model, ["a1", name]):
                pass

        return {
            "choose": partial(set_adapter, self.model, name),
            "batch": batch,
            "save": partial(save_adapter, self.model, saved, name),
            "load": partial(load_adapter, self.model, saved, "loaded"),
            "delete": partial(delete_adapter, self.model, "loaded"),
            "merge": partial(merge, self.model, name),
            "unmerge": partial(unmerge, self.model),
        }


class Theirs:
    """The same of PEFT."""

    def __init__(self, shape: Shape, r: int) -> None:
        import peft

        self.model: Any = base(shape)
        self.config = peft.LoraConfig(r=r, target_modules=TARGETS["all"], task_type="CAUSAL_LM")

    def add(self, name: str) -> None:
        import peft

        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(name, self.config)
        else:
            self.model = peft.get_peft_model(self.model, self.config, adapter_name=name)

    def operations(self, name: str, saved: Path) -> dict[str, Callable[[], Any]]:
        return {
            "choose": partial(self.model.set_adapter, name),
            "save": partial(self.model.save_pretrained, saved, selected_adapters=[name]),
            "load": partial(self.model.load_adapter, saved / name, "loaded"),
            "delete": partial(self.model.delete_adapter, "loaded"),
            "merge": partial(self.model.merge_adapter, [name]),
            "unmerge": self.model.unmerge_adapter,
        }


def measure(contender: Ours | Theirs, counts: list[int], folder: Path) -> list[dict[str, float]]:
    """CPU seconds of each operation at each count, and of all that were added up to there."""
    rows, total = [], 0.0
    for count in range(1, counts[-1] + 1):
        name = f"a{count}"
        added = cpu_seconds(partial(contender.add, name))
        total += added
        if count in counts:
            calls = contender.operations(name, folder / name)
            times = {operation: cpu_seconds(call) for operation, call in calls.items()}
            rows.append({"add": added, "all added": total, **times})
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="small", help="default small: 57 layers with an adapter")
    made.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help=f"default {COUNTS}")
    made.add_argument("--peft-counts", type=int, nargs="*", default=[1, 16, 64], help="default 1 16 64")
    made.add_argument("--rank", type=int, default=2, help="default 2")
    args: argparse.Namespace = made.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for who, kind, counts in (("ours", Ours, args.counts), ("PEFT", Theirs, args.peft_counts)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = measure(kind(SHAPES[args.shape], args.rank), sorted(counts), folder) if counts else []
            rows |= {f"{who}, {count}": times for count, times in zip(sorted(counts), found)}
    report(
        "many_adapters",
        args,
        rows,
        [f"{operation} (ms)" for operation in OPERATIONS],
        lambda row: [f"{1000 * row[name]:.1f}" if name in row else "-" for name in OPERATIONS],
    )


if __name__ == "__main__":
    main()
