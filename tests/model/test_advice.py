"""What is advised, and when nothing is."""

import pytest

from lightning_lora.fqn import group_of
from lightning_lora.model.advice import advice_on
from lightning_lora.model.learned import Update


@pytest.mark.parametrize(
    ("name", "group"), [("model.layers.0.self_attn.q_proj", "q_proj"), ("net.4", "net"), ("0", "0"), ("", "")]
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def updates(**values: list[float]) -> list[Update]:
    return [Update(name.replace("__", "."), 16, 10.0, found) for name, found in values.items()]


def test_advice() -> None:
    small = [0.5, 0.3] + [1e-4] * 14
    (line,) = advice_on(updates(a__0__q=small, a__1__q=small))
    assert line.startswith("q uses 2.0 of 16 ranks: r=2 holds 99%")
    assert advice_on(updates(a__0__q=[5.0] * 16)) == advice_on([]) == advice_on(updates(q=[0.0] * 16)) == []
