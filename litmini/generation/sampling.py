"""Choice of a token from logits: greedy, or by temperature, top-k, top-p, min-p and repetition penalty."""

from dataclasses import dataclass

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


def penalize(logits: Tensor, tokens: list[int], penalty: float) -> Tensor:
    """Return logits (vocab,) in which those of `tokens` are divided by `penalty` where positive, else multiplied."""
    seen = torch.tensor(sorted(set(tokens)), device=logits.device)
    values, penalty = logits[seen], float(min(max(penalty, 1e-20), 1e20))  # beyond, fp32 overflows and 0 * inf is NaN
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def probabilities(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return the probabilities to sample from and their token ids, (n,) each, from fp32 logits (vocab,)."""
    temperature = min(max(float(sampling.temperature), 1e-30), 1e30)  # within the range of fp32
    if temperature < 1e-6:  # the quotients could overflow; 0 for the most probable token cannot
        logits = logits - logits.max()
    logits = logits / temperature
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return logits.softmax(-1), torch.arange(len(logits), device=logits.device)
    ordered, index = logits.sort(descending=True, stable=True)  # equal logits stay in order, as in argmax
    if sampling.top_k is not None:
        k = min(sampling.top_k, len(ordered))
        ordered, index = ordered[:k], index[:k]
    kept = ordered.softmax(-1)
    if sampling.top_p is not None:  # the fewest tokens that together have at least top_p; always the first
        below = kept.cumsum(-1) - kept < sampling.top_p
        below[0] = True  # a top_p below what fp32 can hold is 0 here
        kept = kept[below]
    if sampling.min_p is not None:
        kept = kept[kept >= sampling.min_p * kept[0]]
    return kept / kept.sum(), index[: len(kept)]


def choose(logits: Tensor, sampling: SamplingConfig, tokens: list[int], generator: torch.Generator | None) -> int:
    """Return the next token id, from fp32 logits (vocab,).

    Args:
        tokens: prompt and completion so far, for the repetition penalty.
        generator: on the device of `logits`; not used at temperature 0, which is greedy.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalize(logits, tokens, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())  # CPU-GPU sync point
    kept, index = probabilities(logits, sampling)
    return int(index[torch.multinomial(kept, 1, generator=generator)])


def log_probabilities(logits: Tensor, token: int, count: int, offset: int = 0) -> Logprobs:
    """Return those of `token` and of the top `count`, from fp32 logits (vocab,); `offset` characters are before it."""
    logs = logits.log_softmax(-1)
    best = logs.topk(min(count, len(logs)))
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprobs(token, float(logs[token]), top, offset)
