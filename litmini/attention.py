"""Attention, once for all families: which keys each query may see, and the kernel that fits.

`make_mask` runs once per forward and `attend` once per layer. A key is seen when it is in the query's document, not
after it, and less than a window before it. Documents packed into one row are attended to one by one: a row of 30 short
documents costs 30 small squares, not one large one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.cache import KVCache

EXPLICIT_LENGTH = 512  # on the CPU, up to here two products and a softmax beat the fused kernel (bf16, forward + backward)


@dataclass(frozen=True)
class Mask:
    """Who sees whom. With neither field set: causal over the whole row."""

    allowed: Tensor | None = None
    """(B, 1, T, S) bool: query t may see key s."""
    groups: tuple[tuple[Tensor, Tensor], ...] | None = None
    """Documents of similar length: flat token indices (n, L) into the B * T tokens, and which of them are real."""
    window: int | None = None
    """With groups: how many keys a query sees, itself included."""


def make_mask(positions: Tensor, documents: Tensor | None, cache: KVCache | None, window: int | None) -> Mask:
    """The mask of one forward pass, for all layers that share a window.

    Args:
        positions: (B, T) int64 within each document, rising; below 0 is padding, seen by padding only.
        documents: (B, T) ints, equal for tokens of one document, which stand side by side; None: one per row.
        cache: advanced by T slots here.
        window: keys that a query sees, itself included; None: all.
    """
    if cache is not None:
        if documents is not None:
            raise ValueError("documents and cache do not go together: generation has one document per row")
        start, keys = cache.length, cache.advance(positions)
        if not cache.padded and (window is None or cache.length <= window):
            if start == 0:
                return Mask()
            if positions.shape[1] == 1:
                return Mask(torch.ones((), dtype=torch.bool, device=keys.device).expand(1, 1, 1, keys.shape[1]))
        return Mask(_allowed(positions, keys, window))
    if documents is None:
        return Mask() if window is None or positions.shape[1] <= window else Mask(_allowed(positions, positions, window))
    if documents.device.type == "cpu":
        return Mask(groups=_group(documents), window=window)
    return Mask(_allowed(positions, positions, window) & (documents[:, None, :, None] == documents[:, None, None, :]))


def _allowed(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(B, 1, T, S) bool from positions (B, T) and (B, S)."""
    distance = queries[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, S)
    seen = (distance >= 0) & ((keys >= 0)[:, None, None, :] | (queries < 0)[:, None, :, None])
    return seen if window is None else seen & (distance < window)


def _group(documents: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Sort the documents of a batch into groups, each padded to its longest: less than a quarter is padding."""
    B, T = documents.shape
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()  # (n_documents,)
    lengths = torch.diff(first, append=torch.tensor([B * T]))
    order = lengths.argsort(descending=True, stable=True).tolist()
    sizes = lengths.tolist()
    groups: list[list[int]] = []
    for i in order:
        if groups and sizes[i] > 0.75 * sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    result = []
    for members in groups:
        offsets = torch.arange(sizes[members[0]])
        real = offsets < lengths[members][:, None]  # (n, L)
        result.append(((first[members][:, None] + offsets).clamp(max=B * T - 1), real))
    return tuple(result)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v over the keys that `mask` allows.

    Args:
        q: (B, n_heads, T, head_dim).
        k, v: (B, n_kv_heads, S, head_dim); query head i uses key head i * n_kv_heads // n_heads.
        scale: 1 / sqrt(head_dim) by default.

    Returns:
        (B, n_heads, T, head_dim), in q's dtype.
    """
    if k.dtype != v.dtype or q.dtype != v.dtype:  # under autocast, rotary leaves q and k in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = scale or 1.0 / math.sqrt(q.shape[-1])
    if mask.groups is None:
        return _kernel(q, k, v, mask.allowed, scale)
    B, n_heads, T, head_dim = q.shape
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, head_dim)
    outputs, places = [], []
    for index, real in mask.groups:
        n, L = index.shape
        gathered = [x[index].transpose(1, 2) for x in (flat_q, flat_k, flat_v)]  # (n, heads, L, head_dim)
        allowed = None
        if mask.window is not None and L > mask.window:
            steps = torch.arange(L)
            allowed = _allowed(steps[None], steps[None], mask.window)
        y = _kernel(gathered[0], gathered[1], gathered[2], allowed, scale)  # padding comes last: no real token sees it
        outputs.append(y.transpose(1, 2)[real])  # (real tokens, n_heads, head_dim)
        places.append(index[real])
    back = torch.cat(places).argsort()
    return torch.cat(outputs)[back].view(B, T, n_heads, head_dim).transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """One product of attention; `allowed` None means causal."""
    B, n_heads, T, head_dim = q.shape
    n_kv_heads, S = k.shape[1], k.shape[2]
    if q.device.type != "cpu" or max(T, S) > EXPLICIT_LENGTH:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=n_heads != n_kv_heads
        )
    if allowed is None:
        allowed = torch.ones(T, S, dtype=torch.bool).tril()
    bias = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, float("-inf"))  # (B or 1, 1, T, S)
    repeats = n_heads // n_kv_heads
    q = q.reshape(B * n_kv_heads, repeats * T, head_dim)  # the heads that share a key head stand below each other
    k, v = k.reshape(B * n_kv_heads, S, head_dim), v.reshape(B * n_kv_heads, S, head_dim)
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, n_heads, T, S) * scale + bias
    weights = torch.softmax(scores, dim=-1)  # in fp32 inside, rounded to q's dtype
    return torch.bmm(weights.view(B * n_kv_heads, repeats * T, S), v).view(B, n_heads, T, head_dim)
