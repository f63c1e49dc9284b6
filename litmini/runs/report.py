"""The loss curve of a run, and its report: one HTML file that needs no network."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from litmini.errors import counted
from litmini.files import read_json, write_text
from litmini.runs.directory import REPORT
from litmini.runs.run import MEASURES, read_metrics, read_samples, today_keys

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#64748b"
SMALL = [("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens a second")]


def plot_metrics(directory: Path, results: dict[str, Any]) -> None:
    """Draw a run's loss curve, training and validation, into loss.png."""
    rows = read_metrics(directory / "metrics.csv")
    file = directory / "loss.png"
    file.unlink(missing_ok=True)  # a new file: never through a link
    _figure(lambda axes: _draw_loss(axes, rows, results, directory.name), (7, 4)).savefig(file, dpi=120)


def write_report(directory: Path, lengths: np.ndarray | None, row_length: int) -> None:
    """Write report.html of a finished run: results, curves, samples, data, configuration and manifest.

    Args:
        lengths: tokens of each training example; None: the data are not examples.
        row_length: tokens of the longest sequence.
    """
    manifest = read_json(directory / "manifest.json")
    results = manifest.pop("results")
    rows = read_metrics(directory / "metrics.csv")
    charts = [_svg(functools.partial(_draw_line, rows=rows, key=key, title=name), (4, 2.4)) for key, name in SMALL]
    if lengths is not None:
        charts.append(_svg(lambda axes: _draw_lengths(axes, lengths, row_length), (4, 2.4)))
    before, after = (today_keys(results.pop(f"samples_{when}", [])) for when in ("before", "after"))
    shown = ("trained_parameters", "steps", "tokens", "target_tokens", "best_step", "best_val_loss")
    numbers = {k: _number(v) for k, v in manifest.get("statistics", {}).items()}
    counts = {k: _number(results[k]) for k in shown if k in results} | {"files": "\n".join(manifest.get("data", {}))}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    html = page.render(
        name=directory.name,
        manifest=manifest,
        tiles=_tiles(results),
        loss=_svg(lambda axes: _draw_loss(axes, rows, results, ""), (9, 3.6)),
        charts=charts,
        samples=list(zip(before, after, strict=False)),
        during=[row for row in read_samples(directory) if before and row["prompt"] == before[0]["prompt"]],
        tables={"training examples": numbers, "this run": counts},
        config=(directory / "config.yaml").read_text(encoding="utf-8"),
        details=yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True),
    )
    write_text(directory / REPORT, html)


def _tiles(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (title, value, note) of the most important results."""
    tiles = []
    for key, (title, form) in MEASURES.items():
        if f"{key}_after" in results:
            before, after = (form.format(results[f"{key}_{when}"]) for when in ("before", "after"))
            tiles.append((f"validation {title}", after, f"was {before}"))
    seconds = results["training_seconds"]
    spent = (
        f"{seconds / 3600:.1f} h"
        if seconds > 7200
        else f"{seconds / 60:.1f} min"
        if seconds > 120
        else f"{seconds:.0f} s"
    )
    tiles.append(("training", spent, counted(results["steps"], "step")))
    mfu = f"MFU {results['mfu']:.1%}" if "mfu" in results else ""
    tiles.append(("tokens a second", f"{results['tokens_per_second']:,.0f}", mfu))
    tiles.append(("peak memory", f"{results['peak_memory_mib'] / 1024:.1f} GiB", ""))
    return tiles


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(draw: Callable[[Any], None], size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    draw(axes)
    return figure


def _svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """Return a chart as an <svg> element, with text as text and without references to other files."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "litmini"}):
        _figure(draw, size).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_loss(axes: Any, rows: list[dict[str, str]], results: dict[str, Any], title: str) -> None:
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title)
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], BLUE, label="training", linewidth=1.2)
    validation = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    if "val_loss_after" in results:
        last = int(rows[-1]["step"])
        validation = [
            (0, results["val_loss_before"]),
            *(p for p in validation if p[0] < last),
            (last, results["val_loss_after"]),
        ]
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=ORANGE, label="validation", markersize=4)
    _from_zero(axes)
    axes.legend(frameon=False)


def _draw_line(axes: Any, rows: list[dict[str, str]], key: str, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.plot([int(r["step"]) for r in rows], [float(r[key]) for r in rows], BLUE, linewidth=1.2)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    _from_zero(axes)


def _from_zero(axes: Any) -> None:
    """Let the y axis begin at zero, and show whole steps on the x axis."""
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_lengths(axes: Any, lengths: np.ndarray, row_length: int) -> None:
    axes.set_title(f"tokens of an example, sequences of {row_length:,}", fontsize=10)
    axes.hist(lengths, bins=min(40, max(5, int(np.ptp(lengths)))), color=GREY)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
  body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1e293b; background: #f8fafc; margin: 0; }
  main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
  h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.2rem 0 .7rem; font-size: 1.15rem; }
  .dim { color: #64748b; } .box { background: white; border: 1px solid #e2e8f0; border-radius: 8px; padding: 1rem; }
  .row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); }
  .wide { grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
  .value { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
  svg { width: 100%; height: auto; display: block; } .loss { overflow-x: auto; } .loss svg { min-width: 30rem; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
  dt { color: #64748b; } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
  .word { display: inline-block; max-width: 100%; overflow-wrap: anywhere; } h3 { margin: 0 0 .5rem; font-size: 1rem; }
  .right { color: #15803d; } .sample { margin-bottom: .8rem; }
  pre { margin: .6rem 0 0; overflow-x: auto; font-size: 13px; } summary { cursor: pointer; font-weight: 600; }
  details { margin-bottom: .8rem; }
</style>
</head>
<body><main>
<h1>{{ name }}</h1>
<div class="dim">{% for word in manifest.command %}<span class="word">{{ word }}</span> {% endfor %}</div>

<h2>Result</h2>
<div class="row">
{% for title, value, beside in tiles %}
  <div class="box">
    <div class="dim">{{ title }}</div><div class="value">{{ value }}</div><div class="dim">{{ beside }}</div>
  </div>
{% endfor %}
</div>

<h2>Loss</h2>
<div class="box loss">{{ loss | safe }}</div>
<div class="row wide" style="margin-top: .8rem">
{% for chart in charts %}
  <div class="box">{{ chart | safe }}</div>
{% endfor %}
</div>

{% if samples %}
<h2>Completions before and after</h2>
{% for before, after in samples %}
<div class="box sample"><dl>
  <dt>prompt</dt><dd>{{ before.prompt }}</dd>
  <dt>reference</dt><dd>{{ before.reference }}</dd>
  <dt>before</dt><dd>{{ before.prediction }}</dd>
{% if loop.first %}
{% for row in during %}
  <dt>step {{ row.step }}</dt><dd>{{ row.prediction }}</dd>
{% endfor %}
{% endif %}
  <dt>after</dt>
  <dd{% if after.prediction.strip() == after.reference.strip() %} class="right"{% endif %}>{{ after.prediction }}</dd>
</dl></div>
{% endfor %}
{% endif %}

<h2>Data</h2>
<div class="row wide">
{% for title, table in tables.items() %}
  <div class="box"><h3>{{ title }}</h3><dl>
{% for key, value in table.items() %}
    <dt>{{ key.replace("_", " ") }}</dt><dd>{{ value }}</dd>
{% endfor %}
  </dl></div>
{% endfor %}
</div>

<h2>How it was made</h2>
<details class="box"><summary>configuration</summary><pre>{{ config }}</pre></details>
<details class="box"><summary>manifest</summary><pre>{{ details }}</pre></details>
</main></body>
</html>
"""
