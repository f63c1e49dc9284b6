"""A reward by a model behind an OpenAI-compatible endpoint that rates completions (RL from AI feedback)."""

from __future__ import annotations

import json
import math
import re

from litmini.config.judge import JudgeConfig
from litmini.evaluation.judge import fill, judge_client, read_template
from litmini.openai_client import ServerError, ask_all
from litmini.tokenizer import Message

MOST = 10
"""The best rating."""
PROMPT = """Rate the answer of an assistant to the request of a user: is it correct, helpful, and what was asked for?

[Request]
{question}
[End of request]

[Answer]
{answer}
[End of answer]

Say in one sentence why. Then end with a line of its own that holds your rating between [[0]], useless, and [[10]], perfect."""
PLACEHOLDERS = ("question", "answer")


class JudgeReward:
    """Rates completions from 0 to 1, several at once."""

    def __init__(self, config: JudgeConfig) -> None:
        """
        Raises:
            UserError: the address is none, it has several models and none is named, or the prompt's file lacks a placeholder.
        """
        self.config, self.problem = config, ""
        self.template = read_template(config.prompt, PROMPT, PLACEHOLDERS)
        self.client = judge_client(config)

    def score(self, completions: list[tuple[list[Message] | str, str]]) -> list[float | None]:
        """Return the rating of each (prompt, completion); NaN where there is none, and `problem` then says why."""
        found = dict(ask_all(self._rate, completions, self.config.concurrency))
        return [found[i] for i in range(len(completions))]

    def _rate(self, completion: tuple[list[Message] | str, str]) -> float:
        prompt, text = completion
        asked = fill(self.template, {"question": _conversation(prompt), "answer": text})
        try:
            reply = self.client.chat([{"role": "user", "content": asked}], **self.config.request)
        except ServerError as error:
            self.problem = f"has no rating: {error}"
            return math.nan
        rating = read_rating(reply.text)
        if rating is None:
            self.problem = f"has no rating [[0]] to [[{MOST}]] in the reply {json.dumps(reply.text[-200:])}"
            return math.nan
        return rating / MOST


def read_rating(reply: str) -> float | None:
    """Return the last rating [[0]] to [[10]] of a reply, or a number alone; None: it has none."""
    named = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", reply)
    alone = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\.?\s*", reply)
    value = float(named[-1] if named else alone[1] if alone else "nan")
    return value if 0 <= value <= MOST else None


def _conversation(prompt: list[Message] | str) -> str:
    """Return a prompt as a judge reads it: a single turn as it is, several with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [(str(message.get("role", "")), str(message.get("content") or "")) for message in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)
