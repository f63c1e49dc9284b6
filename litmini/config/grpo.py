"""The settings of finetune_grpo.py. Nothing heavy is imported here."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from litmini.config.finetune import DataConfig
from litmini.config.judge import JudgeConfig
from litmini.config.optional_adapters import OptionalAdaptersConfig
from litmini.config.training import OptimConfig
from litmini.errors import UserError, check

USED_BY: dict[str, tuple[str, ...]] = {
    "scale_rewards": ("grpo", "bnpo", "dr_grpo", "dapo", "gspo"),
}
"""Setting -> the losses that use it; all use the others."""


@dataclass
class GrpoDataConfig(DataConfig):
    """Data: which files the prompts come from."""

    path: list[str] | str
    """Training file: .jsonl, .json, .csv or .parquet with prompt (text or a list of messages) and any further columns, which
    rewards may read; or messages, whose last turn, the assistant's, is the completion; or hub:ORG/NAME[/FOLDER]
    [@REVISION][:SPLIT], a data set of the hub; or a list of these."""
    max_seq_len: int | None = None
    """Most tokens of a prompt with a completion; longer prompts are dropped. Default (null): 2048, or the model's context if
    that is shorter."""
    max_dropped: float = 0.01
    """Largest fraction of prompts that leave no room for a completion that is no error."""


@dataclass
class GrpoConfig:
    """Policy optimization: how completions are sampled, compared and learned from. Names and defaults are TRL's."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "rloo"] = "dapo"
    """How losses of tokens are averaged (grpo, bnpo, dr_grpo, dapo); gspo: grpo with the ratio of whole completions; rloo:
    REINFORCE with a leave-one-out baseline. docs/grpo.md has their definitions."""
    num_generations: int = 8
    """Completions to each prompt: a group, whose rewards are compared."""
    max_completion_length: int = 256
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Temperature of sampling, and of the log-probabilities in the loss."""
    epsilon: float = 0.2
    """The ratio is clipped to 1 - epsilon from below."""
    epsilon_high: float | None = None
    """The ratio is clipped to 1 + epsilon_high from above (DAPO: 0.28). None: epsilon."""
    beta: float = 0.0
    """Weight of the KL divergence to the model at the start, which is this model with its adapters off."""
    num_iterations: int = 1
    """Optimizer steps on the same completions."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, of all rewards of the step, or not (Dr. GRPO)."""
    mask_truncated: bool = False
    """Learn nothing from completions that max_completion_length ended."""
    dynamic_sampling: bool = False
    """Leave out the groups whose rewards are all equal, also from what the loss is divided by (DAPO)."""
    sample_batch_size: int = 64
    """Completions of one process that are sampled at once."""

    def __post_init__(self) -> None:
        check(
            "grpo.",
            self,
            num_generations=self.num_generations > 1,
            max_completion_length=self.max_completion_length > 0,
            temperature=0 < self.temperature < math.inf,
            epsilon=0 < self.epsilon < 1,
            epsilon_high=self.epsilon_high is None or 0 < self.epsilon_high < math.inf,
            beta=0 <= self.beta < math.inf,
            num_iterations=self.num_iterations > 0,
            sample_batch_size=self.sample_batch_size > 0,
        )

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def ineffective(self) -> dict[str, bool]:
        """Return setting -> whether it was changed and the loss does not use it."""
        plain = GrpoConfig()
        return {
            f"grpo.{name}": self.loss_type not in losses and getattr(self, name) != getattr(plain, name)
            for name, losses in USED_BY.items()
        }


@dataclass
class SamplerConfig:
    """Sampler: a server that samples completions in this program's place."""

    base_url: str | None = None
    """Address of an OpenAI-compatible server that loads LoRA adapters while it runs, such as http://127.0.0.1:8000/v1 of
    vLLM. None: the model that is trained samples itself."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; without it, none is sent."""
    concurrency: int = 64
    """Requests at once, of each process."""
    timeout: float = 600.0
    """Seconds that one try of a request may take."""
    max_weight: float = 3.0
    """The server computes log-probabilities a little differently: each token is weighted by how much more probable it is here,
    at most by this (truncated importance sampling)."""

    def __post_init__(self) -> None:
        check(
            "sampler.",
            self,
            concurrency=0 < self.concurrency <= 1024,
            timeout=0 < self.timeout < 1e6,
            max_weight=0 < self.max_weight < math.inf,
        )


