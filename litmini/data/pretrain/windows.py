"""Token shards -> sequences -> batches. Which tokens a sequence has is a pure function of the seed and its number.

The order is a keyed permutation that is computed, not stored: memory does not grow with the corpus, any sequence can be
read at any time, and a resumed run, on any number of processes, continues with the very next sequence.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litmini.data.pretrain.read_shards import Corpus, Shard
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE

BLOCK = 4096
"""Sequences whose locations are computed together; in each block, corpora have exactly their weights."""
ROUNDS = 8


class TokenWindows:
    """Sequences of `length` tokens, adjacent windows of corpora, in another order in each epoch.

    Args:
        corpora: all with the same tokenizer.
        split: "train" or "val".
        weights: the proportion of sequences from each corpus, so that one may be in its third epoch while another is in
            its first; None: all sequences of all corpora once in an epoch.
        isolate: tokens see their own document only, and no document's end predicts the next one's begin.
        limit: the most sequences of an epoch; None: all.

    Raises:
        UserError: a corpus is smaller than a sequence.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        split: str,
        length: int,
        seed: int,
        weights: list[float] | None = None,
        isolate: bool = False,
        limit: int | None = None,
    ) -> None:
        self.length, self.seed, self.isolate, self.split = length, seed, isolate, split
        self.end, self.vocab_size = corpora[0].end, corpora[0].vocab_size
        groups = [corpora] if weights is None else [[corpus] for corpus in corpora]
        self.shards = [[shard for corpus in group for shard in corpus.splits[split]] for group in groups]
        # starts[g][s]: the number of group g's first window in its shard s; the last entry is how many there are
        self.starts = [np.cumsum([0, *((s.tokens - 1) // length for s in shards)]) for shards in self.shards]
        for group, shards, starts in zip(groups, self.shards, self.starts, strict=True):
            if not starts[-1]:
                names = ", ".join(corpus.name for corpus in group)
                longest = max((s.tokens for s in shards), default=0)
                raise UserError(
                    f"{names}: the longest {split} shard has {longest:,} tokens, a sequence needs {length + 1:,} "
                    f"(data.max_seq_len + 1). Prepare more text, or take shorter sequences."
                )
        self.count = sum(int(starts[-1]) for starts in self.starts)
        self.limit = min(limit or self.count, self.count)
        self.quotas = _quotas(weights or [1.0])
        self._block = lru_cache(maxsize=4)(self._locate_block)

    def __len__(self) -> int:
        """Return the sequences of one epoch (of all corpora together), or `limit`."""
        return self.limit

    def epochs(self, count: int) -> list[float]:
        """Return how often the first `count` sequences go through each corpus (or, without weights, through all)."""
        return [count * quota / BLOCK / int(s[-1]) for quota, s in zip(self.quotas, self.starts, strict=True)]

    def locate(self, number: int) -> tuple[Shard, int]:
        """Return the shard of sequence `number`, counted through all epochs, and its first token there."""
        return self._block(number // BLOCK)[number % BLOCK]

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return where the sequences `numbers` are: shard and first token."""
        return [[f"{shard.file}: token {start}"] for shard, start in map(self.locate, numbers)]

    def lengths(self) -> None:
        """Return None: a window is no example."""

    def longest_batch(self, micro_batch: int) -> None:
        """Return None: all windows are of one length."""

    def _locate_block(self, block: int) -> list[tuple[Shard, int]]:
        order = permute(np.arange(BLOCK), BLOCK, (self.seed, block)) if len(self.quotas) > 1 else np.arange(BLOCK)
        groups = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        by_group: list[Iterator[tuple[Shard, int]]] = []
        for group, starts in enumerate(self.starts):
            count = int(starts[-1])
            numbers = np.arange(block * self.quotas[group], (block + 1) * self.quotas[group])  # of this group
            epochs, windows = np.divmod(numbers, count)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                windows[now] = permute(windows[now], count, (self.seed, group, int(epoch)))
            files = np.searchsorted(starts, windows, side="right") - 1
            begins = ((windows - starts[files]) * self.length).tolist()
            by_group.append(zip(map(self.shards[group].__getitem__, files.tolist()), begins, strict=True))
        return [next(by_group[group]) for group in groups.tolist()]

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        """Return tensors (sequences, length) int64: tokens and labels, and with `isolate` positions and documents.

        Without numbers: one sequence of padding, which has no label.
        """
        if not numbers:
            nothing = torch.zeros((1, self.length), dtype=torch.int64)
            return {"tokens": nothing, "labels": nothing + IGNORE, "documents": nothing}
        windows = np.empty((len(numbers), self.length + 1), np.int64)
        locations = self._prefetch(numbers)
        for i, (shard, start) in enumerate(locations):
            windows[i] = shard.read(start, self.length + 1)
        if (largest := int(windows.max())) >= self.vocab_size:
            shard, _ = locations[int(windows.max(axis=1).argmax())]
            raise UserError(
                f"{shard.file} holds token {largest:,}, but index.json has vocab_size {self.vocab_size:,}. Prepare the "
                f"corpus again."
            )
        tokens, labels = windows[:, :-1], windows[:, 1:]
        batch: dict[str, Any] = {"tokens": tokens, "labels": labels}
        if self.isolate:
            ends = tokens == self.end
            batch["labels"] = np.where(ends, IGNORE, labels)
            first = np.zeros_like(ends)  # of each document
            first[:, 1:] = ends[:, :-1]
            steps = np.arange(self.length)
            batch["positions"] = steps - np.maximum.accumulate(np.where(first, steps, 0), axis=1)
            batch["documents"] = 1 + np.cumsum(first, axis=1)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _prefetch(self, numbers: list[int]) -> list[tuple[Shard, int]]:
        """Begin to read sequences; return where they are."""
        locations = [self.locate(number) for number in numbers]
        for shard, start in locations:
            shard.prefetch(start, self.length + 1)
        return locations

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's sequences among `numbers`, in micro-batches, as many on every rank; no others are read.

        Where there are too few sequences for all ranks, a micro-batch is one sequence of padding.
        """
        mine = numbers[rank::world]
        if self.split == "train":
            self._prefetch([number + len(numbers) for number in mine])  # those of the next step
        for i in range(-(-len(numbers) // (micro_batch * world))):
            yield self.batch(list(mine[i * micro_batch : (i + 1) * micro_batch]))


def _quotas(weights: list[float]) -> list[int]:
    """Return how many sequences of a block are from each corpus: `weights`, rounded by largest remainder."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(int)
    for i in np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]:
        quotas[i] += 1
    if not quotas.all():
        raise UserError(f"data.weights {weights}: a corpus gets less than 1 of {BLOCK} sequences; leave it out.")
    return quotas.tolist()


def permute(numbers: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Apply a pseudo-random permutation of range(count) to `numbers`: a bijection that needs no table.

    A balanced Feistel network permutes the next power of 4; a result beyond `count` is permuted again until it is inside
    (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        numbers: (n,) ints in [0, count).
        key: seeds the permutation.

    Returns:
        (n,) int64.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    outside, permuted = np.arange(len(numbers)), numbers.astype(np.uint64)
    while len(outside):
        left, right = permuted[outside] >> shift, permuted[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        permuted[outside] = left << shift | right
        outside = outside[permuted[outside] >= count]
    return permuted.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the finaliser of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
