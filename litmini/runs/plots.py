"""Draws the loss curves of several runs into one picture."""

from pathlib import Path

from litmini.errors import UserError
from litmini.files import existing_file, read_json
from litmini.runs.run import read_metrics


def plot_runs(directories: list[Path], file: Path, smooth: float, by: str) -> dict[str, float | None]:
    """Draw the training loss (thin) and validation loss (dots) of several runs into one picture.

    Args:
        smooth: weight of the running mean at each training step, 0 to 1.
        by: the column on the x axis, "step" or "tokens".

    Returns:
        Run -> its last validation loss.

    Raises:
        UserError: a directory holds no run, or the file type of the picture is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=by, ylabel="loss (nats per target token)")
    last: dict[str, float | None] = {}
    for number, directory in enumerate(directories):
        rows = read_metrics(existing_file(str(directory / "metrics.csv"), "metrics of a run"))
        mean, curve = 0.0, []
        for count, row in enumerate(rows, 1):
            mean = smooth * mean + (1 - smooth) * float(row["loss"])
            curve.append(mean / (1 - smooth**count))  # bias correction, as in Adam
        axes.plot([int(row[by]) for row in rows], curve, f"C{number}", linewidth=0.8, alpha=0.6)
        validation = [(int(row[by]), float(row["val_loss"])) for row in rows if row["val_loss"]]
        results = read_json(directory / "manifest.json").get("results", {})
        if "val_loss_after" in results:
            validation.append((int(rows[-1][by]), results["val_loss_after"]))
        last[str(directory)] = validation[-1][1] if validation else None
        axes.plot(*zip(*validation or [(0, float("nan"))], strict=True), f"C{number}o-", label=directory.name)
    axes.grid(alpha=0.3)
    axes.legend(title="validation; thin: training")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return last
