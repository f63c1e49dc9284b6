"""What a run of policy optimization shows at its end: the curve of rewards, completions during training, and what failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litmini.errors import counted
from litmini.runs.run import read_metrics, read_samples

if TYPE_CHECKING:
    from litmini.tasks.grpo_rewards import Rewards
    from litmini.tasks.setup import TrainingSetup

SHOWN = 12  # steps whose completions the report shows


def plot_rewards(setup: TrainingSetup) -> None:
    """Draw the rewards of training and of validation prompts into reward.png."""
    if not setup.fabric.is_global_zero:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = setup.recorder
    rows, results = read_metrics(run.directory / "metrics.csv"), run.results
    points = {
        key: [(int(row["step"]), float(row[key])) for row in rows if row[key]] for key in ("reward", "val_reward")
    }
    if "reward_before" in results:
        points["val_reward"].insert(0, (0, results["reward_before"]))
    if "reward_after" in results:
        points["val_reward"].append((setup.progress.step, results["reward_after"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="reward", title=run.directory.name)
    axes.grid(alpha=0.3)
    for key, label, style in (("reward", "sampled in training", "-"), ("val_reward", "validation, greedy", "o-")):
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.legend(frameon=False)
    file = run.directory / "reward.png"
    file.unlink(missing_ok=True)  # a new file: never through a link
    figure.savefig(file, dpi=120)


def completion_tables(setup: TrainingSetup) -> dict[str, dict[str, Any]]:
    """Return tables for the report: for some steps a prompt, with its best and its worst completion."""
    rows = [row for row in read_samples(setup.recorder.directory) if "advantage" in row]
    steps = sorted({row["step"] for row in rows})
    some = {steps[i * (len(steps) - 1) // max(1, SHOWN - 1)] for i in range(SHOWN)} if steps else set()
    tables: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["step"] in some):
        table = tables.setdefault(f"completions in step {row['step']}", {"prompt": row["prompt"]})
        which = "best" if len(table) == 1 else "worst"
        table[f"{which}, reward {row['reward']:.3g}, advantage {row['advantage']:.2f}"] = row["prediction"]
    return tables


def describe_rewards(setup: TrainingSetup, rewards: Rewards) -> str:
    """Return a text that names the rewards that failed, and warns of steps from which nothing could be learned."""
    lines = [
        f"warning: reward {name} failed for {counted(count, 'completion')}, left out; the first: {first}"
        for name, (count, first) in rewards.failures.items()
    ]
    if setup.fabric.is_global_zero:
        rows = [row for row in read_metrics(setup.recorder.directory / "metrics.csv") if row["equal_groups"]]
        empty = sum(float(row["equal_groups"]) == 1 for row in rows)
        if empty * 4 > len(rows):
            lines.append(
                f"warning: in {empty} of {counted(len(rows), 'step')} the completions to each prompt had equal rewards: "
                f"nothing was learned in them."
            )
        different = [float(row["logp_difference"]) for row in rows if row["logp_difference"]]
        if different and max(different) > 0.1:
            lines.append(
                f"warning: log-probabilities of sampler and trainer differ by up to {max(different):.2g} on average over a "
                f"step: --precision 32-true or bf16-mixed brings them together."
            )
    return "".join(f"{line}\n" for line in lines)
