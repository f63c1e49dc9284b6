"""The settings of commands that talk to a model: which one, and how its answers are chosen."""

import math
from dataclasses import dataclass, field
from typing import Literal

from litmini.errors import check


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, where, and in what numbers: what every command that talks to one takes."""

    checkpoint_dir: str
    """Model to use."""
    adapter_dir: str | None = None
    """Adapter in PEFT's format to put on it."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    chat_template: str = "auto"
    """auto: the checkpoint's own, if it has one; none: the prompt as raw text; or the path of a .jinja file."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights."""
    bits: Literal[4, 16] = 16
    """4 puts the base's linears into NF4 while they are loaded: a quarter of the memory, somewhat other answers."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU."""
    compile: bool = False
    """Compile what is done for each token: faster, but the first answer takes longer, the very first one much longer."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How an answer is chosen, token by token, and where it ends."""

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Sample among the tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are in the prompt or the answer already become less likely (arXiv 1909.05858)."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the answer; they are not part of it."""
    ignore_eos: bool = False
    """Go on to max_new_tokens whatever comes."""
    logprobs: int | None = None
    """Keep the log-probability of every token, and this many of the likeliest beside it."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            max_new_tokens=self.max_new_tokens > 0,
            temperature=0 <= self.temperature < math.inf,
            top_k=self.top_k is None or self.top_k > 0,
            top_p=self.top_p is None or 0 < self.top_p <= 1,
            min_p=self.min_p is None or 0 <= self.min_p <= 1,
            repetition_penalty=0 < self.repetition_penalty < math.inf,
            seed=self.seed is None or 0 <= self.seed < 2**63,
            stop=all(self.stop),
            logprobs=self.logprobs is None or 0 <= self.logprobs <= 20,
        )
