"""Objectives: an objective turns a micro-batch into a summed loss, and counts the units of that sum.

The loop divides by the units of the whole optimizer step over all ranks. So no objective depends on the size of a micro-batch
or the number of ranks if `loss` is a sum; a mean of means, or a term for a micro-batch as a whole, depends on them.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from litmini.ops.cross_entropy import IGNORE

Batch = dict[str, Tensor]


class Objective(Protocol):
    """What the loop and its record need of an objective."""

    unit: str
    """Name of the units in the manifest, in the plural."""

    def count(self, batch: Batch) -> int:
        """Return the units of a micro-batch (target tokens, pairs, sequences), from tensors on the host."""
        ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss summed over these units, fp32, 0-d; an exact zero with a graph if there are none.

        Args:
            model: as Fabric wrapped it; in training or evaluation mode.
            batch: on the model's device.
        """
        ...


@runtime_checkable
class Measuring(Protocol):
    """What an objective has as well that reports more than its loss. Its sums travel with those of the loss."""

    names: tuple[str, ...]
    """Names of its metrics: columns of metrics.csv, and with "val_" before them those of validation."""
    shown: dict[str, str]
    """Name -> format, of those that the progress line shows."""

    def take_sums(self) -> Tensor:
        """Return sums over the micro-batches since the last call, (k,) fp32 on the device, and begin again with zeros."""
        ...

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return metrics by name, made of sums over all micro-batches and ranks; without those that have no value."""
        ...


class LanguageModeling:
    """Cross entropy of the next token, summed over the target tokens.

    In training, mixture-of-experts models add their load-balancing loss to it, weighted by the number of targets. That loss
    belongs to this objective: with a head that returns anything but a summed loss, their files leave it out.
    """

    unit = "target_tokens"

    def count(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the summed cross entropy; the model's head computes it in chunks."""
        loss, _ = model(**batch)
        return loss  # type: ignore[no-any-return]


def count_tokens(batch: Batch) -> int:
    """Return the number of tokens of a micro-batch without padding; a batch without document ids has no padding."""
    return int((batch["documents"] > 0).sum()) if "documents" in batch else torch.numel(batch["tokens"])
