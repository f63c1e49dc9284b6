"""Completions sampled from a model that is trained, with the log-probability that each of their tokens was sampled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litmini.config.generate import SamplingConfig
from litmini.distributed.lockstep import in_lockstep
from litmini.generation.batch import Batch
from litmini.generation.generate import raise_first
from litmini.generation.request import Request


@dataclass(frozen=True)
class Rollout:
    """A sampled completion."""

    ids: list[int]
    """Token ids, with the end token that the model chose."""
    log_probs: list[float]
    """Of each of them, at the temperature of sampling."""
    truncated: bool
    """Whether it ended with the longest length, and not by itself."""


def completion_seed(*numbers: int) -> int:
    """Return a seed, below 2^63, that differs for other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class _RolloutRequest(Request):
    """A request that keeps all tokens, its end token among them; `seen` gets it with the logits of each."""

    def __init__(self, prompt: list[int], sampling: SamplingConfig, stop_ids: list[int], seen: Any) -> None:
        super().__init__(prompt, sampling, stop_ids)
        self.chosen: list[int] = []
        self._seen = seen

    @property
    def wants_logits(self) -> bool:
        return True

    def push(self, token: int, logits: Tensor) -> None:
        self.chosen.append(token)
        self._seen.append((self, logits))
        super().push(token, logits)


def sample(
    model: nn.Module,
    prompts: list[list[int]],
    seeds: list[int],
    stop_ids: list[int],
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
) -> list[Rollout]:
    """Return a completion to each prompt, `batch_size` of them at a time. Where processes hold shards, all of them call this.

    A completion depends on its prompt, its seed and the model: not on its neighbours, but for rounding. The cache is freed
    before this returns.

    Args:
        model: in evaluation mode, with its own head.
        prompts: token ids.
        seeds: of each.
        temperature: 0 is greedy; the log-probabilities are those at 1 then.

    Raises:
        UserError: a prompt fills the model's context, or logits are not finite.
    """
    found: list[Rollout] = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad(), in_lockstep(model, lambda: model(token)):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            found += _sample_together(model, prompts[part], seeds[part], stop_ids, temperature, max_new_tokens)
    return found


def _sample_together(
    model: nn.Module, prompts: list[list[int]], seeds: list[int], stop_ids: list[int], temperature: float, most: int
) -> list[Rollout]:
    seen: list[tuple[_RolloutRequest, Tensor]] = []
    requests = [
        _RolloutRequest(ids, SamplingConfig(max_new_tokens=most, temperature=temperature, seed=seed), stop_ids, seen)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    batch = Batch(model)
    batch.add(list(requests))
    order: list[_RolloutRequest] = []
    scores: list[Tensor] = []
    while True:
        if seen:
            order += [request for request, _ in seen]
            scores.append(_log_probs(seen, temperature or 1.0))
            seen.clear()
        if not batch.requests:
            break
        batch.step()
    raise_first(list(requests))
    values: dict[int, list[float]] = {id(request): [] for request in requests}
    for request, value in zip(order, torch.cat(scores).tolist(), strict=True):  # the CPU-GPU sync point
        values[id(request)].append(value)
    return [Rollout(r.chosen, values[id(r)], r.finish == "length") for r in requests]


def _log_probs(seen: list[tuple[_RolloutRequest, Tensor]], temperature: float) -> Tensor:
    """Return the log-probability of the last token of each request, (n,) fp32, from the logits (vocab,) that it came from."""
    logits = torch.stack([row for _, row in seen]) / temperature  # (n, vocab)
    last = torch.tensor([request.chosen[-1] for request, _ in seen], device=logits.device)
    return logits.gather(1, last[:, None])[:, 0] - logits.logsumexp(-1)
