"""Token shards -> rows -> batches. Which tokens are in which row is a pure function of the seed and the row's number.

The order is a keyed permutation that is computed, not stored: nothing here grows with the corpus, any row can be asked
for at any time, and a resumed run, on as many processes as one likes, goes on with the very next row.
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
"""Rows whose places are computed together; in each, corpora have exactly their shares."""
ROUNDS = 8


class TokenWindows:
    """Rows of `length` tokens cut out of corpora, side by side, shuffled anew each epoch.

    Args:
        corpora: all with the same tokenizer.
        split: "train" or "val".
        weights: the share of rows that each corpus gives, which may take it through several epochs while another has
            not seen its first; None: all rows of all corpora once in an epoch.
        isolate: tokens see their own document only, and no document's end predicts the next one's begin.
        limit: rows that there are at most.

    Raises:
        UserError: a corpus is smaller than a row.
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
                most = max((s.tokens for s in shards), default=0)
                raise UserError(
                    f"{names}: the longest {split} shard has {most:,} tokens, a row needs {length + 1:,} (data.max_seq_len "
                    f"+ 1). Prepare more text, or take shorter rows."
                )
        self.count = sum(int(starts[-1]) for starts in self.starts)
        self.limit = min(limit or self.count, self.count)
        self.quotas = _quotas(weights or [1.0])
        self._places = lru_cache(maxsize=4)(self._compute_places)

    def __len__(self) -> int:
        """Rows of one epoch (of all corpora together), or `limit`."""
        return self.limit

    def epochs(self, rows: int) -> list[float]:
        """How often the first `rows` rows go through each corpus (or, without weights, through all)."""
        return [rows * quota / BLOCK / int(s[-1]) for quota, s in zip(self.quotas, self.starts, strict=True)]

    def place(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, counted through all epochs, and where in it the row begins."""
        return self._places(row // BLOCK)[row % BLOCK]

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Where the tokens of the rows `numbers` are: shard and first token."""
        found = [self.place(number) for number in numbers]
        return [[f"{shard.file}: token {start}"] for shard, start in found]

    def lengths(self) -> None:
        """None: a window is no example."""

    def longest_batch(self, micro_batch: int) -> None:
        """None: all windows are of one length."""

    def _compute_places(self, block: int) -> list[tuple[Shard, int]]:
        """The place of each row in a block."""
        order = permute(np.arange(BLOCK), BLOCK, (self.seed, block)) if len(self.quotas) > 1 else np.arange(BLOCK)
        groups = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        found: list[Iterator[tuple[Shard, int]]] = []
        for group, starts in enumerate(self.starts):
            count = int(starts[-1])
            numbers = np.arange(block * self.quotas[group], (block + 1) * self.quotas[group])  # of this group's rows
            epochs, locations = np.divmod(numbers, count)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                locations[now] = permute(locations[now], count, (self.seed, group, int(epoch)))
            files = np.searchsorted(starts, locations, side="right") - 1
            begins = ((locations - starts[files]) * self.length).tolist()
            found.append(zip(map(self.shards[group].__getitem__, files.tolist()), begins, strict=True))
        return [next(found[group]) for group in groups.tolist()]

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Tensors (rows, length) int64: tokens and labels, and with `isolate` positions and documents.

        Without rows: one of padding, which has no label.
        """
        if not rows:
            nothing = torch.zeros((1, self.length), dtype=torch.int64)
            return {"tokens": nothing, "labels": nothing + IGNORE, "documents": nothing}
        windows = np.empty((len(rows), self.length + 1), np.int64)
        locations = self._expect(rows)
        for i, (shard, start) in enumerate(locations):
            windows[i] = shard.read(start, self.length + 1)
        if (largest := int(windows.max())) >= self.vocab_size:
            shard, _ = locations[int(windows.max(axis=1).argmax())]
            raise UserError(
                f"{shard.file} holds token {largest:,}, index.json says that there are {self.vocab_size:,}. Prepare the "
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

    def _expect(self, rows: list[int]) -> list[tuple[Shard, int]]:
        """The places of rows, which will be read soon."""
        locations = [self.place(row) for row in rows]
        for shard, start in locations:
            shard.expect(start, self.length + 1)
        return locations

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the rows `numbers`, in micro-batches, as many on every rank; no other rows are read.

        Where the rows do not suffice for all ranks, a micro-batch is one row of padding.
        """
        mine = numbers[rank::world]
        if self.split == "train":
            self._expect([row + len(numbers) for row in mine])  # those of the next step
        for i in range(-(-len(numbers) // (micro_batch * world))):
            yield self.batch(list(mine[i * micro_batch : (i + 1) * micro_batch]))


def _quotas(weights: list[float]) -> list[int]:
    """How many of a block's rows each corpus gives: the shares `weights`, by largest remainder."""
    shares = np.array(weights) / sum(weights) * BLOCK
    quotas = np.floor(shares).astype(int)
    for i in np.argsort(quotas - shares, kind="stable")[: BLOCK - quotas.sum()]:
        quotas[i] += 1
    if not quotas.all():
        raise UserError(f"data.weights {weights}: a corpus gets less than 1 of {BLOCK} rows; leave it out.")
    return quotas.tolist()


def permute(numbers: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(count) puts `numbers`: a bijection that needs no table.

    A balanced Feistel network permutes the next power of 4; whoever lands beyond `count` goes on walking until he is back
    inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        numbers: (n,) ints in [0, count).
        key: seeds the permutation.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    walking, locations = np.arange(len(numbers)), numbers.astype(np.uint64)
    while len(walking):
        left, right = locations[walking] >> shift, locations[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        locations[walking] = left << shift | right
        walking = walking[locations[walking] >= count]
    return locations.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
