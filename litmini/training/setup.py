"""The inputs of the training loop: progress, data, recorder, and a `Setup` that holds them with model and optimizer; and how
batches reach the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from litmini.config.training import OptimConfig, TrainConfig
from litmini.ops.attention import Documents
from litmini.ops.cross_entropy import Targets
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


@dataclass(frozen=True)
class SizedBatches:
    """Batches, and their number for a progress bar."""

    batches: Iterator[Batch]
    count: int

    def __iter__(self) -> Iterator[Batch]:
        return self.batches

    def __len__(self) -> int:
        return self.count


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


def on_device(batch: Batch, device: torch.device, attention: str | None = None) -> dict[str, Any]:
    """Return a batch of the host on a device. On a GPU its documents and labels have their bounds and positions with them.

    Copies do not block the host. On a CPU the batch stays as it is.

    Args:
        attention: the kernel to use, see `litmini/ops/attention.py`; None: by the rules.
    """
    if device.type == "cpu" and attention is None:
        return batch

    def move(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    # without documents, each sequence is one
    ids = batch["documents"] if "documents" in batch else torch.ones_like(batch["tokens"])
    ready: dict[str, Any] = {
        name: move(tensor) for name, tensor in batch.items() if name not in ("documents", "labels")
    }
    ready["documents"] = Documents.of(ids, attention).map(move)
    if "labels" in batch:
        ready["labels"] = Targets.of(batch["labels"], device).map(move)
    return ready


class Feed:
    """The micro-batches of each step of this rank, on the host and on the device.

    On a GPU a thread makes those of the next step while this one runs. They are a pure function of the step, so a resumed run
    gets the same.
    """

    def __init__(
        self,
        data: TrainingData,
        device: torch.device,
        rank: int,
        world: int,
        attention: str | None = None,
        prefetch: bool | None = None,
    ) -> None:
        """
        Args:
            prefetch: whether a thread makes the next step's; None: on a GPU.
        """
        self._data, self._device, self._attention = data, device, attention
        self._rank, self._world = rank, world
        self._thread = (
            ThreadPoolExecutor(1, "batches") if prefetch or (prefetch is None and device.type == "cuda") else None
        )
        self._next: tuple[int, Future[list[tuple[Batch, dict[str, Any]]]]] | None = None

    def take(self, step: int) -> list[tuple[Batch, dict[str, Any]]]:
        """Return the micro-batches of a step, each as it is on the host and on the device."""
        if self._thread is None:
            return self._make(step)
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._make, step)
        batches = self._next[1].result()
        self._next = None
        if step + 1 < self._data.total_steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batches

    def _make(self, step: int) -> list[tuple[Batch, dict[str, Any]]]:
        batches = self._data.batches(step, self._rank, self._world)
        return [(batch, on_device(batch, self._device, self._attention)) for batch in batches]


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
    attention: str | None = None
    """The attention kernel that the user asked for; None: by the rules of `litmini/ops/attention.py`."""
    prefetch: bool | None = None
    """Whether a thread makes the micro-batches of the next step while this one runs; None: on a GPU. False where they come
    from the model that is trained."""
