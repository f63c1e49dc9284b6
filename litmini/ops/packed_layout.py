"""How packed documents are laid out for attention on a CPU: one after the other, similar lengths together."""

import torch
from torch import Tensor

ALIGN = 32  # oneDNN makes code for each shape of its products: milliseconds, and up to a MiB that it keeps


class Documents:
    """Where the tokens of packed documents stand when each document has a place of its own, similar lengths together.

    Attributes:
        shapes: (documents, length) of each group; their places follow each other, each document padded to its group's
            length: its longest document's, which leaves less than a quarter of them empty, rounded up.
    """

    def __init__(self, shapes: list[tuple[int, int]], index: Tensor, real: Tensor) -> None:
        """
        Args:
            index: (M,) int64; for each place, which of the B * T tokens stands there; any one where it is empty.
            real: (M,) bool; the place is not empty.
        """
        self.shapes, self.index, self.real = shapes, index, real
        self._rows: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def rows(self, n_heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the rows of (B * T, n_heads), the order in which each document has its heads one after the other.

        Returns:
            (M * n_heads,) which row stands at each place; (B * T * n_heads,) the place of each row; and, unless all are
            in use, (M * n_heads, 1) bool whether the place is.
        """
        if n_heads not in self._rows:
            heads = torch.arange(n_heads)[:, None]
            index, real, start = [], [], 0
            for count, length in self.shapes:
                tokens = slice(start, start + count * length)
                index.append((self.index[tokens].view(count, 1, length) * n_heads + heads).flatten())
                real.append(self.real[tokens].view(count, 1, length).expand(-1, n_heads, -1).flatten())
                start = tokens.stop
            places, used = torch.cat(index), torch.cat(real)
            inverse = torch.empty(int(self.real.sum()) * n_heads, dtype=torch.int64)
            inverse[places[used]] = used.nonzero().flatten()
            self._rows[n_heads] = places, inverse, None if bool(used.all()) else used[:, None]
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
    """To a multiple of `ALIGN`, or less of short lengths; so there are few different ones."""
    step = min(ALIGN, 1 << (length // 8).bit_length())
    return -(-length // step) * step


class _Unpack(torch.autograd.Function):
    """(B, n_heads, T, head_dim) -> (M * n_heads, head_dim). Every row has one place, so the gradient is a gather, too."""

    @staticmethod
    def forward(ctx, x: Tensor, documents: Documents) -> Tensor:  # type: ignore[override,no-untyped-def]
        ctx.documents, ctx.shape = documents, x.shape
        return x.transpose(1, 2).reshape(-1, x.shape[-1]).index_select(0, documents.rows(x.shape[1])[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        B, n_heads, T, head_dim = ctx.shape  # empty places are seen by empty places only: their gradient is 0
        rows = grad.index_select(0, ctx.documents.rows(n_heads)[1])
        return rows.view(B, T, n_heads, head_dim).transpose(1, 2), None


class _Repack(torch.autograd.Function):
    """The way back: (M * n_heads, head_dim) -> (B, n_heads, T, head_dim)."""

    @staticmethod
    def forward(ctx, y: Tensor, documents: Documents, shape: torch.Size) -> Tensor:  # type: ignore[override,no-untyped-def]
        B, n_heads, T, head_dim = shape
        ctx.documents, ctx.n_heads = documents, n_heads
        rows = y.index_select(0, documents.rows(n_heads)[1])
        return rows.view(B, T, n_heads, head_dim).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override,no-untyped-def]
        places, _, used = ctx.documents.rows(ctx.n_heads)
        rows = grad.transpose(1, 2).reshape(-1, grad.shape[-1]).index_select(0, places)
        return rows if used is None else rows.mul_(used), None, None
