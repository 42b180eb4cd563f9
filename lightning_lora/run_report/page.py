"""``report.html``: one file without a server or a network, with plotly in it to draw the figures."""

import math
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lightning_lora.formats.curves import Curves
from lightning_lora.formats.publish import write_text
from lightning_lora.model.advice import advice_on
from lightning_lora.model.learned import Update
from lightning_lora.run_report import figures
from lightning_lora.run_report.run_files import RunFiles, read_run

REPORT_FILE = "report.html"
_HIGHER_IS_WORSE = ("loss", "perplexity", "error", "mse", "mae")
_RISEN, _FALLEN = 1.01, 0.99  # of the lowest, or of the value before


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` of what a run has left in its directory.

    Args:
        run_dir: The directory, such as ``runs/quickstart``.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
        FileNotFoundError: If there is nothing of a run in the directory.
    """
    run = read_run(Path(run_dir))
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ModuleNotFoundError(
            f"A report needs plotly, which is not installed: pip install plotly, then lightning-lora report {run_dir}"
        ) from None
    target = run.run_dir / REPORT_FILE
    page = _render(run, get_plotlyjs())
    write_text(page.encode(errors="replace").decode(), target)  # half characters, as JSON can hold
    return target


def _render(run: RunFiles, plotly: str) -> str:
    record = run.record
    relative = all(update.relative_norm is not None for update in run.updates)
    before, after = (record["before"], record["after"]) if record else ({}, {})
    drawn = {
        **figures.learning_curves(run.curves, before),
        **figures.norms(run.updates),
        **({"spectrum": figures.spectrum()} if run.updates else {}),
        **(figures.lengths(record["data"]) if record else {}),
        **figures.speed(run.curves),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"megabytes": lambda size: f"{size / 1e6:,.2f} MB", "figure": lambda value: f"{value:.4g}"}
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=run.run_dir.resolve().name,
        record=record,
        took=str(timedelta(seconds=round(record["seconds"]))) if record else None,
        verdict=_verdict(before, after),
        notes=_notes(run.curves, before),
        advice=advice_on(run.updates),
        metrics=_metrics(before, after, bool(record and record["samples"])),
        settings=run.settings,
        layers=[_layer(update, relative) for update in run.updates],
        relative=relative,
        figures=drawn,
        plotly=plotly.replace("</script", "<\\/script"),
    )


def _verdict(before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
    """Whether it worked, as a word for the page's color and a sentence."""
    name = next((name for name in ("val_loss", *before) if name in before and name in after), None)
    if name is None:
        return "unknown", (
            "Whether it learned is not known, since it was not measured before and after: the Report callback does so "
            "where there are rows to validate on and num_sanity_val_steps=-1."
        )
    one, other = before[name], after[name]
    better = other < one if any(word in name for word in _HIGHER_IS_WORSE) else other > one
    went = "fell" if other < one else "rose" if other > one else "stayed"
    sentence = f"{name} {went} from {one:.4g} to {other:.4g} on the rows held out."
    return ("good", f"It learned: {sentence}") if better else ("bad", f"It did not learn what is measured: {sentence}")


def _notes(curves: Curves, before: dict[str, float]) -> list[str]:
    """What the curve of the validation loss says of the length of the run."""
    points = curves.get("val_loss", [])
    values = [before["val_loss"]] if "val_loss" in before else []
    values += [value for _, value in points]
    if not points or len(values) < 2:
        return []
    best = min(points, key=lambda point: point[1])
    if values[-1] > best[1] * _RISEN:
        return [
            f"val_loss was lowest at step {best[0]} ({best[1]:.4g}) and has risen since: LoRA(merge='best') keeps that "
            "one, and fewer epochs would have been enough."
        ]
    if values[-1] < values[-2] * _FALLEN:
        return ["val_loss was still falling when it was measured last: more epochs may bring it further."]
    return []


def _metrics(before: dict[str, float], after: dict[str, float], with_perplexity: bool) -> list[tuple[str, str, str]]:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [(name, shown(before.get(name)), shown(after.get(name))) for name in dict.fromkeys([*before, *after])]
    losses = [each.get("val_loss") for each in (before, after)]
    if with_perplexity and any(loss is not None for loss in losses):
        # Above 700, the exponential does not fit a float.
        exponentials = [math.exp(loss) if loss is not None and loss < 700 else None for loss in losses]
        rows.insert(1, ("perplexity", *map(shown, exponentials)))  # type: ignore[arg-type]
    return rows


def _layer(update: Update, relative: bool) -> dict[str, Any]:
    """What the page shows of a layer when it is chosen."""
    spectrum, share = update.spectrum, update.relative_norm
    text = f"effective rank {spectrum.effective_rank:.1f} of {update.r}; {spectrum.enough} hold 99% of the energy; "
    text += f"norm {spectrum.norm:.3g}" + ("" if share is None else f", {share:.2%} of the weight's")
    size = share if relative else spectrum.norm
    return {"name": update.layer, "values": update.values, "text": text, "size": size}
