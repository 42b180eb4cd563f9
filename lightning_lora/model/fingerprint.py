"""Which base an adapter belongs to: a short number of its frozen tensors, and samples of them to compare."""

import base64
import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lora.fake_tensors import has_values
from lightning_lora.layers import dequantized
from lightning_lora.layers.offloading import offloaded
from lightning_lora.model.base_config import changed_settings, configs_of
from lightning_lora.model.quantization import plain_tensors, stands_for_packed
from lightning_lora.model.record import Injection, adapted_layers, injections_of, parameters_by_name
from lightning_lora.model.sketch import Sketch, sketch
from lightning_lora.sharding import full_tensor

_SAMPLES, _FEWEST, _ALL = 16, 4, 4096  # of a tensor, of one among very many, of all together
_UNKNOWN = "unknown until the model is materialized"

# What holds the samples of a tensor exactly, the coarsest first; the place in this list is its code in the text.
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
_CHECKSUM = len(_FORMATS)  # of what is no floating point
# By how much one base in two formats may differ, relative to a value; and float16 has a smallest step.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_SMALLEST_STEP = 2.0**-24
# By how much all values of a tensor may differ, relative to its norm, where samples are equal, and where not quite.
_EXACT, _ROUNDED = 1e-5, 2.0**-6
_NOISE = 2.0**-16  # in float32, relative to the largest sample of a tensor: what other hardware computes


class BaseTensor(NamedTuple):
    """A tensor of a base.

    Attributes:
        name: Its name.
        tensor: The whole of it.
        replaced: Rows that the adapter puts others in the place of, so that they do not matter.
    """

    name: str
    tensor: Tensor
    replaced: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What tells a base from another.

    Attributes:
        short: A short number of it, which rounding may change.
        samples: Names, shapes and samples of the tensors, as text; files of version 0.1 had none.
        sketches: What is known of all values of each tensor, as text, in the order of the samples.
        config: What the configs of transformers models say that changes what they compute.
        names: Of the tensors, in this order, of a base at hand.
    """

    short: str
    samples: str | None = None
    sketches: str | None = None
    config: dict[str, Any] | None = None
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __str__(self) -> str:
        return self.short

    def fits(self, other: "Fingerprint") -> bool:
        """Whether both are of one base, in whatever precision either has it.

        Raises:
            ValueError: If the samples of one are damaged.
        """
        if self.samples is None or other.samples is None:
            return self.short == other.short
        (names, values), (other_names, other_values) = _decode(self.samples), _decode(other.samples)
        return names == other_names and len(values) == len(other_values) and all(map(_agree, values, other_values))

    def edits(self, here: "Fingerprint", computed: bool = False) -> list[str]:
        """Which tensors and settings of a base at hand are not those of this one, which it :meth:`fits`.

        Every value was looked at where both have sketches; a change within what rounding does is not seen. Values that
        are ``computed``, as those of quantized weights are, may be rounded otherwise on other hardware.
        """
        found = changed_settings(self.config or {}, here.config or {})
        if None in (self.samples, here.samples, self.sketches, here.sketches):
            return found
        (_, values), (_, values_here) = _decode(self.samples or ""), _decode(here.samples or "")
        sketches, sketches_here = _decode_sketches(self.sketches), _decode_sketches(here.sketches)
        if not len(values) == len(values_here) == len(sketches) == len(sketches_here) == len(here.names):
            raise ValueError("The sketches of the base are damaged.")
        for name, one, two, known, seen in zip(here.names, values, values_here, sketches, sketches_here):
            if not known.is_near(seen, _EXACT if one == two and not computed else _ROUNDED):
                found.append(repr(name))
        return list(dict.fromkeys(found))

    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each tensor of a base at hand, by name."""
        return {name: each.norm for name, each in zip(self.names, _decode_sketches(self.sketches))}

    def apart(self, other: "Fingerprint") -> "Apart | None":
        """How far two bases are apart that have the same tensors, by name and shape; ``None`` if they have not."""
        if self.samples is None or other.samples is None:
            return None
        (names, values), (other_names, other_values) = _decode(self.samples), _decode(other.samples)
        if names != other_names or len(values) != len(other_values):
            return None
        different = [pair for pair in zip(values, other_values) if not _agree(*pair)]
        if any(_CHECKSUM in (one.code, two.code) or len(one.content) == 0 for one, two in different):
            return None
        numbers = [(one.numbers(), two.numbers()) for one, two in different]
        if any(len(one) != len(two) for one, two in numbers):
            return None
        squares = sum(float(np.sum((one - two) ** 2)) for one, two in numbers)
        size = sum(float(np.sum(np.maximum(one**2, two**2))) for one, two in numbers)
        return Apart(len(different), (squares / size) ** 0.5 if size else 0.0)


class Apart(NamedTuple):
    """How far two bases are apart.

    Attributes:
        tensors: How many of their tensors differ.
        distance: Of these, relative to their size.
    """

    tensors: int
    distance: float


