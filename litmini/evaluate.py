"""Answers on held-out examples: are they exactly right?"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from litmini.data import Example
from litmini.generate import generate_batch
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One held-out question, what was expected and what the model said."""

    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected.strip()


def answer_all(
    model: nn.Module, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int, batch_size: int = 25
) -> list[Answer]:
    """Greedy answers to the last turn of every example that has a question and an answer."""
    asked: list[tuple[list[int], str, str]] = []
    for example in examples:
        if example.messages is None:
            if example.prompt:
                asked.append((tokenizer.encode(example.prompt), example.prompt, example.text[len(example.prompt) :]))
        elif len(example.messages) > 1 and example.messages[-1]["role"] == "assistant":
            *before, last = example.messages
            asked.append((tokenizer.encode_prompt(before), before[-1]["content"], last["content"]))
    room: Any = model.config
    answers = [Answer(q, a, "") for prompt, q, a in asked if len(prompt) >= room.max_positions]  # nothing can be said
    asked = [entry for entry in asked if len(entry[0]) < room.max_positions]
    training = model.training
    model.eval()
    with tqdm(total=len(asked), desc="answering", unit="ex", disable=None) as bar:
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            ids = generate_batch(model, [p for p, _, _ in part], max_new_tokens, tokenizer.stop_ids)
            answers += [Answer(q, a, tokenizer.decode(i)) for (_, q, a), i in zip(part, ids, strict=True)]
            bar.update(len(part))
    model.train(training)
    return answers


def exact_match(answers: list[Answer]) -> float:
    """The share of answers that are exactly right, 0 to 1."""
    return sum(a.right for a in answers) / max(1, len(answers))
