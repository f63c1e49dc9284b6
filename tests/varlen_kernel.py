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
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(q)
    assert (bounds.diff() >= 0).all() and bounds.diff().max() <= longest


def _documents(bounds: Tensor) -> list[slice]:
    ends = bounds.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, enable_gqa=False,
    seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    _check(query, key, value, cu_seq_q, max_q)
    assert cu_seq_k is not None and torch.equal(cu_seq_q, cu_seq_k) and max_k == max_q
    assert enable_gqa or query.shape[1] == key.shape[1]
    calls.append({"window": tuple(window_size), "documents": len(_documents(cu_seq_q)), "dtype": query.dtype})
    q, k, v = _spread(query, key, value)
    how = (is_causal, scale, window_size or [-1, -1])
    parts = [torch.einsum("hqk,khd->qhd", _scores(q[d], k[d], *how).softmax(-1), v[d]) for d in _documents(cu_seq_q)]
    out = torch.cat(parts).to(query.dtype)
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
