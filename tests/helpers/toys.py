"""A small LightningModule, its data and a quiet Trainer, which many tests share."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROWS = 32


def toy_net(seed: int = 0, dropout: float = 0.1) -> nn.Sequential:
    """The network of the toy, the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(16)
        # As if pretrained, so that no tensor of the base is constant or zero.
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.num_batches_tracked.fill_(7)
        return nn.Sequential(
            nn.Linear(8, 16),
            norm,
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 1),
        )


class Toy(L.LightningModule):
    """A regression on eight features. Its linear layers are ``net.0``, ``net.4`` and the head ``net.6``."""

    def __init__(self, seed: int = 0, dropout: float = 0.1, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr
        self.net = toy_net(seed, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: list[Tensor], name: str) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x.to(self.dtype)).float(), y.float())
        self.log(name, loss)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch, "train_loss")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._loss(batch, "val_loss")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._loss(batch, "test_loss")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0].to(self.dtype))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def dataset() -> TensorDataset:
    """32 rows, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 8, generator=generator)
    return TensorDataset(x, x[:, :3].sum(1, keepdim=True))


def inputs() -> Tensor:
    """The features of :func:`dataset`."""
    return dataset().tensors[0]


def loader(shuffle: bool = False, batch_size: int = 8) -> DataLoader:
    return DataLoader(dataset(), batch_size=batch_size, shuffle=shuffle)


def trainer(tmp_path: str | Path, callbacks: Any = None, **kw: Any) -> L.Trainer:
    """A quiet Trainer on the CPU, which writes below ``tmp_path`` only."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "default_root_dir": tmp_path,
        "callbacks": callbacks,
    }
    return L.Trainer(**(settings | kw))


def randomize(model: nn.Module, scale: float = 0.1) -> None:
    """As if trained: every trainable tensor moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """The model's outputs on :func:`inputs` in eval mode, each module's mode left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    result = model.eval()(inputs().to(next(model.parameters()).dtype)).float()
    for module, training in modes:
        module.training = training
    return result


def base_of(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of the model that the base has too."""
    state = model.state_dict()
    return {name: state[name] for name in base}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Require the same names and, bit for bit, the same values."""
    assert found.keys() == expected.keys()
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not changed


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors anywhere in a checkpoint, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors_in(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from tensors_in(inner, f"{path}/{index}")


def assert_adapter_only(checkpoint: str | Path | Mapping[str, Any], base: Mapping[str, Tensor]) -> None:
    """Require that a checkpoint holds adapters and that no dict in it holds a tensor of the base."""
    if not isinstance(checkpoint, Mapping):
        checkpoint = torch.load(checkpoint, weights_only=True)
    assert checkpoint["lightning_lora"]["adapters"]
    assert any("lora_B" in name for name in checkpoint["state_dict"])
    big = {name: tensor.float() for name, tensor in base.items() if tensor.numel() > 1}
    leaks = [
        (path, name)
        for path, tensor in tensors_in(checkpoint)
        for name, of_base in big.items()
        if tensor.shape == of_base.shape and torch.allclose(tensor.float(), of_base, rtol=1e-2, atol=1e-3)
    ]
    assert not leaks
