"""Compare methods on the same data and steps, each with its own sweep of learning rates.

    python scripts/examples/make_comparison_data.py
    python scripts/compare_methods.py --config config_hub/compare/compare.yaml

Writes OUT_DIR/comparison.md, .json and .png. If you repeat the command, it continues with the missing runs.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litmini.cli import command
from litmini.errors import UserError

METHODS = {  # name: script and its settings
    "lora": ("finetune_lora.py", []),
    "rslora": ("finetune_lora.py", ["--lora.rank_stabilized", "true"]),
    "dora": ("finetune_dora.py", []),
    "qlora": ("finetune_qlora.py", []),
    "qdora": ("finetune_dora.py", ["--quantize.bits", "4"]),
    "pissa": ("finetune_lora.py", ["--lora.init", "pissa"]),
    "full": ("finetune_full.py", []),
}


@dataclass
class CompareConfig:
    """Settings of compare_methods.py."""

    settings: str
    """YAML file with the settings of all runs."""
    out_dir: str
    """Directory of the runs and the comparison."""
    lrs: dict[str, list[float]] = field(default_factory=dict)
    """Method -> its learning rates. The methods are lora, rslora, dora, qlora, qdora, pissa and full."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.lrs.keys() - METHODS.keys()):
            raise UserError(f"unknown method {', '.join(unknown)}; the methods are: {', '.join(METHODS)}.")
        if not self.lrs or not all(self.lrs.values()):
            raise UserError("lrs is empty; expected methods and their learning rates, such as '{lora: [1e-3]}'.")


def main(config: CompareConfig) -> None:
    from litmini.runs.sweep import Outcome, is_finished, read_outcome, run_all, starting_words

    directory = Path(config.out_dir)
    given: list[tuple[Outcome, list[str]]] = []
    for method, rates in config.lrs.items():
        for rate in rates:
            outcome = Outcome(f"{method}-{rate:g}", len(given), {"method": method, "optim.lr": rate}, None)
            out = directory / outcome.name
            if is_finished(out):
                read_outcome(outcome, out, "val_loss")
            words = ["--config", config.settings, "--out_dir", str(out), "--optim.lr", str(rate), *METHODS[method][1]]
            given.append((outcome, starting_words(words, out)))
    for outcome in run_all(given, directory, "val_loss", [{}], train):
        if outcome.status == "failed":
            raise UserError(
                f"{outcome.name} failed (see above, {outcome.why}); repeat the command to continue from there."
            )
    rows = [{"method": o.choice["method"], "lr": o.choice["optim.lr"], **read(directory / o.name)} for o, _ in given]
    best = [min((r for r in rows if r["method"] == m), key=lambda r: r["val_loss_after"]) for m in config.lrs]
    print(table := markdown(best, rows))
    (directory / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    (directory / "comparison.md").write_text(table)
    plot(directory / "comparison.png", rows)


class Ended:
    """A run that has ended."""

    def __init__(self, status: int) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status

    def terminate(self) -> None:
        pass


def train(outcome: Any, words: list[str], environment: dict[str, str]) -> Ended:
    """Run a method to its end; what it prints is shown."""
    print(f"--- {outcome.choice['method']} at {outcome.choice['optim.lr']:g}", flush=True)
    script = Path(__file__).parent / METHODS[outcome.choice["method"]][0]
    return Ended(subprocess.run([sys.executable, str(script), *words]).returncode)


def read(out: Path) -> dict[str, Any]:
    """Return the results of a run; the time of a step is the median, which few slow steps do not change."""
    import csv

    results = json.loads((out / "manifest.json").read_text())["results"]
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [0, *(int(row["tokens"]) for row in rows)]
    seconds = [(b - a) / float(r["tokens_per_second"]) for a, b, r in zip(tokens, tokens[1:], rows, strict=False)]
    kept = ("val_loss_before", "val_loss_after", "trained_parameters", "training_seconds", "peak_memory_mib")
    return {**{name: results[name] for name in kept}, "seconds_per_step": statistics.median(seconds)}


def markdown(best: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return a table of the best learning rate of each method, with the losses at the others."""
    lines = [
        "| method | best lr | validation loss | at the other rates | trained parameters | seconds a step | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in best:
        others = [f"{r['val_loss_after']:.4f} ({r['lr']:g})" for r in rows if r["method"] == b["method"] and r is not b]
        lines.append(
            f"| {b['method']} | {b['lr']:g} | {b['val_loss_after']:.4f} | "
            f"{', '.join(others)} | "
            f"{b['trained_parameters']:,} | {b['seconds_per_step']:.2f} | {b['peak_memory_mib']:,.0f} |"
        )
    lines.append(f"\nBefore training: {best[0]['val_loss_before']:.4f}.")
    return "\n".join(lines) + "\n"


def plot(file: Path, rows: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from litmini.runs.sweep_report import loss_by_number

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log")
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        lines.setdefault(row["method"], []).append((row["lr"], [row["val_loss_after"]]))
    loss_by_number(axes, lines, "learning rate", "validation loss (nats a target token)")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    command(main, CompareConfig, __doc__)
