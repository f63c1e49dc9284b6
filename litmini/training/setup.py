"""The inputs of the training loop: progress, data, recorder, and a `Setup` that holds them with model and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from litmini.config.training import OptimConfig, TrainConfig
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Progress:
    """The progress of a run, saved in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on, without padding."""
    targets: int = 0
    """Units of the objective; for language modelling, target tokens."""
    seconds: float = 0.0
    """Seconds in training steps."""
    best_step: int = 0
    """Step with the lowest validation loss; 0: none was measured."""
    best_val_loss: float | None = None
    """Lowest validation loss."""
    not_better: int = 0
    """Consecutive evaluations up to now without a lower validation loss."""
    skipped: int = 0
    """Steps skipped because loss or gradients were not finite."""
    skipped_in_row: int = 0
    """Consecutive skipped steps up to now."""
    loss_scale: dict[str, float] | None = None
    """State of the gradient scaler of 16-mixed."""

    def advance(self, tokens: int, targets: int, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += tokens
        self.targets += targets
        self.seconds += seconds

    def remember(self, val_loss: float) -> None:
        """Record a validation loss if it is the lowest so far; NaN never is."""
        self.not_better += 1
        if val_loss < (math.inf if self.best_val_loss is None else self.best_val_loss):
            self.best_step, self.best_val_loss, self.not_better = self.step, val_loss, 0


class TrainingData(Protocol):
    """Micro-batches of a run. Each is a pure function of the step, so a resumed run continues exactly."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return the micro-batches of a rank in an optimizer step; the number is the same on every rank."""
        ...

    def validation_batches(self, rank: int, world: int) -> Iterable[Batch] | None:
        """Return the validation batches of a rank; None if there is no validation set."""
        ...

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        """Return where the examples come from (file:line), for each sequence of `batches`."""
        ...


class Recorder:
    """The record of a run. This one keeps nothing; `litmini.runs.run.Run` writes a directory."""

    def log(self, metrics: dict[str, float]) -> None:
        """Keep a row of metrics."""

    def checkpoint(self, progress: Progress) -> Path | None:
        """Save the state to resume from, possibly in the background; return its path."""
        return None

    def save_nonfinite_step(
        self, step: int, micro_batches: list[Batch], losses: list[float], locations: Callable[[], list[list[str]]]
    ) -> str:
        """Keep the data of a non-finite step; return its location. Every rank calls this."""
        return ""

    def wait(self) -> None:
        """Wait until all checkpoints are on disk."""


@dataclass
class Setup:
    """Everything that a run trains with."""

    fabric: Fabric
    model: Any
    """The model, as `fabric.setup_module` returned it."""
    optimizer: Any
    """The optimizer, as `fabric.setup_optimizers` returned it."""
    data: TrainingData
    train: TrainConfig
    optim: OptimConfig
    seed: int
    """Seed of dropout, whose masks are a pure function of seed, step and rank."""
    progress: Progress
    recorder: Recorder
    throughput: Callable[[list[Batch], float], dict[str, float]] | None = None
    """(micro-batches of a rank, their seconds) -> further metrics of a step."""
    sample: Callable[[Progress], None] | None = None
    """Generates completions every `train.sample_every` steps; every rank calls it."""
