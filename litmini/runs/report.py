"""The loss curve of a run, and its report: one HTML file that needs no network and no script."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from litmini.errors import counted
from litmini.files import read_json, write_text
from litmini.runs.charts import Series, bar_chart, line_chart
from litmini.runs.directory import REPORT
from litmini.runs.run import COLUMNS, MEASURES, read_metrics, read_samples, today_keys

BLUE, ORANGE = "#2563eb", "#ea580c"
SMALL = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens a second"}
Rows = list[dict[str, str]]


def plot_metrics(directory: Path, results: dict[str, Any]) -> None:
    """Draw a run's loss curve, training and validation, into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(directory / "metrics.csv")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per target token)", title=directory.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], BLUE, label="training", linewidth=1.2)
    if validation := _validation(rows, results):
        axes.plot(*zip(*validation, strict=True), "o-", color=ORANGE, label="validation", markersize=4)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), 1.05 * high if high > 0 else 0.0)
    locator: Any = axes.xaxis.get_major_locator()
    locator.set_params(integer=True)
    axes.legend(frameon=False)
    file = directory / "loss.png"
    file.unlink(missing_ok=True)  # a new file: never through a link
    figure.savefig(file, dpi=120)


def write_report(
    directory: Path, lengths: np.ndarray | None, row_length: int, more_charts: Any = (), more_tables: Any = None
) -> None:
    """Write report.html of a finished run: results, curves, completions, wrong ones, data, configuration and manifest.

    Args:
        lengths: tokens of each training example; None: the data are not examples.
        row_length: tokens of the longest sequence.
        more_charts: functions that draw on matplotlib's axes.
        more_tables: title -> name of a row -> its value; None: none.
    """
    manifest = read_json(directory / "manifest.json")
    results = manifest.pop("results")
    rows = read_metrics(directory / "metrics.csv")
    measured = [name for name in rows[0] if name not in COLUMNS and not name.startswith("val_")]
    small = {**SMALL, **{name: name.replace("_", " ") for name in measured}}
    charts = [
        line_chart(
            name,
            [
                Series(name, "blue", _column(rows, key)),
                Series("validation", "orange", _column(rows, f"val_{key}"), dots=True),
            ],
            "step",
        )
        for key, name in small.items()
    ]
    if lengths is not None:
        charts.append(bar_chart(f"tokens of an example, in sequences of {row_length:,}", lengths.tolist(), "tokens"))
    charts += [_drawn(draw) for draw in more_charts]
    before, after = (today_keys(results.pop(f"samples_{when}", [])) for when in ("before", "after"))
    units = ("target_tokens", "pairs", "completions", "texts")
    shown = ("trained_parameters", "steps", "tokens", *units, "best_step", "best_val_loss")
    numbers = {k: _number(v) for k, v in manifest.get("statistics", {}).items()}
    counts = {k: _number(results[k]) for k in shown if k in results} | {"files": "\n".join(manifest.get("data", {}))}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    html = page.render(
        name=directory.name,
        manifest=manifest,
        facts=_facts(manifest),
        tiles=_tiles(results),
        loss=_loss_chart(rows, results),
        charts=charts,
        samples=list(zip(before, after, strict=False)),
        during=[row for row in read_samples(directory) if before and row["prompt"] == before[0]["prompt"]],
        wrong=results.pop("wrong_after", []),
        n_wrong=results.get("wrong", 0),
        tables={**(more_tables or {}), "training examples": numbers, "this run": counts},
        config=(directory / "config.yaml").read_text(encoding="utf-8"),
        details=yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True),
    )
    write_text(directory / REPORT, html)


