"""``LoRA``: the life of a run, hook by hook, in the order in which Lightning calls them."""

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_lora.config import LoraConfig
from lightning_lora.formats.merged import ADAPTER_DIR
from lightning_lora.formats.model_card import run_of
from lightning_lora.formats.open_file import path_or_url
from lightning_lora.formats.peft import load_adapter, read_adapter, write_adapter
from lightning_lora.model.base_dtype import cast_base
from lightning_lora.model.checks import require_clear_freeze, require_unwrapped
from lightning_lora.model.eject import eject
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.freeze import freeze_norms
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge, unmerge
from lightning_lora.model.peft_wrapped import wrapped_models
from lightning_lora.model.recompute import keep_adapters, leave_alone
from lightning_lora.model.record import Injection, adopt, injections, injections_of
from lightning_lora.model.removed import MERGED, REMOVED, forget_removed, how_merged, removed_injections
from lightning_lora.model.summary import print_summary
from lightning_lora.sharding import is_sharded
from lightning_lora.signature import takes
from lightning_lora.trainer import (
    base_changes,
    configure_model,
    gradient_checks,
    quantized_base,
    requeue,
    resume,
    run_names,
    weight_averaging,
)
from lightning_lora.trainer.best_checkpoint import load_best, require_best, require_own_best
from lightning_lora.trainer.end_of_fit import export_merged, merge_in_memory
from lightning_lora.trainer.eva_calibration import calibrate_eva
from lightning_lora.trainer.finite_steps import ON_NAN
from lightning_lora.trainer.frozen_parameters import drop_frozen
from lightning_lora.trainer.peft_wrapped import adopt_wrapped
from lightning_lora.trainer.precision import warn_of_emulation
from lightning_lora.trainer.process_launchers import no_way_back, spawns
from lightning_lora.trainer.pytorch_lightning import original_class, rebuild, serve_both_packages
from lightning_lora.trainer.sharded_strategy import checkpoints_of
from lightning_lora.trainer.strategy import install
from lightning_lora.trainer.watches import Watches

_MERGE_MODES = ("last", "best", None)


@dataclasses.dataclass(frozen=True)
class _Arguments(LoraConfig):
    # All that LoRA takes. The words on its own part are in LoRA's docstring.
    __doc__ = LoraConfig.__doc__

    _: dataclasses.KW_ONLY
    config: LoraConfig | None = None
    merge: str | None = "last"
    export_dir: str | Path | None = None
    adapter: str | Path | None = None
    module: str | None = None
    adapter_name: str = "default"
    summary: bool = True
    base_dtype: str | None = None
    on_nan: str = "raise"
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.r, LoraConfig):
            raise ValueError("LoRA got a LoraConfig in the place of r: pass it by its name, LoRA(config=...).")
        super().__post_init__()


