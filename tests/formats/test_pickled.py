"""Pickles that ask for more than they have bytes for: refused at once, and all that ``torch.save`` writes is read."""

import pickle
import resource
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora import CheckpointError
from lightning_lora.formats.dcp_index import read_index
from lightning_lora.formats.open_file import open_file
from lightning_lora.formats.saved_adapter import read

IN_FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def called(name: str, *arguments: bytes) -> bytes:
    module, _, last = name.rpartition(".")
    named = pickle.GLOBAL + f"{module}\n{last}\n".encode()
    return named + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def write(path: Path, program: bytes, parts: dict[str, bytes] | None = None) -> Path:
    """A file as ``torch.save`` writes it, of any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/version", "3\n")
        for name, content in (parts or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def refused(path: Path) -> None:
    """Require that a file is refused by all that read it, without memory or time for what it asks."""
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read(path)
    with pytest.raises(RuntimeError):
        open_file(path, "refuse")
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kilobytes


MANY = st.integers(10**9, 10**10).map(number)
ALLOCATING = st.sampled_from(
    ["__builtin__.bytearray", "builtins.bytearray", "torch.Tensor", "torch.FloatTensor", "torch.storage.UntypedStorage"]
)
WALKING = st.sampled_from(["builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size"])


@given(
    program=st.one_of(
        st.builds(called, ALLOCATING, MANY),
        st.builds(called, WALKING, st.builds(called, ALLOCATING, MANY)),
        st.builds(
            lambda name, many: called("torch._tensor._rebuild_from_type_v2", name, name, many + b"\x85", b"}"),
            ALLOCATING.map(lambda name: b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n"),
            MANY,
        ),
        st.builds(
            lambda size, codec: called("_codecs.encode", text("".join(map(chr, range(0x4E00, size)))), text(codec)),
            st.integers(0x9000, 0xD000),
            st.sampled_from(["punycode", "idna", "zlib_codec", "../latin1"]),
        ),
    )
)
@IN_FILES
def test_a_call_that_takes_memory_or_time(program: bytes, tmp_path: Path) -> None:
    refused(write(tmp_path / "call.ckpt", program))


def nested(kind: Callable[..., Any], levels: int, width: int) -> Any:
    found: Any = kind([1])
    for _ in range(levels):
        found = kind([found] * width)
    return found


@given(
    kind=st.sampled_from(
        [list, tuple, lambda items: dict(enumerate(items)), lambda items: OrderedDict(enumerate(items))]
    ),
    sizes=st.sampled_from([(60, 2), (2, 30_000), (9, 50), (300, 1)]),
    where=st.sampled_from(["state_dict", "lightning_lora", "adapters", "beside"]),
)
@IN_FILES
def test_what_is_shared_at_many_levels(
    kind: Callable[..., Any], sizes: tuple[int, int], where: str, tmp_path: Path
) -> None:
    bomb = nested(kind, *sizes)
    content = {"state_dict": {}, "lightning_lora": {"adapters": []}, where: bomb}
    if where == "adapters":
        content["lightning_lora"] = {"adapters": bomb}
    torch.save(content, tmp_path / "shared.ckpt")
    refused(tmp_path / "shared.ckpt")


def test_what_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"state_dict": {}, "lightning_lora": {"adapters": []}}
    content["lightning_lora"]["itself"] = content
    torch.save(content, tmp_path / "itself.ckpt")
    refused(tmp_path / "itself.ckpt")


@given(copies=st.integers(200, 400), packed=st.booleans())
@IN_FILES
def test_parts_that_share_their_bytes_or_are_packed(copies: int, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "parts.ckpt"
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.", zipfile.ZIP_STORED)
        archive.writestr("archive/data/0", bytes(1 << 16))
        first = archive.getinfo("archive/data/0")
        for number in range(1, 1 if packed else copies):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
    refused(path)


PLAIN = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=5),
        st.binary(min_size=1, max_size=5), st.builds(bytearray, st.binary(max_size=5)),
        st.complex_numbers(allow_nan=False), st.sets(st.integers(), max_size=3), st.just(torch.Size([2, 3])),
        st.just(torch.float16), st.just(torch.device("cpu")),
        st.dictionaries(st.integers(0, 9), st.integers(0, 9)).map(Counter),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=30,
)  # fmt: skip
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])


@given(plain=PLAIN, shape=st.lists(st.integers(0, 3), max_size=3), dtype=DTYPES, trained=st.booleans())
@IN_FILES
def test_whatever_torch_writes_is_read(
    plain: Any, shape: list[int], dtype: torch.dtype, trained: bool, tmp_path: Path
) -> None:
    tensor = torch.ones(shape).to(dtype)
    tensors: list[Any] = [tensor, tensor[:0] if shape else tensor, torch.nn.Parameter(tensor.float(), trained)]
    content = {"plain": [plain, plain], "tensors": tensors, "sparse": torch.eye(2).to_sparse()}
    for new in (True, False):
        torch.save(content, tmp_path / "any.pt", _use_new_zipfile_serialization=new)
        found = open_file(tmp_path / "any.pt", "refuse")
        assert found["plain"] == [plain, plain]
        toys.assert_same_tensors(dict(enumerate(found["tensors"])), dict(enumerate(tensors)))
        if new:
            assert open_file(tmp_path / "any.pt", "skip")["plain"] == [plain, plain]


@given(place=st.integers(2**28, 2**31))
@IN_FILES
def test_a_place_that_no_machine_has(place: int, tmp_path: Path) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "index"
    path.write_bytes(b"\x80\x02N" + pickle.LONG_BINPUT + struct.pack("<I", place) + b".")
    with pytest.raises(RuntimeError, match="index is damaged"):
        read_index(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000
