"""What a person looks at after a run: the loss curve and a report that is one file."""

from pathlib import Path
from typing import Any

from litmini.runs import read_metrics


def plot_metrics(directory: Path, results: dict[str, Any]) -> None:
    """Draw a run's loss curve, training and held-out, into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(directory / "metrics.csv")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats a target token)", title=directory.name)
    axes.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], label="training", linewidth=1.2)
    held_out = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
    if "val_loss_after" in results:
        held_out = [(0, results["val_loss_before"]), *held_out, (int(rows[-1]["step"]), results["val_loss_after"])]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held-out")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
