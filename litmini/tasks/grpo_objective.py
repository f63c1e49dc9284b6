"""The objective of policy optimization: the clipped loss over sampled completions, and what is measured on them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from litmini.config.grpo import GrpoConfig
from litmini.ops.cross_entropy import IGNORE, Targets
from litmini.tasks.grpo_completions import Completion
from litmini.tasks.grpo_losses import policy_loss, units
from litmini.tasks.preference import INPUTS
from litmini.training.objective import Batch

OF_TOKENS = ("ratio", "logp_difference", "clipped", "kl")
ON_TOKENS = ("mask", "ratio", "difference", "clipped", "divergence")
"""What is summed over the tokens that are trained on."""
ON_COMPLETIONS = (
    "completions",
    "known",
    "reward",
    "tokens",
    "nll",
    "truncated",
    "groups",
    "equal",
    "spread",
    "compared",
)
"""What is summed over the completions that were sampled, and over their groups."""


class PolicyOptimization:
    """The clipped loss over completions of the model itself, which has a `LogProbHead` of the sampling temperature.

    On validation batches, which have rewards only, the loss is minus the reward.

    Args:
        model: without Fabric's wrapper.
        rewards: names of the rewards.
    """

    def __init__(self, config: GrpoConfig, model: nn.Module, rewards: tuple[str, ...]) -> None:
        self.config, self._model = config, model
        self.unit = "completions" if config.loss_type in ("grpo", "gspo", "rloo") else "target_tokens"
        self._own = tuple(f"reward_{name}" for name in rewards)
        has_divergence = config.beta > 0 and config.loss_type != "rloo"
        self.names: tuple[str, ...] = (
            "reward",
            "reward_std",
            "equal_groups",
            "length",
            "truncated",
            "failed",
            "entropy",
        )
        self.names += (*(self._own if len(rewards) > 1 else ()), *OF_TOKENS[: len(OF_TOKENS) - (not has_divergence)])
        self.shown = {"reward": ".3f", "equal_groups": ".0%"}
        self._on_tokens: Tensor | None = None
        self._on_completions = self._zeros()

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys([*ON_COMPLETIONS, *self._own, *(f"{name} count" for name in self._own)], 0.0)

    def count(self, batch: Batch) -> int:
        """Return the units of `units`; of a validation batch the completions with a reward."""
        if "rewards" in batch:
            return int((~batch["rewards"].isnan()).sum())
        return units(int(batch["completions"].sum()), int((batch["labels"] != IGNORE).sum()), self.config)

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss."""
        if "rewards" in batch:
            return -batch["rewards"].nansum()  # type: ignore[no-any-return]
        log_probs, _ = model(**{name: batch[name] for name in INPUTS})
        mask = Targets.of(batch["labels"]).labels != IGNORE
        old, reference = batch.get("old", log_probs.detach()), batch.get("reference")
        found = policy_loss(log_probs, old, mask, batch["advantages"], self.config, reference, batch.get("weights"))
        with torch.no_grad():
            difference = (log_probs - batch["sampled"]) * mask
            ratio = difference.exp() * mask
            sums = [mask.sum(), ratio.sum(), difference.abs().sum(), found.clipped, found.divergence]
            values = torch.stack([one.float() for one in sums])
        self._on_tokens = values if self._on_tokens is None else self._on_tokens + values
        return found.loss

    def add_completions(self, completions: list[Completion], n_groups: int, equal: int, spreads: list[float]) -> None:
        """Add what the metrics of sampled completions and of their groups are made of.

        Args:
            equal: groups whose rewards are equal.
            spreads: the standard deviation of the rewards of each group that has one.
        """
        known = [completion.reward for completion in completions if not math.isnan(completion.reward)]
        found = {"completions": len(completions), "known": len(known), "reward": sum(known)}
        found["tokens"] = sum(len(completion.ids) for completion in completions)
        found["nll"] = -sum(sum(completion.log_probs) for completion in completions)
        found["truncated"] = sum(completion.truncated for completion in completions)
        found |= {"groups": n_groups, "equal": equal, "spread": sum(spreads), "compared": len(spreads)}
        for i, name in enumerate(self._own):
            values = [v for a in completions if (v := a.rewards[i]) is not None and not math.isnan(v)]
            found |= {name: sum(values), f"{name} count": len(values)}
        self._on_completions = {name: value + found[name] for name, value in self._on_completions.items()}

    def take_sums(self) -> Tensor:
        """Return the sums since the last call, and begin again."""
        device = next(self._model.parameters()).device
        on_tokens = torch.zeros(len(ON_TOKENS), device=device) if self._on_tokens is None else self._on_tokens
        on_completions = torch.tensor(list(self._on_completions.values()), device=device)
        self._on_tokens, self._on_completions = None, self._zeros()
        return torch.cat([on_tokens, on_completions])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Return means over completions, groups and tokens, without those of completions where none were sampled."""
        s = dict(zip([*ON_TOKENS, *self._zeros()], sums, strict=True))
        parts = {
            "reward": ("reward", "known"),
            "reward_std": ("spread", "compared"),
            "equal_groups": ("equal", "groups"),
            "length": ("tokens", "completions"),
            "truncated": ("truncated", "completions"),
            "entropy": ("nll", "tokens"),
            "ratio": ("ratio", "mask"),
            "logp_difference": ("difference", "mask"),
            "clipped": ("clipped", "mask"),
            "kl": ("divergence", "mask"),
            **{name: (name, f"{name} count") for name in self._own},
        }
        found = {name: s[top] / s[bottom] for name, (top, bottom) in parts.items() if s[bottom]}
        if s["completions"]:
            found["failed"] = 1 - s["known"] / s["completions"]
        return {name: value for name, value in found.items() if name in self.names}
