"""Preference learning: its data, its objectives, and what it measures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litmini.checkpoints.scores import refuse_scores
from litmini.config.preference import FinetunePreferenceConfig, PreferenceConfig, PreferenceDataConfig
from litmini.data.preferences import PreferenceSequences, load_preferences
from litmini.methods.reference import at_start
from litmini.tasks.plan import open_base, plan
from litmini.tasks.preference_losses import LOSSES, Pairs, kto
from litmini.tasks.setup import Data, warn
from litmini.training.objective import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

INPUTS = ("tokens", "positions", "documents", "labels")
"""What a model takes of a batch."""


class _Completions:
    """What the objectives of pairs and of single completions have in common: log-probabilities, and sums of metrics.

    Args:
        model: with its adapters and a `LogProbHead`, without Fabric's wrapper. Where a batch has no `reference`, that is this
            model as its adapters began.
    """

    names: tuple[str, ...]
    shown: dict[str, str]

    def __init__(self, config: PreferenceConfig, model: nn.Module) -> None:
        self.config, self._model = config, model
        self._sums: Tensor | None = None
        self.names = ("reward_chosen", "reward_rejected", "margin", "logp_chosen", "logp_rejected")
        self.names += ("kl",) if config.has_reference else ()

    def log_probs(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the log-probability of each label, (B, T) fp32, 0 where there is none."""
        found, _ = model(**{name: batch[name] for name in INPUTS})
        return found  # type: ignore[no-any-return]

    @torch.no_grad()
    def reference(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the same of the model at the start; zeros where the loss has no reference."""
        if "reference" in batch:
            return batch["reference"]  # type: ignore[no-any-return]
        if not self.config.has_reference:
            return torch.zeros(batch["slots"].shape, device=batch["slots"].device)
        with at_start(self._model):
            return self.log_probs(model, batch)

    def add(self, sums: list[Tensor], log_probs: Tensor, reference: Tensor, batch: dict[str, Any]) -> None:
        """Add sums of metrics, and for the KL divergence half the square of each token's log-ratio.

        That is estimate k2 of joschu.net/blog/kl-approx.html; the others grow exponentially on completions of the data.
        """
        divergence = (log_probs - reference).detach().square().sum() / 2
        found = torch.stack([*(one.detach().float() for one in sums), divergence, batch["lengths"].sum().float()])
        self._sums = found if self._sums is None else self._sums + found

    def take_sums(self) -> Tensor:
        """Return the sums of metrics since the last call, and begin again."""
        sums, self._sums = self._sums, None
        return torch.zeros(self.n_sums, device=next(self._model.parameters()).device) if sums is None else sums

    n_sums: int


class PairPreference(_Completions):
    """A loss of `LOSSES`, summed over pairs. The model has a `LogProbHead`."""

    n_sums = 8
    unit = "pairs"

    def __init__(self, config: PreferenceConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.names += ("accuracy",)
        self.shown = {"accuracy": ".0%", "margin": ".3f"}

    def count(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["lengths"]) // 2

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss."""
        reference = self.reference(model, batch)  # before the activations of the other forward pass are in memory
        log_probs = self.log_probs(model, batch)
        each, start = (document_sums(one, batch).unflatten(0, (-1, 2)) for one in (log_probs, reference))  # (n, 2)
        tokens = batch["lengths"].unflatten(0, (-1, 2)).float()
        pairs = Pairs(each[:, 0], each[:, 1], start[:, 0], start[:, 1], tokens[:, 0], tokens[:, 1])
        losses = LOSSES[self.config.loss](pairs, self.config)
        if self.config.sft_weight:
            losses = losses - self.config.sft_weight * pairs.chosen_mean
        rewards = self._rewards(pairs)
        sums = [*(one.sum() for one in rewards), (rewards[0] > rewards[1]).sum()]
        counts = tokens.new_full((), len(tokens))
        self.add([*sums, pairs.chosen.sum(), pairs.rejected.sum(), counts], log_probs, reference, batch)
        return losses.sum()

    def _rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return beta times the log-ratios; without a reference, the log-probabilities as the loss takes them."""
        if self.config.loss in ("simpo", "orpo"):
            return self.config.beta * pairs.chosen_mean, self.config.beta * pairs.rejected_mean
        return self.config.beta * pairs.chosen_ratio, self.config.beta * pairs.rejected_ratio

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return means over pairs; the KL divergence is a mean over supervised tokens."""
        chosen, rejected, correct, logp_chosen, logp_rejected, n, divergence, tokens = sums
        names = ("reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected")
        values = (chosen, rejected, chosen - rejected, correct, logp_chosen, logp_rejected)
        found = {name: value / max(1.0, n) for name, value in zip(names, values, strict=True)}
        return found | ({"kl": divergence / max(1.0, tokens)} if self.config.has_reference else {})


class SinglePreference(_Completions):
    """KTO's loss, summed over completions.

    The batches of a step are first those of mismatched completions, all of them, which give its z, then those of its
    completions.
    """

    n_sums = 9
    unit = "completions"

    def __init__(self, config: PreferenceConfig, model: nn.Module, fabric: Fabric | None = None) -> None:
        """
        Args:
            fabric: of all ranks, whose mismatched completions z is the mean of; None: there is one.
        """
        super().__init__(config, model)
        self._fabric = fabric
        self._mismatched: list[Tensor] = []
        self._z: Tensor | None = None
        self.names += ("z",)
        self.shown = {"margin": ".3f", "z": ".3f"}

    def count(self, batch: Batch) -> int:
        """Return the number of completions."""
        return 0 if "mismatched" in batch else len(batch["lengths"])

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss; of mismatched completions an exact zero."""
        if "mismatched" in batch:
            return self._add_mismatched(model, batch)
        reference = self.reference(model, batch)
        log_probs = self.log_probs(model, batch)
        each, start = document_sums(log_probs, batch), document_sums(reference, batch)
        z, desirable = self._estimate(each), batch["desirable"]
        losses = kto(each - start, z, desirable, self.config)
        if self.config.sft_weight:
            losses = losses - self.config.sft_weight * torch.where(desirable, each / batch["lengths"], 0.0)
        rewards = self.config.beta * (each - start)
        both = [one.where(kind, 0.0).sum() for one in (rewards, each) for kind in (desirable, ~desirable)]
        counts = [desirable.sum(), (~desirable).sum()]
        self.add([*both, *counts, z * len(each)], log_probs, reference, batch)
        return losses.sum()

    @torch.no_grad()
    def _add_mismatched(self, model: Any, batch: dict[str, Any]) -> Tensor:
        if self._z is not None:  # the first of another step
            self._z, self._mismatched = None, []
        reference, log_probs = self.reference(model, batch), self.log_probs(model, batch)
        ratio = document_sums(log_probs - reference, batch)
        self._mismatched.append(torch.stack([ratio.sum(), ratio.new_full((), len(ratio))]))
        return torch.zeros((), device=ratio.device, requires_grad=True)

    def _estimate(self, like: Tensor) -> Tensor:
        """Return z of this step: the mean log-ratio of mismatched completions of all ranks, at least 0."""
        if not self._mismatched and self._z is None:  # a step to see how much memory it takes
            return like.new_zeros(())
        if self._z is None:
            total: Any = sum(self._mismatched)
            if self._fabric is not None:
                total = self._fabric.all_reduce(total, reduce_op="sum")
            self._z = (total[0] / total[1].clamp(min=1)).clamp(min=0).detach()
        return self._z

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return means over desirable (chosen) and other (rejected) completions; what there is none of has no value."""
        chosen, rejected, logp_chosen, logp_rejected, n_chosen, n_rejected, z, divergence, tokens = sums
        found: dict[str, float] = {}
        if n_chosen:
            found |= {"reward_chosen": chosen / n_chosen, "logp_chosen": logp_chosen / n_chosen}
        if n_rejected:
            found |= {"reward_rejected": rejected / n_rejected, "logp_rejected": logp_rejected / n_rejected}
        if n_chosen and n_rejected:
            found["margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found | {"kl": divergence / max(1.0, tokens), "z": z / max(1.0, n_chosen + n_rejected)}


def document_sums(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the sum of values (B, T) over each document of a batch of `PreferenceSequences`, (n,)."""
    n = len(batch["lengths"])
    return values.new_zeros(n + 1).index_add(0, batch["slots"].flatten(), values.flatten())[:n]


@dataclass(frozen=True)
class PreferenceData(Data):
    """The sequences of a run; of single completions, each step begins with the mismatched ones."""

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        numbers = self._numbers(step)
        return [*self._mismatched(self.train, numbers, rank, world), *super().batches(step, rank, world)]

    def validation_batches(self, rank: int, world: int) -> Any:
        if not self.val:
            return None
        batches = super().validation_batches(rank, world) or ()
        return (b for part in (self._mismatched(self.val, range(len(self.val)), rank, world), batches) for b in part)

    def _mismatched(self, sequences: Any, numbers: range, rank: int, world: int) -> Any:
        mismatched = sequences.mismatched
        return () if mismatched is None else mismatched.batches(numbers, self.micro_batch_size, rank, world)

    def locations(self, step: int, rank: int, world: int) -> list[list[str]]:
        found = super().locations(step, rank, world)
        return found * 2 if self.train.mismatched is not None else found  # type: ignore[attr-defined]


def prepare_data(fabric: Fabric, config: FinetunePreferenceConfig, began: datetime | None = None) -> PreferenceData:
    """Download the checkpoint if it is missing, tokenise the data, and plan the run.

    Raises:
        UserError: the sequences are longer than the model's context, or the data cannot be read.
    """
    tokenizer, base = open_base(fabric, config, began)
    refuse_scores(config.base, config.starts_from)
    kind = "single" if config.preference.loss == "kto" else "pairs"
    train, val, chosen = load_preferences(config.data, tokenizer, config.seed, kind)
    plain = {f.name: f.default for f in dataclasses.fields(PreferenceDataConfig)}
    ineffective = {"data.train_on": config.data.train_on != plain["train_on"], **config.preference.ineffective()}
    ineffective["lora.dropout, which is off"] = config.lora is not None and config.lora.dropout > 0
    warn(fabric, ineffective)
    data = plan(fabric, config, tokenizer, base, train, val, chosen, PreferenceSequences)
    return PreferenceData(**vars(data))


def make_objective(
    config: FinetunePreferenceConfig, model: nn.Module, fabric: Fabric
) -> PairPreference | SinglePreference:
    """Return the objective of `preference.loss`."""
    if config.preference.loss == "kto":
        return SinglePreference(config.preference, model, fabric)
    return PairPreference(config.preference, model)
