"""The callback added to projects that others have written, as docs/own-trainer.md says.

Each project is looked at where it is installed: ``pip install timm torch_geometric segmentation-models-pytorch lightly
chemprop pytorch-forecasting``, in an environment of their own, then ``pytest -m slow tests/projects``. With
``PROJECTS_TABLE=docs/projects.md`` each test writes its row into the table of that page.
"""

import copy
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import toys
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA, adapter_state_dict, eject

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EPOCHS = 4


class Supervised(L.LightningModule):
    """A network of theirs in a plain module of a user's."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *inputs: Any) -> Tensor:
        out = self.net(*inputs)
        return out if isinstance(out, Tensor) else out[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        *inputs, target = batch
        loss = self.loss(self(*inputs), target)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-3)


def images(classes: int = 3, size: int = 32, channels: int = 3) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(12) % classes
    pixels = torch.randn(12, channels, size, size, generator=generator) + targets.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(pixels, targets), batch_size=4)


def of_timm(name: str, **settings: Any) -> Any:
    timm = pytest.importorskip("timm")
    size = settings.get("img_size", 32)
    return Supervised(timm.create_model(name, num_classes=3, **settings), F.cross_entropy), images(size=size)


def of_torchvision(name: str) -> Any:
    torchvision = pytest.importorskip("torchvision")
    return Supervised(torchvision.models.get_model(name, weights=None, num_classes=3), F.cross_entropy), images(size=64)


def of_segmentation_models() -> Any:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8))
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Supervised(net, F.cross_entropy), DataLoader(TensorDataset(pixels, (pixels[:, 0] > 0).long()), batch_size=4)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv, SAGEConv

        self.one, self.two, self.head = SAGEConv(8, 16), GATConv(16, 8, heads=2), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.two(self.one(x[0], edges[0]).relu(), edges[0]).relu())


def of_torch_geometric() -> Any:
    pytest.importorskip("torch_geometric")
    generator = torch.Generator().manual_seed(0)
    x, edges = torch.randn(1, 20, 8, generator=generator), torch.randint(0, 20, (1, 2, 60), generator=generator)
    data = DataLoader(TensorDataset(x, edges, (x[..., 0] > 0).long() + (x[..., 1] > 0).long()))
    return Supervised(Graph(), lambda out, target: F.cross_entropy(out, target[0])), data


class Byol(L.LightningModule):
    """lightly's own example: a student, and a teacher that follows it by momentum."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU())
        self.projection, self.prediction = BYOLProjectionHead(32, 32, 16), BYOLPredictionHead(16, 32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction(self.projection(self.backbone(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from lightly.loss import NegativeCosineSimilarity

        x, noise = batch
        with torch.no_grad():
            target = self.projection(self.backbone(x + noise))
        return NegativeCosineSimilarity()(self(x), target.detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


def of_lightly() -> Any:
    pytest.importorskip("lightly")
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(16, 3, 4, 4, generator=generator), 0.1 * torch.randn(16, 3, 4, 4, generator=generator)]
    return Byol(), DataLoader(TensorDataset(*views), batch_size=8)


def of_chemprop() -> Any:
    pytest.importorskip("chemprop")
    from chemprop import data, models
    from chemprop import nn as layers

    smiles = ["C", "CC", "CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CO"]
    points = [data.MoleculeDatapoint.from_smi(smile, [float(len(smile))]) for smile in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False)
    return models.MPNN(
        layers.BondMessagePassing(d_h=32), layers.MeanAggregation(), layers.RegressionFFN(input_dim=32)
    ), loader


def of_pytorch_forecasting(kind: str) -> Any:
    forecasting = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    rows = [
        {"time": t, "series": str(s), "value": float(torch.sin(torch.tensor(t / 3 + s)))}
        for s in range(3)
        for t in range(30)
    ]
    data = forecasting.TimeSeriesDataSet(
        pd.DataFrame(rows), time_idx="time", target="value", group_ids=["series"], max_encoder_length=10,
        max_prediction_length=3, time_varying_unknown_reals=["value"], time_varying_known_reals=["time"],
    )  # fmt: skip
    kinds = {
        "TFT": lambda: forecasting.TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=2),
        "DeepAR": lambda: forecasting.DeepAR.from_dataset(data, hidden_size=8, rnn_layers=1),
    }
    return kinds[kind](), data.to_dataloader(train=True, batch_size=8, shuffle=False, num_workers=0)


PROJECTS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "ViT": ("timm", lambda: of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), {}),
    "EVA-02": ("timm", lambda: of_timm("eva02_tiny_patch14_224", img_size=28, depth=2), {}),
    "BEiT": ("timm", lambda: of_timm("beit_base_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2), {}),
    "ConvNeXt": ("timm", lambda: of_timm("convnext_atto"), {"target_modules": "all-linear+conv", "r": 1}),
    "Swin": ("torchvision", lambda: of_torchvision("swin_t"), {}),
    "ResNet": ("torchvision", lambda: of_torchvision("resnet18"), {"target_modules": "all-linear+conv"}),
    "Unet": ("segmentation-models-pytorch", of_segmentation_models, {"target_modules": "all-linear+conv"}),
    "SAGE, GAT": ("torch_geometric", of_torch_geometric, {}),
    "BYOL": ("lightly", of_lightly, {}),
    "MPNN": ("chemprop", of_chemprop, {}),
    "TFT": ("pytorch-forecasting", lambda: of_pytorch_forecasting("TFT"), {}),
    "DeepAR": (
        "pytorch-forecasting", lambda: of_pytorch_forecasting("DeepAR"), {"target_modules": "all-linear+recurrent"}
    ),
}  # fmt: skip


def fit(
    module: L.LightningModule, data: Any, path: Path, settings: dict[str, Any], ckpt_path: Any = None
) -> list[float]:
    """Train, keep the checkpoint of each epoch, and return the losses."""
    L.seed_everything(1, verbose=False)
    losses, keep = Losses(), ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    lora = LoRA(**{"r": 4, "summary": False, "merge": None, **settings})
    toys.trainer(path, [lora, keep, losses], max_epochs=EPOCHS).fit(
        module, data, ckpt_path=ckpt_path, weights_only=False
    )
    return losses.losses


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def outputs(module: L.LightningModule, data: Any) -> list[Tensor]:
    """The module's loss on each batch in eval mode, or what it predicts where its own step wants a Trainer."""
    module.eval()
    torch.manual_seed(0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        if isinstance(next(iter(data))[0], dict):
            found = [module(batch[0])["prediction"] for batch in data]
        else:
            found = [module.training_step(batch, i) for i, batch in enumerate(data)]
    del module.log
    return found


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project(name: str, tmp_path: Path) -> None:
    package, make, settings = PROJECTS[name]
    torch.manual_seed(0)
    module, data = make()
    base = copy.deepcopy(module)
    whole = copy.deepcopy(base)
    losses = fit(whole, data, tmp_path / "whole", settings)
    first, last = losses[: len(data)], losses[-len(data) :]
    assert sum(last) < sum(first)

    checkpoint = next((tmp_path / "whole").glob("epoch=1*.ckpt"))
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    adapter = adapter_state_dict(whole)
    assert saved.keys() <= adapter.keys() | {n for n in saved if "metric" in n or "loss" in n}

    resumed = copy.deepcopy(base)
    fit(resumed, data, tmp_path / "resumed", settings, checkpoint)
    toys.assert_same_tensors(adapter_state_dict(resumed), adapter)

    trained = outputs(whole, data)
    merged = outputs(eject(whole, merge=True), data)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    plain = copy.deepcopy(base)
    plain.load_state_dict(whole.state_dict())  # their own class takes it, as it is
    torch.testing.assert_close(outputs(plain, data), merged)
    version = importlib.metadata.version(package)
    before, after = (sum(part) / len(part) for part in (first, last))
    apart = max(float((one - other).abs().max()) for one, other in zip(merged, trained))
    row = f"| {name} | {package} {version} | {before:.3f} | {after:.3f} | {apart:.0e} |"
    print(row)
    if page := os.environ.get("PROJECTS_TABLE"):
        lines = Path(page).read_text().splitlines()
        Path(page).write_text("\n".join(row if line.startswith(f"| {name} |") else line for line in lines) + "\n")
