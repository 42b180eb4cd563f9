"""Images with a label each: a folder with one folder for each class, or the digits of scikit-learn."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from lightning_lora.data.resumable import EpochSampler, ResumableDataLoader

DIGITS = "scikit-learn:digits"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Mean and deviation of ImageNet's colors, by which nearly all pretrained models expect their inputs.
_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class ImageData(L.LightningDataModule):
    """Images and labels. All images are resized to one square size and normalized as for ImageNet.

    Args:
        path: A folder with a folder of images for each label, or ``scikit-learn:digits``, the 1,797 digits of 8 x 8
            pixels that scikit-learn carries.
        labels: Names of the classes, in the order of their indices.
        size: Height and width of the input, in pixels. Default 224.
        val_fraction: Share of the images held out for validation, above 0 and below 1. Default 0.2.
        batch_size: Images in a batch. Default 32.
        num_workers: Processes that load batches; 0 loads in the training process. Default 0.
        seed: Seed of the split and of the training order. Default 0.

    Raises:
        ValueError: If ``val_fraction`` is out of range, or, in ``setup``, if the folders are not those of the labels.
    """

    def __init__(
        self,
        path: str,
        labels: list[str],
        size: int = 224,
        val_fraction: float = 0.2,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"Found val_fraction={val_fraction}, expected more than 0 and less than 1, such as 0.2.")
        self.path = path
        self.labels = labels
        self.size = size
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_rows: list[tuple[Any, int]] | None = None
        self.val_rows: list[tuple[Any, int]] = []

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, after ``setup``."""
        found = [label for _, label in self.train_rows or []]
        return [found.count(index) for index in range(len(self.labels))]

    def setup(self, stage: str) -> None:
        """Find the images and split them, once."""
        if self.train_rows is not None:
            return
        rows = _digits(self.labels) if self.path == DIGITS else _folders(self.path, self.labels)
        held_out = max(1, round(self.val_fraction * len(rows)))
        if len(rows) <= held_out:
            raise ValueError(f"{self.path}: found {len(rows)} images, expected more than the {held_out} held out.")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.val_rows = [rows[index] for index in order[:held_out]]
        self.train_rows = [rows[index] for index in order[held_out:]]
        rank_zero_info(f"{self.path}: {len(self.train_rows)} images for training, {held_out} for validation.")

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, in an order of their own that ``seed`` fixes."""
        rows = self.train_rows or []
        return self._loader(rows, EpochSampler(len(rows), self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """The images held out."""
        return self._loader(self.val_rows)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same images as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same images as in validation."""
        return self.val_dataloader()

    def collate(self, rows: list[tuple[Any, int]]) -> dict[str, Tensor]:
        """``pixel_values`` of shape ``(images, 3, size, size)``, and ``labels``."""
        pixels = torch.cat([self._resize(_pixels(image)) for image, _ in rows])
        return {"pixel_values": (pixels - _MEAN) / _STD, "labels": torch.tensor([label for _, label in rows])}

    def _resize(self, pixels: Tensor) -> Tensor:
        size = (self.size, self.size)
        return interpolate(pixels[None], size, mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)

    def _loader(self, rows: list[tuple[Any, int]], sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return ResumableDataLoader(
            rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )


def _digits(labels: list[str]) -> list[tuple[Any, int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(f"The data {DIGITS!r} is in scikit-learn. Run: pip install scikit-learn") from None
    if len(labels) != 10:
        raise ValueError(f"Found {len(labels)} labels for {DIGITS!r}, expected 10, one for each digit.")
    images, targets = load_digits(return_X_y=True)
    return [
        (torch.from_numpy(image.astype(np.float32) / 16).view(1, 8, 8), int(target))
        for image, target in zip(images, targets)
    ]


def _folders(path: str, labels: list[str]) -> list[tuple[Any, int]]:
    folder = Path(path)
    there = sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    missing = [label for label in labels if label not in there]
    surplus = [name for name in there if name not in labels]
    if missing or surplus:
        raise ValueError(
            f"Found the folders {', '.join(there) or 'none'} in {path!r}, expected one for each label: "
            f"{', '.join(labels)}. Correct the path, the labels or the folders."
        )
    rows = []
    for index, label in enumerate(labels):
        images = sorted(file for file in (folder / label).iterdir() if file.suffix.lower() in _SUFFIXES)
        if not images:
            raise ValueError(f"Found no images ({', '.join(_SUFFIXES)}) in {folder / label}, expected at least one.")
        rows += [(image, index) for image in images]
    return rows


def _pixels(image: Any) -> Tensor:
    """Values from 0 to 1, of shape ``(channels, height, width)``."""
    if isinstance(image, Tensor):
        return image
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            values = np.asarray(opened.convert("RGB"), dtype=np.float32)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{image}: found no image that can be read ({error}). Remove or replace the file.") from None
    return torch.from_numpy(values / 255).permute(2, 0, 1)
