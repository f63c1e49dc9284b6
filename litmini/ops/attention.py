"""Attention for all families: positions, the mask of each query, and the choice of a kernel.

`advance` and `make_mask` run once per forward and `attend` once per layer. A query sees the keys of its own document that
are not after it and less than a window before it. `choose_kernel` has the rules by which a kernel is chosen:

| kernel | what it computes |
|---|---|
| `varlen` | packed sequences and KV caches by FlashAttention, in 16 bits (`varlen.py`); no mask, no scores in memory |
| `flex` | packed sequences whose scores are changed (softcap, ALiBi, sinks) or whose heads are large, by FlexAttention |
| `documents` | packed sequences on a CPU, document by document (`cpu_attention.py`) |
| `sdpa` | everything else, by `scaled_dot_product_attention`, with a dense mask where one is needed |
| `explicit` | what none of them has, by matmuls and a softmax |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litmini.errors import UserError
from litmini.ops.cpu_attention import (
    PaddedDocuments,
    alibi,
    allowed_keys,
    attend_dense,
    attend_fused,
    document_by_document,
    pad_documents,
)

if TYPE_CHECKING:
    from litmini.ops.kv_cache import KVCache, Slots

ESTIMATE = (
    "estimate"  # a kernel for estimates of memory: FlexAttention's counts as `varlen`, which keeps the same tensors
)
FLEX_HEAD_DIM = 16  # the smallest head that FlexAttention compiles
_chosen: set[str] | None = None  # while `record_kernels` runs


@dataclass(frozen=True)
class Documents:
    """The documents of a batch with their bounds, which the host computes: no kernel has to wait for the device's.

    The tokens of a document are contiguous. Padding is a document of its own.
    """

    ids: Tensor
    """(B, T) int64, one id per document; 0: padding."""
    bounds: Tensor
    """(n + 1,) int32: the first of the B * T tokens of each document, then B * T. Documents at the end may be empty, so that
    few sizes occur and compiled code fits all batches."""
    longest: int
    """At least the tokens of the longest document, for the same reason a power of two."""
    kernel: str | None = None
    """The kernel to use; None: by the rules."""

    @classmethod
    def of(cls, ids: Tensor, kernel: str | None = None) -> Documents:
        """Return the documents of ids (B, T); on a GPU, this waits for the device."""
        B, T = ids.shape
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        first = starts.flatten().nonzero().flatten().to(torch.int32)  # CPU-GPU sync point, if on a GPU
        bounds = torch.full((-(-(len(first) + 1) // 64) * 64,), B * T, dtype=torch.int32, device=ids.device)
        bounds[: len(first)] = first
        longest = int(bounds.diff().max()) if len(first) else 1
        return cls(ids, bounds, 1 << (longest - 1).bit_length(), kernel)

    def map(self, function: Any) -> Documents:
        """Return the same documents with `function` applied to both tensors, to move them, say."""
        return Documents(function(self.ids), function(self.bounds), self.longest, self.kernel)


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees. Without `allowed`, `packed` and `documents`: causal, and the last query sees every key."""

    queries: Tensor
    """(B, T) int64 positions."""
    keys: Tensor
    """(B, S) int64 positions."""
    window: int | None = None
    """Number of keys that a query sees, its own included; None: all."""
    allowed: Tensor | None = None
    """(B, 1, T, S) bool: query t may see key s."""
    padded: PaddedDocuments | None = None
    """Documents packed into sequences, for `documents`."""
    packed: Documents | None = None
    """Documents packed into sequences, for the other kernels."""
    flash: bool = False
    """FlashAttention computes such a mask on this device: asked for here, as compiled code could not ask."""
    flash_gqa: bool = True
    """This torch's `varlen_attn` takes fewer key heads than query heads."""
    blocks: Any = None
    """FlexAttention's block mask of these documents."""
    slots: Slots | None = None
    """With a cache: the slots of the new keys."""
    static: bool = False
    """With a cache: `keys` are all of its slots, in use or not."""
    is_prompt: bool = False
    """On a CPU with a cache: more than one query, and nothing but causal."""
    _dense: list[Tensor] = field(default_factory=list, repr=False)

    def dense(self) -> Tensor | None:
        """Return the mask (B, 1, T, S) bool; None: causal. It is made when it is asked for, once, as it is large."""
        if not (self.packed or self.static) or self._dense:
            return self._dense[0] if self._dense else self.allowed
        mask = allowed_keys(self.queries, self.keys, self.window)
        if self.packed:
            ids = self.packed.ids
            mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])  # (B, 1, T, T)
        else:  # padding sees all keys, as its output must be finite
            mask = mask | (self.queries < 0)[:, None, :, None]
        if not torch.compiler.is_compiling():  # compiled code makes it as it is used
            self._dense.append(mask)
        return mask


