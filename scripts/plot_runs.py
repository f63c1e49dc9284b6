"""Draw the loss curves of several runs into one picture.

python scripts/plot_runs.py out/compare-swiglu out/compare-gelu --out_file out/compare.png
"""

from dataclasses import dataclass

from litmini.cli import command
from litmini.errors import check


@dataclass
class PlotConfig:
    """Settings of plot_runs.py."""

    runs: list[str]
    """Run directories; words that are no settings."""
    out_file: str = "out/runs.png"
    """The picture, .png, .svg or .pdf."""
    smooth: float = 0.95
    """How much of the smoothed training loss each step keeps: 0 draws it as it is."""
    by: str = "step"
    """What is on the x axis: step or tokens."""

    def __post_init__(self) -> None:
        check("", self, runs=bool(self.runs), smooth=0 <= self.smooth < 1, by=self.by in ("step", "tokens"))


def main(config: PlotConfig) -> None:
    from pathlib import Path

    from litmini.runs.plots import plot_runs

    for name, loss in plot_runs(
        [Path(run) for run in config.runs], Path(config.out_file), config.smooth, config.by
    ).items():
        print(f"{name}: last validation loss {loss:.4f}" if loss is not None else f"{name}: no validation loss")
    print(f"drawn: {config.out_file}")


if __name__ == "__main__":
    command(main, PlotConfig, __doc__, positional=("runs...",))
