"""Attention, once for all families: which keys each query may see, and the kernel that fits.

`make_mask` runs once per forward and `attend` once per layer. A key is seen when it is in the query's document, not
after it, and less than a window before it. Documents packed into one row are attended to one by one: a row of 30 short
documents costs 30 small squares, not one large one.
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

# On a CPU, up to this length two matmuls and a softmax are faster than the fused kernel, forward and backward: measured with
# AMX and without (`python scripts/bench/cpu_choices.py`). In fp32, where no instruction set has matmuls of its own, never.
EXPLICIT_LENGTH = 512
EXPLICIT_LENGTH_FP32 = 0


@dataclass(frozen=True)
class Mask:
    """Who sees whom. With neither `allowed` nor `documents`: causal, and the last query sees every key."""

    queries: Tensor
    """(B, T) int64 positions."""
    keys: Tensor
    """(B, S) int64 positions."""
    allowed: Tensor | None = None
    """(B, 1, T, S) bool: query t may see key s."""
    documents: Documents | None = None
    """Documents packed into rows; then `allowed` is not used."""
    window: int | None = None
    """How many keys a query sees, itself included; None: all."""
    slots: Slots | None = None
    """With a cache: where its layers put the new keys."""


def make_mask(positions: Tensor, documents: Tensor | None, cache: KVCache | None, window: int | None) -> Mask:
    """The mask of one forward pass, for all layers that share a window.

    Args:
        positions: (B, T) int64 within each document, rising; below 0 is padding, seen by padding only.
        documents: (B, T) ints, equal for tokens of one document, which stand side by side; None: one per row.
        cache: advanced by these T positions already.
        window: keys that a query sees, itself included; None: all.
    """
    T = positions.shape[1]
    if cache is not None:
        if documents is not None:
            raise ValueError("documents and cache do not go together: generation has one document per row")
        slots = cache.slots(window)
        keys = slots.positions[:, : slots.used]  # (B, S)
        simple = not cache.ragged and (window is None or cache.length <= window) and T in (1, cache.length)
        if simple:
            return Mask(positions, keys, None, None, window, slots)
        allowed = _allowed(positions, keys, window)
        if cache.ragged:  # padding, whose keys are nowhere, may look at anything: what comes of it must be finite
            allowed = allowed | (positions < 0)[:, None, :, None]
        return Mask(positions, keys, allowed, None, window, slots)
    if documents is None:
        fits = window is None or window >= T
        padded = not positions.is_meta and bool((positions[:, 0] < 0).any())  # a sync point; training gives documents
        return Mask(positions, positions, None if fits and not padded else _allowed(positions, positions, window))
    if documents.device.type == "cpu":
        return Mask(positions, positions, documents=_unpack(documents), window=window)
    same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
    return Mask(positions, positions, _allowed(positions, positions, window) & same)


def _allowed(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(B, 1, T, S) bool from positions (B, T) and (B, S)."""
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
    """softmax(q k^T * scale) v over the keys that `mask` allows.

    Args:
        q: (B, n_heads, T, head_dim).
        k, v: (B, n_kv_heads, S, head_dim); query head i uses key head i * n_kv_heads // n_heads.
        scale: 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        slopes: (n_heads,) fp32; slope * (query - key position) is taken off each score (ALiBi, arXiv 2108.12409).
        dropout: on the softmax; 0 outside of training.

    Returns:
        (B, n_heads, T, head_dim), in v's dtype.
    """
    if k.dtype != v.dtype or q.dtype != v.dtype:  # under autocast, rotary leaves q and k in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = scale or 1.0 / math.sqrt(q.shape[-1])
    if mask.documents is None:
        return _kernel(q, k, v, mask.allowed, scale, softcap, _alibi(mask.queries, mask.keys, slopes), dropout)
    if torch.compiler.is_compiling():  # its loop is another one in each batch, and its time is in large kernels
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
    """`attend` for packed rows on a CPU."""
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
        # what is empty comes last: no real token sees it
        y = _kernel(rows[0], rows[1], rows[2], allowed, scale, softcap, _alibi(steps, steps, slopes), dropout)
        outputs.append(y.reshape(-1, head_dim))  # (count * n_heads * longest, head_dim)
    return _Repack.apply(torch.cat(outputs), mask.documents, q.shape)


def _alibi(queries: Tensor, keys: Tensor, slopes: Tensor | None) -> Tensor | None:
    """(B, n_heads, T, S) fp32, to be added to scores, from positions (B, T) and (B, S)."""
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
    """One product of attention; `allowed` None means causal, T being S or 1."""
    B, n_heads, T, head_dim = q.shape
    n_kv_heads, S = k.shape[1], k.shape[2]
    plain = softcap is None and bias is None
    longest = EXPLICIT_LENGTH_FP32 if q.dtype == torch.float32 else EXPLICIT_LENGTH
    if plain and (q.device.type != "cpu" or T == 1 or max(T, S) > longest):
        causal = False
        if allowed is None and T > 1:  # a branch: compiled, T is a symbol, and so would `T > 1` be
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
    q = q.reshape(B * n_kv_heads, repeats * T, head_dim)  # the heads that share a key head stand below each other
    k, v = k.reshape(B * n_kv_heads, S, head_dim), v.reshape(B * n_kv_heads, S, head_dim)
    if plain:  # one product that scales and hides
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
    weights = torch.softmax(scores, dim=-1).to(v.dtype)  # in fp32 inside
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights.view(B * n_kv_heads, repeats * T, S), v).view(B, n_heads, T, head_dim)
