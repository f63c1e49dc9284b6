"""FlashAttention over sequences of different lengths, by `torch.nn.attention.varlen`: in 16 bits, since A100 and RTX 30.

Neither a mask nor scores are in memory. Sequences are flattened to (tokens, heads, head_dim); bounds on the device say where
each begins, so the host waits for nothing. Not run on a GPU yet: tests register the operator for the CPU.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litmini.ops.cpu_attention import expand_heads

HEAD_DIM, DTYPES = 256, (torch.bfloat16, torch.float16)  # FlashAttention's largest head, and its dtypes
MULTIPLE = 8  # of which its heads are multiples

NEWER = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
"""Compute capability of a GPU -> the newer FlashAttention for it: torch's name, and the module that torch takes it from."""


@functools.lru_cache
def activate_newer(device: torch.device) -> str | None:
    """Let torch use FlashAttention 3 on Hopper and 4 on Blackwell, if it is installed; return torch's name of it.

    The kernels that come with torch are those of FlashAttention 2.
    """
    major = torch.cuda.get_device_capability(device)[0]
    name, module = NEWER.get(major, ("", ""))
    try:
        if not name or not importlib.import_module(module):
            return None
        torch.nn.attention.activate_flash_attention_impl(name)
    except ModuleNotFoundError:
        return None
    except (ImportError, RuntimeError, ValueError) as error:  # of another version than torch expects
        warnings.warn(f"{name} is installed, but cannot be used: {error}", stacklevel=2)
        return None
    return name


@functools.lru_cache
def has_flash(device: torch.device, cache: bool = False) -> bool:
    """Return whether FlashAttention runs on a device, and torch's `varlen_attn` has windows; for a KV cache, what it needs."""
    if not {"scale", "window_size", *(("seqused_k", "enable_gqa") if cache else ())} <= parameters():
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ("cpu", "meta")  # for tests, which register the operator, and for estimates


@functools.lru_cache(1)
def parameters() -> set[str]:
    """Return the names of the parameters of `varlen_attn`, of which torch 2.10 has fewer than torch 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None, scale: float, gqa: bool
) -> Tensor:
    """Return the attention of packed documents, (B, n_heads, T, head_dim); q, k and v as `attention.attend` has them.

    Args:
        bounds: (n + 1,) int32: the first of the B * T tokens of each document, then B * T.
        longest: at least the tokens of the longest document.
        gqa: this torch takes fewer key heads than query heads.
    """
    if not gqa:
        k, v = (expand_heads(x, q.shape[1] // x.shape[1]) for x in (k, v))
    return _varlen(q, k, v, bounds, bounds, longest, longest, scale, (-1 if window is None else window - 1, 0))


def attend_cached(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, window: int | None, scale: float) -> Tensor:
    """Return the attention of new tokens over a cache whose slot p holds position p, (B, n_heads, T, head_dim).

    Args:
        k, v: (B, n_kv_heads, S, head_dim), all slots of the cache; those after a sequence's last position are not read.
        queries: (B, T) int64 positions; below 0 is padding, which stands on the left and gets zeros.
    """
    B, T = queries.shape
    S = k.shape[2]
    rows = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    lengths = (queries[:, -1] + 1).clamp(min=0).to(torch.int32)  # (B,) keys of each sequence
    if T == 1:
        ends = (
            (-1, -1) if window is None else (window - 1, 0)
        )  # without an end, the kernel reads keys once for all heads
        return _varlen(q, k, v, rows, rows * S, T, S, scale, ends, lengths)
    # two documents for each sequence: its padding, without keys, and its tokens
    padding = (queries < 0).sum(1, dtype=torch.int32)  # (B,)
    starts = torch.stack((rows[:-1] * T, rows[:-1] * T + padding), 1).flatten()  # (2 * B,)
    query_bounds = torch.cat((starts, rows[-1:] * T))
    key_bounds = torch.stack((rows, rows), 1).flatten()[:-1] * S  # 0, 0, S, S, ..., B * S
    used = torch.stack((torch.zeros_like(lengths), lengths), 1).flatten()
    return _varlen(q, k, v, query_bounds, key_bounds, T, S, scale, (-1 if window is None else window - 1, 0), used)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    window: tuple[int, int],
    used: Tensor | None = None,
) -> Tensor:
    """
    Args:
        window: keys that a query sees before its own, and after it; -1: all.
        used: (n,) int32, keys of each sequence that are read; None: all.
    """
    from torch.nn.attention.varlen import varlen_attn

    B, n_heads, T, head_dim = q.shape
    how: dict[str, Any] = {"enable_gqa": True} if n_heads != k.shape[1] else {}
    if used is not None:
        how["seqused_k"] = used
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (tokens, heads, head_dim)
    if padding := -head_dim % MULTIPLE:  # zeros, which change no score
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    y: Any = varlen_attn(
        q, k, v, query_bounds, key_bounds, longest_query, longest_key, scale=scale, window_size=window, **how
    )
    return y[..., :head_dim].view(B, T, n_heads, head_dim).transpose(1, 2)
