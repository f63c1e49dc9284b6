"""Choice of a token from logits: greedy, or by temperature, top-k, top-p, min-p and repetition penalty."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litmini.config.generate import SamplingConfig


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities (natural) at one token, before temperature and all else."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The top-k tokens and theirs."""
    offset: int = 0
    """Characters of the completion before it."""


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Return logits (B, vocab), those of seen tokens divided by a penalty where positive, else multiplied.

    Args:
        seen: (B, vocab) bool.
        penalty: (B, 1) fp32; 1 leaves a row as it is.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return the probabilities to sample from and their token ids, (B, n) each, from fp32 logits (B, vocab).

    Tokens that cannot be chosen have the probability 0; the shapes depend on `top_k` alone, so nothing waits for the device.
    """
    temperature = min(max(float(sampling.temperature), 1e-30), 1e30)  # within the range of fp32
    if temperature < 1e-6:  # the quotients could overflow; 0 for the most probable token cannot
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / temperature
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return logits.softmax(-1), torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    ordered, index = logits.sort(descending=True, stable=True)  # equal logits stay in order, as in argmax
    if sampling.top_k is not None:
        k = min(sampling.top_k, ordered.shape[-1])
        ordered, index = ordered[:, :k], index[:, :k]
    kept = ordered.softmax(-1)
    if sampling.top_p is not None:  # the fewest tokens that together have at least top_p; always the first
        below = kept.cumsum(-1) - kept < sampling.top_p
        below[:, 0] = True  # a top_p below what fp32 can hold is 0 here
        kept = kept.masked_fill(~below, 0.0)
    if sampling.min_p is not None:
        kept = kept.masked_fill(kept < sampling.min_p * kept[:, :1], 0.0)
    return kept / kept.sum(-1, keepdim=True), index


class Sampler:
    """Chooses the next token of each sequence of a batch. The host waits for nothing.

    Args:
        samplings: the settings of each sequence.
        tokens: prompt and completion so far of each, for the repetition penalty.
        generators: of each, on the device; not used at temperature 0, which is greedy.
    """

    def __init__(
        self,
        samplings: list[SamplingConfig],
        tokens: list[list[int]],
        generators: list[torch.Generator | None],
        device: torch.device | str = "cpu",
    ) -> None:
        self._tokens, self._generators, self._seen = tokens, generators, torch.empty(0)
        # beyond these bounds fp32 overflows, and 0 * inf is NaN
        penalties = [min(max(float(s.repetition_penalty), 1e-20), 1e20) for s in samplings]
        self._penalty = torch.tensor(penalties, device=device)[:, None] if set(penalties) != {1.0} else None
        alike: dict[tuple[Any, ...], list[int]] = {}  # sequences with the same settings are sampled together
        for row, s in enumerate(samplings):
            if s.temperature:
                alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
        self._groups = [(samplings[rows[0]], rows, torch.tensor(rows, device=device)) for rows in alike.values()]

    def choose(self, logits: Tensor) -> Tensor:
        """Return the token ids (B,) int64 from fp32 logits (B, vocab)."""
        if self._penalty is not None:
            if not self._seen.numel():
                self._seen = torch.zeros(logits.shape, dtype=torch.bool)
                for row, tokens in zip(self._seen, self._tokens, strict=True):
                    row[sorted(set(tokens))] = True
                self._seen = self._seen.to(logits.device)
            logits = penalize(logits, self._seen, self._penalty)
        chosen = logits.argmax(-1)
        for sampling, rows, index in self._groups:
            kept, ids = probabilities(logits.index_select(0, index), sampling)
            uniform = [
                torch.rand(1, dtype=torch.float64, generator=self._generators[row], device=logits.device)
                for row in rows
            ]
            chosen = chosen.index_copy(0, index, draw(kept, ids, torch.stack(uniform)))
        if self._penalty is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen


def draw(kept: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens (B,) at which the cumulative probabilities pass `uniform`.

    One random number for each token, however many can be chosen: so a seed gives the same for a row alone and beside others.

    Args:
        kept, ids: (B, n), as `probabilities` gives them.
        uniform: (B, 1) fp64 in [0, 1).
    """
    cumulative = kept.double().cumsum(-1)  # (B, n); in fp32, it is off by more than the rarest tokens have
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, index)[:, 0]


def log_probabilities(logits: Tensor, token: int, count: int, offset: int = 0) -> Logprobs:
    """Return those of `token` and of the top `count`, from fp32 logits (vocab,); `offset` characters are before it."""
    logs = logits.log_softmax(-1)
    best = logs.topk(min(count, len(logs)))
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprobs(token, float(logs[token]), top, offset)
