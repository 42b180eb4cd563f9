"""Whether the merged model computes what was trained: a batch that the model saw, before the merge and after it."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # of which torch 2.13 has no public name; Lightning uses it too

from lightning_lora.compiled import is_compiled
from lightning_lora.eval_mode import evaluating
from lightning_lora.layers import LoraLayer
from lightning_lora.model.quantization import is_quantized
from lightning_lora.model.record import common_module, named_injections
from lightning_lora.sharding import is_sharded

# How far outputs may be apart, relative to the largest, in a model whose coarsest weights are of this type.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.25}
_ROOM = 2e11  # positions times parameters: seconds on a CPU, where the model is by then
_FLOATS = 256  # that are about one position of a sequence, as a patch of 16 x 16 is
_MOST = 10**7  # values that are looked at of each output
_SMALLEST = 1e-30
_PLAIN = (Tensor, int, float, str, type(None))


class MergeProbe:
    """Keeps what the adapted model was first called with, and compares what it computes before and after a merge.

    The outermost module around all adapters that can be called so once more is looked at, in eval mode and with the
    first sample; a model that only the training step knows how to call may have such a module inside.
    Models that processes share, that are compiled, quantized (which are not merged in memory), or too large for a CPU,
    are left out, and so are inputs that are more than tensors and plain values.
    """

    def __init__(self, pl_module: "pl.LightningModule") -> None:
        self._calls: dict[nn.Module, Any] = {}  # the inputs, by module
        self._looked_at = nn.Module()
        self._before: list[Tensor] = []
        skipped = is_sharded(pl_module) or is_quantized(pl_module) or any(map(is_compiled, pl_module.modules()))
        self._around = [] if skipped else _holders(pl_module)  # the outermost first
        self._hooks = {each: each.register_forward_pre_hook(self._keep, with_kwargs=True) for each in self._around}

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # a step of the module, with nothing in the module that says so
            return
        self._hooks.pop(module).remove()
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        one_sample = len({tensor.shape[:1] for tensor in tensors}) == 1 and all(tensor.dim() for tensor in tensors)
        kept = [tensor[:1] if one_sample else tensor for tensor in tensors]
        positions = [each.numel() / (_FLOATS if each.is_floating_point() else 1) for each in kept]
        size = max(positions, default=0) * sum(p.numel() for p in module.parameters())
        if size <= _ROOM and all(isinstance(leaf, _PLAIN) for leaf in leaves):
            cut = {id(tensor): short.detach().cpu().clone() for tensor, short in zip(tensors, kept)}
            self._calls[module] = tree_map(lambda leaf: cut.get(id(leaf), leaf), (args, kwargs))

    def stop(self) -> None:
        """Wait for no call any more."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def look(self) -> None:
        """Note what the model computes with its adapters, before they are merged."""
        self.stop()
        failed = None
        for module in [each for each in self._around if each in self._calls]:
            self._looked_at = module
            try:
                self._before = self._outputs()
                return
            except Exception as error:  # of whatever kind the model raises outside of a training step
                failed = error
        if failed is not None:
            _warn_of(failed)

    def difference(self) -> float | None:
        """How far outputs are from those before, relative to the largest of them; ``None`` if it is not known.

        Raises:
            RuntimeError: If it is more than rounding can be.
        """
        if not self._before:
            return None
        try:
            after = self._outputs()
        except Exception as error:  # as for want of memory; the export is not lost for it
            _warn_of(error)
            return None
        pairs = [(one[kept], other[kept]) for one, other in zip(self._before, after) for kept in [one.isfinite()]]
        apart = [(a - b).abs() / a.abs().max().clamp_min(_SMALLEST) for a, b in pairs if len(a)] or [torch.zeros(1)]
        largest, median = (max(float(look(each)) for each in apart) for look in (torch.max, torch.median))
        dtypes = {parameter.dtype for parameter in self._looked_at.parameters()}
        allowed = max((_ROUNDING[dtype] for dtype in dtypes if dtype in _ROUNDING), default=_ROUNDING[torch.float32])
        name = type(self._looked_at).__name__
        if not median <= allowed:
            raise RuntimeError(
                f"The merged model does not compute what was trained: on the first batch, half of the outputs of the "
                f"{name} are {median:.2g} of the largest apart or more, and rounding gives {allowed:g} at most. The "
                "merged model was not exported; the adapter is in the checkpoints. Find the layer that computes "
                "otherwise when it is merged and leave it out by exclude_modules, or set LoRA(verify=False) if the "
                "model itself is not the same from call to call."
            )
        if not largest <= allowed:  # as where rounding has another expert chosen
            rank_zero_warn(
                f"A few outputs of the merged {name} on the first batch are up to {largest:.2g} of the largest apart "
                f"from those before, which is more than the {allowed:g} that rounding gives; half of them are no more "
                f"than {median:.1e}. A model that chooses, as by experts, may do so."
            )
        rank_zero_info(f"Verified: merged, outputs on the first batch are up to {largest:.1e} of the largest apart.")
        return largest

    def _outputs(self) -> list[Tensor]:
        device = next((parameter.device for parameter in self._looked_at.parameters()), torch.device("cpu"))
        args, kwargs = move_data_to_device(self._calls[self._looked_at], device)
        with torch.no_grad(), evaluating(self._looked_at), torch.random.fork_rng(devices=[]):
            out = self._looked_at(*args, **kwargs)
        floats = [leaf for leaf in tree_leaves(_plain(out)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        arrays = [leaf for leaf in floats if leaf.numel() > 1] or floats  # a loss says less than what it is made of
        return [leaf.flatten()[:_MOST].double().cpu() for leaf in arrays if leaf.numel()]


def _warn_of(error: Exception) -> None:
    rank_zero_warn(
        "The outputs of the merged model are not verified, since the model cannot be called after the run: "
        f"{type(error).__name__}: {error}"
    )


def _plain(out: Any) -> Any:
    """An output of transformers as a dict, without the caches in it."""
    return {key: value for key, value in out.items() if isinstance(value, Tensor)} if hasattr(out, "items") else out


def _holders(pl_module: "pl.LightningModule") -> list[nn.Module]:
    """The modules around all adapted layers, but for LightningModules, which log in their forwards."""
    modules = dict(pl_module.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, LoraLayer)]
    names += [f"{name}." for name, injection in named_injections(pl_module) if injection.peft is not None]
    common = common_module(names).split(".")
    around = [modules.get(".".join(common[:depth])) for depth in range(1, len(common) + 1)]
    return [module for module in around if module is not None and not isinstance(module, pl.LightningModule)]