def _drawn(draw: Callable[[Any], None]) -> str:
    """Return a chart that `draw` draws on matplotlib's axes, as an <svg> element with text as text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text, figure = io.StringIO(), Figure(figsize=(4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "litmini"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _facts(manifest: dict[str, Any]) -> list[str]:
    """Return model, method, date and machine of a run, as far as its manifest has them."""
    base, hardware = manifest.get("base", {}), manifest.get("hardware", {})
    source = (base.get("source") or {}).get("source") or base.get("checkpoint_dir")
    facts = [source, manifest.get("method"), str(manifest.get("date", "")).replace("T", " ")[:16]]
    if hardware.get("name"):
        facts.append(f"{hardware['name']}, {counted(hardware['cores'], 'core')}")
    return [fact for fact in facts if fact]


def _column(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]


def _validation(rows: Rows, results: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (step, validation loss), those before and after training among them."""
    points = _column(rows, "val_loss")
    if "val_loss_after" not in results or not rows:
        return points
    last = int(rows[-1]["step"])
    inner = [point for point in points if point[0] < last]
    return [(0, results["val_loss_before"]), *inner, (last, results["val_loss_after"])]


def _loss_chart(rows: Rows, results: dict[str, Any]) -> str:
    curves = [Series("training", "blue", _column(rows, "loss"))]
    curves.append(Series("validation", "orange", _validation(rows, results), dots=True))
    return line_chart("loss (nats per target token)", curves, "step", log=True, width=760)


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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }}</title>
<style>
  :root { --text: #1e293b; --dim: #64748b; --page: #f8fafc; --box: #fff; --edge: #e2e8f0; --blue: #2563eb; --orange: #ea580c;
          --right: #15803d; --wrong: #b91c1c; }
  @media (prefers-color-scheme: dark) {
    :root { --text: #e2e8f0; --dim: #94a3b8; --page: #0f172a; --box: #1e293b; --edge: #334155; --blue: #60a5fa;
            --orange: #fb923c; --right: #4ade80; --wrong: #f87171; }
  }
  body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--text); background: var(--page); margin: 0; }
  main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
  h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .7rem; font-size: 1.15rem; }
  h3 { margin: 0 0 .5rem; font-size: 1rem; }
  .dim { color: var(--dim); }
  .box { background: var(--box); border: 1px solid var(--edge); border-radius: 8px; padding: 1rem; }
  .facts { margin: .2rem 0 .6rem; } .facts span { display: inline-block; margin-right: 1.2rem; overflow-wrap: anywhere; }
  .row { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
  .wide { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
  .value { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
  dt { color: var(--dim); } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
  .word { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
  .right { color: var(--right); } .wrong { color: var(--wrong); } .sample { margin-bottom: .8rem; }
  pre { margin: .6rem 0 0; overflow-x: auto; font-size: 13px; } summary { cursor: pointer; font-weight: 600; }
  details { margin-bottom: .8rem; }
  svg { width: 100%; height: auto; display: block; font: 12px system-ui, "DejaVu Sans", sans-serif; }
  .line { fill: none; stroke-width: 1.5; stroke: currentColor; } .dot { fill: currentColor; } .grid { stroke: var(--edge); }
  .blue { color: var(--blue); } .orange { color: var(--orange); } .bar { fill: var(--dim); } .bar:hover { fill: var(--blue); }
  .label { fill: var(--dim); text-anchor: end; } .label.blue { fill: var(--blue); } .label.orange { fill: var(--orange); }
  .start { text-anchor: start; } .middle { text-anchor: middle; } .label.title { fill: var(--text); }
  .hit { fill: currentColor; opacity: 0; } .tip:hover .hit { opacity: .5; }
  @media (max-width: 560px) {
    main { padding: 1rem .6rem 3rem; } .box { padding: .7rem; } .loss svg { font-size: 19px; }
    dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  }
</style>
</head>
<body><main>
<h1>{{ name }}</h1>
<div class="facts">{% for fact in facts %}<span>{{ fact }}</span> {% endfor %}</div>
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
{% for chart in charts if chart %}
  <div class="box">{{ chart | safe }}</div>
{% endfor %}
</div>

{% if wrong %}
<h2>Wrong completions after training: {{ n_wrong }}{{ ", the first %d" % wrong | length if n_wrong > wrong | length }}</h2>
{% for one in wrong %}
<div class="box sample"><dl>
  <dt>prompt</dt><dd>{{ one.prompt }}</dd>
  <dt>reference</dt><dd>{{ one.reference }}</dd>
  <dt>completion</dt><dd class="wrong">{{ one.prediction }}</dd>
</dl></div>
{% endfor %}
{% endif %}

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
