"""Judges of pairs of answers: a model behind an OpenAI-compatible endpoint, or a reward model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from litmini.config.judge import JudgeConfig
from litmini.errors import UserError, counted
from litmini.evaluation.answers import Pair
from litmini.evaluation.verdicts import Verdict
from litmini.files import existing_file
from litmini.openai_client import Client, ServerError, ask_all

ORDERS = ("ab", "ba")
MOST_FAILURES = 5
"""Requests that may fail one after the other; then the endpoint is not asked any more."""
PROMPT = """Two assistants have answered the question of a user. Decide which answer is better: more correct, more helpful, \
and closer to what was asked. Do not let the order of the answers, their length or their style decide.

[Question]
{question}
[End of question]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Say in one or two sentences why. Then end with a line of its own that holds your verdict: [[A]] if answer A is better, [[B]] \
if answer B is better, [[C]] if they are equally good."""
PLACEHOLDERS = ("question", "first", "second")


def read_template(file: str | None, default: str = PROMPT, placeholders: tuple[str, ...] = PLACEHOLDERS) -> str:
    """Return the prompt of a file, or the default.

    Raises:
        UserError: it is no text, or lacks one of the `placeholders`.
    """
    try:
        text = default if file is None else existing_file(file, "judge prompt").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}.") from None
    if missing := [f"{{{name}}}" for name in placeholders if f"{{{name}}}" not in text]:
        raise UserError(
            f"{file} lacks {', '.join(missing)}; expected all of {', '.join(f'{{{n}}}' for n in placeholders)}."
        )
    return text


def question(template: str, pair: Pair, order: str) -> str:
    """Return what a judge is asked about a pair."""
    first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
    return fill(template, {"question": pair.question, "first": first, "second": second})


def fill(template: str, values: dict[str, str]) -> str:
    """Return a template with `values` where their names stand in braces. What stands in a value is no placeholder."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], template)


def judge_client(config: JudgeConfig) -> Client:
    """Return a client of the judge's endpoint.

    Raises:
        UserError: it has several models, or none, and `model` names none; or it cannot be reached.
    """
    assert config.base_url is not None
    client = Client(config.base_url, config.model, config.key_variable, config.timeout, config.tries)
    if not config.model:
        client.model = client.only_model("--judge.model")
    return client


def read_verdict(reply: str, order: str) -> str | None:
    """Return whom a reply prefers: a, b or tie; None: it says neither.

    The last [[A]], [[B]] or [[C]] counts, or a letter alone.
    """
    named = re.findall(r"\[\[\s*([ABC]|tie)\s*\]\]", reply, re.IGNORECASE)
    alone = re.fullmatch(r"\W*([ABC]|tie)\W*", reply.strip(), re.IGNORECASE)
    said = (named[-1] if named else alone[1] if alone else "").upper()
    if said in ("C", "TIE"):
        return "tie"
    return {"A": order[0], "B": order[1]}.get(said)


class LLMJudge:
    """Asks an endpoint about pairs, several at once, and about each in both orders.

    Raises:
        UserError: the endpoint cannot be reached, or has several models and none is named.
    """

    orders = ORDERS

    def __init__(self, config: JudgeConfig) -> None:
        self.config, self.template = config, read_template(config.prompt)
        self.client = judge_client(config)
        self.failures: list[str] = []
        """Requests without a reply, as text."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the verdicts depend on."""
        c = self.config
        return {"judge": self.client.model, "prompt": self.template, "temperature": c.temperature, "max_tokens": c.max_tokens,
                "body": c.body}  # fmt: skip

    def judge(self, wanted: list[tuple[Pair, str]]) -> Iterator[Verdict]:
        """Yield a verdict about each pair in its order, as they come. What fails is in `failures`.

        Raises:
            UserError: `MOST_FAILURES` requests in a row failed; all verdicts there are were yielded.
        """
        in_row = 0
        for _, result in ask_all(self._ask, wanted, self.config.concurrency):
            if isinstance(result, Verdict):
                in_row = 0
                yield result
                continue
            self.failures.append(str(result))
            in_row += 1
            if in_row == MOST_FAILURES:
                raise UserError(
                    f"{counted(in_row, 'request')} in a row failed, the last: {result} The verdicts so far are kept: repeat "
                    f"the command to continue."
                )

    def _ask(self, asked: tuple[Pair, str]) -> Verdict | ServerError:
        pair, order = asked
        messages = [{"role": "user", "content": question(self.template, pair, order)}]
        try:
            reply = self.client.chat(messages, **self.config.request)
        except ServerError as error:
            return error
        return Verdict(
            pair.number, order, read_verdict(reply.text, order), reply.text, reply.prompt_tokens, reply.completion_tokens,
            messages,
        )  # fmt: skip


class RewardJudge:
    """Compares the scores of a reward model, which sees one answer at a time.

    Args:
        tie_margin: scores that differ by no more than this are a tie.
    """

    orders = ("none",)
    batch = 8  # pairs

    def __init__(self, directory: str, base: str | None, device: str, tie_margin: float = 0.0) -> None:
        from litmini.evaluation.rewards import RewardModel

        self.model, self.directory, self.tie_margin = RewardModel(directory, base, device), directory, tie_margin
        self.failures: list[str] = []
        """Pairs without scores, as text."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the verdicts depend on."""
        return {"judge": self.directory, "tie_margin": self.tie_margin}

    def judge(self, wanted: list[tuple[Pair, str]]) -> Iterator[Verdict]:
        """Yield a verdict about each pair; what does not fit into the model's context is in `failures`."""
        for start in range(0, len(wanted), self.batch):
            pairs = [pair for pair, _ in wanted[start : start + self.batch]]
            scores = self.model.score([(pair.prompt, text) for pair in pairs for text in (pair.a, pair.b)])
            for pair, a, b in zip(pairs, scores[::2], scores[1::2], strict=True):
                if a is None or b is None or a != a or b != b:  # NaN
                    self.failures.append(f"pair {pair.number + 1}: an answer is beyond the reward model's context")
                    continue
                winner = "tie" if abs(a - b) <= self.tie_margin else "a" if a > b else "b"
                yield Verdict(pair.number, "none", winner, scores=[a, b])
