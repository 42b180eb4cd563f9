"""The page on a run: what is in it, what is not taken for markup, and that a browser draws it."""

import json
import os
import shutil
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora.cli.main import main
from lightning_lora.formats.run_record import RunRecord, write_record
from lightning_lora.model.state_dict import CheckpointError
from lightning_lora.run_report import write_report

HOSTILE = '</script><img src="http://evil.test/x" onerror="alert(1)"><a href="http://evil.test">&amp;{{ 7 * 7 }}'
BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)


def record(**changes: Any) -> RunRecord:
    layers = [f"model.layers.{number}.self_attn.{name}" for number in range(3) for name in ("q_proj", "v_proj")]
    made: Any = {
        "command": "lightning-lora fit --config quickstart",
        "seconds": 84.4,
        "versions": {"torch": "2.13", "device": "cpu"},
        "settings": {"adapter default": {"r": 8}},
        "data": [
            {
                "purpose": "training",
                "rows": 5,
                "lengths": {"texts": 5, "tokens": 50, "learned": 20, "first": 8, "step": 2, "counts": [2, 3]},
            },
            {"purpose": "validation", "rows": 2, "lengths": None},
        ],
        "before": {"val_loss": 4.7},
        "after": {"val_loss": 3.7},
        "samples": [{"prompt": "Define: Internet", "before": "A network.", "after": "A place."}],
        "outputs": [{"name": "exported adapter", "path": "export/adapter", "bytes": 1_900_000}],
        "updates": [
            {
                "layer": layer,
                "r": 4,
                "weight_norm": 1.0 if number == 2 else 10.0,
                "values": [0.4 + number, 0.2, 0.1, 0.05],
            }
            for number, layer in enumerate(layers)
        ],
    }
    return made | changes


def write(run_dir: Path, **changes: Any) -> str:
    run_dir.mkdir(exist_ok=True)
    write_record(record(**changes), run_dir)
    lines = ["metric,step,value", *(f"{name},{step},{step + 1}" for step in (4, 9) for name in NAMES)]
    (run_dir / "learning_curve.csv").write_text("\n".join(lines) + "\n")
    (run_dir / "config.yaml").write_text("seed_everything: 0\n")
    return write_report(run_dir).read_text(encoding="utf-8")


NAMES = ("train_loss", "val_loss", "val_accuracy", "tokens_per_second", "peak_memory_gb", "adapter/q_proj/stable_rank")


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.shown: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if not self._in_script:
            self.shown.append(data)
        elif self.scripts:
            self.scripts[-1] += data

    @property
    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.tags}

    @property
    def text(self) -> str:
        return " ".join("".join(self.shown).split())


def test_everything_is_in_it(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "run"))
    plots = {"loss", "metrics", "norms", "spectrum", "lengths", "tokens_per_second", "peak_memory_gb"}
    sections = {"next", "curves", "samples", "learned", "data", "speed", "sizes", "again", "settings", "versions"}
    assert plots | sections <= page.ids
    for said in (
        "It learned: val_loss fell from 4.7 to 3.7",
        "uses",  # advice
        "perplexity",
        "A network.",
        "A place.",
        "0:01:24",
        "1.90 MB",
        "lightning-lora fit --config quickstart",
        "seed_everything: 0",
        "2.13",
    ):
        assert said in page.text
    drawn = figures_in(page)
    assert drawn["loss"]["data"][1]["x"] == [0, 4, 9] and drawn["loss"]["data"][1]["y"][0] == 4.7
    assert [trace["name"] for trace in drawn["metrics"]["data"]] == ["val_accuracy"]
    assert drawn["norms"]["data"][0]["y"] == ["q_proj", "v_proj"]
    assert drawn["norms"]["data"][0]["customdata"] == [[0, 2, 4], [1, 3, 5]]
    assert len(page.scripts) == 2 and len(page.scripts[0]) > 1_000_000  # plotly, once


def figures_in(page: Page) -> dict[str, Any]:
    line = next(line for line in page.scripts[1].splitlines() if line.startswith("const figures = "))
    found: dict[str, Any] = json.loads(line.removeprefix("const figures = ").removesuffix(";"))
    return found


