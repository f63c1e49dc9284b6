"""Exact match of greedy completions, and perplexity."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from litmini.config.generate import SamplingConfig
from litmini.data.dataset import Example
from litmini.errors import UserError, counted
from litmini.generation.batch import check_ids
from litmini.generation.generate import finish_all
from litmini.generation.request import Request
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """What a model completes one validation prompt with, beside what the data has."""

    prompt: str
    reference: str
    prediction: str

    @property
    def correct(self) -> bool:
        return self.prediction.strip() == self.reference.strip()


def predict(
    model: nn.Module, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int, batch_size: int = 25
) -> list[Prediction]:
    """Return greedy completions in place of the last assistant turn of every example that has a prompt and a completion."""
    pairs: list[tuple[list[int], str, str]] = []
    for example in examples:
        if example.messages is None:
            if example.prompt:
                pairs.append(
                    (
                        tokenizer.encode(tokenizer.mark(example.prompt)),
                        example.prompt,
                        example.text[len(example.prompt) :],
                    )
                )
        elif (
            len(example.messages) > 1
            and example.messages[-1]["role"] == "assistant"
            and example.messages[-1].get("content")
        ):
            *before, last = example.messages
            ids = tokenizer.encode_prompt(before, example.tools or None)
            pairs.append((ids, before[-1].get("content", ""), last["content"]))
    config: Any = model.config
    predictions = [Prediction(q, a, "") for ids, q, a in pairs if len(ids) >= config.max_positions]  # no token fits
    pairs = [pair for pair in pairs if len(pair[0]) < config.max_positions]
    training = model.training
    model.eval()
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    with tqdm(total=len(pairs), desc="generating", unit="ex", disable=None, leave=False) as bar:
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            requests = [Request(ids, sampling, tokenizer.stop_ids) for ids, _, _ in part]
            finish_all(model, requests)
            texts = [tokenizer.decode(request.ids) for request in requests]
            predictions += [Prediction(q, a, text) for (_, q, a), text in zip(part, texts, strict=True)]
            bar.update(len(part))
    model.train(training)
    return predictions


def exact_match(predictions: list[Prediction]) -> float:
    """Return the share of correct predictions, 0 to 1."""
    return sum(p.correct for p in predictions) / max(1, len(predictions))


@dataclass(frozen=True)
class Perplexity:
    """Loss of a text."""

    loss_sum: float
    """In nats."""
    n_targets: int
    n_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss_sum / self.n_targets, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which perplexity is not."""
        return self.loss_sum / math.log(2) / self.n_bytes


@torch.inference_mode()
def perplexity(model: nn.Module, tokenizer: Tokenizer, text: str, window: int, stride: int) -> Perplexity:
    """Return the loss of every token of `text` but the first, each counted once.

    Args:
        window: tokens in one forward; every window but the first re-reads `window - stride` tokens as context only, so
            that each token is predicted from at least so many others.
        stride: tokens from one window to the next.

    Raises:
        UserError: there are fewer than two tokens, or window and stride do not fit each other or the model's context.
    """
    config: Any = model.config
    if not 1 <= stride < window <= config.max_positions:
        raise UserError(
            f"window {window} and stride {stride}: expected 1 <= stride < window <= {config.max_positions}, the context."
        )
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"the text has {counted(len(ids), 'token')}; at least 2 are needed.")
    check_ids(ids, config.vocab_size)
    device = next(model.parameters()).device
    loss_sum, n_targets = 0.0, 0
    with tqdm(total=len(ids) - 1, desc="reading", unit="tok", disable=None) as bar:
        while n_targets < len(ids) - 1:
            start = max(0, n_targets - (window - stride))
            part = ids[start : start + window + 1]
            if start + window + 1 > len(ids):  # the last window ends with the text, and is as long as the others
                start = max(0, len(ids) - window - 1)
                part = ids[start:]
            tokens = torch.tensor([part], device=device)
            labels = tokens[:, 1:].clone()
            labels[:, : n_targets - start] = IGNORE
            loss, count = model(tokens[:, :-1], labels=labels)
            loss_sum, n_targets = loss_sum + float(loss), n_targets + int(count)
            bar.update(int(count))
    return Perplexity(loss_sum, n_targets, len(text.encode()))
