"""Tensors with a shape and no values: a run on them takes no memory, and tells what it would take."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

# Not public, but what torch's own documentation has for this purpose ("Fake tensor"); nothing else imports it here.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_LARGE = 2**22  # elements; tensors of floating-point numbers up to here have values where no parameter is in them
_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}

# Losses that hold the memory of each element's loss as long as their mean is there: it is what the kernel shrinks.
_SHRUNK = {_aten.mse_loss.default, _aten.smooth_l1_loss.default}


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, and not a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


class ValueNeededError(Exception):
    """What ran on tensors without values asks for one that decides how it goes on."""


class FakeTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # (torch has no types here)
    """Within this context, parameters have no values, nor has what is computed of them; and bytes are counted.

    Whole numbers and truths, small tensors that no parameter is in, and the data have values as ever, so masks,
    positions and indices do what they do in a run. A single number that would be computed of parameters, such as a
    loss, is 1; of comparisons, all are true and not one is.

    Args:
        instead: What to do in the place of operators of other libraries, by their names such as ``library::operator``,
            where these take memory that their results do not show, or ask for values.

    Attributes:
        live: Bytes of all tensors that were made in here and are there still.
        peak: The most that there were at once, since :meth:`restart`.
        on_peak: Called each time that there are more than ever.
    """

    def __init__(self, instead: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._instead = instead or {}
        self.live = self.peak = 0
        self.on_peak: Callable[[], None] | None = None
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}
        self._is_off = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It keeps nothing of what operations give, so that layers are to do what they do in a run."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts run as they are written, whose operations are then seen."""
        return False

    def __enter__(self) -> "FakeTensors":
        # A fake tensor has weak references, with which torch swaps none; of ours, a new type alone is to be taken over.
        self._patch = patch("torch.utils.swap_tensors", _put)
        self._patch.start()
        self._hook = register_module_parameter_registration_hook(self._without_values)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()
        self._patch.stop()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Work with values, uncounted, as for reading data."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    @contextmanager
    def _within(self) -> Iterator[None]:
        """What is run by an operator is counted too, and under autocast where the operator is."""
        # Not public: autocast is off for what a mode runs, and torch says in no other way whether it was on.
        with torch._C._RestorePythonTLSSnapshot(), torch.no_grad():  # type: ignore[attr-defined]
            super().__enter__()  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live

    def count(self, tensor: Tensor, size: int | None = None) -> None:
        """Count a tensor as long as it is there, once; as so many bytes, or those of its storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if size is None else size
        self.live += self._sizes[key]
        weakref.finalize(storage, self._forget, key).atexit = False
        if self.live > self.peak:
            self.peak = self.live
            if self.on_peak is not None:
                self.on_peak()

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _without_values(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        is_plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        if self._is_off or parameter is None or not is_plain:
            return None
        with self.off():
            found = self._fake.from_tensor(parameter)
        self.count(found)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_off:
            return func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(isinstance(each, FakeTensor) or _is_large(each) for each in given):
            out = self._on_fakes(func, args, kwargs)
        elif func._schema.is_mutable:
            out = func(*args, **kwargs)
        else:
            out = self._on_values(func, args, kwargs)
        if not _is_alias(func):
            for each in tree_leaves(out):
                if isinstance(each, Tensor):
                    self.count(each)
        return out

    def _on_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on tensors with values, unless what it makes is too large for some."""
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        try:
            with self._fake:
                out = func(*plain_args, **plain_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        # Kernels of other libraries may be slow, and none of them are masks or positions.
        is_foreign = func.namespace not in ("aten", "prims") and any(each.is_floating_point() for each in made)
        return out if is_foreign or any(map(_is_large, made)) else func(*args, **kwargs)

    def _on_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _single(args[0].dtype)
        if func in (_aten.equal.default, _aten.allclose.default):
            return True
        if func._schema.name in self._instead:
            with self._within():
                return self._instead[func._schema.name](*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _indices(args[1]), *args[2:])
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise ValueNeededError(str(func)) from error
        if _is_alias(func):
            return out
        every = func.overloadpacket is _aten.all

        def number(tensor: FakeTensor) -> Tensor:
            if tensor.numel() != 1:
                return tensor
            value = _single(tensor.dtype) if tensor.is_floating_point() or every else 0
            return torch.full(tensor.shape, value, dtype=tensor.dtype)

        found = tree_map_only(FakeTensor, number, out)
        if func in _SHRUNK and found.numel() == 1:
            with self._fake:
                whole = args[0] - args[1]
            self.count(found, whole.untyped_storage().nbytes())
            self.count(whole)
        return found


def _is_large(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > _LARGE


def _is_alias(func: Any) -> bool:
    """Whether an operator gives nothing new, but what it was given or a view of it."""
    return any(each.alias_info is not None for each in func._schema.returns)


def _single(dtype: torch.dtype) -> float | int | bool:
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0


def _indices(given: Any) -> list[Tensor | None]:
    """Indices in which masks that have values are positions, so that the shape of what they choose is known."""
    found: list[Tensor | None] = []
    for each in given:
        is_mask = each is not None and each.dtype in (torch.bool, torch.uint8) and has_values(each)
        found += each.nonzero().unbind(1) if is_mask else [each]
    return found


def _put(one: Tensor, other: Tensor) -> None:
    one.data = other.data


def _plain(value: Any) -> Any:
    """Without a class of a library's, which fake tensors do not take before torch 2.13."""
    if not isinstance(value, nn.Parameter) or type(value) is nn.Parameter:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)
