"""Plot the loss curves of several runs in one picture.

python scripts/plot_runs.py out/compare-swiglu out/compare-gelu --out_file out/compare.png
"""

from dataclasses import dataclass

from litmini.cli import command
from litmini.errors import check


@dataclass
class PlotConfig:
    """Settings of plot_runs.py."""

    runs: list[str]
    """Run directories; positional arguments."""
    out_file: str = "out/runs.png"
    """File of the picture: .png, .svg or .pdf."""
    smooth: float = 0.95
    """Weight of the running mean of the training loss at each step; 0: no smoothing."""
    by: str = "step"
    """The x axis: step or tokens."""

    def __post_init__(self) -> None:
        check("", self, runs=bool(self.runs), smooth=0 <= self.smooth < 1, by=self.by in ("step", "tokens"))


def main(config: PlotConfig) -> None:
    from pathlib import Path

    from litmini.runs.plots import plot_runs

    for name, loss in plot_runs(
        [Path(run) for run in config.runs], Path(config.out_file), config.smooth, config.by
    ).items():
        print(f"{name}: last validation loss {loss:.4f}" if loss is not None else f"{name}: no validation loss")
    print(f"picture: {config.out_file}")


if __name__ == "__main__":
    command(main, PlotConfig, __doc__, positional=("runs...",))