class LoRA(Callback):
    r"""Turn a training run into a LoRA run: freeze the model, train small adapters, save them alone, merge at the end.

    The update of each adapted weight is ``scaling * B A`` (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685). The ``LightningModule`` needs no change and knows nothing of it.

    Example::

        import lightning as L
        from lightning_lora import LoRA

        trainer = L.Trainer(callbacks=[LoRA(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])], max_epochs=1)
        trainer.fit(model, data)                    # frozen base, trained adapter, small checkpoints
        trainer.fit(model, data, ckpt_path="last")  # resumes on the same trajectory
        trainer.test(model, data, ckpt_path="best") # an adapter checkpoint on the untouched base

    After ``fit``, the model is merged: it has its own layer types and keys again, and the adapter is in its weights.
    The same Trainer or another one can still test, resume or go on training with it, and
    :func:`~lightning_lora.unmerge` restores the base weights bit for bit; for that, the base's copy of the adapted
    weights stays in memory as long as the model does.

    Where PEFT has wrapped the model already (``get_peft_model``), give no settings of an adapter: PEFT's adapters are
    trained, and get small checkpoints, exact resume and the exports. They stay PEFT's, unmerged.

    It takes every setting of :class:`~lightning_lora.LoraConfig`, from ``r`` to ``seed``, and by their names these of
    the run:

    Args:
        config: All settings of the adapter at once, instead of them.
        merge: Which adapter is folded into the weights when ``fit`` ends: that of the ``"last"`` step, that of the
            ``"best"`` checkpoint by ``ModelCheckpoint(monitor=...)``, or none (``None``), which leaves the adapted
            model. With ``"best"``, what is trained outside of ``module`` is that checkpoint's too. Nothing is merged
            after an exception or an interrupt.
        export_dir: Where the end of ``fit`` writes ``adapter/``, in PEFT's format, and ``merged/``, the merged model.
        adapter: Where to start from: a directory in PEFT's format or an adapter checkpoint. Unlike ``ckpt_path``, it
            brings the adapter's tensors alone, no optimizer and no progress.
        module: Dotted name of the submodule to adapt; the rest of the module then trains as it would without LoRA, and
            is in the checkpoints. ``None`` is the whole module.
        adapter_name: Name of the adapter.
        summary: Whether to print a table of what is trained when ``fit`` starts.
        base_dtype: Type that the frozen base's weights are cast to, once and for good, such as ``"bfloat16"``: half the
            memory of float32. What is trained stays as it is, and so does what is outside of ``module``. Inputs in
            floating-point numbers must have this type too, unless the precision is mixed. ``None`` leaves the base.
        on_nan: What a NaN or an infinity in loss or gradients does, before the optimizer steps: ``"raise"`` ends the
            run with an error that names the layers and the last checkpoint, ``"warn"`` leaves out that step, and
            ``"ignore"`` does not look. Steps that a gradient scaler leaves out, as under ``"16-mixed"``, are normal.
        verify: Whether an export is verified: the files of ``merged/`` are opened again and compared with the model,
            and the first batch is put through the model before and after the merge, where that takes seconds.

    Raises:
        ValueError: If a setting is out of range or of no known kind.
    """

    @takes(_Arguments)
    def __init__(self, given: _Arguments) -> None:
        super().__init__()
        own = LoraConfig(**{field.name: getattr(given, field.name) for field in dataclasses.fields(LoraConfig)})
        if given.config is not None and own != LoraConfig():
            raise ValueError("LoRA got both a config and settings of its own: put all of them into the config.")
        if given.merge not in _MERGE_MODES:
            raise ValueError(f"merge is {given.merge!r}, but it must be one of {', '.join(map(repr, _MERGE_MODES))}.")
        if given.on_nan not in ON_NAN:
            raise ValueError(f"on_nan is {given.on_nan!r}, but it must be one of {', '.join(map(repr, ON_NAN))}.")
        self.config = given.config or own
        self.merge = given.merge
        self.export_dir = Path(given.export_dir) if given.export_dir is not None else None
        self.adapter = path_or_url(given.adapter) if given.adapter is not None else None
        self.module = given.module
        self.adapter_name = given.adapter_name
        self.summary = given.summary
        self.base_dtype = _floating_dtype(given.base_dtype)
        self.on_nan = given.on_nan
        self.verify = given.verify
        self._injected_now = False
        self._came: str | None = None
        self._running = False
        self._watches = Watches()
        serve_both_packages(self)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            module=self.module, adapter_name=self.adapter_name, target_modules=self.config.target_modules
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Install the checkpoint seam, and have the adapters injected as soon as the model is built."""
        checkpoints = checkpoints_of(trainer.strategy)
        checkpoints.require_compatible(trainer, self)
        self._require_room(trainer)
        if stage == "fit":
            if spawns(trainer.strategy) and not (self._is_in(pl_module) and self.merge is None):
                raise no_way_back()
            self._require_ends(trainer)
            base_changes.require_no_unfreezing(trainer, self.module)
            resume.install(trainer)
        self._injected_now = self._running = False
        self._came = None
        install(trainer.strategy, checkpoints, keeps_finite=self.on_nan != "ignore")
        quantized_base.leave_to_building(trainer)
        configure_model.attach_after(pl_module, self)
        if weight_averaging.must_be_injected_early(trainer, pl_module, self):
            self.attach(pl_module)

    def attach(self, pl_module: "pl.LightningModule") -> None:
        """Put the adapter in, right after ``configure_model`` and before the strategy wraps the model."""
        root = self._root(pl_module)
        if self.config == LoraConfig() and (wrapped := wrapped_models(root)):
            adopt_wrapped(self, pl_module, wrapped)
            return
        adopt(root)
        beneath = self._adapters_beneath(root)
        self._came = how_merged(root)
        unmerge(root)
        adopt(root)
        quantized_base.quantize_now(pl_module.trainer, pl_module)
        quantized_base.require_compatible(pl_module.trainer, root)
        before = len(injections_of(root))
        if not self._is_in(root):
            require_unwrapped(root)
            require_clear_freeze(root, self.config)
        inject(root, self.config, self.adapter_name)
        if len(injections_of(root)) > before:
            self._injected_now = True
            self._injection(root).beneath = beneath
        if self.base_dtype is not None:
            cast_base(root, self.base_dtype, "mixed" in str(pl_module.trainer.precision))
        if self._injected_now:
            if isinstance(self.adapter, Path) and self.adapter.is_dir():
                read_adapter(self._injection(root), self.adapter)
            elif self.adapter is not None:
                load_adapter(pl_module, self.adapter)
        for injection in injections_of(root):
            fingerprint(injection)
        quantized_base.leave_out_of_ddp(pl_module.trainer, pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Go on at the moment at which the checkpoint was written."""
        if trainer.state.fn == "fit" and self is _lora_callbacks(trainer)[0]:
            resume.go_on_from(checkpoint, trainer)
            run_names.go_on_from(checkpoint, pl_module)
            if self._running:  # strategies that shard the model restore it after this start
                resume.rebuild_dataloader(trainer)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Drop frozen parameters from the optimizers, let gradients and averages pass rightly, say what is trained."""
        if self.merge == "best":
            require_own_best(trainer, pl_module)
        base_changes.require_frozen(trainer.optimizers, pl_module)
        drop_frozen(trainer.optimizers, pl_module)
        if (injection := self._injection(self._root(pl_module))).peft is None:
            freeze_norms(injection)  # the strategy may have put in others for them
        if self.adapter is None:
            calibrate_eva(trainer, pl_module, injection)
        self._running = True
        if trainer.ckpt_path is not None:
            resume.rebuild_dataloader(trainer)
        gradient_checks.enable_through_checkpointing(pl_module)
        weight_averaging.keep_base_exact(trainer, pl_module)
        if self is _lora_callbacks(trainer)[0]:
            run_names.begin(trainer, pl_module)
            warn_of_emulation(trainer)
        if self.summary and self is _lora_callbacks(trainer)[0]:
            rank_zero_only(print_summary)(pl_module)
        if self is _lora_callbacks(trainer)[-1]:  # it looks for all, since all adapters have their start by now
            exports = any(cb.verify and cb.export_dir is not None for cb in _lora_callbacks(trainer))
            self._watches.begin_fit(pl_module, trainer.optimizers, probes=exports and self.merge is not None)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let a SLURM job be requeued between steps alone, and look at each step, now that none is a trial."""
        if self is _lora_callbacks(trainer)[0]:
            requeue.requeue_waits(trainer)
            keep_adapters(pl_module)
            self._watches.begin_steps(trainer, self.on_nan)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._watches.before_batch(batch)

    @override
    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: torch.Tensor) -> None:
        resume.backward_begins(trainer)
        self._watches.before_backward(loss)

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Never train silently on nothing: gradients must reach the adapters before their optimizer's first step."""
        self._watches.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: torch.optim.Optimizer
    ) -> None:
        """Let no NaN and no infinity into the adapters."""
        self._watches.before_optimizer_step(optimizer)

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Say so if the base is no longer the one on which the checkpoint will be opened."""
        self._watches.before_save()

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """A moment from which a run can go on."""
        self._watches.after_batch()
        requeue.requeue_if_asked(trainer)

    @override
    def on_validation_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Another one."""
        requeue.requeue_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Tell checkpoints of a finished validation, which come next, from those of one in its middle."""
        if trainer.state.fn == "fit":
            resume.validation_ended(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """The last one. What the last step has made is about to be saved, exported and merged."""
        requeue.requeue_if_asked(trainer)
        self._watches.end_steps()

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Training is over and the last checkpoint is written: fold the adapters in and export."""
        callbacks = _lora_callbacks(trainer)
        if self is not callbacks[-1]:
            return  # the last one acts for all, since checkpoints must be read before any adapter is folded in
        moved = self._watches.end_fit()
        if self.merge == "best":
            load_best(trainer, pl_module)
        # Where processes share the model, all of them take part in gathering it.
        takes_part = trainer.is_global_zero or is_sharded(pl_module)
        exporting = [(cb, cb.export_dir) for cb in callbacks if cb.export_dir is not None and takes_part]
        if moved and exporting:
            rank_zero_warn(
                f"{ADAPTER_DIR}/ is not exported, since it could not be opened on the base: {moved[0]!r} has changed."
            )
        for cb, directory in [] if moved else exporting:
            write_adapter(cb._injection(cb._root(pl_module)), directory / ADAPTER_DIR, run_of(trainer))
        if self._watches.probe is not None and exporting:
            self._watches.probe.look()
        if self.merge is not None:
            merge_in_memory(pl_module)
            for cb, directory in exporting:
                export_merged(trainer, cb._root(pl_module), directory, self._watches.probe, cb.verify)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the module's methods as they were, and a model that came merged merged again."""
        self._release(trainer, pl_module)
        if stage != "fit":
            self._merge_again(pl_module)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Merge nothing; and where the run had not begun, leave the model as it came."""
        self._release(trainer, pl_module)
        if not self._running and self._injected_now and injections_of(self._root(pl_module)):
            eject(self._root(pl_module))
        elif not self._running:
            self._merge_again(pl_module)

    def _require_room(self, trainer: "pl.Trainer") -> None:
        for other in _lora_callbacks(trainer):
            if other is not self and other.state_key == self.state_key:
                raise ValueError(
                    f"The Trainer has two LoRA callbacks on the same modules under the name {self.adapter_name!r}: "
                    "take one out, or give each adapter layers of its own by target_modules or module."
                )
            if other.merge != self.merge:
                raise ValueError(
                    f"The Trainer's LoRA callbacks have merge={self.merge!r} and merge={other.merge!r}, but all "
                    "adapters of a model are folded in together: give them the same merge."
                )
            if other.on_nan != self.on_nan:
                raise ValueError(
                    f"The Trainer's LoRA callbacks have on_nan={self.on_nan!r} and on_nan={other.on_nan!r}, but they "
                    "look at the same steps: give them the same on_nan."
                )

    def _require_ends(self, trainer: "pl.Trainer") -> None:
        """What the end of the run needs is looked for at its beginning."""
        if self.merge == "best":
            require_best(trainer)
        if self.export_dir is not None and trainer.is_global_zero:
            self.export_dir.mkdir(parents=True, exist_ok=True)

    def _merge_again(self, pl_module: "pl.LightningModule") -> None:
        root = self._root(pl_module)
        if self._came == REMOVED and injections_of(root):
            eject(root, merge=True)
        elif self._came == MERGED and injections_of(root):
            merge(root)

    def _adapters_beneath(self, root: nn.Module) -> list[dict[str, Any]]:
        """The adapters of an earlier stage that are merged into the base for good, if this is a new one."""
        earlier = removed_injections(root)
        if not earlier or any(
            found.adapter_name == self.adapter_name and found.config == self.config for found in earlier
        ):
            return []
        return forget_removed(root)

    def _release(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        leave_alone(pl_module)
        configure_model.as_before(pl_module)
        quantized_base.as_before(trainer, pl_module)
        self._watches.stop()
        self._watches = Watches()
        gradient_checks.disable_through_checkpointing(pl_module)

    def _injection(self, root: nn.Module) -> Injection:
        return next(found for found in (*injections_of(root), *injections(root)) if self._is_mine(found))

    def _is_in(self, module: nn.Module) -> bool:
        return any(self._is_mine(found) for found in injections(module))

    def _is_mine(self, found: Injection) -> bool:
        return (found.config, found.adapter_name) == (self.config, self.adapter_name)

    def _root(self, pl_module: "pl.LightningModule") -> nn.Module:
        if not self.module:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"LoRA(module={self.module!r}) names no submodule of {type(pl_module).__name__}, whose own submodules "
                f"are: {children}. Name one of these or a dotted path below one."
            ) from error

    def __reduce__(self) -> Any:
        return rebuild, (original_class(self),), {**self.__dict__, "_watches": Watches()}


def _floating_dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"base_dtype is {name!r}, but it must be a type such as 'bfloat16', or None.")
    return found


def _lora_callbacks(trainer: "pl.Trainer") -> list[LoRA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LoRA)]  # type: ignore[attr-defined]
