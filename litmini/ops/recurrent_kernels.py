"""Kernels of other packages for recurrent layers, used where they are installed and the tensors are on a GPU: that of
`flash-linear-attention` for the gated delta rule, that of `mamba-ssm` for the scan of Mamba2. Not run on a GPU yet.

They compute what `linear_attention.py` and `state_space.py` compute, in 16 bits where those do so in fp32, and without a
cache only: prompts and single tokens go the plain way. `runs` are those of `linear_attention.py`.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
SCAN_CHUNK = 256
MOST_SCANNED = 32_768
"""Longest sequence for `mamba-ssm`: from about 61,000 tokens on, its offsets overflow silently (state-spaces/mamba #1015)."""


def delta_rule_kernel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: Any) -> Tensor | None:
    """Return what `gated_delta_rule` returns first, (B, T, n_v_heads, d_v); None: not installed, or not for these tensors.

    With documents, once a forward, the kernel's host code waits for their bounds.
    """
    chunk = _find("fla", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule") if _is_for(v, runs) else None
    if chunk is None or {q.dtype, k.dtype} != {v.dtype} or (runs.ids is not None and runs.bounds is None):
        return None
    groups = v.shape[2] // k.shape[2]
    q, k = (one.repeat_interleave(groups, 2) for one in (q, k))
    inputs = [q, k, v, decay.float(), beta]
    if runs.bounds is not None:  # the kernel wants all sequences in one
        inputs = [one.flatten(0, 1)[None] for one in inputs]
    y, _ = chunk(
        *(one.contiguous() for one in inputs),
        scale=k.shape[-1] ** -0.5,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=runs.bounds,
    )
    return y.view_as(v)  # type: ignore[no-any-return]


def scan_kernel(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, runs: Any) -> Tensor | None:
    """Return what `state_space_scan` returns first, (B, T, n_heads, head_dim); None: not installed, or not for these."""
    name = "mamba_chunk_scan_combined"
    scan = _find("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", name) if _is_for(x, runs) else None
    if scan is None or x.shape[1] > MOST_SCANNED:
        return None
    ids = None if runs.ids is None else runs.ids.to(torch.int32).contiguous()
    b, c = b.to(x.dtype), c.to(x.dtype)
    return scan(x, dt.float(), a.float(), b, c, SCAN_CHUNK, D=d.float(), seq_idx=ids)  # type: ignore[no-any-return]


def _is_for(x: Tensor, runs: Any) -> bool:
    """Whether the kernels compute with such tensors: on a GPU, in 16 bits, without padding that a state must pass."""
    return x.device.type in DEVICES and x.dtype in DTYPES and not runs.padded


@functools.cache
def _find(package: str, module: str, name: str) -> Any:
    """Return a function of an optional package; None: it is not installed."""
    return getattr(importlib.import_module(module), name) if importlib.util.find_spec(package) else None