def advance(tokens: Tensor, positions: Tensor | None, cache: KVCache | None) -> Tensor:
    """Return the positions (B, T) int64 of tokens (B, T), and advance the cache to them.

    Without positions, each sequence continues after the last position in the cache, or starts at 0.
    """
    start = 0 if cache is None else cache.length
    given = positions is not None
    if positions is None:
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
    if cache is not None:
        cache.advance(positions, None if given else start)
    return positions


def document_ids(documents: Tensor | Documents) -> Tensor:
    """Return the ids (B, T) int64 of documents, with or without their bounds."""
    return documents.ids if isinstance(documents, Documents) else documents


def make_mask(
    positions: Tensor,
    documents: Tensor | Documents | None,
    cache: KVCache | None,
    window: int | None,
    changes_scores: bool = False,
) -> Mask:
    """Return the mask of one forward pass, for all layers with the same window.

    Args:
        positions: (B, T) int64 within each document, increasing; below 0 is padding, which only padding sees.
        documents: (B, T) document ids, with their bounds or without; the tokens of one document are contiguous; None: one
            document per sequence.
        cache: already advanced by these T positions.
        window: number of keys that a query sees, its own included; None: all.
        changes_scores: the layers have a softcap, ALiBi, sinks or heads of more than 256, so that a GPU needs FlexAttention.
    """
    T = positions.shape[1]
    if cache is not None:
        if documents is not None:
            raise ValueError("documents and a cache cannot be combined: generation has one document per sequence")
        slots = cache.slots(window)
        keys = slots.positions[:, : slots.used]  # (B, S)
        if cache.static:
            from litmini.ops import varlen

            in_order = slots.n_slots == cache.capacity  # not a ring, whose slots are in any order
            flash = in_order and not torch.is_grad_enabled() and varlen.has_flash(positions.device, cache=True)
            return Mask(positions, keys, window, slots=slots, flash=flash, static=True)
        if not cache.ragged and (window is None or cache.length <= window):
            is_prompt = T > 1 and positions.device.type == "cpu" and not torch.is_grad_enabled()
            return Mask(positions, keys, window, slots=slots, is_prompt=is_prompt)
        allowed = allowed_keys(positions, keys, window)
        if cache.ragged:  # padding has no keys in the cache: it sees all keys, as its output must be finite
            allowed = allowed | (positions < 0)[:, None, :, None]
        return Mask(positions, keys, window, allowed, slots=slots)
    if documents is None:
        fits = window is None or window >= T
        padded = not positions.is_meta and bool((positions[:, 0] < 0).any())  # CPU-GPU sync point, not in training
        return Mask(
            positions, positions, window, None if fits and not padded else allowed_keys(positions, positions, window)
        )
    if isinstance(documents, Tensor):
        if documents.device.type == "cpu":
            return Mask(positions, positions, window, padded=pad_documents(documents))
        documents = Documents.of(documents)
    blocks = None
    wants_flex = documents.kernel == "flex" or (changes_scores and documents.kernel is None)
    if wants_flex and not positions.is_meta:  # which FlexAttention refuses
        from litmini.ops.flex_attention import block_mask  # imports torch.compile's parts

        blocks = block_mask(documents.ids, positions, window)
    from litmini.ops import varlen

    flash, gqa = varlen.has_flash(documents.ids.device), "enable_gqa" in varlen.parameters()
    return Mask(positions, positions, window, packed=documents, flash=flash, flash_gqa=gqa, blocks=blocks)


