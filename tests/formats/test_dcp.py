"""Directories that ``torch.distributed.checkpoint`` writes: read right or refused, and nothing in them is run."""

import os
import pickle
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import toys
from helpers.toys import Toy, loader, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import metadata

from lightning_lora import LoRA, load_adapter, load_from_checkpoint
from lightning_lora.formats.dcp import CHECKSUMS_FILE, INDEX_FILE, META_FILE, read_directory, write_checksums
from lightning_lora.formats.dcp_index import read_index
from lightning_lora.model.state_dict import CheckpointError


def write(directory: Path, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Path:
    """As a strategy that shards the model does, in one process."""
    directory.mkdir(parents=True)
    dcp.save({"state_dict": tensors}, checkpoint_id=directory, no_dist=True)
    torch.save(rest, directory / META_FILE)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("dcp")
    trainer = toys.trainer(folder, [LoRA(r=2, summary=False, merge=None)], max_epochs=1, enable_checkpointing=False)
    trainer.fit(Toy(), loader())
    trainer.save_checkpoint(folder / "one.ckpt")
    content = torch.load(folder / "one.ckpt", weights_only=True)
    tensors = content.pop("state_dict")
    directory = write(folder / "shards.ckpt", tensors, content)
    write_checksums(directory)
    return directory, tensors


@pytest.fixture
def copied(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Without checksums, as it was written without this package."""
    target = shutil.copytree(saved[0], tmp_path / "copy.ckpt")
    (target / CHECKSUMS_FILE).unlink()
    return target


def change_index(directory: Path, change: Callable[[Any], Any]) -> None:
    with (directory / INDEX_FILE).open("rb") as file:
        index = pickle.load(file)  # which this test has written
    changed = change(index)
    (directory / INDEX_FILE).write_bytes(pickle.dumps(index if changed is None else changed))


def refused(directory: Path, match: str) -> None:
    model = Toy()
    before = snapshot(model)
    for read in (
        lambda: load_adapter(model, directory),
        lambda: toys.trainer("unused", [LoRA(r=2)], max_epochs=2).fit(model, loader(), ckpt_path=directory),
    ):
        with pytest.raises(CheckpointError, match=match):
            read()
        toys.assert_same_tensors(snapshot(model), before)
    with pytest.raises(CheckpointError, match=match):
        load_from_checkpoint(Toy, directory)


def test_reads_what_torch_wrote(saved: tuple[Path, dict[str, Tensor]], copied: Path) -> None:
    for directory in (saved[0], copied):
        toys.assert_same_tensors(read_directory(directory)["state_dict"], saved[1])


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]),
)
@settings(max_examples=20)
def test_reads_any_tensor(tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype) -> None:
    tensor = torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].view(shape).to(dtype)
    directory = write(tmp_path_factory.mktemp("any") / "d", {"a": tensor, "b.c": torch.ones(2)}, {})
    toys.assert_same_tensors(read_directory(directory)["state_dict"], {"a": tensor, "b.c": torch.ones(2)})


@given(data=st.data())
@settings(max_examples=150)
def test_a_changed_bit_is_told(
    saved: tuple[Path, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    target = shutil.copytree(saved[0], tmp_path_factory.mktemp("bit") / "copy.ckpt")
    file = target / data.draw(st.sampled_from(sorted(path.name for path in target.iterdir())))
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    with pytest.raises((CheckpointError, RuntimeError)):
        read_directory(target)


@pytest.mark.parametrize("name", [META_FILE, INDEX_FILE, "__0_0.distcp"])
def test_a_missing_file_is_told(name: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    target = shutil.copytree(saved[0], tmp_path / "copy.ckpt")
    (target / name).unlink()
    if name == META_FILE:
        with pytest.raises((CheckpointError, IsADirectoryError)):
            load_from_checkpoint(Toy, target)
    else:
        refused(target, "missing, or not what was written|incomplete")
        (target / CHECKSUMS_FILE).unlink()
        refused(target, "incomplete")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["whole", "planner data", "value"])
def test_no_object_is_made(where: str, copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    def change(index: Any) -> Any:
        if where == "whole":
            return Touch(mark)
        if where == "planner data":
            index.planner_data = {"a": Touch(mark)}
        else:
            index.storage_meta = Touch(mark)
        return None

    change_index(copied, change)
    refused(copied, r"holds a \w+\.mkdir")
    assert not mark.exists()


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_objects_beside_the_tensors_are_for_files_that_are_trusted(
    weights_only: bool | None, copied: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    rest = torch.load(copied / META_FILE, weights_only=True)
    torch.save({**rest, "hyper_parameters": {"x": Touch(mark)}}, copied / META_FILE)
    if weights_only is False:
        with suppress(TypeError):  # Toy has no such argument
            load_from_checkpoint(Toy, copied, weights_only=False)
    else:
        with pytest.raises(
            CheckpointError, match=r"namely posix\.mkdir, .* load_from_checkpoint\(\.\.\., weights_only"
        ):
            load_from_checkpoint(Toy, copied, weights_only=weights_only)
    assert mark.exists() == (weights_only is False)


def test_no_class_of_torch_is_changed(copied: Path) -> None:
    # A pickle may set attributes of whatever it has, classes too.
    name = "torch.distributed.checkpoint.metadata"
    script = f"c{name}\nMetadataIndex\n(N(S'fqn'\nS'changed'\ndtb.".encode()
    (copied / INDEX_FILE).write_bytes(script)
    refused(copied, "damaged")
    assert "fqn" not in vars(metadata.MetadataIndex)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "inner/../../outside", "..", "a\\b", ""])
def test_no_file_elsewhere_is_opened(path: str, copied: Path) -> None:
    shutil.copy(copied / "__0_0.distcp", copied.parent / "outside")

    def change(index: Any) -> None:
        for place in index.storage_data.values():
            place.relative_path = path

    change_index(copied, change)
    refused(copied, "which is no file in it")


def test_checksums_of_files_elsewhere_are_refused(copied: Path) -> None:
    (copied / CHECKSUMS_FILE).write_text('{"../outside": [1, 2]}')
    (copied.parent / "outside").write_text("x")
    refused(copied, "which is no file in it")
    (copied / CHECKSUMS_FILE).write_text('{"a": "b"}')
    refused(copied, CHECKSUMS_FILE)


def test_a_shape_that_lies_takes_no_memory(copied: Path) -> None:
    def change(index: Any) -> None:
        for entry in index.state_dict_metadata.values():
            entry.size = torch.Size([1 << 40, *entry.size[1:]])

    change_index(copied, change)
    tracemalloc.start()
    refused(copied, "do not make up")
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


@pytest.mark.parametrize("name", [INDEX_FILE, CHECKSUMS_FILE, "part", "beside"])
@pytest.mark.parametrize("endless", ["queue", "zeros"])
def test_what_never_ends_is_not_read(name: str, endless: str, copied: Path) -> None:
    path = next(copied.glob("*.distcp")) if name == "part" else copied / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if endless == "queue" else path.symlink_to("/dev/zero")
    refused(copied, "is no file")


@given(times=st.integers(2, 500))
@settings(max_examples=10)
def test_parts_that_share_their_bytes(saved: tuple[Path, dict[str, Tensor]], times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(saved[0], Path(folder) / "copy.ckpt"))
        (directory / CHECKSUMS_FILE).unlink()

        def change(index: Any) -> None:
            for entry in index.state_dict_metadata.values():
                (chunk,) = entry.chunks
                rows = chunk.sizes[0]
                entry.size = torch.Size([rows * times, *entry.size[1:]])
                entry.chunks = [
                    metadata.ChunkStorageMetadata(torch.Size([rows * i, *chunk.offsets[1:]]), chunk.sizes)
                    for i in range(times)
                ]
            index.storage_data = {
                metadata.MetadataIndex(key.fqn, chunk.offsets): place
                for key, place in index.storage_data.items()
                for chunk in index.state_dict_metadata[key.fqn].chunks
            }

        change_index(directory, change)
        with pytest.raises(RuntimeError, match="than that file has bytes"):
            read_directory(directory)


def test_a_part_of_a_single_value(tmp_path: Path) -> None:
    directory = write(tmp_path / "one.ckpt", {"a": torch.zeros(2, 2)}, {})
    part = next(directory.glob("*.distcp"))
    torch.save(torch.zeros(1).expand(1 << 16, 1 << 16), part)  # 16 GB in a few bytes

    def change(index: Any) -> None:
        (entry,), (place,) = index.state_dict_metadata.values(), index.storage_data.values()
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 16, 1 << 16])
        place.offset, place.length = 0, part.stat().st_size

    change_index(directory, change)
    with pytest.raises(RuntimeError, match="does not hold"):
        read_directory(directory)


@given(rest=st.one_of(st.none(), st.integers(), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)))
@settings(max_examples=20)
def test_what_is_said_of_optimizers(saved: tuple[Path, dict[str, Tensor]], rest: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(saved[0], Path(folder) / "copy.ckpt"))
        (directory / CHECKSUMS_FILE).unlink()
        content = torch.load(directory / META_FILE, weights_only=True)
        content["lightning_lora"]["optimizers"] = [rest, {"state": {0: rest}}]
        torch.save(content, directory / META_FILE)
        refused(directory, "cannot be read")


def set_in_each(values: str, name: str, value: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        for each in getattr(index, values).values():
            setattr(each, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.state_dict_metadata.clear(),
        lambda index: index.storage_data.clear(),
        lambda index: {"state_dict_metadata": 1},
        set_in_each("state_dict_metadata", "chunks", []),
        set_in_each("state_dict_metadata", "properties", metadata.TensorProperties(dtype=torch.float64)),
        set_in_each("storage_data", "offset", -1),
        set_in_each("storage_data", "length", 3),
        set_in_each("storage_data", "transform_descriptors", ["zstd"]),
    ],
)
def test_an_index_that_lies(change: Callable[[Any], Any], copied: Path) -> None:
    change_index(copied, change)
    refused(copied, "incomplete|does not hold|do not fit|is damaged")


def test_the_index_of_any_bytes(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    content = (saved[0] / INDEX_FILE).read_bytes()

    @given(st.binary(max_size=64), st.integers(0, len(content)))
    @settings(max_examples=200)
    def check(insert: bytes, at: int) -> None:
        path = tmp_path / "index"
        path.write_bytes(content[:at] + insert + content[at + len(insert) :])
        with suppress(RuntimeError):  # and nothing else
            read_index(path)

    check()