def fingerprint(injection: Injection) -> Fingerprint:
    """What tells the frozen base under an injection from others, computed once.

    It covers the name and shape of every frozen parameter and persistent buffer, up to 16 values spread evenly over
    each, by which one base is told from another, and in three numbers all values, by which an edited one is. A copy of
    it in another precision is the same base.
    """
    if injection.fingerprint is None:
        if not all(map(has_values, parameters_by_name(injection.root).values())):
            return Fingerprint(_UNKNOWN)
        injection.fingerprint = fingerprint_in(injection)
    found: Fingerprint = injection.fingerprint
    return found


def fingerprint_in(injection: Injection, prefix: str = "") -> Fingerprint:
    """The same of the part whose names begin with a prefix, without it, computed now."""
    tensors = (each for each in base_tensors(injection) if each.name.startswith(prefix))
    named = (each._replace(name=each.name[len(prefix) :]) for each in tensors)
    found = fingerprint_of(named, configs_of(injection.root.get_submodule(prefix.rstrip("."))))
    # A base that the start has quantized was computed, and may be another one in a few values on other hardware.
    return dataclasses.replace(found, sketches=None) if injection.config.quantizes_base else found


def fingerprint_of(tensors: Iterable[BaseTensor], config: dict[str, Any] | None = None) -> Fingerprint:
    """The fingerprint of named tensors, of which only one is held at a time; see :func:`fingerprint`."""
    taken = sorted((_take(each) for each in tensors), key=lambda sample: (sample.name, sample.shape))
    digest = hashlib.sha256()
    for sample in taken:
        digest.update(f"{sample.name}{sample.shape}".encode())
    names = digest.copy()
    for sample in taken:
        digest.update(sample.rounded)
    parts = [part for sample in taken for part in sample.parts]
    sketches = np.array([each for sample in taken for each in sample.sketches], dtype="<f4").tobytes()
    return Fingerprint(
        digest.hexdigest()[:16],
        f"{names.hexdigest()[:16]}:{base64.b64encode(_encode(parts)).decode()}",
        base64.b64encode(sketches).decode(),
        config,
        tuple(sample.name for sample in taken for _ in sample.parts),
    )


class _Part(NamedTuple):
    dtype: torch.dtype
    values: Tensor


class _Sample(NamedTuple):
    name: str
    shape: str
    rounded: bytes  # as version 0.1 took them
    parts: list[_Part]
    sketches: list[Sketch]


def _take(base: BaseTensor) -> _Sample:
    parts = _plain(base.tensor.detach())
    shape = [tuple(part.shape) for part in parts] if base.tensor.is_nested else tuple(base.tensor.shape)
    rounded = b"".join(spread(part).to(torch.bfloat16).view(torch.int16).numpy().tobytes() for part in parts)
    taken = [_Part(part.dtype, spread(_kept_rows(part, base.replaced))) for part in parts]
    return _Sample(base.name, str(shape), rounded, taken, [sketch(_without(part, base.replaced)) for part in parts])


def _plain(tensor: Tensor) -> list[Tensor]:
    """The ordinary dense tensors that hold what a tensor holds."""
    if tensor.is_nested:
        return [part for each in tensor.unbind() for part in _plain(each)]
    if tensor.is_quantized:
        return [tensor.dequantize()]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [*tensor.indices().unbind(), *_plain(tensor.values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), *_plain(tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), *_plain(tensor.values())]
    return [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor]


