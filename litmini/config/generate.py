"""The settings of commands that generate: the model, and how its completions are sampled."""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from litmini.errors import check


@dataclass(kw_only=True)
class ModelConfig:
    """The model of a command that generates: its files, device and dtype."""

    checkpoint_dir: str
    """Checkpoint directory of the model."""
    adapter_dir: str | None = None
    """Adapter over it, in PEFT's format."""
    model_file: str | None = None
    """The model file of a checkpoint whose family is not in litmini/models/."""
    chat_template: str = "auto"
    """auto: the checkpoint's own template, if it has one; none: prompts are raw text; chatml, llama3,
    gemma, alpaca or zephyr; or the path of a .jinja file."""
    template_kwargs: dict[str, Any] | None = None
    """Variables of the template, such as '{enable_thinking: false}'. None: those of training."""
    special_tokens_in_text: bool = False
    """Special tokens such as <|im_end|> in prompts and messages are tokens. By default they are encoded as text."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the weights."""
    bits: Literal[4, 16] = 16
    """4 quantizes the base's linears to NF4 while they are loaded: a quarter of the memory, slightly different results."""
    device: str = "auto"
    """auto: a GPU if there is one, else the CPU."""
    check_finite: bool = False
    """Check that no weight is NaN or infinite, which takes a moment: every weight is read."""
    compile: bool = False
    """Compile the decoding step: faster, but the first completion takes longer, and the first ever takes much longer."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How a completion is sampled, and where it ends."""

    max_new_tokens: int = 256
    """Longest completion in tokens."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample from the top_k most probable tokens."""
    top_p: float | None = None
    """Sample from the most probable tokens whose probabilities add up to this value."""
    min_p: float | None = None
    """Sample from the tokens whose probability is at least min_p times that of the most probable token."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the completion so far become less probable (arXiv 1909.05858)."""
    seed: int | None = None
    """Seed of sampling, for repeatable completions."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the completion; they are not part of it."""
    ignore_eos: bool = False
    """Generate max_new_tokens tokens even after an end token."""
    logprobs: int | None = None
    """Return the log-probability of every token, and those of this many most probable tokens."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            max_new_tokens=self.max_new_tokens > 0,
            temperature=0 <= self.temperature <= sys.float_info.max,
            top_k=self.top_k is None or self.top_k > 0,
            top_p=self.top_p is None or 0 < self.top_p <= 1,
            min_p=self.min_p is None or 0 <= self.min_p <= 1,
            repetition_penalty=0 < self.repetition_penalty <= sys.float_info.max,
            seed=self.seed is None or 0 <= self.seed < 2**63,
            stop=all(self.stop),
            logprobs=self.logprobs is None or 0 <= self.logprobs <= 20,
        )
