"""Memory and time of the end of a run, where the adapter is folded in, and the merged model written.

The peak is that of the device's tensors in the callback's last hook, over what was there before it; the unit is the
adapted weights.

    python -m benchmarks.end_of_fit
"""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks import harness
from benchmarks.harness import DTYPES, SHAPES
from benchmarks.throughput import Module, loss_everywhere
from lightning_lora import LoRA


class Measured(LoRA):
    """Takes note of what its last hook takes."""

    def __init__(self, device: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.device = device

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = harness.now(self.device)
        self.peak = harness.peak_bytes(lambda: super(Measured, self).on_fit_end(trainer, pl_module), self.device)
        self.seconds = harness.now(self.device) - start


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    shape = SHAPES[args.shape]
    rows: dict[str, dict[str, Any]] = {}
    for what in ("merge", "merge and export"):
        module = Module(
            harness.base(shape, args.device, DTYPES[args.dtype]), loss_everywhere, (1, 8), shape.vocabulary, 0
        )
        weights = [layer.weight for name, layer in module.named_modules() if name.endswith("_proj")]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        with tempfile.TemporaryDirectory() as folder:
            lora = Measured(
                args.device,
                r=args.r,
                target_modules="all-linear",
                merge="last",
                export_dir=Path(folder) if "export" in what else None,
                summary=False,
                verify=False,  # which maps the files that were written, and the profiler takes that for memory
            )
            trainer = L.Trainer(
                accelerator=args.device,
                devices=1,
                max_steps=1,
                callbacks=[lora],
                logger=False,
                default_root_dir=folder,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module)
        rows[what] = {"seconds": lora.seconds, "peak bytes": lora.peak, "peak over weights": lora.peak / size}
    harness.report(
        "end_of_fit",
        args,
        rows,
        ("seconds", "peak", "over the adapted weights"),
        lambda row: (
            f"{row['seconds']:.3f}",
            f"{row['peak bytes'] / 1e6:,.1f} MB",
            f"{row['peak over weights']:.2f}",
        ),
    )


if __name__ == "__main__":
    main()