def test_what_a_run_says_is_no_markup(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "command": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "settings": {HOSTILE: {HOSTILE: HOSTILE}},
        "samples": [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}],
        "before": {HOSTILE: 1.0},
        "after": {HOSTILE: 1.0},
        "outputs": [{"name": HOSTILE, "path": HOSTILE, "bytes": 1}],
        "updates": [{"layer": HOSTILE, "r": 1, "weight_norm": 1.0, "values": [0.5]}],
    }
    plain, hostile = Page(write(tmp_path / "one")), Page(write(tmp_path / "two", **changes))
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in plain.tags}
    assert len(hostile.scripts) == 2
    assert not any("http" in str(value) for _, each in hostile.tags for key, value in each.items() if key != "content")
    assert hostile.text.count("{{ 7 * 7 }}") > 5  # no template of its own
    # Plotly takes some tags for markup too.
    assert "<" not in "".join(map(str, figures_in(hostile)["norms"]["data"][0]["y"]))


def test_it_asks_for_nothing(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "run"))
    assert not [(tag, each) for tag, each in page.tags if {"src", "href", "data", "action"} & each.keys()]
    policy = next(each["content"] for _, each in page.tags if "http-equiv" in each)
    assert str(policy).startswith("default-src 'none';")


def test_without_a_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,1,2.5\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "loss" in page.ids and "samples" not in page.ids


def test_nothing_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing of a run"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        write_report(tmp_path / "none")
    (tmp_path / "run.json").write_text('{"command": 1}')
    with pytest.raises(CheckpointError, match=r"run.json is damaged"):
        write_report(tmp_path)


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(record(), tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ModuleNotFoundError, match="pip install plotly"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(record(), tmp_path)
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}: open it in a browser.\n"


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    if BROWSER is None:
        pytest.skip("needs Chromium or Chrome")
    write(tmp_path / "run", samples=[{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}])
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith("file:") else None)
        page.goto((tmp_path / "run" / "report.html").as_uri())
        page.wait_for_selector("#spectrum .bars path")
        assert page.inner_text("#layer-name").endswith("1.self_attn.q_proj")  # the largest, relative to its weight
        page.locator("#norms").scroll_into_view_if_needed()
        box = page.locator("#norms .nsewdrag").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 6, box["y"] + box["height"] / 4)
        playwright.expect(page.locator("#layer-name")).to_have_text("model.layers.0.self_attn.q_proj")
        assert page.locator("#spectrum .bars path").count() == 4
        assert page.evaluate("document.getElementById('spectrum').data[0].y") == [0.4, 0.2, 0.1, 0.05]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert said == []
        browser.close()


NUMBERS = st.one_of(st.floats(), st.integers(-(2**62), 2**62))
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)


@given(
    seconds=NUMBERS, counts=st.lists(st.integers(-3, 3), max_size=3), texts=st.integers(-1, 2), step=st.integers(-1, 2),
    values=st.lists(st.floats(), max_size=3), r=st.integers(-1, 3), weight_norm=st.none() | st.floats(), layer=TEXTS,
    rows=st.lists(st.lists(st.one_of(NUMBERS.map(str), TEXTS), max_size=4), max_size=3), deep=st.booleans(),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_run_is_shown_or_refused(
    tmp_path: Path, seconds: float, counts: list[int], texts: int, step: int, values: list[float], r: int,
    weight_norm: float | None, layer: str, rows: list[list[str]], deep: bool,
) -> None:  # fmt: skip
    lengths = {"texts": texts, "tokens": 1, "learned": 1, "first": 0, "step": step, "counts": counts}
    update = {"layer": layer, "r": r, "weight_norm": weight_norm, "values": values, "more": 1}
    made = record(seconds=seconds, data=[{"purpose": "training", "rows": 1, "lengths": lengths}], updates=[update])
    (tmp_path / "run.json").write_text("[" * 100_000 if deep else json.dumps(made))
    table = "\n".join(["metric,step,value", *(",".join(row) for row in rows)])
    (tmp_path / "learning_curve.csv").write_text(table, encoding="utf-8", errors="replace")
    with suppress(CheckpointError):  # and nothing else
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "learning_curve.csv", "metrics.csv"])
def test_only_what_lies_in_the_run_is_shown(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write(run_dir)
    (tmp_path / "secret").write_text("metric,step,value\nval_mine,1,2\nhidden: 3\n")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(tmp_path / "secret")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "val_mine" not in page and "hidden: 3" not in page
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)  # which never comes to an end
    write_report(run_dir)
