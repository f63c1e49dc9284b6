"""The kernels of `flash-linear-attention` and `mamba-ssm` by their documented contracts, on a CPU: token by token in fp32."""

import itertools
from typing import Any

import torch
from torch import Tensor

calls: list[str] = []
"""The name of each kernel that was called."""


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """fla.ops.gated_delta_rule: q, k (B, T, H, K), v (B, T, H, V), g and beta (B, T, H); `cu_seqlens` wants B = 1."""
    calls.append("chunk_gated_delta_rule")
    B, T, H, K = q.shape
    assert q.dtype == k.dtype == v.dtype != torch.float32 and all(one.is_contiguous() for one in (q, k, v, g, beta))
    assert k.shape == q.shape and v.shape[:3] == (B, T, H) and g.shape == beta.shape == (B, T, H)
    assert initial_state is None and not output_final_state
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, T])
    else:
        assert B == 1 and cu_seqlens.dtype == torch.int64 and cu_seqlens[0] == 0 and cu_seqlens[-1] == T
        assert (cu_seqlens.diff() >= 0).all()
    q, k, v32, g, beta = (one.float() for one in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (one * torch.rsqrt(one.square().sum(-1, keepdim=True) + 1e-6) for one in (q, k))
    outputs = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        state = v32.new_zeros(B, H, K, v.shape[-1])
        for t in range(start, stop):
            state = state * g[:, t, :, None, None].exp()
            delta = beta[:, t, :, None] * (v32[:, t] - (k[:, t, :, None] @ state)[..., 0, :])
            state = state + k[:, t, ..., None] * delta[..., None, :]
            outputs.append((q[:, t, :, None] @ state)[..., 0, :] * (K**-0.5 if scale is None else scale))
    return torch.stack(outputs, 1).to(v.dtype), None


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor:  # fmt: skip
    """mamba_ssm.ops.triton.ssd_combined: x (b, l, h, p), dt (b, l, h), A (h), B, C (b, l, g, n), D (h), `seq_idx` (b, l)."""
    calls.append("mamba_chunk_scan_combined")
    batch, T, heads, _ = x.shape
    assert (
        B.shape == C.shape and B.shape[:2] == (batch, T) and heads % B.shape[2] == 0 and dt.shape == (batch, T, heads)
    )
    assert x.dtype == B.dtype == C.dtype and A.shape == (heads,) and D is not None and D.shape == (heads,)
    assert chunk_size & (chunk_size - 1) == 0 and z is dt_bias is initial_states is cu_seqlens is None
    assert not dt_softplus and dt_limit == (0.0, float("inf")) and not return_final_states
    assert seq_idx is None or (seq_idx.shape == (batch, T) and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    values, dt = x.float(), dt.float()
    B, C = (one.float().repeat_interleave(heads // B.shape[2], 2) for one in (B, C))
    state, outputs = values.new_zeros(batch, heads, x.shape[-1], B.shape[-1]), []
    for t in range(T):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        added = (dt[:, t, :, None] * values[:, t])[..., None] * B[:, t, :, None]
        state = state * (dt[:, t] * A)[..., None, None].exp() + added
        outputs.append((state @ C[:, t, ..., None])[..., 0] + D[:, None] * values[:, t])
    return torch.stack(outputs, 1).to(x.dtype)


FUNCTIONS: dict[str, Any] = {"fla": chunk_gated_delta_rule, "mamba_ssm": mamba_chunk_scan_combined}


def find(package: str, module: str, name: str) -> Any:
    """Return the stand-in in place of `recurrent_kernels._find`."""
    assert FUNCTIONS[package].__name__ == name and module.startswith(f"{package}.ops.")
    return FUNCTIONS[package]
