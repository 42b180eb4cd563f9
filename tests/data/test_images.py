"""Images as a viewer shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_lora.data import ImageData
from lightning_lora.data.images import _pixels

HALF = np.zeros((8, 16), np.uint8)
HALF[:, :8] = 255  # white on the left


def shades(folder: Path, name: str, image: Any, **options: Any) -> list[float]:
    """The four corners' gray."""
    image.save(folder / name, **options)
    pixels = _pixels(folder / name).mean(0)
    return [round(float(pixels[y, x]), 2) for y in (0, -1) for x in (0, -1)]


def test_every_kind_of_pixels(tmp_path: Path) -> None:
    white, gray = [1.0, 0.0, 1.0, 0.0], [0.12] * 4
    color = Image.fromarray(np.stack([HALF] * 3, -1))
    for name in ("a.png", "a.tif", "a.gif", "a.bmp", "a.webp"):
        assert shades(tmp_path, name, color) == white, name
    assert shades(tmp_path, "gray.png", Image.fromarray(HALF)) == white
    assert shades(tmp_path, "bits.png", Image.fromarray(HALF).convert("1")) == white
    assert shades(tmp_path, "palette.png", color.convert("P")) == white
    assert shades(tmp_path, "cmyk.tif", color.convert("CMYK")) == white
    assert shades(tmp_path, "dark16.png", Image.fromarray(np.full((8, 8), 8000, np.uint16))) == gray
    assert shades(tmp_path, "dark16.tif", Image.fromarray(np.full((8, 8), 8000, np.uint16))) == gray
    assert shades(tmp_path, "floats.tif", Image.fromarray(np.full((8, 8), 31.0, np.float32))) == gray
    assert shades(tmp_path, "fractions.tif", Image.fromarray(np.full((8, 8), 0.12, np.float32))) == gray


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear = np.zeros((8, 16, 4), np.uint8)
    clear[:, 8:, 3] = 255
    assert shades(tmp_path, "alpha.png", Image.fromarray(clear)) == [1.0, 0.0, 1.0, 0.0]


def test_images_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right, so that the left is up
    assert shades(tmp_path, "a.png", Image.fromarray(HALF), exif=exif) == [1.0, 1.0, 0.0, 0.0]


def test_folders_inside_of_a_label_count_for_it(tmp_path: Path) -> None:
    (Path(folders(tmp_path)) / "b" / "more").mkdir()
    Image.fromarray(HALF).save(tmp_path / "b" / "more" / "3.png")
    data = ImageData(str(tmp_path), ["a", "b"], val_fraction=0)
    data.setup("fit")
    assert data.class_counts == [3, 4]


def folders(folder: Path) -> str:
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(HALF).save(folder / label / f"{index}.jpg")
    return str(folder)


def test_files_that_cannot_be_read_are_named_before_training(tmp_path: Path) -> None:
    path = folders(tmp_path / "images")
    whole = (tmp_path / "images/a/0.jpg").read_bytes()
    (tmp_path / "images/a/0.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/b/1.jpg").write_bytes(b"x")
    (tmp_path / "images/b/notes.txt").write_text("x")
    data = ImageData(path, ["a", "b"], val_fraction=0)
    with (
        pytest.warns(UserWarning, match=r"Left out 1 of .*, which are no images, such as 'notes\.txt'"),
        pytest.raises(ValueError, match=r"Found 2 rows(.|\n)*a/0\.jpg: found no image(.|\n)*b/1\.jpg: found no image"),
    ):
        data.setup("fit")
    skipping = ImageData(path, ["a", "b"], val_fraction=0, on_error="skip")
    skipping.setup("fit")
    assert skipping.class_counts == [2, 2]


def test_the_processor_of_the_checkpoint_is_asked(tmp_path: Path) -> None:
    path = folders(tmp_path / "images")
    (tmp_path / "vit").mkdir()
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 12, "width": 12}}
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(settings))
    data = ImageData(path, ["a", "b"], val_fraction=0, pretrained=str(tmp_path / "vit"))
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["pixel_values"].shape == (6, 3, 12, 12)
    assert (batch["pixel_values"].amin(), batch["pixel_values"].amax()) == pytest.approx((-1, 1), abs=0.05)
    plain = ImageData(path, ["a", "b"], size=8, val_fraction=0)
    plain.setup("fit")
    (batch,) = plain.train_dataloader()
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(batch["pixel_values"][0, :, 0, 0], expected, atol=0.05)