def _without(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    return tensor.index_fill(0, torch.tensor(rows, device=tensor.device), 0) if rows else tensor


def _decode_sketches(text: str | None) -> list[Sketch]:
    numbers = np.frombuffer(base64.b64decode(text or ""), dtype="<f4").astype(float)
    if len(numbers) % 3:
        raise ValueError("The sketches of the base are damaged.")
    return [Sketch(*three) for three in numbers.reshape(-1, 3).tolist()]


def _kept_rows(tensor: Tensor, replaced: tuple[int, ...]) -> Tensor:
    if not replaced or tensor.is_meta:
        return tensor
    kept = torch.ones(len(tensor), dtype=torch.bool)
    kept[list(replaced)] = False
    rows = kept.nonzero().flatten()
    if len(rows) > _SAMPLES:  # as many of them as there are samples will do
        rows = rows[torch.linspace(0, len(rows) - 1, _SAMPLES, dtype=torch.float64).long()]
    return tensor[rows.to(tensor.device)]


def spread(tensor: Tensor) -> Tensor:
    """Up to 16 values spread evenly over a tensor, on the CPU; none of one without values."""
    flat = tensor.flatten()
    if flat.is_meta or not flat.numel():
        return torch.empty(0, dtype=tensor.dtype)
    where = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[where.long().to(flat.device)].cpu()


def _encode(parts: list[_Part]) -> bytes:
    most = max(_FEWEST, min(_SAMPLES, _ALL // max(len(parts), 1)))
    # One format for all tensors of a type, for a few round numbers in one of them say nothing of its precision.
    formats: dict[torch.dtype, int] = {}
    for dtype, values in parts:
        if dtype.is_floating_point:
            formats[dtype] = max(formats.get(dtype, 0), _format_of(values))
    content = b""
    for dtype, values in parts:
        if dtype.is_floating_point:
            where = torch.linspace(0, max(len(values) - 1, 0), min(most, len(values)), dtype=torch.float64).long()
            own = values[where].to(_FORMATS[formats[dtype]])
            content += bytes((formats[dtype], len(own))) + own.view(torch.uint8).numpy().tobytes()
        else:
            whole = values.long().numpy().astype("<i8").tobytes()
            content += bytes((_CHECKSUM, 1)) + zlib.crc32(whole).to_bytes(4, "little")
    return content


def _format_of(values: Tensor) -> int:
    """The code of the coarsest format that holds all of them exactly, else the finest."""
    for code, dtype in enumerate(_FORMATS):
        if torch.equal(torch.nan_to_num(values.to(dtype).double()), torch.nan_to_num(values.double())):
            return code
    return len(_FORMATS) - 1


class _Values(NamedTuple):
    code: int
    content: bytes

    def numbers(self) -> "np.ndarray":
        return torch.frombuffer(bytearray(self.content), dtype=_FORMATS[self.code]).double().numpy()


def _decode(samples: str) -> tuple[str, list[_Values]]:
    names, _, text = samples.partition(":")
    content, found, at = base64.b64decode(text), [], 0
    while at < len(content):
        code, count = content[at], content[at + 1] if at + 1 < len(content) else 0
        if code > _CHECKSUM:
            raise ValueError("The samples of the base are damaged.")
        size = count * (4 if code == _CHECKSUM else _FORMATS[code].itemsize)
        found.append(_Values(code, content[at + 2 : at + 2 + size]))
        at += 2 + size
    return names, found


def _agree(one: _Values, other: _Values) -> bool:
    if one.code == other.code and one.content == other.content:
        return True
    if _CHECKSUM in (one.code, other.code):
        return False
    a, b = one.numbers(), other.numbers()
    if len(a) != len(b):
        return False
    size = np.maximum(np.abs(a), np.abs(b))
    if one.code != other.code:
        allowed = _ROUNDING[_FORMATS[min(one.code, other.code)]] * size + _SMALLEST_STEP
        alike = np.abs(a - b) <= allowed
    elif _FORMATS[one.code] is torch.float32:
        alike = np.abs(a - b) <= _NOISE * np.max(size, initial=0.0)
    else:  # in one precision; but among the smallest numbers float16 has fewer of them than bfloat16
        alike = (a == _in_float16(b)) | (b == _in_float16(a))
    return bool(np.all((a == b) | alike | (np.isnan(a) & np.isnan(b))))


def _in_float16(numbers: "np.ndarray") -> "np.ndarray":
    return torch.from_numpy(numbers).half().double().numpy()


def base_tensors(injection: Injection) -> Iterator[BaseTensor]:
    """The frozen parameters and persistent buffers under an injection, as they are when nothing is merged.

    Where processes share them, each is made full as it comes.
    """
    root = injection.root
    tensors = list(plain_tensors(root, of_base=True))  # which reshards, so that the objects below are those named here
    layers = adapted_layers(root)
    # By what is there, for a module may have several names.
    own = [(layer, layer.adapted_parameters()) for layer in layers]
    of_base = {id(here[name]): base for layer, here in own for name, base in layer._aside.items() if name in here}
    beside = injections_of(root)
    for each in beside if injection in beside else (*beside, injection):
        if each.in_place:
            of_base.update((id(here), each.aside[name]) for name, here in each.tensors(each.aside).items())
    replaced = {
        id(parameter): part.replaced_rows
        for _, layer in injection.layers()
        for part in layer.parts(injection.adapter_name)
        if part.replaced_rows
        for parameter in layer.adapted_parameters().values()
    }
    # What this injection trains is none of its base; what another one trains is.
    trained = {id(tensor) for tensor in injection.tensors(injection.trained).values()}
    for name, module, inner in tensors:
        key, is_buffer = id(getattr(module, inner)), inner in module._buffers
        if key not in trained and not (is_buffer and injection.saves(name)):
            tensor = base_values(module, inner, of_base.get(key, offloaded(module, inner)))
            yield BaseTensor(name, tensor, replaced.get(key, ()))


def base_values(module: nn.Module, name: str, tensor: Tensor | None) -> Tensor:
    """The whole of what a module computes with, of a tensor that it has, or of another one in its place."""
    if stands_for_packed(module, name):
        return dequantized(module)
    return full_tensor(module, name, tensor)
