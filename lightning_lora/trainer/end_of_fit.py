"""What the end of a fit does with its adapters: folds them into the model that is in memory, and exports that."""

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.formats.merged import ADAPTER_DIR, MERGED_DIR, save_merged
from lightning_lora.formats.model_card import add_to_card, run_of
from lightning_lora.model.eject import eject
from lightning_lora.model.peft_wrapped import merged_base
from lightning_lora.model.quantization import is_quantized
from lightning_lora.model.record import injections
from lightning_lora.trainer.merge_probe import MergeProbe


def merge_in_memory(pl_module: "pl.LightningModule") -> None:
    """Fold all adapters into the model, or say why they stay at work."""
    if all(injection.peft is not None for injection in injections(pl_module)):
        rank_zero_info(
            "The adapters are PEFT's and stay at work in its layers, so that nothing is merged in memory: PEFT's "
            "merge_and_unload() does so. merged/ holds the merged model."
        )
    elif is_quantized(pl_module):
        rank_zero_info(
            "The base is quantized, so that a merged model would be several times larger: the adapter stays at work in "
            "memory, and merged/ is written layer by layer. eject(model, merge=True) merges it here."
        )
    else:
        eject(pl_module, merge=True)


def export_merged(
    trainer: "pl.Trainer", root: nn.Module, directory: Path, probe: MergeProbe | None, verify: bool
) -> None:
    """Write the merged model, and into the cards how far its outputs are from those of the trained one.

    Args:
        trainer: The Trainer.
        root: What the adapters are, or were, injected into.
        directory: Where ``adapter/`` is and ``merged/`` is to be.
        probe: What looked at the model before the merge, if something did.
        verify: Whether to open the files again.

    Raises:
        RuntimeError: If it computes something else than what was trained; nothing is written then.
    """
    module = trainer.lightning_module
    tokenizer = getattr(module, "tokenizer", getattr(trainer.datamodule, "tokenizer", None))  # type: ignore[attr-defined]
    wrapped = [injection.root for injection in injections(root) if injection.peft is not None]
    with merged_base(wrapped[0]) if wrapped else nullcontext(root) as merged:
        apart = probe.difference() if probe is not None else None
        facts = {"merged outputs apart": f"{apart:.1e}"} if apart is not None else {}
        run = run_of(trainer)
        run = run._replace(facts={**run.facts, **facts})
        save_merged(merged, directory / MERGED_DIR, tokenizer, verify=verify, run=run)
    if facts:
        add_to_card(directory / ADAPTER_DIR, facts)
    rank_zero_info(f"Exported the adapter and the merged model to {directory}")
