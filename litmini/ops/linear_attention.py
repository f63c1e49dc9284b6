"""Linear attention: the gated delta rule, and the causal convolution before it, over packed documents or with a state cache.

`make_runs` runs once per forward, `causal_conv` and `gated_delta_rule` once per layer. States and convolutions begin again
with each document: no token knows anything of another document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.ops.attention import Documents, document_ids
from litmini.ops.chunks import chunk_decays, split_chunks
from litmini.ops.recurrent_kernels import delta_rule_kernel

if TYPE_CHECKING:
    from litmini.ops.kv_cache import KVCache


@dataclass(frozen=True)
class Runs:
    """Which tokens follow on one another."""

    positions: Tensor
    """(B, T) int64; below 0: padding."""
    ids: Tensor | None = None
    """(B, T) int64, one id per document, whose tokens are contiguous; None: one document per sequence."""
    bounds: Tensor | None = None
    """(n + 1,) int64: the first of the B * T tokens of each document, then B * T; None where the host does not know them."""
    padded: bool = False
    """With a cache: some of the tokens may be padding, which stands on the left."""


def make_runs(positions: Tensor, documents: Tensor | Documents | None, cache: KVCache | None) -> Runs:
    """Return the runs of one forward pass, for all recurrent layers; arguments are those of `make_mask`."""
    if cache is not None:
        return Runs(positions, padded=cache.static or cache.ragged)
    if documents is not None:
        bounds = documents.bounds.long() if isinstance(documents, Documents) else None
        return Runs(positions, document_ids(documents), bounds)
    padded = not positions.is_meta and bool((positions[:, 0] < 0).any())  # CPU-GPU sync point, not in training
    return Runs(positions, (positions >= 0).long() if padded else None)


def causal_conv(
    x: Tensor, weight: Tensor, runs: Runs, tail: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the causal depthwise convolution of x over the tokens of each document, (B, T, C) in x's dtype.

    Args:
        x: (B, T, C).
        weight: (C, 1, K); its last column is that of the token itself.
        tail: (B, K - 1, C), the inputs before x, with a cache.
        bias: (C,), added to the convolution.

    Returns:
        The convolution, computed in fp32; with a tail, the last K - 1 inputs.
    """
    K = weight.shape[-1]
    weight = weight[:, 0].mT  # (K, C)
    if tail is None:
        return _conv(F.pad(x, (0, 0, K - 1, 0)), weight, bias, runs.ids), None
    inputs = torch.cat((tail.to(x.dtype), x), 1)  # (B, K - 1 + T, C)
    if runs.padded:  # the tail moves to the first token
        n_padding = (runs.positions < 0).sum(1, keepdim=True)  # (B, 1)
        at = torch.arange(inputs.shape[1], device=x.device)
        at = torch.where(at < n_padding + K - 1, (at - n_padding).clamp(min=0), at)  # (B, K - 1 + T)
        inputs = inputs.gather(1, at[..., None].expand_as(inputs))
    return _conv(inputs, weight, bias, None), inputs[:, inputs.shape[1] - (K - 1) :]


