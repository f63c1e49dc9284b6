"""Attention on a CPU: packed sequences document by document, and explicit products where they beat the fused kernel.

30 short documents cost 30 small squares of scores, not one large square. Documents of similar length are padded to one
batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Two matmuls and a softmax are faster than the fused kernel up to this length, forward and backward: measured with and
# without AMX (`python scripts/bench/cpu_choices.py`). In fp32, which has no matmul instructions, they never are.
EXPLICIT_LENGTH = 512
EXPLICIT_LENGTH_FP32 = 0

# oneDNN compiles code for each shape of a matmul: this takes milliseconds and up to a MiB that stays allocated
ALIGN = 32


class PaddedDocuments:
    """The padded layout of packed documents: groups of documents of similar length, one group after the other.

    Attributes:
        shapes: (documents, length) of each group; each document is padded to the length of the longest one of its group,
            rounded up; less than a quarter of the slots is padding.
    """

    def __init__(self, shapes: list[tuple[int, int]], index: Tensor, real: Tensor) -> None:
        """
        Args:
            index: (M,) int64; for each slot, the index of its token among the B * T tokens; arbitrary for padding.
            real: (M,) bool; whether a slot holds a token, not padding.
        """
        self.shapes, self.index, self.real = shapes, index, real
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def rows(self, n_heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the permutation of the rows of (B * T, n_heads) that groups rows by document and head.

        Returns:
            The row of each slot (M * n_heads,); the slot of each row (B * T * n_heads,); and, unless there is no padding,
            whether a slot holds a row (M * n_heads, 1) bool.
        """
        if n_heads not in self._rows:
            heads = torch.arange(n_heads)[:, None]
            index, real, start = [], [], 0
            for count, length in self.shapes:
                tokens = slice(start, start + count * length)
                index.append((self.index[tokens].view(count, 1, length) * n_heads + heads).flatten())
                real.append(self.real[tokens].view(count, 1, length).expand(-1, n_heads, -1).flatten())
                start = tokens.stop
            order, used = torch.cat(index), torch.cat(real)
            inverse = torch.empty(int(self.real.sum()) * n_heads, dtype=torch.int64)
            inverse[order[used]] = used.nonzero().flatten()
            self._rows[n_heads] = order, inverse, None if bool(used.all()) else used[:, None]
        return self._rows[n_heads]


def pad_documents(documents: Tensor) -> PaddedDocuments:
    """Sort the documents of a batch into groups, each padded to its longest (see `PaddedDocuments`)."""
    B, T = documents.shape
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = starts.flatten().nonzero().flatten()  # (n_documents,)
    lengths = torch.diff(first, append=torch.tensor([B * T]))
    lengths, order = lengths.sort(descending=True, stable=True)
    first, sizes = first[order], lengths.tolist()
    shapes: list[tuple[int, int]] = []
    for size in sizes:
        if shapes and size > 0.75 * shapes[-1][1]:
            shapes[-1] = (shapes[-1][0] + 1, shapes[-1][1])
        else:
            shapes.append((1, size))
    shapes = [(count, _round_up(longest)) for count, longest in shapes]
    index, real, at = [], [], 0
    for count, longest in shapes:
        offsets = torch.arange(longest)
        index.append((first[at : at + count, None] + offsets).clamp(max=B * T - 1).flatten())
        real.append((offsets < lengths[at : at + count, None]).flatten())
        at += count
    return PaddedDocuments(shapes, torch.cat(index), torch.cat(real))