@dataclass
class RewardsConfig:
    """Rewards: what makes a completion good."""

    functions: list[str] = field(default_factory=list)
    """Any of FILE.py:FUNCTION, which is called with prompt, completion and record; exact_match, number_match, regex,
    json_schema or length; judge, a model that rates completions (see --judge.base_url); and the directory of a reward model
    from finetune_reward.py."""
    weights: list[float] | None = None
    """Weight of each of them in the sum. None: 1."""
    answer: str = "answer"
    """Column with the right answer, of exact_match and number_match."""
    pattern: str | None = None
    """Regular expression that regex finds in a good completion; '(?s)^.*$' would be all of it."""
    schema: str | None = None
    """JSON file with the schema of json_schema. None: the schema is in the column schema of each record."""
    length: int = 100
    """Words of a completion up to which length is 1; it falls to 0 at twice as many."""
    time_limit: float = 10.0
    """Seconds that a function may take for a completion, which is left out then."""
    checkpoint_dir: str | None = None
    """Base of a reward model that is an adapter. None: the base that adapter_config.json names."""

    def __post_init__(self) -> None:
        check(
            "rewards.",
            self,
            functions=bool(self.functions),
            weights=self.weights is None
            or (len(self.weights) == len(self.functions) and all(map(math.isfinite, self.weights))),
            length=self.length > 0,
            time_limit=0 < self.time_limit < 1e6,
        )
        if len({reward_name(one) for one in self.functions}) < len(self.functions):
            raise UserError(f"rewards.functions names one twice: {', '.join(self.functions)}.")
        if "regex" in self.functions and self.pattern is None:
            raise UserError("the reward regex needs --rewards.pattern, a regular expression.")
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"rewards.pattern {self.pattern!r} is no regular expression: {error}.") from None


def reward_name(function: str) -> str:
    """Return the name of a reward in metrics: that of its function, or the directories of a reward model."""
    path, _, name = function.rpartition(":")
    return name if path.endswith(".py") else re.sub(r"\W+", "_", function).strip("_")


@dataclass(kw_only=True)
class FinetuneGrpoConfig(OptionalAdaptersConfig):
    """Settings of finetune_grpo.py."""

    data: GrpoDataConfig
    rewards: RewardsConfig
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, schedule="constant"))

    @property
    def task(self) -> str:
        return f"rewards ({self.grpo.loss_type})"

    def __post_init__(self) -> None:
        super().__post_init__()
        group, batch = self.grpo.num_generations, self.train.global_batch_size
        if batch is not None and batch % group:
            raise UserError(
                f"train.global_batch_size {batch} is the number of completions in an optimizer step: expected a multiple of "
                f"grpo.num_generations {group}."
            )
        if self.train.max_steps is not None and self.train.max_steps % self.grpo.num_iterations:
            raise UserError(
                f"train.max_steps {self.train.max_steps}: expected a multiple of grpo.num_iterations "
                f"{self.grpo.num_iterations}, the steps on the same completions."
            )
        if self.sampler.base_url is not None and self.lora is None:
            raise UserError(
                "sampler.base_url: the server gets adapters in each step, but with lora null every weight is trained. Leave "
                "out lora null, or leave out sampler.base_url."
            )
        if ("judge" in self.rewards.functions) != (self.judge.base_url is not None):
            raise UserError(
                "the reward judge and --judge.base_url, the address of the model that rates completions, go together: "
                "give both or neither."
            )
        if self.grpo.beta and self.lora is None:
            raise UserError(
                "grpo.beta compares with the model at the start, which is the model with its adapters off: leave out "
                "lora null, or take --grpo.beta 0."
            )
