"""Images with a label each: a folder with one folder for each class, or the digits of scikit-learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_lora.data.files import Record
from lightning_lora.data.from_files import Encoded, FileData

DIGITS = "scikit-learn:digits"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Mean and deviation of ImageNet's colors, by which nearly all pretrained models expect their inputs.
_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class ImageData(FileData):
    """Images and labels. All images are resized to one square size and normalized as for ImageNet.

    Args:
        path: A folder with a folder of images for each label, or ``scikit-learn:digits``, the 1,797 digits of 8 x 8
            pixels that scikit-learn carries. So is ``val_path``; ``predict_path`` is a folder of images.
        labels: Names of the classes, in the order of their indices.
        size: Height and width of the input, in pixels. Default 224.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.

    Raises:
        ValueError: In ``setup``, if the folders are not those of the labels, and as in the base class.
    """

    def __init__(self, path: str, labels: list[str], size: int = 224, **options: Any) -> None:
        super().__init__(path, **options)
        self.labels = labels
        self.size = size

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, after ``setup``."""
        found = [label for _, label in self.train_rows or []]
        return [found.count(index) for index in range(len(self.labels))]

    def read(self, path: str) -> list[Record]:
        """The images of a folder for each label, or the digits."""
        return _digits(self.labels) if path == DIGITS else _folders(path, self.labels)

    def read_unlabelled(self, path: str) -> list[Record]:
        """The images of one folder, in the order of their names."""
        return [Record(str(image), {"image": image}) for image in _images(Path(path))]

    def encode(self, record: Record) -> Encoded:
        """The image, not yet opened, and the index of its label."""
        return Encoded((record.fields["image"], record.fields["label"]))

    def collate(self, rows: list[tuple[Any, int]]) -> dict[str, Tensor]:
        """``pixel_values`` of shape ``(images, 3, size, size)``, and ``labels``."""
        images, labels = zip(*rows)
        return {"pixel_values": self._pixel_values(images), "labels": torch.tensor(labels)}

    def collate_predict(self, records: list[Record]) -> dict[str, Tensor]:
        """The same without labels."""
        return {"pixel_values": self._pixel_values([record.fields["image"] for record in records])}

    def _pixel_values(self, images: Sequence[Any]) -> Tensor:
        return (torch.cat([self._resize(_pixels(image)) for image in images]) - _MEAN) / _STD

    def _resize(self, pixels: Tensor) -> Tensor:
        size = (self.size, self.size)
        return interpolate(pixels[None], size, mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)


def _digits(labels: list[str]) -> list[Record]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(f"The data {DIGITS!r} is in scikit-learn. Run: pip install scikit-learn") from None
    if len(labels) != 10:
        raise ValueError(f"Found {len(labels)} labels for {DIGITS!r}, expected 10, one for each digit.")
    images, targets = load_digits(return_X_y=True)
    return [
        Record(DIGITS, {"image": torch.from_numpy(image.astype(np.float32) / 16).view(1, 8, 8), "label": int(target)})
        for image, target in zip(images, targets)
    ]


def _folders(path: str, labels: list[str]) -> list[Record]:
    folder = Path(path)
    there = sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    missing = [label for label in labels if label not in there]
    surplus = [name for name in there if name not in labels]
    if missing or surplus:
        raise ValueError(
            f"Found the folders {', '.join(there) or 'none'} in {path!r}, expected one for each label: "
            f"{', '.join(labels)}. Correct the path, the labels or the folders."
        )
    return [
        Record(str(image), {"image": image, "label": index})
        for index, label in enumerate(labels)
        for image in _images(folder / label)
    ]


def _images(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not found:
        raise ValueError(f"Found no images ({', '.join(_SUFFIXES)}) in {folder}, expected at least one.")
    return found


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
