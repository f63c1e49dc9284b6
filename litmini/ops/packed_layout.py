"""The layout of packed documents for attention on a CPU: documents of similar length are padded to one batch."""

import torch
from torch import Tensor

ALIGN = (
    32  # oneDNN compiles code for each shape of a matmul: this takes milliseconds and up to a MiB that stays allocated
)


class Documents:
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


def _unpack(documents: Tensor) -> Documents:
    """Sort the documents of a batch into groups, each padded to its longest (see `Documents`)."""
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
    return Documents(shapes, torch.cat(index), torch.cat(real))


def _round_up(length: int) -> int:
    """Return `length` rounded up to a multiple of `ALIGN`, or of less if it is short: few lengths remain."""
    step = min(ALIGN, 1 << (length // 8).bit_length())
    return -(-length // step) * step


class _Unpack(torch.autograd.Function):
    """(B, n_heads, T, head_dim) -> (M * n_heads, head_dim). Every row has one slot, so the gradient is a gather as well."""

    @staticmethod
    def forward(ctx, x: Tensor, documents: Documents) -> Tensor:  # type: ignore[override,no-untyped-def]
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
    def forward(ctx, y: Tensor, documents: Documents, shape: torch.Size) -> Tensor:  # type: ignore[override,no-untyped-def]
        B, n_heads, T, head_dim = shape
        ctx.documents, ctx.n_heads = documents, n_heads
        rows = y.index_select(0, documents.rows(n_heads)[1])
        return rows.view(B, T, n_heads, head_dim).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        order, _, used = ctx.documents.rows(ctx.n_heads)
        rows = grad.transpose(1, 2).reshape(-1, grad.shape[-1]).index_select(0, order)
        return rows if used is None else rows.mul_(used), None, None
