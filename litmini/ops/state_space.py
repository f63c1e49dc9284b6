"""State space layers: the scan of Mamba2, over packed documents or with a state cache.

It stands after the causal convolution of `linear_attention.py` and takes the same runs: states begin again with each document,
so that no token knows anything of another document.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from litmini.ops.chunks import chunk_decays, split_chunks
from litmini.ops.linear_attention import Runs
from litmini.ops.recompute import recomputed
from litmini.ops.recurrent_kernels import scan_kernel


def state_space_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, runs: Runs, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the selective state space model of Mamba2 (arXiv 2405.21060), in fp32, also under autocast.

    For each token, S = exp(dt a) S + b (dt x)^T, and its output is c^T S + d x. Letters are those of the paper.

    Args:
        x: (B, T, n_heads, head_dim).
        dt: (B, T, n_heads), step sizes, at least 0.
        a: (n_heads,), below 0.
        b, c: (B, T, n_groups, d_state); head i uses group i * n_groups // n_heads.
        d: (n_heads,).
        state: (B, n_heads, d_state, head_dim) fp32, with a cache; None: 0.

    Returns:
        (B, T, n_heads, head_dim) in x's dtype, and the state after the last token; empty, where none came in and a kernel of
        `recurrent_kernels.py` ran.
    """
    if torch.compiler.is_compiling():  # the loop over chunks would be unrolled
        from litmini.ops.uncompiled import call_uncompiled  # imports torch._dynamo

        return call_uncompiled(_state_space_scan, x, dt, a, b, c, d, runs, state)  # type: ignore[no-any-return]
    return _state_space_scan(x, dt, a, b, c, d, runs, state)


def _state_space_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, runs: Runs, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if state is None and (of_kernel := scan_kernel(x, dt, a, b, c, d, runs)) is not None:
        return of_kernel, of_kernel.new_empty(0)
    return recomputed(functools.partial(_scan, runs), x, dt, a, b, c, d, state)  # type: ignore[no-any-return]


def _scan(
    runs: Runs, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `state_space_scan` returns."""
    B, T, n_heads, head_dim = x.shape
    n_groups, d_state = b.shape[2:]
    heads = (n_groups, n_heads // n_groups)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        inputs = x.float().unflatten(2, heads)  # (B, T, n_groups, heads, head_dim): the heads of a group
        steps = dt.float().unflatten(2, heads)  # (B, T, n_groups, heads)
        b, c = b.float()[:, :, :, None], c.float()[:, :, :, None]  # (B, T, n_groups, 1, d_state)
        if runs.padded:  # padding leaves the state as it is, whatever it holds
            padding = (runs.positions < 0)[..., None, None]
            inputs, b = (one.masked_fill(padding[..., None], 0) for one in (inputs, b))
            steps = steps.masked_fill(padding, 0)
        values, decay = inputs * steps[..., None], steps * a.float().view(heads)
        if state is None:
            state = values.new_zeros(B, n_heads, d_state, head_dim)
        state = state.unflatten(1, heads)
        compute = _step if T == 1 else _chunks
        y, state = compute(values, decay, b, c, runs.ids, state)
        y = y + inputs * d.float().view(*heads, 1)
    return y.flatten(2, 3).to(x.dtype), state.flatten(1, 2)


def _step(
    values: Tensor, decay: Tensor, b: Tensor, c: Tensor, ids: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a single token; arguments and results are those of `_chunks`."""
    state = state * decay[:, 0, ..., None, None].exp() + b[:, 0, ..., None] * values[:, 0, ..., None, :]
    return (c[:, 0, ..., None, :] @ state)[..., 0, :][:, None], state


def _chunks(
    values: Tensor, decay: Tensor, b: Tensor, c: Tensor, ids: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute all tokens in chunks: what they do to one another by decayed scores, what went before by the state.

    Args:
        values: (B, T, n_groups, heads, head_dim), dt x.
        decay: (B, T, n_groups, heads).
        b, c: (B, T, n_groups, 1, d_state).
        ids: (B, T) of documents.
        state: (B, n_groups, heads, d_state, head_dim).

    Returns:
        (B, T, n_groups, heads, head_dim), and the state after the last token.
    """
    T, heads = values.shape[1], values.shape[3]
    values, decay, b, c = map(split_chunks, (values, decay, b, c))  # (B, n_groups, heads or 1, n_chunks, size, ...)
    from_state, to_state, between, pairs = chunk_decays(decay, ids)
    y = (c @ b.mT * pairs) @ values  # what tokens of the same chunk do
    b, c = b[:, :, 0], c[:, :, 0]  # the same for all heads of a group, which so are columns of one matmul
    added = (values * to_state[..., None]).movedim(2, 4).flatten(4)  # (B, n_groups, n_chunks, size, heads * head_dim)
    added = (b.mT @ added).unflatten(4, (heads, -1)).movedim(4, 2)  # (B, n_groups, heads, n_chunks, d_state, head_dim)
    states = []
    for i in range(values.shape[3]):
        states.append(state)
        state = state * between[..., i, None, None] + added[..., i, :, :]
    before = torch.stack(states, 3).movedim(2, 4).flatten(4)  # (B, n_groups, n_chunks, d_state, heads * head_dim)
    before = (c @ before).unflatten(4, (heads, -1)).movedim(4, 2)  # (B, n_groups, heads, n_chunks, size, head_dim)
    y = y + before * from_state[..., None]
    return y.movedim((3, 4), (1, 2)).flatten(1, 2)[:, :T], state
