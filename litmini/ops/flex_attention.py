"""FlexAttention for packed sequences whose scores are changed: softcap (Gemma 2), ALiBi (MPT, Falcon), sinks (gpt-oss).

On a GPU it is compiled once for each shape, and computes only blocks of 128 x 128 in which some query sees some key. On a CPU
it runs uncompiled, forward only, for tests. It has not run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


def block_mask(documents: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """Return which blocks of scores are computed: causal, within a document and a window.

    Args:
        documents: (B, T) int64 ids; the tokens of one document are contiguous.
        positions: (B, T) int64 within each document.
        window: number of keys that a query sees, its own included; None: all.
    """

    def is_seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (documents[b, q] == documents[b, k]) & (q >= k)
        return seen if window is None else seen & (positions[b, q] - positions[b, k] < window)

    B, T = documents.shape
    make: Any = compiled(create_block_mask) if documents.device.type == "cuda" else create_block_mask
    return make(is_seen, B, None, T, T, device=documents.device)


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMask,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    positions: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute `attention.attend` for packed sequences, whose `positions` (B, T) count from 0 in each document."""

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score + slopes[h] * (positions[b, j] - positions[b, i])
        return score

    changes = None if softcap is None and slopes is None else change
    run: Any = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        run = compiled(flex_attention)
    how = {"score_mod": changes, "block_mask": blocks, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        return run(q, k, v, **how)
    y, aux = run(q, k, v, **how, return_aux=AuxRequest(lse=True))
    # a sink is one more key with a value of zero: it takes its part of the softmax, exp(sink) / (exp(lse) + exp(sink))
    return y * torch.sigmoid(aux.lse - sinks[:, None])[..., None].to(y.dtype)


@functools.lru_cache
def compiled(function: Any) -> Any:
    """Return `function` compiled for whatever comes: uncompiled, it would have all scores in memory."""
    from litmini.ops.uncompiled import allow_forms

    allow_forms()
    return torch.compile(function)
