"""Speculative decoding: draft several tokens, verify them in one forward, accept a prefix (arXiv 2211.17192).

The completion is that of plain greedy decoding; only rounding differs, as between any two batch sizes, where two tokens are
equally likely to the last bit.
"""

from typing import Any, Protocol

import torch
from torch import nn

from litmini.errors import UserError
from litmini.ops.kv_cache import KVCache


class Draft(Protocol):
    """Proposes the next tokens of a text."""

    def begin(self, capacity: int) -> None:
        """Start a text of at most so many tokens."""

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Return at most `limit` tokens that may follow `tokens`."""


class PromptLookup:
    """Propose what followed the last few tokens before: for completions that quote their prompt.

    Args:
        count: tokens to propose at once.
        longest: how many of the last tokens must have occurred before; fewer, down to 2, are tried, too.
    """

    def __init__(self, count: int, longest: int = 4) -> None:
        self.count, self.longest = count, longest

    def begin(self, capacity: int) -> None:
        pass

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        for length in range(min(self.longest, len(tokens) - 1), 1, -1):
            tail = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):  # the latest occurrence first
                if tokens[start : start + length] == tail:
                    return tokens[start + length :][: min(self.count, limit)]
        return []


class DraftModel:
    """Propose the greedy completion of a smaller model with the same tokenizer.

    Args:
        count: tokens to propose at once.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        config: Any = model.config
        self.model, self.config, self.count = model, config, count
        self._read: list[int] = []  # the tokens in the cache

    def begin(self, capacity: int) -> None:
        if capacity > self.config.max_positions:
            raise UserError(f"the draft model's context is {self.config.max_positions} tokens, {capacity} are needed.")
        parameter = next(self.model.parameters())
        self._cache = KVCache(self.config, 1, capacity, parameter.dtype, parameter.device)
        self._read = []

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        same = 0
        while same < min(len(self._read), len(tokens) - 1) and self._read[same] == tokens[same]:
            same += 1
        same = self._cache.resume(same)
        new = tokens[same:]
        drafted: list[int] = []
        if max(new) >= self.config.vocab_size:  # a larger model may have more rows than its tokenizer has ids
            return drafted
        while len(drafted) < min(self.count, limit):
            for part in torch.tensor([new], device=self._cache.device).split(self._cache.chunk, 1):
                where = torch.arange(same, same + part.shape[1], device=part.device)[None]
                logits = self.model(part, where, cache=self._cache)
                same += part.shape[1]
            new = [int(logits[0, -1].argmax())]
            drafted += new
        self._read = [*tokens, *drafted[:-1]] if drafted else self._read[:same]
        return drafted
