"""What a sweep found: its table, its plot, and the best choice."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litmini.errors import counted
from litmini.runs.sweep import Outcome

MOST_LINES = 12  # curves in the legend of a plot


@dataclass(frozen=True)
class Row:
    """A choice, with what its runs measured."""

    choice: dict[str, Any]
    values: list[float]
    """Of its finished runs, one for each seed."""
    outcomes: list[Outcome]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def is_done(self) -> bool:
        return len(self.values) == len(self.outcomes)


def rows_of(outcomes: Sequence[Outcome], maximize: bool = False) -> list[Row]:
    """Return one row for each choice: those that are done first, the best on top."""
    numbers = sorted({one.number for one in outcomes})
    rows = []
    for number in numbers:
        mine = [one for one in outcomes if one.number == number]
        rows.append(
            Row(mine[0].choice, [one.value for one in mine if one.status == "done" and one.value is not None], mine)
        )
    sign = -1 if maximize else 1
    return sorted(rows, key=lambda row: (not row.is_done, sign * row.mean if row.values else 0.0))


def short(value: Any) -> str:
    """Return a value of a setting as tables show it."""
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def table(rows: list[Row], metric: str) -> str:
    """Return a Markdown table of all choices; of several seeds it shows mean, standard deviation, and the range."""
    keys = list(dict.fromkeys(key for row in rows for key in row.choice))
    seeds = max((len(row.outcomes) for row in rows), default=1) > 1
    lines = [f"| {' | '.join([*keys, metric, *(['std', 'lowest to highest'] * seeds), 'runs'])} |"]
    lines.append(f"|{'---|' * (lines[0].count('|') - 1)}")
    for row in rows:
        cells = [short(row.choice[key]) if key in row.choice else "" for key in keys]
        cells.append(f"{row.mean:.4f}" if row.values else "")
        if seeds:
            several = len(row.values) > 1
            cells.append(f"{statistics.stdev(row.values):.4f}" if several else "")
            cells.append(f"{min(row.values):.4f} to {max(row.values):.4f}" if several else "")
        lines.append(" ".join(f"| {' | '.join([*cells, _said(row.outcomes)])} |".split()))
    return "\n".join(lines) + "\n"


def _said(outcomes: list[Outcome]) -> str:
    """Return what became of the runs of a choice."""
    found = []
    for status in ("done", "waiting", "running"):
        if count := sum(one.status == status for one in outcomes):
            found.append(f"{count} {status}" if len(outcomes) > 1 or status != "done" else "done")
    for one in outcomes:
        name = f"seed {one.seed} " if len(outcomes) > 1 else ""
        if one.status == "pruned":
            found.append(f"{name}pruned at step {one.step}: {one.value:.4f}")
        elif one.status == "failed":
            found.append(f"{name}failed: {one.why}".replace("|", "/"))
    return "; ".join(found)


def describe(outcomes: Sequence[Outcome]) -> str:
    """Return how many runs ended how."""
    parts = [
        f"{count} {status}"
        for status in ("done", "pruned", "failed", "waiting")
        if (count := sum(one.status == status for one in outcomes))
    ]
    return f"{counted(len(outcomes), 'run')}: {', '.join(parts)}"


def plot(file: Path, rows: list[Row], metric: str) -> None:
    """Draw parallel coordinates of all choices, and the loss by learning rate or, without one, by the first number.

    Nothing is drawn if no run is done.
    """
    done = [row for row in rows if row.values]
    if not done:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _parallel(left, done, metric)
    keys = list(done[0].choice)
    numeric = [key for key in keys if all(isinstance(row.choice.get(key), (int, float)) for row in done)]
    key = next((key for key in keys if key.rpartition(".")[2] == "lr"), numeric[0] if numeric else None)
    if key is None or key not in numeric:
        right.axis("off")
    else:
        lines: dict[str, list[tuple[float, list[float]]]] = {}
        for row in done:
            others = ", ".join(f"{k.rpartition('.')[2]} {short(v)}" for k, v in row.choice.items() if k != key)
            lines.setdefault(others, []).append((float(row.choice[key]), row.values))
        loss_by_number(right, lines, "learning rate" if key.endswith("lr") else key, metric)
    figure.savefig(file, dpi=120)


def loss_by_number(axes: Any, lines: dict[str, list[tuple[float, list[float]]]], label: str, metric: str) -> None:
    """Draw a curve of means for each name, over numbers; a bar from the lowest to the highest value of several."""
    points = [x for line in lines.values() for x, _ in line]
    if min(points) > 0 and max(points) > 5 * min(points):
        axes.set_xscale("log")
    for name, line in lines.items():
        line = sorted(line)
        means = [statistics.fmean(values) for _, values in line]
        spread = [[mean - min(v) for mean, (_, v) in zip(means, line, strict=True)]]
        spread.append([max(v) - mean for mean, (_, v) in zip(means, line, strict=True)])
        axes.errorbar([x for x, _ in line], means, spread, fmt="o-", capsize=3, label=name or None)
    axes.set_xlabel(label)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if any(lines) and len(lines) <= MOST_LINES:
        axes.legend()


def _parallel(axes: Any, rows: list[Row], metric: str) -> None:
    """Draw a line for each choice through its settings and its mean; the colour is that of the mean."""
    import matplotlib

    keys = list(dict.fromkeys(key for row in rows for key in row.choice))
    means = [row.mean for row in rows]
    columns: list[list[Any]] = [[row.choice.get(key) for row in rows] for key in keys]
    heights, ticks = zip(*(_heights(column) for column in columns), _heights(means, ends=True), strict=True)
    low, high = min(means), max(means)
    colours = matplotlib.colormaps["viridis"]
    for i, mean in sorted(enumerate(means), key=lambda one: -one[1]):
        colour = colours((mean - low) / (high - low) if high > low else 1.0)
        axes.plot(range(len(heights)), [column[i] for column in heights], "-", color=colour, alpha=0.8)
    for x, marks in enumerate(ticks):
        axes.axvline(x, color="0.6", linewidth=0.8)
        for height, text in marks:
            axes.annotate(text, (x, height), xytext=(3, 0), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(heights)), [key.rpartition(".")[2] for key in keys] + [metric])
    axes.set_xlim(-0.2, len(heights) - 0.6)
    axes.set_yticks([])


def _heights(column: list[Any], ends: bool = False) -> tuple[list[float], list[tuple[float, str]]]:
    """Return where the values of a column stand, 0 to 1, and the marks of some of them. Numbers are to scale, or log scale.

    Args:
        ends: mark the lowest and the highest number only.
    """
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in column)
    if not numbers:
        names = sorted({short(v) for v in column})
        place = {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
        return [place[short(v)] for v in column], [(height, name) for name, height in place.items()]
    low, high = min(column), max(column)
    scale = math.log if low > 0 and high > 20 * low else float
    span = scale(high) - scale(low)
    heights = [(scale(v) - scale(low)) / span if span else 0.5 for v in column]
    distinct = sorted(set(zip(heights, column, strict=True)))
    marks = distinct if len(distinct) <= 6 and not ends else [distinct[0], distinct[-1]]
    return heights, [(height, f"{value:.4g}") for height, value in marks]
