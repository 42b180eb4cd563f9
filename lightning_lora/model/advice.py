"""What the updates of adapters advise to try next, in words, as far as ``benchmarks/advice.py`` bears it out."""

from statistics import fmean

from lightning_lora.fqn import group_of
from lightning_lora.model.learned import ENERGY, Update


def advice_on(updates: list[Update]) -> list[str]:
    """What the updates of all layers advise, in words; nothing for what has learned nothing."""
    groups: dict[str, list[Update]] = {}
    for update in updates:
        if update.spectrum.norm > 0:
            groups.setdefault(group_of(update.layer), []).append(update)
    lines = []
    for group, found in groups.items():
        rank = max(update.r for update in found)
        used, enough = fmean(u.spectrum.effective_rank for u in found), max(u.spectrum.enough for u in found)
        if enough <= rank / 2:
            lines.append(
                f"{group} uses {used:.1f} of {rank} ranks: r={enough} holds {ENERGY:.0%} of each update's energy "
                f"(lightning-lora resize --energy {ENERGY})."
            )
    return lines
