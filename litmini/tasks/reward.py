"""Reward models: a score for a conversation, learned from pairs of a chosen and a rejected completion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.checkpoints.classifier import check_scored
from litmini.config.preference import FinetuneRewardConfig, RewardConfig, RewardDataConfig
from litmini.data.preferences import PreferenceSequences, load_preferences
from litmini.tasks.plan import open_base, plan
from litmini.tasks.setup import Data, warn
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class BradleyTerry:
    """-log sigmoid(rc - rr - margin) + center (rc + rr)^2, summed over pairs; rc, rr are the scores of the chosen and the
    rejected completion (arXiv 2203.02155, equation 1; centering: arXiv 2312.09244). The model has a `ScoreHead` of one.
    """

    unit = "pairs"
    names = ("reward_chosen", "reward_rejected", "margin", "accuracy")
    shown = {"accuracy": ".0%", "margin": ".3f"}  # noqa: RUF012

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._sums: Tensor | None = None

    def count(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["lengths"]) // 2

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss."""
        scores, _ = model(**{name: batch[name] for name in ("tokens", "positions", "documents", "labels")})
        chosen, rejected = scores.view(-1, 2).unbind(1)  # (n,) each
        losses = -F.logsigmoid(chosen - rejected - batch["margins"])
        if self.config.center:
            losses = losses + self.config.center * (chosen + rejected).square()
        n = chosen.new_full((), len(chosen))
        found = torch.stack([chosen.sum(), rejected.sum(), (chosen > rejected).sum().float(), n]).detach()
        self._sums = found if self._sums is None else self._sums + found
        return losses.sum()

    def take_sums(self) -> Tensor:
        """Return the sums of metrics since the last call, and begin again."""
        sums, self._sums = self._sums, None
        return torch.zeros(4) if sums is None else sums

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return means over pairs."""
        chosen, rejected, correct, n = sums
        values = (chosen, rejected, chosen - rejected, correct)
        return {name: value / max(1.0, n) for name, value in zip(self.names, values, strict=True)}


@dataclass(frozen=True)
class RewardData(Data):
    """The sequences of a run. `names` are those of a classifier that has one score."""

    names: tuple[str, ...] = ("reward",)


def prepare_data(fabric: Fabric, config: FinetuneRewardConfig, began: datetime | None = None) -> RewardData:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, began)
    check_scored(Path(config.base))
    train, val, _ = load_preferences(config.data, tokenizer, config.seed, "scored")
    plain = {f.name: f.default for f in dataclasses.fields(RewardDataConfig)}
    ineffective = {"data.train_on": config.data.train_on != plain["train_on"]}
    ineffective["lora.dropout, which is off"] = config.lora is not None and config.lora.dropout > 0
    warn(fabric, ineffective)
    data = plan(fabric, config, tokenizer, base, train, val, [], PreferenceSequences)
    return RewardData(**vars(data))
