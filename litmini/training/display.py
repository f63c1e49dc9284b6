"""What a run shows while it trains: a progress bar or lines, validation losses, and the progress of an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from litmini.training.objective import Batch
from litmini.training.setup import Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TRAINING = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # fits into 80 columns
LINES = 20  # of a whole run, without a terminal


def say(fabric: Fabric, text: str) -> None:
    """Print a text in the first process at once, above the progress bars if there are any."""
    if fabric.is_global_zero:
        tqdm.write(text)
        sys.stdout.flush()  # a log file is watched, too


def validating(fabric: Fabric, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield validation batches, with a progress bar that vanishes at the end."""
    yield from tqdm(batches, "validating", leave=False, unit="batch", disable=_hidden(fabric), dynamic_ncols=True)


def _hidden(fabric: Fabric) -> bool | None:
    """Return what tqdm's `disable` takes; None: if stderr is not a terminal."""
    return None if fabric.is_global_zero else True


class Display:
    """The progress of the training steps.

    Args:
        total: steps of the run.
        step: those that are done.
    """

    def __init__(self, fabric: Fabric, total: int, step: int) -> None:
        self.fabric, self.val_loss = fabric, ""
        self.bar = tqdm(
            total=total,
            initial=step,
            desc="training",
            disable=_hidden(fabric),
            dynamic_ncols=True,
            bar_format=TRAINING,
        )

    def show(self, metrics: dict[str, float], progress: Progress, more: dict[str, str]) -> None:
        """Show a step: in the bar or, without a terminal, in a line for each twentieth of the run; and a validation loss.

        Args:
            more: the objective's metrics to show, and their formats.
        """
        step, total = progress.step, self.bar.total
        if "val_loss" in metrics:
            self.val_loss = f"val {metrics['val_loss']:.3f}, "
            lowest = "the lowest so far"
            if progress.best_step != step and progress.best_val_loss is not None:
                lowest = f"the lowest was {progress.best_val_loss:.4f}, of step {progress.best_step}"
            say(self.fabric, f"step {step} of {total}: validation loss {metrics['val_loss']:.4f}, {lowest}")
        speed = f"{metrics['tokens_per_second']:,.0f} tok/s"
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {self.val_loss}{speed}", refresh=False)
        self.bar.update()
        if self.bar.disable and step % max(1, total // LINES) == 0:
            remaining = tqdm.format_interval(progress.seconds / step * (total - step))
            say(self.fabric, f"step {step} of {total}: {_format_metrics(metrics, more)}, {remaining} left")


def _format_metrics(metrics: dict[str, float], more: dict[str, str]) -> str:
    """Return metrics as a line of text."""
    measured = "".join(f"{name} {metrics[name]:{form}}, " for name, form in more.items() if name in metrics)
    words = f"loss {metrics['loss']:.3f}, {measured}lr {metrics['lr']:.1e}, norm {metrics['grad_norm']:.2f}, "
    words += f"{metrics['tokens_per_second']:,.0f} tok/s"
    if "mfu" in metrics:
        words += f", MFU {metrics['mfu']:.0%}, {metrics['memory_mib']:,.0f} MiB"
    return words
