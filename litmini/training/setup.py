"""What the loop runs on: how far a run is, its data, where it is recorded, and all of it together in a `Setup`."""

from __future__ import annotations

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
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens that went through the model, padding not counted."""
    targets: int = 0
    """Units of the objective: for language modelling, target tokens."""
    seconds: float = 0.0
    """Time in training steps."""
    best_step: int = 0
    """After which step the validation loss was lowest; 0: none was taken."""
    best_val_loss: float | None = None
    """That loss."""
    skipped: int = 0
    """Steps left out because loss or gradients were not finite."""
    skipped_in_row: int = 0
    """Of these, the last ones without a step taken between them."""
    loss_scale: dict[str, float] | None = None
    """State of the gradient scaler of 16-mixed."""

    def advance(self, tokens: int, targets: int, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += tokens
        self.targets += targets
        self.seconds += seconds

    def remember(self, val_loss: float) -> None:
        """Note a validation loss if it is the lowest so far."""
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, val_loss


class TrainingData(Protocol):
    """Micro-batches, each a pure function of the step: so a resumed run continues exactly."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return the micro-batches of a rank in an optimizer step; as many on every rank."""
        ...

    def validation_batches(self, rank: int, world: int) -> Iterable[Batch] | None:
        """Return a rank's share of the validation set; None if there is none."""
        ...

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        """Return where the examples come from (file:line), for each sequence of `batches`."""
        ...


@dataclass(frozen=True)
class BatchList:
    """Training data as a list, for checks that need no data set: for each step its micro-batches, the same on every rank."""

    steps: list[list[Batch]]

    @property
    def total_steps(self) -> int:
        return len(self.steps)

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        return self.steps[step]

    def validation_batches(self, rank: int, world: int) -> None:
        return None

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        return []


class Recorder:
    """What is kept of a run. This one keeps nothing; `litmini.runs.run.Run` is a directory."""

    def log(self, metrics: dict[str, float]) -> None:
        """Keep a row of metrics."""

    def checkpoint(self, progress: Progress) -> Path | None:
        """Save a state that can be resumed from, maybe in the background; return where."""
        return None

    def save_nonfinite_step(
        self, step: int, micro_batches: list[Batch], losses: list[float], locations: Callable[[], list[list[str]]]
    ) -> str:
        """Keep the data of a step whose loss or gradients were not finite; return where. Every rank calls it."""
        return ""

    def wait(self) -> None:
        """Wait until what is saved in the background is on disk."""


@dataclass
class Setup:
    """What a run trains with, complete before the first step."""

    fabric: Fabric
    model: Any
    """As `fabric.setup_module` returned it."""
    optimizer: Any
    """As `fabric.setup_optimizers` returned it."""
    data: TrainingData
    train: TrainConfig
    optim: OptimConfig
    seed: int
    """Dropout in a step is a pure function of this, the step and the rank; what runs between steps changes nothing."""
    progress: Progress
    recorder: Recorder
    throughput: Callable[[list[Batch], float], dict[str, float]] | None = None
    """Further metrics of a step, from a rank's micro-batches and the seconds they took."""
    sample: Callable[[Progress], None] | None = None
    """Generates completions, each `train.sample_every` steps; every rank calls it."""
