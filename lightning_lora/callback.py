"""``LoRA``: the life of a run, hook by hook, in the order in which Lightning calls them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import nn
from typing_extensions import override

from lightning_lora.config import ALL_LINEAR, AUTO, LoraConfig
from lightning_lora.formats.merged import ADAPTER_DIR, MERGED_DIR, save_merged
from lightning_lora.formats.model_card import facts_of
from lightning_lora.formats.peft import load_adapter, read_adapter, write_adapter
from lightning_lora.model.eject import eject, is_folded
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import unmerge
from lightning_lora.model.param_groups import drop_frozen
from lightning_lora.model.record import Injection, injections, injections_of
from lightning_lora.model.summary import print_summary
from lightning_lora.sharding import is_sharded
from lightning_lora.trainer import gradient_checks, resume, weight_averaging
from lightning_lora.trainer.eva_calibration import start_from_data
from lightning_lora.trainer.process_launchers import no_way_back, spawns
from lightning_lora.trainer.pytorch_lightning import original_class, rebuild, serve_both_packages
from lightning_lora.trainer.resume import load_best
from lightning_lora.trainer.sharded_strategy import checkpoints_of
from lightning_lora.trainer.strategy import install

_MERGE_MODES = ("last", "best", None)


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

    Args:
        r: See :class:`~lightning_lora.LoraConfig`, as for all arguments up to ``seed``.
        config: All of those at once, instead of them.
        merge: Which adapter is folded into the weights when ``fit`` ends: that of the ``"last"`` step, that of the
            ``"best"`` checkpoint by ``ModelCheckpoint(monitor=...)``, or none (``None``), which leaves the adapted
            model. Nothing is merged after an exception or an interrupt.
        export_dir: Where the end of ``fit`` writes ``adapter/``, in PEFT's format, and ``merged/``, the merged model.
        adapter: Where to start from: a directory in PEFT's format or an adapter checkpoint. Unlike ``ckpt_path``, it
            brings the adapter's tensors alone, no optimizer and no progress.
        module: Dotted name of the submodule to adapt; the rest of the module then trains as it would without LoRA, and
            is in the checkpoints. ``None`` is the whole module.
        adapter_name: Name of the adapter.
        summary: Whether to print a table of what is trained when ``fit`` starts.

    Raises:
        ValueError: If a setting is out of range or of no known kind.
    """

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = ALL_LINEAR,
        fused_qkv: list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        target_parameters: list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: str | list[str] | None = AUTO,
        bias: str = "none",
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        freeze_A: bool = False,
        use_vera: bool = False,
        vera_d_initial: float = 0.1,
        rank_dropout: float = 0.0,
        seed: int = 0,
        *,
        config: LoraConfig | None = None,
        merge: str | None = "last",
        export_dir: str | Path | None = None,
        adapter: str | Path | None = None,
        module: str | None = None,
        adapter_name: str = "default",
        summary: bool = True,
    ) -> None:
        super().__init__()
        given = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            fused_qkv=fused_qkv,
            exclude_modules=exclude_modules,
            target_parameters=target_parameters,
            trainable_token_indices=trainable_token_indices,
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save,
            bias=bias,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            freeze_A=freeze_A,
            use_vera=use_vera,
            vera_d_initial=vera_d_initial,
            rank_dropout=rank_dropout,
            seed=seed,
        )
        if config is not None and given != LoraConfig():
            raise ValueError("LoRA got both a config and settings of its own: put all of them into the config.")
        if merge not in _MERGE_MODES:
            raise ValueError(f"merge is {merge!r}, but it must be one of {', '.join(map(repr, _MERGE_MODES))}.")
        self.config = config or given
        self.merge = merge
        self.export_dir = Path(export_dir) if export_dir is not None else None
        self.adapter = Path(adapter) if adapter is not None else None
        self.module = module
        self.adapter_name = adapter_name
        self.summary = summary
        self._injected_now = False
        self._was_folded = False
        self._running = False
        self._gradients_seen = False
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
            resume.install(trainer)
        self._injected_now = self._was_folded = self._running = self._gradients_seen = False
        install(trainer.strategy, checkpoints)
        _after_configure_model(pl_module, self)
        if weight_averaging.must_be_injected_early(trainer, pl_module, self):
            self.attach(pl_module)

    def attach(self, pl_module: "pl.LightningModule") -> None:
        """Put the adapter in, right after ``configure_model`` and before the strategy wraps the model."""
        root = self._root(pl_module)
        self._was_folded = is_folded(root)
        unmerge(root)
        before = len(injections_of(root))
        inject(root, self.config, self.adapter_name)
        if len(injections_of(root)) > before:
            self._injected_now = True
            if self.adapter is not None and self.adapter.is_dir():
                read_adapter(root, self._injection(root), self.adapter)
            elif self.adapter is not None:
                load_adapter(pl_module, self.adapter)
        for injection in injections_of(root):
            fingerprint(root, injection)

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Go on at the moment at which the checkpoint was written."""
        if trainer.state.fn == "fit" and self is _lora_callbacks(trainer)[0]:
            resume.go_on_from(checkpoint, trainer)
            if self._running:  # strategies that shard the model restore it after this start
                resume.rebuild_dataloader(trainer)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Drop frozen parameters from the optimizers, let gradients and averages pass rightly, say what is trained."""
        drop_frozen(trainer.optimizers, pl_module)
        if self.adapter is None:
            start_from_data(trainer, pl_module, self._root(pl_module), self._injection(self._root(pl_module)))
        self._running = True
        if trainer.ckpt_path is not None:
            resume.rebuild_dataloader(trainer)
        gradient_checks.enable_through_checkpointing(pl_module)
        weight_averaging.keep_base_exact(trainer)
        if self.summary and self is _lora_callbacks(trainer)[0]:
            rank_zero_only(print_summary)(pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let a SLURM job be requeued between steps alone."""
        if self is _lora_callbacks(trainer)[0]:
            resume.requeue_waits(trainer)

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Never train silently on nothing: the first backward pass must reach the adapters."""
        if not self._gradients_seen:
            self._gradients_seen = True
            gradient_checks.require_some(self._root(pl_module))

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """A moment from which a run can go on."""
        resume.requeue_if_asked(trainer)

    @override
    def on_validation_batch_end(self, trainer: "pl.Trainer", *_: Any) -> None:
        """Another one."""
        resume.requeue_if_asked(trainer)

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Tell checkpoints of a finished validation, which come next, from those of one in its middle."""
        if trainer.state.fn == "fit":
            resume.validation_ended(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """The last one."""
        resume.requeue_if_asked(trainer)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Training is over and the last checkpoint is written: fold the adapters in and export."""
        callbacks = _lora_callbacks(trainer)
        if self is not callbacks[-1]:
            return  # the last one acts for all, since checkpoints must be read before any adapter is folded in
        if self.merge == "best":
            load_best(trainer, pl_module)
        # Where processes share the model, all of them take part in gathering it.
        takes_part = trainer.is_global_zero or is_sharded(pl_module)
        exporting = [cb for cb in callbacks if cb.export_dir is not None and takes_part]
        for callback in exporting:
            callback._export_adapter(trainer, pl_module)
        if self.merge is not None:
            eject(pl_module, merge=True)
            for callback in exporting:
                callback._export_merged(trainer, pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Leave the module's methods as they were, and a model that came merged merged again."""
        self._release(pl_module)
        if stage != "fit":
            self._refold(pl_module)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Merge nothing; and where the run had not begun, leave the model as it came."""
        self._release(pl_module)
        if not self._running and self._injected_now and injections_of(self._root(pl_module)):
            eject(self._root(pl_module))
        elif not self._running:
            self._refold(pl_module)

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

    def _require_ends(self, trainer: "pl.Trainer") -> None:
        """What the end of the run needs is looked for at its beginning."""
        if self.merge == "best" and trainer.checkpoint_callback is None:
            raise ValueError(
                'LoRA(merge="best") needs a checkpoint of the best step, and the Trainer keeps none: add '
                'ModelCheckpoint(monitor="val_loss") to its callbacks, or use merge="last".'
            )
        if self.export_dir is not None and trainer.is_global_zero:
            self.export_dir.mkdir(parents=True, exist_ok=True)

    def _refold(self, pl_module: "pl.LightningModule") -> None:
        if self._was_folded and injections_of(self._root(pl_module)):
            eject(self._root(pl_module), merge=True)

    def _release(self, pl_module: "pl.LightningModule") -> None:
        pl_module.__dict__.pop("configure_model", None)
        gradient_checks.disable_through_checkpointing(pl_module)

    def _export_adapter(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.export_dir is not None
        root = self._root(pl_module)
        write_adapter(root, self._injection(root), self.export_dir / ADAPTER_DIR, facts_of(trainer))

    def _export_merged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.export_dir is not None
        tokenizer = getattr(pl_module, "tokenizer", getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]
        save_merged(self._root(pl_module), self.export_dir / MERGED_DIR, tokenizer)
        rank_zero_info(f"Exported the adapter and the merged model to {self.export_dir}")

    def _injection(self, root: nn.Module) -> Injection:
        return next(found for found in injections_of(root) if self._is_mine(found))

    def _is_in(self, pl_module: "pl.LightningModule") -> bool:
        return any(self._is_mine(found) for _, _, found in injections(pl_module))

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
        return rebuild, (original_class(self),), self.__dict__


def _lora_callbacks(trainer: "pl.Trainer") -> list[LoRA]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LoRA)]  # type: ignore[attr-defined]


def _after_configure_model(pl_module: "pl.LightningModule", callback: LoRA) -> None:
    """Attach a callback's adapter when Lightning calls ``configure_model``.

    Lightning 2.6 has no callback hook between ``configure_model`` and the strategy's set-up, where optimizers are made
    and the model is wrapped. So the instance gets a ``configure_model`` of its own until the run ends.
    """
    current = pl_module.__dict__.get("configure_model")
    waiting: list[LoRA] | None = getattr(current, "waiting", None)
    if waiting is not None:
        waiting.append(callback)
        return
    waiting = [callback]
    build = pl_module.configure_model

    def configure_model() -> None:
        build()
        for waiting_callback in waiting:
            waiting_callback.attach(pl_module)

    configure_model.waiting = waiting  # type: ignore[attr-defined]
    pl_module.__dict__["configure_model"] = configure_model
