"""Callbacks for use beside ``LoRA``."""

from lightning_lora.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_lora.callbacks.adapter_monitor import AdapterMonitor
from lightning_lora.callbacks.base_as_reference import BaseAsReference
from lightning_lora.callbacks.before_after import BeforeAfter
from lightning_lora.callbacks.graceful_interrupt import GracefulInterrupt
from lightning_lora.callbacks.learning_curve import LearningCurve
from lightning_lora.callbacks.max_update_norm import MaxUpdateNorm
from lightning_lora.callbacks.prediction_writer import PredictionWriter
from lightning_lora.callbacks.report import Report
from lightning_lora.callbacks.throughput import Throughput

__all__ = [
    "ActivationCheckpointing",
    "AdapterMonitor",
    "BaseAsReference",
    "BeforeAfter",
    "GracefulInterrupt",
    "LearningCurve",
    "MaxUpdateNorm",
    "PredictionWriter",
    "Report",
    "Throughput",
]