def _round_up(length: int) -> int:
    """Return `length` rounded up to a multiple of `ALIGN`, or of less if it is short: few lengths remain."""
    step = min(ALIGN, 1 << (length // 8).bit_length())
    return -(-length // step) * step


class _Unpack(torch.autograd.Function):
    """(B, n_heads, T, head_dim) -> (M * n_heads, head_dim). Every row has one slot, so the gradient is a gather as well."""

    @staticmethod
    def forward(ctx, x: Tensor, documents: PaddedDocuments) -> Tensor:  # type: ignore[override,no-untyped-def]
        ctx.documents, ctx.shape = documents, x.shape
        return x.transpose(1, 2).reshape(-1, x.shape[-1]).index_select(0, documents.rows(x.shape[1])[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        B, n_heads, T, head_dim = ctx.shape  # only padding sees padding: its gradient is 0
        rows = grad.index_select(0, ctx.documents.rows(n_heads)[1])
        return rows.view(B, T, n_heads, head_dim).transpose(1, 2), None


class _Repack(torch.autograd.Function):
    """The inverse of `_Unpack`: (M * n_heads, head_dim) -> (B, n_heads, T, head_dim)."""

    @staticmethod
    def forward(ctx, y: Tensor, documents: PaddedDocuments, shape: torch.Size) -> Tensor:  # type: ignore[override,no-untyped-def]
        B, n_heads, T, head_dim = shape
        ctx.documents, ctx.n_heads = documents, n_heads
        rows = y.index_select(0, documents.rows(n_heads)[1])
        return rows.view(B, T, n_heads, head_dim).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        order, _, used = ctx.documents.rows(ctx.n_heads)
        rows = grad.transpose(1, 2).reshape(-1, grad.shape[-1]).index_select(0, order)
        return rows if used is None else rows.mul_(used), None, None


def allowed_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return the mask (B, 1, T, S) bool of positions (B, T) and (B, S); only padding sees padding (below 0)."""
    distance = queries[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, S)
    seen = (distance >= 0) & ((keys >= 0)[:, None, None, :] | (queries < 0)[:, None, :, None])
    return seen if window is None else seen & (distance < window)


def alibi(queries: Tensor, keys: Tensor, slopes: Tensor | None) -> Tensor | None:
    """Return the bias of scores (B, n_heads, T, S) fp32 from positions (B, T) and (B, S)."""
    if slopes is None:
        return None
    return slopes[:, None, None] * (keys[:, None, None, :] - queries[:, None, :, None])


def document_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: PaddedDocuments,
    window: int | None,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute `attention.attend` for packed sequences, whose positions count from 0 in each document."""
    head_dim = q.shape[-1]
    parts = []
    for x in (q, k, v):
        sizes = [count * x.shape[1] * longest for count, longest in documents.shapes]
        parts.append(_Unpack.apply(x, documents).split(sizes))
    outputs = []
    for (count, longest), *qkv in zip(documents.shapes, *parts, strict=True):
        rows = [x.view(count, -1, longest, head_dim) for x in qkv]  # (count, heads, longest, head_dim)
        steps, allowed = torch.arange(longest)[None], None
        if window is not None and longest > window:
            allowed = allowed_keys(steps, steps, window)
        # padding comes last: no real token sees it
        bias = alibi(steps, steps, slopes)
        y = attend_dense(rows[0], rows[1], rows[2], allowed, scale, softcap, bias, dropout, sinks)
        outputs.append(y.reshape(-1, head_dim))  # (count * n_heads * longest, head_dim)
    return _Repack.apply(torch.cat(outputs), documents, q.shape)


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention by the fused kernel or, for what it lacks and where they are faster, by explicit products.

    Args:
        q, k, v: as `attention.attend` has them, all of one dtype.
        allowed: (B, 1, T, S) bool; None: causal, and the last query sees every key.
        bias: (B, n_heads, T, S) fp32, added to the scores.
    """
    T, S = q.shape[2], k.shape[2]
    plain = softcap is None and bias is None and sinks is None
    longest = EXPLICIT_LENGTH_FP32 if q.dtype == torch.float32 else EXPLICIT_LENGTH
    if plain and (q.device.type != "cpu" or T == 1 or max(T, S) > longest):
        return attend_fused(q, k, v, allowed, scale, dropout, expand=q.device.type != "cpu")
    return _explicit(q, k, v, allowed, scale, softcap, bias, dropout, sinks)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, dropout: float, expand: bool
) -> Tensor:
    """Compute attention by `scaled_dot_product_attention`; arguments as for `attend_dense`.

    Args:
        expand: with a mask, repeat the key heads. GPUs take the math kernel, quadratic in memory, for a mask and fewer key
            heads than query heads.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1 and allowed is not None and expand:
        k, v = expand_heads(k, repeats), expand_heads(v, repeats)
    causal = False
    if allowed is None and q.shape[2] > 1:  # a branch: under torch.compile `T > 1` would be symbolic, not a bool
        if q.shape[2] == k.shape[2]:
            causal = True
        else:  # for the kernel, the first query sees one key
            allowed = _causal(q.shape[2], k.shape[2], q.device)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=gqa, dropout_p=dropout
    )


def _causal(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def expand_heads(x: Tensor, repeats: int) -> Tensor:
    """Repeat each head: (B, n, S, head_dim) -> (B, n * repeats, S, head_dim)."""
    return x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    B, n_heads, T, head_dim = q.shape
    n_kv_heads, S = k.shape[1], k.shape[2]
    if allowed is None:
        allowed = _causal(T, S, q.device)
    hidden = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
    repeats = n_heads // n_kv_heads
    q = q.reshape(B * n_kv_heads, repeats * T, head_dim)  # query heads with the same key head are stacked
    k, v = k.reshape(B * n_kv_heads, S, head_dim), v.reshape(B * n_kv_heads, S, head_dim)
    if softcap is None and bias is None:  # one matmul scales and masks
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
    if sinks is not None:  # one more key
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(B, -1, T, 1)), -1)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)[..., :S]  # computed in fp32
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights.reshape(B * n_kv_heads, repeats * T, S), v).view(B, n_heads, T, head_dim)
