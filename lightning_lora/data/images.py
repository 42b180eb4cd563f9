"""Images with a label each: a folder with one folder for each class, or the digits of scikit-learn."""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.from_files import FileData
from lightning_lora.data.labels import agreed_labels
from lightning_lora.data.record import BadRows, Record
from lightning_lora.pretrained import resolve

DIGITS = "scikit-learn:digits"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Mean and deviation of ImageNet's colors, by which nearly all pretrained models expect their inputs.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ImageData(FileData):
    """Images and labels. All images are resized to one square size and normalized as the checkpoint expects it.

    They are seen as a viewer shows them: turned by their EXIF orientation, 8 and 16 bits a channel, gray, palette or
    CMYK, what is transparent on white, and of an animation its first picture. A file that cannot be read is named in
    ``setup``.

    Args:
        path: A folder with a folder of images for each label, or ``scikit-learn:digits``, the 1,797 digits of 8 x 8
            pixels that scikit-learn carries. So is ``val_path``; ``predict_path`` is a folder of images.
        labels: Names of the classes, in the order of their indices. Default ``None``: the model's.
        size: Height and width of the input, in pixels. Default ``None``: what the checkpoint's image processor says, or
            224 where it has none, and with it mean and deviation of the colors, or ImageNet's.
        pretrained: Checkpoint whose image processor is asked. Default ``None``: the model's.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.

    Raises:
        ValueError: In ``setup``, if the folders are not those of the labels, and as in the base class.
    """

    def __init__(
        self,
        path: Paths,
        labels: list[str] | None = None,
        size: int | None = None,
        pretrained: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        # Those of the model where none are given, from `setup` on.
        self.labels = labels or []
        self._given = labels
        self.size = size
        self.pretrained = pretrained
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, after ``setup``."""
        found = [label for _, label in self.train_rows or []]
        return [found.count(index) for index in range(len(self.labels))]

    def setup(self, stage: str) -> None:
        """Find the images, look at each, and split them, once."""
        self.labels = agreed_labels(self._given, self.of_model("labels"))
        super().setup(stage)

    def prepare(self) -> None:
        """Ask the checkpoint how it expects images."""
        settings = _processor(self.pretrained or self.of_model("pretrained"))
        if settings.get("do_normalize", True):
            self.mean = torch.tensor(settings.get("image_mean", _MEAN))[:, None, None]
            self.std = torch.tensor(settings.get("image_std", _STD))[:, None, None]
        else:
            self.mean, self.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        self.size = self.size or _size(settings) or 224

    def read(self, path: Paths, bad: BadRows) -> list[Record]:
        """The images of a folder for each label, or the digits."""
        if not isinstance(path, str):
            raise ValueError(f"Found path={path}, expected one folder of images.")
        return _digits(self.labels) if path == DIGITS else _readable(_folders(path, self.labels), bad)

    def read_unlabelled(self, path: Paths, bad: BadRows) -> list[Record]:
        """The images of one folder, in the order of their names."""
        return _readable([Record(str(image), {"image": image}) for image in _images(Path(str(path)))], bad)

    def content(self, record: Record, unused: Collection[str]) -> bytes:
        """The bytes of the image, and its label."""
        image = record.fields["image"]
        data = image.read_bytes() if isinstance(image, Path) else image.numpy().tobytes()
        return b"%d:" % record.fields["label"] + data

    def encode(self, record: Record) -> Encoded:
        """The image's file, or its pixels if it has none, and the index of its label."""
        image = record.fields["image"]
        return Encoded([[str(image) if isinstance(image, Path) else image.tolist(), record.fields["label"]]])

    def label(self, row: list[Any]) -> str:
        """The name of its label, and of its file."""
        return f"{self.labels[row[1]]} {row[0] if isinstance(row[0], str) else ''}".rstrip()

    def encode_predict(self, record: Record) -> Any:
        """The image, not yet opened."""
        return record.fields["image"]

    def collate(self, rows: list[list[Any]]) -> dict[str, Tensor]:
        """``pixel_values`` of shape ``(images, 3, size, size)``, and ``labels``."""
        images, labels = zip(*rows)
        return {**self.collate_predict(images), "labels": torch.tensor(labels)}

    def collate_predict(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The same without labels."""
        return {"pixel_values": (torch.cat([self._resize(_pixels(image)) for image in rows]) - self.mean) / self.std}

    def _resize(self, pixels: Tensor) -> Tensor:
        size = (self.size or 0, self.size or 0)
        return interpolate(pixels[None], size, mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)


def _processor(pretrained: str | None) -> dict[str, Any]:
    """The settings of a checkpoint's image processor; none where it has none."""
    if pretrained is None or pretrained.endswith(".onnx"):
        return {}
    from transformers import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(resolve(pretrained))[0])
    except OSError:  # no such file in it
        return {}


def _size(settings: dict[str, Any]) -> int | None:
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = cropped or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return int(size) if size else None


def _digits(labels: list[str]) -> list[Record]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(f"The data {DIGITS!r} is in scikit-learn. Run: pip install scikit-learn") from None
    if len(labels) != 10:
        raise ValueError(f"Found {len(labels)} labels for {DIGITS!r}, expected 10, one for each digit.")
    images, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images.astype(np.float32) / 16).view(-1, 1, 8, 8)
    return [
        Record(f"{DIGITS}, image {number}", {"image": image, "label": int(target)})
        for number, (image, target) in enumerate(zip(pixels, targets), start=1)
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
    files = sorted(file for file in folder.rglob("[!.]*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not found:
        raise ValueError(f"Found no images ({', '.join(_SUFFIXES)}) in {folder}, expected at least one.")
    others = [file.name for file in files if file not in set(found)]
    if others:
        rank_zero_warn(f"Left out {len(others)} of {folder}, which are no images, such as {others[0]!r}.")
    return found


def _readable(records: list[Record], bad: BadRows) -> list[Record]:
    """The images that can be read; the others are noted."""

    def problem(record: Record) -> ValueError | None:
        try:
            _load(record.fields["image"], check=True)
        except ValueError as error:
            return error
        return None

    # Threads: decoding is done outside of Python.
    with ThreadPoolExecutor() as threads:
        problems = list(threads.map(problem, records))
    for error in filter(None, problems):
        bad.add(error)
    return [record for record, error in zip(records, problems) if error is None]


def _load(file: str | Path, check: bool = False) -> Any:
    """The image in a file, upright; for a check, in the smallest size that the format can be decoded in."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            if check:
                opened.draft(None, (1, 1))
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: found no image that can be read ({error}). Remove or replace the file.") from None


def _pixels(image: Any) -> Tensor:
    """Values from 0 to 1, of shape ``(channels, height, width)``."""
    if not isinstance(image, (str, Path)):
        return torch.as_tensor(image)
    from PIL import Image

    loaded = _load(image)
    if loaded.mode.startswith(("I", "F")):
        # 16 bits a pixel, also where the format has room for 32; fractions are of one, or as whole numbers.
        values = np.asarray(loaded, dtype=np.float32)
        highest = next((top for top in (1, 255) if loaded.mode == "F" and values.max() <= top), 65535)
        return torch.from_numpy(values / highest)[None].clamp(0, 1)
    if loaded.has_transparency_data:
        loaded = loaded.convert("RGBA")
        white = Image.new("RGBA", loaded.size, "white")
        loaded = Image.alpha_composite(white, loaded)
    return torch.from_numpy(np.asarray(loaded.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
