"""The settings of judges behind OpenAI-compatible endpoints. Nothing heavy is imported here."""

import math
from dataclasses import dataclass, field
from typing import Any

from litmini.errors import UserError, check


@dataclass
class JudgeConfig:
    """Judge: a model behind an OpenAI-compatible endpoint, and how it is asked."""

    base_url: str | None = None
    """Address of the endpoint, such as http://127.0.0.1:8000/v1."""
    model: str = ""
    """Name of the model there. Default: the only one that the endpoint has."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without it, none is sent. A key never stands on a command line."""
    prompt: str | None = None
    """File of the prompt. Of judge.py: with {question}, {first} and {second} where these belong, and asking for [[A]], [[B]]
    or [[C]], a tie; as a reward: with {question} and {answer}, and asking for [[0]] to [[10]]. Default: those of
    docs/judging.md and docs/grpo.md."""
    max_tokens: int = 512
    """Longest reply in tokens."""
    temperature: float | None = 0.0
    """Temperature of the judge; null: left to the endpoint."""
    body: dict[str, Any] = field(default_factory=dict)
    """Further entries of requests, such as '{seed: 1}'; null takes one out: '{max_tokens: null, max_completion_tokens: 900}',
    say."""
    timeout: float = 120.0
    """Seconds that one try of a request may take."""
    tries: int = 6
    """How often a request is sent where the endpoint is late, busy or unreachable; waits grow from 1 to 60 seconds."""
    concurrency: int = 8
    """Requests at once."""

    def __post_init__(self) -> None:
        check(
            "judge.",
            self,
            max_tokens=self.max_tokens > 0,
            temperature=self.temperature is None or 0 <= self.temperature < math.inf,
            timeout=0 < self.timeout < 1e6,
            tries=self.tries > 0,
            concurrency=0 < self.concurrency <= 256,
        )
        if wrong := [key for key in self.body if not isinstance(key, str) or key in ("messages", "model", "stream")]:
            raise UserError(
                f"judge.body has the entry {wrong[0]}; expected names of further entries, such as '{{seed: 1}}'. The model is "
                f"--judge.model, what it is asked --judge.prompt."
            )

    @property
    def request(self) -> dict[str, Any]:
        """Entries of each request beside model and messages; None: left out."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **self.body}
