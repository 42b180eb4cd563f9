"""The report of a run: one page that says whether it worked, why, and what to try next."""

from lightning_lora.run_report.page import write_report

__all__ = ["write_report"]
