"""Positions of the tokens of one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from litmini.ops.kv_cache import KVCache


def advance(tokens: Tensor, positions: Tensor | None, cache: KVCache | None) -> Tensor:
    """Return the positions (B, T) int64 of tokens (B, T), and advance the cache to them.

    Without positions, each sequence continues after the last position in the cache, or starts at 0.
    """
    if positions is None:
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
    if cache is not None:
        cache.advance(positions)
    return positions
