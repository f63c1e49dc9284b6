"""Attention for all families: positions, the mask of each query, and the choice of a kernel.

`advance` and `make_mask` run once per forward and `attend` once per layer. A query sees the keys of its own document that
are not after it and less than a window before it. On a CPU, attention runs document by document over a packed sequence: 30
short documents cost 30 small squares of scores, not one large square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.ops.packed_layout import Documents, _Repack, _Unpack, _unpack

if TYPE_CHECKING:
    from litmini.ops.kv_cache import KVCache, Slots

# On a CPU, two matmuls and a softmax are faster than the fused kernel up to this length, forward and backward: measured with
# and without AMX (`python scripts/bench/cpu_choices.py`). In fp32, which has no matmul instructions, they never are.
EXPLICIT_LENGTH = 512
EXPLICIT_LENGTH_FP32 = 0


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees. With neither `allowed` nor `documents`: causal, and the last query sees every key."""

    queries: Tensor
    """(B, T) int64 positions."""
    keys: Tensor
    """(B, S) int64 positions."""
    allowed: Tensor | None = None
    """(B, 1, T, S) bool: query t may see key s."""
    documents: Documents | None = None
    """Documents packed into sequences; `allowed` is then unused."""
    window: int | None = None
    """Number of keys that a query sees, its own included; None: all."""
    slots: Slots | None = None
    """With a cache: the slots of the new keys."""


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


def make_mask(positions: Tensor, documents: Tensor | None, cache: KVCache | None, window: int | None) -> Mask:
    """Return the mask of one forward pass, for all layers with the same window.

    Args:
        positions: (B, T) int64 within each document, increasing; below 0 is padding, which only padding sees.
        documents: (B, T) document ids; the tokens of one document are contiguous; None: one document per sequence.
        cache: already advanced by these T positions.
        window: number of keys that a query sees, its own included; None: all.
    """
    T = positions.shape[1]
    if cache is not None:
        if documents is not None:
            raise ValueError("documents and a cache cannot be combined: generation has one document per sequence")
        slots = cache.slots(window)
        keys = slots.positions[:, : slots.used]  # (B, S)
        simple = not cache.ragged and (window is None or cache.length <= window) and T in (1, cache.length)
        if simple:
            return Mask(positions, keys, None, None, window, slots)
        allowed = _allowed(positions, keys, window)
        if cache.ragged:  # padding has no keys in the cache: it sees all keys, as its output must be finite
            allowed = allowed | (positions < 0)[:, None, :, None]
        return Mask(positions, keys, allowed, None, window, slots)
    if documents is None:
        fits = window is None or window >= T
        padded = not positions.is_meta and bool((positions[:, 0] < 0).any())  # CPU-GPU sync point, not in training
        return Mask(positions, positions, None if fits and not padded else _allowed(positions, positions, window))
    if documents.device.type == "cpu":
        return Mask(positions, positions, documents=_unpack(documents), window=window)
    same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return Mask(positions, positions, _allowed(positions, positions, window) & same)


def _allowed(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return the mask (B, 1, T, S) bool of positions (B, T) and (B, S)."""
    distance = queries[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, S)
    seen = (distance >= 0) & ((keys >= 0)[:, None, None, :] | (queries < 0)[:, None, :, None])
    return seen if window is None else seen & (distance < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T * scale) v over the keys that `mask` allows.

    Args:
        q: (B, n_heads, T, head_dim).
        k, v: (B, n_kv_heads, S, head_dim); query head i uses key head i * n_kv_heads // n_heads.
        scale: 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        slopes: (n_heads,) fp32; slope * (query - key position) is subtracted from each score (ALiBi, arXiv 2108.12409).
        dropout: probability, applied to the softmax; 0 outside of training.

    Returns:
        (B, n_heads, T, head_dim), in v's dtype.
    """
    if k.dtype != v.dtype or q.dtype != v.dtype:  # under autocast, rotary leaves q and k in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = scale or 1.0 / math.sqrt(q.shape[-1])
    if mask.documents is None:
        return _kernel(q, k, v, mask.allowed, scale, softcap, _alibi(mask.queries, mask.keys, slopes), dropout)
    if torch.compiler.is_compiling():  # the loop over documents differs in each batch, and large kernels take its time
        from litmini.ops.uncompiled import call_uncompiled  # imports torch._dynamo

        return call_uncompiled(_document_by_document, q, k, v, mask, scale, softcap, slopes, dropout)
    return _document_by_document(q, k, v, mask, scale, softcap, slopes, dropout)


def _document_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    dropout: float,
) -> Tensor:
    """Compute `attend` for packed sequences on a CPU."""
    assert mask.documents is not None
    head_dim = q.shape[-1]
    parts = []
    for x in (q, k, v):
        sizes = [count * x.shape[1] * longest for count, longest in mask.documents.shapes]
        parts.append(_Unpack.apply(x, mask.documents).split(sizes))
    outputs = []
    for (count, longest), *qkv in zip(mask.documents.shapes, *parts, strict=True):
        rows = [x.view(count, -1, longest, head_dim) for x in qkv]  # (count, heads, longest, head_dim)
        steps, allowed = torch.arange(longest)[None], None
        if mask.window is not None and longest > mask.window:
            allowed = _allowed(steps, steps, mask.window)
        # padding comes last: no real token sees it
        y = _kernel(rows[0], rows[1], rows[2], allowed, scale, softcap, _alibi(steps, steps, slopes), dropout)
        outputs.append(y.reshape(-1, head_dim))  # (count * n_heads * longest, head_dim)
    return _Repack.apply(torch.cat(outputs), mask.documents, q.shape)


def _alibi(queries: Tensor, keys: Tensor, slopes: Tensor | None) -> Tensor | None:
    """Return the bias of scores (B, n_heads, T, S) fp32 from positions (B, T) and (B, S)."""
    if slopes is None:
        return None
    return slopes[:, None, None] * (keys[:, None, None, :] - queries[:, None, :, None])


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Compute attention with one kernel; `allowed` None means causal, where T is S or 1."""
    B, n_heads, T, head_dim = q.shape
    n_kv_heads, S = k.shape[1], k.shape[2]
    plain = softcap is None and bias is None
    longest = EXPLICIT_LENGTH_FP32 if q.dtype == torch.float32 else EXPLICIT_LENGTH
    if plain and (q.device.type != "cpu" or T == 1 or max(T, S) > longest):
        causal = False
        if allowed is None and T > 1:  # a branch: under torch.compile `T > 1` would be symbolic, not a bool
            causal = True
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal,
            scale=scale,
            enable_gqa=n_heads != n_kv_heads,
            dropout_p=dropout,
        )
    if allowed is None:
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    hidden = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
    repeats = n_heads // n_kv_heads
    q = q.reshape(B * n_kv_heads, repeats * T, head_dim)  # query heads with the same key head are stacked
    k, v = k.reshape(B * n_kv_heads, S, head_dim), v.reshape(B * n_kv_heads, S, head_dim)
    if plain:  # one matmul scales and masks
        if hidden.dim() == 2:
            hidden = hidden.repeat(repeats, 1)  # (repeats * T, S)
        else:
            hidden = hidden.expand(B, n_heads, T, S).reshape(B * n_kv_heads, repeats * T, S)
        scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale).view(B, n_heads, T, S)
    else:
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, n_heads, T, S) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias
        scores = scores + hidden
    weights = torch.softmax(scores, dim=-1).to(v.dtype)  # computed in fp32
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights.view(B * n_kv_heads, repeats * T, S), v).view(B, n_heads, T, head_dim)
