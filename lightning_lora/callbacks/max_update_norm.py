"""``MaxUpdateNorm``: no adapter moves its weight by more than a norm."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.hooks import RemovableHandle

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import listed
from lightning_lora.layers import LoraAdapter
from lightning_lora.layers.spectrum import norm
from lightning_lora.model.record import named_injections
from lightning_lora.sharding import unsharded, unwrap_fsdp
from lightning_lora.trainer.frozen_parameters import step_hooks


class MaxUpdateNorm(Callback):
    r"""Scale an adapter's update back, after each step of an optimizer, where it has grown beyond a norm.

    This is max-norm regularization (Srivastava et al., "Dropout", JMLR 15, 2014, section 5.1) of the update
    ``scaling * B A`` as a whole, as it is in use in fine-tuning of image models, instead of that of each row: if its
    Frobenius norm is beyond ``max_norm``, what is trained of A and B is scaled by the same factor, so that the norm is
    ``max_norm`` again. Below that, nothing changes. The norm is computed from products of the rank's size.

    Args:
        max_norm: The largest Frobenius norm of an update; a weight of shape ``(out, in)`` as layers are initialized has
            one of about ``sqrt(out / 3)``.

    Raises:
        ValueError: If ``max_norm`` is not positive, or, when ``fit`` starts, if an adapter's update is no product of
            two matrices (DoRA, VeRA, token rows) or starts at a part of the weight (PiSSA, OLoRA, LoftQ), or if there
            is no adapter of this package.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        if not max_norm > 0:
            raise ValueError(f"MaxUpdateNorm found max_norm={max_norm}, expected more than 0.")
        self.max_norm = max_norm
        self._adapters: list[LoraAdapter] = []
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the adapters, which are all in by now."""
        self._adapters, others = [], []
        for root_name, injection in named_injections(pl_module):
            for name, layer in injection.layers():
                adapter = unwrap_fsdp(layer.lora[injection.adapter_name])
                if isinstance(adapter, LoraAdapter) and _adds_a_product(adapter, injection.config):
                    self._adapters.append(adapter)
                else:
                    others.append(f"{root_name}.{name}".lstrip("."))
        if others:
            raise ValueError(
                f"MaxUpdateNorm cannot scale the updates of {listed(others)}: they are not B A alone (DoRA, VeRA and "
                "token rows), or start at a part of the weight (PiSSA, OLoRA, LoftQ). Take out the callback, or train "
                "these layers otherwise."
            )
        if not self._adapters:
            raise ValueError(
                "MaxUpdateNorm found no adapter of this package to limit. Put LoRA(...) beside it, on a model without "
                "PEFT's adapters."
            )

        self._hooks = [hook for each in trainer.optimizers for hook in step_hooks(each, after=self._scale_back)]

    def on_train_end(self, *args: object) -> None:
        """Optimizers outlive a fit."""
        for hook in self._hooks:
            hook.remove()
        self._adapters, self._hooks = [], []

    def on_exception(self, *args: object) -> None:
        """The same."""
        self.on_train_end()

    @torch.no_grad()
    def _scale_back(self, *args: object) -> None:
        for adapter in self._adapters:
            with unsharded(list(adapter.modules())):
                factors = adapter.low_rank_factors()
                assert factors is not None
                share = (self.max_norm / (abs(adapter.scaling) * norm(factors))).clamp(max=1)
            trained = [p for p in (adapter.lora_A, adapter.lora_B) if p.requires_grad]
            for parameter in trained:  # a slice of it, where processes share the model
                parameter.mul_(share ** (1 / len(trained)))


def _adds_a_product(adapter: LoraAdapter, config: LoraConfig) -> bool:
    with unsharded(list(adapter.modules())):
        return not config.takes_from_base and adapter.low_rank_factors() is not None