def _conv(inputs: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    y: Tensor = _Conv.apply(inputs, weight, bias, ids)
    return y


def _taps(K: int, ids: Tensor | None) -> list[Tensor | None]:
    """Return for each row of the weight whether its input is of the token's own document, (B, T, 1) bool; None: it is."""
    if ids is None:
        return [None] * K
    before = F.pad(ids, (K - 1, 0), value=-1)
    return [(before[:, j : j + ids.shape[1]] == ids)[..., None] for j in range(K - 1)] + [None]


class _Conv(torch.autograd.Function):
    """Keeps its inputs only: autograd would keep one masked copy of them for each row of the weight."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, ids)
        ctx.bias_dtype = None if bias is None else bias.dtype
        K = len(weight)
        T = inputs.shape[1] - K + 1
        y = inputs[:, K - 1 :].float() * weight[-1].float()
        for j, tap in enumerate(_taps(K, ids)[:-1]):
            term = inputs[:, j : j + T].float() * weight[j].float()
            y += term if tap is None else term * tap
        if bias is not None:
            y += bias.float()
        return y.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        inputs, weight, ids = ctx.saved_tensors
        T, grad = grad.shape[1], grad.float()
        d_inputs = torch.zeros(inputs.shape, dtype=torch.float32, device=grad.device)
        d_weight = []
        for j, tap in enumerate(_taps(len(weight), ids)):
            own = grad if tap is None else grad * tap
            d_inputs[:, j : j + T] += own * weight[j].float()
            if ctx.needs_input_grad[1]:
                d_weight.append((own * inputs[:, j : j + T].float()).sum((0, 1)))
        d_bias = grad.sum((0, 1)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return d_inputs.to(inputs.dtype), torch.stack(d_weight).to(weight.dtype) if d_weight else None, d_bias, None


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: Runs, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule (Gated Delta Networks, arXiv 2412.06464), in fp32, also under autocast.

    For each token, S = exp(decay) S, then S = S + k (beta (v - k S)), and its output is q S / sqrt(d_k); q and k are
    normalized.

    Args:
        q, k: (B, T, n_k_heads, d_k); value head i uses key head i * n_k_heads // n_v_heads.
        v: (B, T, n_v_heads, d_v).
        decay: (B, T, n_v_heads), at most 0.
        beta: (B, T, n_v_heads).
        state: (B, n_v_heads, d_k, d_v) fp32, with a cache; None: 0.

    Returns:
        (B, T, n_v_heads, d_v) in v's dtype, and the state after the last token; empty, where none came in and a kernel of
        `recurrent_kernels.py` ran.
    """
    if torch.compiler.is_compiling():  # the loop over chunks would be unrolled
        from litmini.ops.uncompiled import call_uncompiled  # imports torch._dynamo

        return call_uncompiled(_gated_delta_rule, q, k, v, decay, beta, runs, state)  # type: ignore[no-any-return]
    return _gated_delta_rule(q, k, v, decay, beta, runs, state)


def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: Runs, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if state is None and (of_kernel := delta_rule_kernel(q, k, v, decay, beta, runs)) is not None:
        return of_kernel, of_kernel.new_empty(0)
    B, _, n_v_heads, d_v = v.shape
    n_k_heads, d_k = k.shape[2:]
    groups = n_v_heads // n_k_heads
    with torch.autocast("cpu" if v.is_meta else v.device.type, enabled=False):
        q, k = (_normalize(x.float())[:, :, :, None] for x in (q, k))  # (B, T, n_k_heads, 1, d_k)
        q = q * d_k**-0.5
        values = v.float().unflatten(2, (n_k_heads, groups))  # (B, T, n_k_heads, groups, d_v)
        decay, beta = (x.float().unflatten(2, (n_k_heads, groups)) for x in (decay, beta))
        if runs.padded:  # padding leaves the state as it is, whatever it holds
            padding = (runs.positions < 0)[..., None, None]
            decay, beta = decay.masked_fill(padding, 0), beta.masked_fill(padding, 0)
            k, values = k.masked_fill(padding[..., None], 0), values.masked_fill(padding[..., None], 0)
        if state is None:
            state = values.new_zeros(B, n_v_heads, d_k, d_v)
        state = state.unflatten(1, (n_k_heads, groups))
        compute = _step if v.shape[1] == 1 and not torch.is_grad_enabled() else _chunks
        y, state = compute(q, k, values, decay, beta, runs.ids, state)
    return y.flatten(2, 3).to(v.dtype), state.flatten(1, 2)


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, ids: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a single token; arguments and results are those of `_chunks`."""
    state = state * decay[:, 0, ..., None, None].exp()  # (B, n_k_heads, groups, d_k, d_v)
    delta = (v[:, 0] - (k[:, 0, ..., None, :] @ state)[..., 0, :]) * beta[:, 0, ..., None]
    state = state + k[:, 0, ..., None] * delta[..., None, :]
    return (q[:, 0, ..., None, :] @ state)[..., 0, :][:, None], state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, ids: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute all tokens in chunks: what they do to one another by a triangular solve, what went before by the state.

    Args:
        q, k: (B, T, n_k_heads, 1, d_k).
        v: (B, T, n_k_heads, groups, d_v).
        decay, beta: (B, T, n_k_heads, groups).
        ids: (B, T) of documents.
        state: (B, n_k_heads, groups, d_k, d_v).

    Returns:
        (B, T, n_k_heads, groups, d_v), and the state after the last token.
    """
    T = v.shape[1]
    q, k, v, decay, beta = map(split_chunks, (q, k, v, decay, beta))
    from_state, to_state, between, pairs = chunk_decays(decay, ids)
    system = k @ k.mT * beta[..., None] * pairs  # its diagonal counts as ones
    read = k * from_state[..., None]  # (B, n_k_heads, groups, n_chunks, size, d_k)
    rows = torch.cat((v, read), -1) * beta[..., None]
    rows = torch.linalg.solve_triangular(system, rows, upper=False, unitriangular=True)
    new, read = rows.split((v.shape[-1], k.shape[-1]), -1)
    within, q, k = q @ k.mT * pairs, q * from_state[..., None], k * to_state[..., None]
    outputs = []
    for i in range(v.shape[3]):
        delta = new[..., i, :, :] - read[..., i, :, :] @ state  # (B, n_k_heads, groups, size, d_v)
        outputs.append(q[..., i, :, :] @ state + within[..., i, :, :] @ delta)
        state = state * between[..., i, None, None] + k[..., i, :, :].mT @ delta
    y = torch.stack(outputs, 1).movedim(4, 2)  # (B, n_chunks, size, n_k_heads, groups, d_v)
    return y.flatten(1, 2)[:, :T], state