def choose_kernel(
    q: Tensor, mask: Mask, softcap: float | None, slopes: Tensor | None, dropout: float, sinks: Tensor | None = None
) -> str:
    """Return the kernel of one attention; see the table at the top of this file.

    Raises:
        UserError: the kernel that was asked for cannot compute it.
    """
    if mask.padded is not None:
        return "documents"
    if mask.packed is None and not mask.flash:
        return "sdpa"
    from litmini.ops import varlen

    changed = softcap is not None or slopes is not None or sinks is not None
    can_compute = {
        "varlen": not (changed or dropout)
        and q.dtype in varlen.DTYPES
        and q.shape[-1] <= varlen.HEAD_DIM
        and mask.flash,
        "flex": not dropout and mask.blocks is not None and q.shape[-1] >= FLEX_HEAD_DIM,
        "sdpa": not changed,
        "explicit": True,
    }
    wanted = mask.packed.kernel if mask.packed else None
    if wanted == ESTIMATE and (changed or q.shape[-1] > varlen.HEAD_DIM):
        return "varlen"
    if wanted in (None, ESTIMATE):
        return next(name for name, can in can_compute.items() if can)
    if not can_compute[wanted]:
        raise UserError(
            f"--attention {wanted} cannot compute the attention of this model: {q.dtype}, heads of {q.shape[-1]}, "
            f"softcap {softcap}, {'ALiBi' if slopes is not None else 'no ALiBi'}, "
            f"{'sinks' if sinks is not None else 'no sinks'}, dropout {dropout}, on {q.device}; "
            f"use --attention auto."
        )
    return wanted


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v over the keys that `mask` allows.

    Args:
        q: (B, n_heads, T, head_dim).
        k, v: (B, n_kv_heads, S, head_dim); query head i uses key head i * n_kv_heads // n_heads.
        scale: 1 / sqrt(head_dim) by default.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        slopes: (n_heads,) fp32; slope * (query - key position) is subtracted from each score (ALiBi, arXiv 2108.12409).
        dropout: probability, applied to the softmax; 0 outside of training.
        sinks: (n_heads,) scores of one more key for each head, which all queries see and whose value is zero (gpt-oss).

    Returns:
        (B, n_heads, T, head_dim), in v's dtype.
    """
    if k.dtype != v.dtype or q.dtype != v.dtype:  # under autocast, rotary leaves q and k in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = scale or 1.0 / math.sqrt(q.shape[-1])
    kernel = choose_kernel(q, mask, softcap, slopes, dropout, sinks)
    if _chosen is not None:
        _chosen.add(kernel)
    if kernel == "varlen":
        from litmini.ops import varlen

        if mask.packed is None:
            return varlen.attend_cached(q, k, v, mask.queries, mask.window, scale)
        bounds, longest = mask.packed.bounds, mask.packed.longest
        return varlen.attend_packed(q, k, v, bounds, longest, mask.window, scale, mask.flash_gqa)
    if kernel == "flex":
        from litmini.ops.flex_attention import attend_flex

        return attend_flex(q, k, v, mask.blocks, scale, softcap, slopes, mask.queries, sinks)
    if kernel == "sdpa" and mask.packed is not None:
        return attend_fused(q, k, v, mask.dense(), scale, dropout, expand=True)
    plain = softcap is None and slopes is None and sinks is None
    if mask.is_prompt and q.dtype in (torch.bfloat16, torch.float16) and plain:
        from litmini.ops.prompt_attention import attend_prompt

        return attend_prompt(q, k, v, scale)
    if mask.padded is None:
        bias = alibi(mask.queries, mask.keys, slopes)
        return attend_dense(q, k, v, mask.dense(), scale, softcap, bias, dropout, sinks)
    args = (mask.padded, mask.window, scale, softcap, slopes, dropout, sinks)
    if torch.compiler.is_compiling():  # the loop over documents differs in each batch, and large kernels take its time
        from litmini.ops.uncompiled import call_uncompiled  # imports torch._dynamo

        return call_uncompiled(document_by_document, q, k, v, *args)
    return document_by_document(q, k, v, *args)


@contextmanager
def record_kernels() -> Iterator[set[str]]:
    """Collect the names of the kernels that `attend` uses, uncompiled, in this process."""
    global _chosen
    _chosen = set()
    try:
        yield _chosen
    finally:
        _chosen = None
