"""Several runs in one picture."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from litmini.errors import UserError
from litmini.files import existing_file, read_json
from litmini.runs.run import read_metrics


def plot_runs(directories: list[Path], file: Path, smooth: float, by: str) -> dict[str, float | None]:
    """Draw the training loss (thin) and validation loss (dots) of several runs into one picture.

    Args:
        smooth: share of the running mean that each training step keeps.
        by: the column on the x axis, "step" or "tokens".

    Returns:
        Run -> its last validation loss.

    Raises:
        UserError: a directory holds no run, or the picture's kind is not known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=by, ylabel="loss (nats a target token)")
    last: dict[str, float | None] = {}
    for number, directory in enumerate(directories):
        rows = read_metrics(existing_file(str(directory / "metrics.csv"), "metrics of a run"))
        mean, curve = 0.0, []
        for count, row in enumerate(rows, 1):
            mean = smooth * mean + (1 - smooth) * float(row["loss"])
            curve.append(mean / (1 - smooth**count))  # as Adam corrects its averages
        axes.plot([int(row[by]) for row in rows], curve, f"C{number}", linewidth=0.8, alpha=0.6)
        held_out = [(int(row[by]), float(row["val_loss"])) for row in rows if row["val_loss"]]
        results = read_json(directory / "manifest.json").get("results", {})
        if "val_loss_after" in results:
            held_out.append((int(rows[-1][by]), results["val_loss_after"]))
        last[str(directory)] = held_out[-1][1] if held_out else None
        axes.plot(*zip(*held_out or [(0, float("nan"))], strict=True), f"C{number}o-", label=directory.name)
    axes.grid(alpha=0.3)
    axes.legend(title="validation; thin: training")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return last


BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#64748b"


def plot_metrics(directory: Path, results: dict[str, Any]) -> None:
    """Draw a run's loss curve, training and validation, into loss.png."""
    rows = read_metrics(directory / "metrics.csv")
    _figure(lambda axes: _draw_loss(axes, rows, results, directory.name), (7, 4)).savefig(
        directory / "loss.png", dpi=120
    )


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
    """A chart as an <svg> element: text stays text, and nothing in it is from outside."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "litmini"}):
        _figure(draw, size).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_loss(axes: Any, rows: list[dict[str, str]], results: dict[str, Any], title: str) -> None:
    axes.set(xlabel="optimizer step", ylabel="loss (nats a target token)", title=title)
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], BLUE, label="training", linewidth=1.2)
    held_out = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    if "val_loss_after" in results:
        last = int(rows[-1]["step"])
        held_out = [
            (0, results["val_loss_before"]),
            *(p for p in held_out if p[0] < last),
            (last, results["val_loss_after"]),
        ]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=ORANGE, label="validation", markersize=4)
    _from_zero(axes)
    axes.legend(frameon=False)


def _draw_line(axes: Any, rows: list[dict[str, str]], key: str, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.plot([int(r["step"]) for r in rows], [float(r[key]) for r in rows], BLUE, linewidth=1.2)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    _from_zero(axes)


def _from_zero(axes: Any) -> None:
    """Zero and the highest value are seen, and steps are whole numbers."""
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_lengths(axes: Any, lengths: np.ndarray, row_length: int) -> None:
    axes.set_title(f"tokens of an example, rows of {row_length:,}", fontsize=10)
    axes.hist(lengths, bins=min(40, max(5, int(np.ptp(lengths)))), color=GREY)
