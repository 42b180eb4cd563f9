"""Write the files of this folder, with the version of lightning_lora that is installed: ``python make.py FOLDER``.

The ones that are kept were written by version 0.1 as of commit 58e2b49, so that they stay readable. Each has beside it
what it must give: the base it belongs to, and outputs or trained weights.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA, save_adapter

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"modules_to_save": ["head"], "bias": "lora_only"},
    "dora": {"use_dora": True, "rank_pattern": {"body.3": 3}},
    "vera": {"use_vera": True, "seed": 3},
    "pissa": {"init_lora_weights": "pissa", "modules_to_save": ["head"]},
    "tokens": {"trainable_token_indices": {"embed": [1, 5]}, "target_modules": ["body.0", "embed_other"]},
    "lora_fa": {"freeze_A": True, "use_rslora": True},
}


class Net(L.LightningModule):
    """Two embeddings, a body with batch norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_other = nn.Embedding(8, 6), nn.Embedding(8, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids) + self.embed_other(ids)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def data() -> DataLoader:
    ids = torch.arange(32) % 8
    return DataLoader(TensorDataset(ids, torch.stack([ids / 8, 1 - ids / 8], dim=1)), batch_size=8)


def settings(variant: str) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["body.0", "body.3"], "modules_to_save": None, **VARIANTS[variant]}


def fit(module: Net, variant: str, folder: Path, steps: int, **kw: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[LoRA(**settings(variant), merge=None, summary=False)],
    )  # fmt: skip
    trainer.fit(module, data(), **kw)
    return trainer


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    save_file(base, folder / "base.safetensors")
    for variant in VARIANTS:
        module = Net()
        module.load_state_dict(base)
        fit(module, variant, folder, 6).save_checkpoint(folder / f"{variant}.ckpt")
        with torch.no_grad():
            outputs = {"at_6": module.eval()(torch.arange(8))}
            module.train()
        if variant == "lora":
            save_adapter(module, folder / "lora_peft")
        module = Net()
        module.load_state_dict(base)
        fit(module, variant, folder, 10)
        with torch.no_grad():
            outputs["at_10"] = module.eval()(torch.arange(8))
        save_file(outputs, folder / f"{variant}_outputs.safetensors")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(Path(sys.argv[1]))
