"""What the updates of adapters advise to try next, in words; ``benchmarks/advice.py`` measures what comes of it."""

from statistics import fmean, median

from lightning_lora.fqn import group_of
from lightning_lora.model.learned import ENERGY, Update

_LARGE = 0.1  # of a weight's norm
_STILL = 0.01  # of the median


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
                f"{group} uses {used:.1f} of {rank} ranks: r={enough} would hold {ENERGY:.0%} of each update's energy."
            )
        large = [(share, update.layer) for update in found if (share := update.relative_norm) is not None]
        share, name = max(large, default=(0.0, ""))
        if share > _LARGE:
            lines.append(
                f"The update of {name} is {share:.0%} of its weight's norm: a lower learning rate or lora_alpha keeps "
                "more of the base."
            )
    norms = [update.spectrum.norm for update in updates]
    still = [u.layer for u, norm in zip(updates, norms) if norm < _STILL * median(norms)]
    if still:
        lines.append(
            f"{len(still)} of {len(updates)} layers moved less than {_STILL:.0%} of the median, "
            f"the first is {still[0]}: they could be left out (exclude_modules)."
        )
    return lines
