"""A batch of packed sequences, with documents of one token and padding."""

import torch

LENGTHS = {
    "one": [150],
    "bounds inside a chunk": [30, 1, 1, 2, 3, 60, 70, 1],
    "bounds between chunks": [64, 128, 1],
    "shorter than a chunk": [1, 7, 2],
}
"""Lengths of documents, for what is computed in chunks of 64 tokens."""


def documents_of(lengths: list[int], B: int = 2) -> torch.Tensor:
    """Return the documents (B, T) of sequences that all have documents of these lengths."""
    return torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]).expand(B, -1)


def packed_batch(rows: list[list[int]], padding: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tokens (3 to 499), positions, documents and labels, (B, T) int64 each.

    Args:
        rows: the lengths of each sequence's documents, T in sum.
        padding: tokens at the end of each sequence, of its last document, that are padding.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T = len(rows), sum(rows[0])
    tokens = torch.randint(3, 500, (B, T), generator=generator)
    documents, positions = torch.zeros(2, B, T, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for row, (lengths, n_padding) in enumerate(zip(rows, padding, strict=True)):
        at = 0
        for number, length in enumerate([*lengths[:-1], lengths[-1] - n_padding], 1):
            part = slice(at, at + length)
            documents[row, part], positions[row, part] = number, torch.arange(length)
            labels[row, part] = torch.randint(3, 500, (length,), generator=generator)
            at += length
        positions[row, at:] = torch.arange(T - at)
    return {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}
