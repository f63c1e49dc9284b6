"""Tokens in chunks, for recurrent layers: within a chunk by matmuls, from chunk to chunk by a state that decays."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens that are computed together, by matmuls; from chunk to chunk goes a state."""


def split_chunks(x: Tensor) -> Tensor:
    """(B, T, n_heads, groups, ...) -> (B, n_heads, groups, n_chunks, size, ...); zeros at the end change no state."""
    size = min(CHUNK, x.shape[1])
    x = F.pad(x, (*[0, 0] * (x.dim() - 2), 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return x.movedim((1, 2), (3, 4))


def chunk_decays(decay: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is left of a state after the decay of tokens, all of it in fp32: nothing in another document.

    Args:
        decay: (B, n_heads, groups, n_chunks, size), at most 0.
        ids: (B, T) of documents.

    Returns:
        From the state before a chunk to each of its tokens, and from each token to the state after the chunk, (.., n_chunks,
        size) each; from state to state, (.., n_chunks); from each token, the last dimension, to each later one, (.., n_chunks,
        size, size).
    """
    size = decay.shape[-1]
    # decay since the chunk began, in two parts: the difference of large ones must be exact
    exact = decay.double().cumsum(-1)
    total = exact.float()
    rest = (exact - total).float().detach()
    later = torch.ones(size, size, dtype=torch.bool, device=decay.device).triu(1)
    from_state, between = total.exp(), total[..., -1].exp()
    to_state = (total[..., -1:] - total + (rest[..., -1:] - rest)).exp()
    if ids is not None:
        ids = torch.cat((ids, ids[:, -1:].expand(-1, -ids.shape[1] % size)), 1).unflatten(1, (-1, size))[:, None, None]
        later = later | (ids[..., None] != ids[..., None, :])  # (B, 1, 1, n_chunks, size, size)
        follows = ids == F.pad(ids[..., :-1, -1:], (0, 0, 1, 0), value=-1)  # the last token of the chunk before
        from_state, to_state = from_state * follows, to_state * (ids == ids[..., -1:])
        between = between * follows[..., -1]
    pairs: Tensor = _Differences.apply(exact)
    return from_state, to_state, between, pairs.masked_fill(later, float("-inf")).exp()


class _Differences(torch.autograd.Function):
    """x (.., n) fp64 -> x_i - x_j (.., n, n) in fp32, whose gradients are summed in fp64: large ones cancel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        first = x.float()
        rest = (x - first).float()
        return first[..., None] - first[..., None, :] + (rest[..., None] - rest[..., None, :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.sum(-1, dtype=torch.float64) - grad.sum(-2, dtype=torch.float64)
