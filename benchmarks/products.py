"""What of a step its matrix products alone take: these, on operands of the same shapes, over the whole step.

A step of the task ``CausalLM`` is made on packed rows of random tokens, its matrix products are noted as torch computes
them, and made again alone, of operands that are already in memory; the attention of each row likewise. Processor
seconds on one thread.

    python -m benchmarks.products
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import harness
from benchmarks.harness import SHAPES
from lightning_lora.data.packing import collate_packs, joined
from lightning_lora.tasks.label_losses import language_model_loss
from lightning_lora.tasks.packed_attention import rows_by_themselves

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default)
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class Noted(TorchDispatchMode):
    """Notes calls of some operators, to make them again."""

    def __init__(self, operators: tuple[Any, ...]) -> None:
        super().__init__()
        self.operators = operators
        self.calls: list[Callable[[], Any]] = []
        self._operands: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.operators:
            given, named = tree_map_only(Tensor, self._like, (args, kwargs))
            self.calls.append(lambda: func(*given, **named))
        return func(*args, **kwargs)

    def _like(self, tensor: Tensor) -> Tensor:
        """A tensor of its own of this shape and these strides, the same each time."""
        key = tuple(tensor.shape), tensor.stride(), tensor.dtype
        if key not in self._operands:
            self._operands[key] = torch.empty_strided(*key[:2], dtype=tensor.dtype).normal_()
        return self._operands[key]

    def again(self) -> None:
        """All noted calls."""
        with torch.no_grad():
            for call in self.calls:
                call()


def batch(vocabulary: int, packs: int, length: int, row: int) -> dict[str, Tensor]:
    """Packs of rows of this length, of which the second half is learned."""
    tokens = torch.randint(vocabulary, (row,)).tolist()
    labels = [-100] * (row // 2) + tokens[row // 2 :]
    pack = joined([{"input_ids": tokens, "labels": labels}] * (length // row))
    return collate_packs([pack] * packs, 0)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, turns=5)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--packs", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a pack")
    parser.add_argument("--row", type=int, default=64, help="tokens of a row in it")
    parser.add_argument("--r", type=int, default=16)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = SHAPES[args.shape]
    model = harness.ours(harness.base(shape), args.r, "all")
    rows = batch(shape.vocabulary, args.packs, args.length, args.row)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(noted: Any = None) -> None:
        with noted or nullcontext():
            with rows_by_themselves(model, rows["position_ids"]):
                loss = language_model_loss(model, rows, forward=lambda **given: model(**given, use_cache=False))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    noted = {"products": Noted(PRODUCTS), "products and attention": Noted(PRODUCTS + ATTENTION)}
    for each in noted.values():
        step(each)
    calls = {"step": step} | {name: each.again for name, each in noted.items()}
    found = harness.take_turns(calls, args.turns, warm_up=0, clock=time.process_time)
    harness.report(
        "products",
        args,
        harness.ratios(found, to="step"),
        ("of a step (quartiles)", "CPU seconds"),
        lambda row: (harness.spread(row), f"{row['seconds']:.3f}"),
    )


if __name__ == "__main__":
    main()
