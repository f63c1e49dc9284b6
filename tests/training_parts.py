"""A `Setup` for tests of the loop: batches from a list, a constant learning rate, metrics kept in memory."""

from collections.abc import Callable
from typing import Any

from litmini.config.training import OptimConfig, TrainConfig
from litmini.evaluation.verify import BatchList
from litmini.training.objective import Batch
from litmini.training.setup import Progress, Recorder, Setup


class Listening(Recorder):
    """Keeps the rows of metrics; calls `log` with each, and `checkpoint` where the loop saves."""

    def __init__(self, log: Callable | None = None, checkpoint: Callable | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        self._log, self._checkpoint = log, checkpoint

    def log(self, metrics: dict[str, float]) -> None:
        self.rows.append(dict(metrics))
        if self._log:
            self._log(metrics)

    def checkpoint(self, progress: Progress) -> Any:
        return self._checkpoint(progress) if self._checkpoint else None


def make_setup(
    fabric: Any,
    model: Any,
    optimizer: Any,
    steps: list[list[Batch]],
    rate: float = 1e-3,
    train: TrainConfig | None = None,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
    seed: int = 0,
    max_grad_norm: float | None = 1.0,
    optim: OptimConfig | None = None,
) -> Setup:
    """`model` and `optimizer` are Fabric's."""
    optim = optim or OptimConfig(lr=rate, schedule="constant", warmup_steps=0, max_grad_norm=max_grad_norm)
    data, train = BatchList(steps), train or TrainConfig()
    return Setup(fabric, model, optimizer, data, train, optim, seed, progress or Progress(), recorder or Listening())
