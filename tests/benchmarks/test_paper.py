"""The paper's claims: how rates are chosen, and that docs/paper.md shows the figures that were measured."""

from types import ModuleType

import pytest
from helpers import ROOT


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.paper import results

    return results


def searched(
    contender: str, lr: float, quality: float, search: bool = True, task: str = "encoder"
) -> dict[str, object]:
    return {"task": task, "contender": contender, "lr": lr, "quality": quality, "search": search}


def test_the_rate_is_chosen_in_the_search_alone(results: ModuleType) -> None:
    runs = [
        searched("qv-8", 1e-3, 0.5),
        searched("qv-8", 3e-3, 0.795),
        searched("qv-8", 1e-2, 0.8),  # no better than the rate before
        searched("qv-8", 3e-2, 0.2),
        searched("qv-8", 5e-2, 0.9, search=False),
        searched("all-8", 7e-2, 0.9),
        searched("qv-8", 9e-2, 0.9, task="causal"),
    ]
    assert results.chosen_rate("encoder", "qv-64", runs) == 3e-3
    losses = [searched("full", lr, loss, task="causal") for lr, loss in ((1e-4, 3.7), (1e-3, 3.8))]
    assert results.chosen_rate("causal", "full", losses) == 1e-4
    with pytest.raises(ValueError, match="Found no search for head on encoder"):
        results.chosen_rate("encoder", "head", runs)


def test_the_page_shows_what_was_measured(results: ModuleType) -> None:
    from benchmarks.paper.table import markdown

    folder = ROOT / "benchmarks" / "paper"
    runs, timings = results.read(folder / "runs.jsonl"), results.read(folder / "timings.jsonl")
    page = (ROOT / "docs" / "paper.md").read_text()
    for task in ("encoder", "causal"):
        table = markdown(task, runs, timings)
        assert table in page, f"The table of docs/paper.md should be:\n{table}"
