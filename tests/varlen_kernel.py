"""The operator behind `torch.nn.attention.varlen.varlen_attn`, which has no CPU implementation, by its documented contract."""

import itertools

import torch
from torch import Tensor
from torch.nn.attention import varlen

calls: list[dict] = []
"""Arguments of each forward call."""


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float | None, window: list[int]) -> Tensor:
    """Return the scores (heads, queries, keys) of one document, -inf where a query does not see a key."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None] + len(k) - len(q)
    left, right = (-1, 0) if is_causal else window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    return scores.masked_fill(~seen, float("-inf"))


def _check(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.ndim == k.ndim == v.ndim == 3 and q.shape[-1] <= 256 and q.shape[1] % k.shape[1] == 0
    assert q.shape[-1] % 8 == 0  # torch's FlashAttention refuses other heads
    _check_bounds(bounds, len(q), longest)


def _cached(q, k, v, query_bounds, key_bounds, longest_query, longest_key, used) -> tuple[list[slice], list[slice]]:
    """Return queries and keys of each document that has queries; of its keys, the first `used` are read."""
    _check(q, k, v, query_bounds, longest_query)
    _check_bounds(key_bounds, len(k), longest_key)
    assert used.dtype == torch.int32 and len(used) == len(key_bounds) - 1 and k.is_contiguous() and v.is_contiguous()
    found = []
    for i, (first, last) in enumerate(itertools.pairwise(query_bounds.tolist())):
        start, stop, n = int(key_bounds[i]), int(key_bounds[i + 1]), int(used[i])
        assert 0 <= n <= stop - start
        if first < last:
            found.append((slice(first, last), slice(start, start + n)))
    return [queries for queries, _ in found], [keys for _, keys in found]


def _check_bounds(bounds: Tensor, tokens: int, longest: int) -> None:
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == tokens
    assert (bounds.diff() >= 0).all() and bounds.diff().max() <= longest


def _documents(bounds: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(bounds.tolist()) if a < b]


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    if seqused_k is None:
        assert cu_seq_k is cu_seq_q and max_k == max_q
        _check(query, key, value, cu_seq_q, max_q)
        queries = keys = _documents(cu_seq_q)
    else:
        queries, keys = _cached(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
    calls.append({"window": tuple(window_size), "documents": len(queries), "dtype": query.dtype})
    q, k, v = _spread(query, key, value)
    how, out = (is_causal, scale, window_size or [-1, -1]), torch.zeros_like(query)
    for d, seen in zip(queries, keys, strict=True):
        if seen.start < seen.stop:  # without keys, the kernel gives zeros
            weights = _scores(q[d], k[seen], *how).softmax(-1)
            out[d] = torch.einsum("hqk,khd->qhd", weights, v[seen]).to(query.dtype)
    lse = torch.zeros(query.shape[1], len(query))
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale=None,
    window_size=None,
):  # fmt: skip
    """The gradients of softmax(s) v with s = scale * q k^T: ds = p * (dp - sum of p * dp), where dp = do v^T."""
    q, k, v = _spread(query, key, value)
    grad_out, scale = grad_out.float(), scale or query.shape[-1] ** -0.5
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for d in _documents(cu_seq_q):
        p = _scores(q[d], k[d], is_causal, scale, window_size or [-1, -1]).softmax(-1)
        dp = torch.einsum("qhd,khd->hqk", grad_out[d], v[d])
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        grads[0][d] = torch.einsum("hqk,khd->qhd", ds, k[d])
        grads[1][d] = torch.einsum("hqk,qhd->khd", ds, q[d])
        grads[2][d] = torch.einsum("hqk,qhd->khd", p, grad_out[d])
    together = [g.view(len(g), key.shape[1], -1, g.shape[-1]).sum(2) for g in grads[1:]]  # over the query heads
    return tuple(g.to(query.dtype) for g in (grads[0], *together))


def _spread(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Return all in fp32, with as many heads."""
    repeats = q.shape[1] // k.shape[1]
    return [q.float(), k.float().repeat_interleave(repeats, 1), v.float().repeat_interleave(repeats, 1)]
