"""Adapters are put in right after ``configure_model`` and before the strategy wraps or shards what that has built."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_lora.trainer import quantized_base


class Attaching(Protocol):
    """A callback that puts something into a module once it is built."""

    def attach(self, pl_module: "pl.LightningModule") -> None:
        """Put it in."""


def attach_after(pl_module: "pl.LightningModule", callback: Attaching) -> None:
    """Attach a callback's adapter when Lightning calls ``configure_model``.

    Lightning 2.6 has no callback hook between ``configure_model`` and the strategy's set-up, where optimizers are made
    and the model is wrapped. So the instance gets a ``configure_model`` of its own until the run ends. It is made of
    what can be pickled and copied, and in a copy of the module it is about the copy, and attaches nothing.

    A module whose ``configure_model`` calls a method named ``shard`` for ``fully_shard`` has it attached before that.
    """
    current = pl_module.__dict__.get("configure_model")
    if not _is_of(current, pl_module):
        current = partial(_build_and_attach, pl_module, current, _Waiting())
        pl_module.__dict__["configure_model"] = current
    current.args[2].append(callback)  # type: ignore[union-attr]


def as_before(pl_module: "pl.LightningModule") -> None:
    """Undo :func:`attach_after`."""
    current: Any = pl_module.__dict__.get("configure_model")
    if _is_of(current, pl_module):
        del pl_module.__dict__["configure_model"]
        if current.args[1] is not None:  # the instance had one already
            pl_module.__dict__["configure_model"] = current.args[1]


def _is_of(current: Any, pl_module: "pl.LightningModule") -> bool:
    ours = isinstance(current, partial) and current.func is _build_and_attach
    return ours and current.args[0] is pl_module


class _Waiting(list[Attaching]):
    """The callbacks whose adapters are to be attached; none in a copy."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Waiting, ()


def _build_and_attach(pl_module: "pl.LightningModule", own: Any, waiting: _Waiting) -> None:
    has_own = own is not None or not type(pl_module).configure_model.__module__.endswith("core.hooks")
    with quantized_base.building(pl_module, has_own), _attached_before_shard(pl_module, waiting):
        if own is None:
            type(pl_module).configure_model(pl_module)
        else:
            own()
    _attach(pl_module, waiting)


def _attach(pl_module: "pl.LightningModule", waiting: _Waiting) -> None:
    while waiting:
        waiting.pop(0).attach(pl_module)


@contextmanager
def _attached_before_shard(pl_module: "pl.LightningModule", waiting: _Waiting) -> Iterator[None]:
    shard = getattr(pl_module, "shard", None)
    if not inspect.ismethod(shard):
        yield
        return

    def attach_and_shard(*args: Any, **kwargs: Any) -> Any:
        _attach(pl_module, waiting)
        return shard(*args, **kwargs)

    pl_module.__dict__["shard"] = attach_and_shard
    try:
        yield
    finally:
        del pl_module.__dict__["shard"]
