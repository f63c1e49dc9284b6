"""The settings of finetune_preference.py and finetune_reward.py. Nothing heavy is imported here."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from litmini.config.finetune import DataConfig
from litmini.config.optional_adapters import OptionalAdaptersConfig
from litmini.config.training import EvalConfig, OptimConfig
from litmini.errors import UserError, check

Loss = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "orpo", "cpo", "kto"]
PAIR = ("prompt", "chosen", "rejected", "margin", "tools", "system", "system_prompt", "history")
USED_BY: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust", "simpo", "cpo"),
    "gamma": ("simpo",),
    "alpha": ("cpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Setting -> the losses that use it; all use the others."""


@dataclass
class PreferenceDataConfig(DataConfig):
    """Data: which files, and how they become sequences of tokens."""

    keys: ClassVar[tuple[str, ...]] = (*PAIR, "completion", "label")
    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with prompt, chosen and rejected (texts or lists of messages), or
    chosen and rejected conversations that begin alike, or prompt, completion and label; or hub:ORG/NAME[/FOLDER]
    [@REVISION][:SPLIT], a data set of the hub; or a list of these."""
    max_seq_len: int | None = None
    """Most tokens of a prompt with its completion; of longer ones the first are kept, and their number is printed. A sequence
    has room for both completions of a pair: twice as many. Default (null): 2048, or the model's context if that is shorter."""
    max_dropped: float = 0.01
    """Largest fraction of records from which nothing can be learned that is no error: the two completions are equal, one is
    empty, or the prompt leaves no room for them."""


@dataclass
class PreferenceConfig:
    """Preference: what is learned from pairs of completions, or from completions with a label."""

    loss: Loss = "sigmoid"
    """sigmoid is DPO; robust, hinge, ipo, apo_zero and apo_down compare with the model at the start as well; simpo, orpo and
    cpo do not; kto learns from single completions, desirable or not. docs/preferences.md has their definitions."""
    beta: float = 0.1
    """How much the log-probabilities count; with a reference, the higher, the closer the model stays to it."""
    label_smoothing: float = 0.0
    """Probability that chosen and rejected are mixed up: of sigmoid (cDPO), robust, simpo and cpo."""
    gamma: float = 0.5
    """simpo: the margin that the chosen completion's reward should have."""
    alpha: float = 1.0
    """cpo: weight of the negative log-likelihood of the chosen completion."""
    sft_weight: float = 0.0
    """Weight of the negative log-likelihood per token of the chosen completion, added to any loss (RPO)."""
    desirable_weight: float = 1.0
    """kto: weight of desirable completions."""
    undesirable_weight: float = 1.0
    """kto: weight of undesirable completions."""

    def __post_init__(self) -> None:
        check(
            "preference.",
            self,
            beta=0 < self.beta < math.inf,
            label_smoothing=0 <= self.label_smoothing < 0.5,
            gamma=0 <= self.gamma < math.inf,
            alpha=0 <= self.alpha < math.inf,
            sft_weight=0 <= self.sft_weight < math.inf,
            desirable_weight=0 < self.desirable_weight < math.inf,
            undesirable_weight=0 < self.undesirable_weight < math.inf,
        )

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the model at the start."""
        return self.loss not in ("simpo", "orpo", "cpo")

    def ineffective(self) -> dict[str, bool]:
        """Return setting -> whether it was changed and the loss does not use it."""
        plain = PreferenceConfig()
        return {
            f"preference.{name}": self.loss not in losses and getattr(self, name) != getattr(plain, name)
            for name, losses in USED_BY.items()
        }


@dataclass
class PreferenceEvalConfig(EvalConfig):
    """Evaluation by generated completions, before and after training."""

    matches: str | None = None
    """A regular expression: complete the prompts of all validation pairs greedily, before and after training, and count the
    completions that match it, '(?is)^.{1,80}$' those that are short, say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.matches or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"eval.matches {self.matches!r} is no regular expression: {error}.") from None


@dataclass(kw_only=True)
class FinetunePreferenceConfig(OptionalAdaptersConfig):
    """Settings of finetune_preference.py."""

    data: PreferenceDataConfig
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    eval: PreferenceEvalConfig = field(default_factory=PreferenceEvalConfig)

    @property
    def task(self) -> str:
        return f"preferences ({self.preference.loss})"


@dataclass
class RewardDataConfig(DataConfig):
    """Data: which files, and how they become sequences of tokens."""

    keys: ClassVar[tuple[str, ...]] = PAIR
    path: list[str] | str
    """Training file of pairs, as of finetune_preference.py; a column margin says by how much the chosen completion should
    be better."""
    max_seq_len: int | None = None
    """Most tokens of a prompt with its completion; pairs with a longer one are dropped. A sequence has room for both
    completions of a pair: twice as many. Default (null): 2048, or the model's context if that is shorter."""
    max_dropped: float = 0.01
    """Largest fraction of pairs from which nothing can be learned that is no error: the two completions are equal, one is
    empty, or one is too long."""


@dataclass
class RewardConfig:
    """Reward: how scores are learned from pairs."""

    center: float = 0.0
    """Weight of the squared sum of both scores of a pair, which keeps scores around 0; 0.01 is usual, 0 is off."""

    def __post_init__(self) -> None:
        check("reward.", self, center=0 <= self.center < math.inf)


@dataclass(kw_only=True)
class FinetuneRewardConfig(OptionalAdaptersConfig):
    """Settings of finetune_reward.py."""

    data: RewardDataConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))

    @property
    def task(self) -> str:
        return "reward model"
