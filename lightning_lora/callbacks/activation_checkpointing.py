"""``ActivationCheckpointing``: compute activations again in the backward pass instead of keeping them."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_lora.model.targets import pretrained_models
from lightning_lora.trainer.gradient_checks import checkpoints_activations


class ActivationCheckpointing(Callback):
    """Keep the inputs alone of the blocks of transformers models, and compute the rest again in the backward pass.

    With most of a model frozen, activations are most of what training needs beside the weights. This keeps a part of
    them that falls with the depth of a block, and a step takes the time of another forward pass more. Gradients are the
    same. Models that do so already are left as they are.

    Example::

        trainer = L.Trainer(callbacks=[LoRA(r=8), ActivationCheckpointing()])

    Raises:
        ValueError: When ``fit`` starts, if there is no model of transformers, or one whose blocks cannot do so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._models: list[Any] = []

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Switch it on."""
        models: dict[str, Any] = dict(pretrained_models(pl_module))
        if not models:
            raise ValueError(
                f"Found no model of transformers in {type(pl_module).__name__}, expected one, of which blocks compute "
                "their activations again. For other modules, call torch.utils.checkpoint in their forward, or, with "
                "FSDP, give FSDPStrategy an activation_checkpointing_policy."
            )
        for model in models.values():
            if not model.supports_gradient_checkpointing:
                raise ValueError(
                    f"Found {type(model).__name__}, whose blocks cannot compute their activations again, expected a "
                    "model of transformers that supports it: leave ActivationCheckpointing out."
                )
        self._models = [model for model in models.values() if not checkpoints_activations(model)]
        for model in self._models:
            _switch(model, True)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Switch off what this has switched on."""
        for model in self._models:
            _switch(model, False)
        self._models = []

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "fit")


def _switch(model: Any, on: bool) -> None:
    end = "enable" if on else "disable"
    # Transformers 5 renames it.
    switch = getattr(model, f"activation_checkpointing_{end}", None) or getattr(model, f"gradient_checkpointing_{end}")
    inputs_had_gradients = getattr(model, "_require_grads_hook", None) is not None
    switch()
    if on and not inputs_had_gradients:  # which this kind of checkpointing does not need, and would be computed
        model.disable_input_require_grads()
