"""What the updates of adapters advise to try next, in words; ``benchmarks/advice.py`` measures what comes of it."""

from statistics import fmean, median
from typing import Any, NamedTuple

from lightning_lora.fqn import group_of
from lightning_lora.model.learned import ENERGY, Update

_LARGE = 0.1  # of a weight's norm
_STILL = 0.01  # of the median


class Advice(NamedTuple):
    """What to try next.

    Attributes:
        text: In words, with what it is drawn from.
        settings: Of :class:`~lightning_lora.LoraConfig`, those that follow it.
    """

    text: str
    settings: dict[str, Any]


def advice_on(updates: list[Update]) -> list[Advice]:
    """What the updates of all layers advise; nothing for what has learned nothing."""
    groups: dict[str, list[Update]] = {}
    for update in updates:
        if update.spectrum.norm > 0:
            groups.setdefault(group_of(update.layer), []).append(update)
    found = []
    for group, members in groups.items():
        rank = max(update.r for update in members)
        used, enough = fmean(u.spectrum.effective_rank for u in members), max(u.spectrum.enough for u in members)
        if enough <= rank / 2:
            text = (
                f"{group} uses {used:.1f} of {rank} ranks: r={enough} would hold {ENERGY:.0%} of each update's energy."
            )
            found.append(Advice(text, {"rank_pattern": {group: enough}}))
        large = [(share, update.layer) for update in members if (share := update.relative_norm) is not None]
        share, name = max(large, default=(0.0, ""))
        if share > _LARGE:
            text = (
                f"The update of {name} is {share:.0%} of its weight's norm: a lower learning rate or lora_alpha keeps "
                "more of the base."
            )
            found.append(Advice(text, {"alpha_pattern": {group: 0.5}}))
    norms = [update.spectrum.norm for update in updates]
    still = [u.layer for u, norm in zip(updates, norms) if norm < _STILL * median(norms)]
    if still:
        text = (
            f"{len(still)} of {len(updates)} layers moved less than {_STILL:.0%} of the median, the first is "
            f"{still[0]}: they could be left out (exclude_modules)."
        )
        found.append(Advice(text, {"exclude_modules": still}))
    return found
