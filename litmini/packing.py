"""Tokenised examples -> rows -> batches. Which examples make which batch is a pure function of the seed and the step."""

import bisect
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from litmini.data import Examples
from litmini.loss import IGNORE

Batch = dict[str, Tensor]


class Rows:
    """Rows of up to `length` tokens, each of one or more examples, shuffled anew each epoch.

    Args:
        examples: none is longer than `length`.
        pack: several examples in a row; else one.
        shuffle: else each epoch has the examples in their order (or, packed, the rows as `pack` makes them).
    """

    def __init__(self, examples: Examples, length: int, pack: bool, seed: int, shuffle: bool = True) -> None:
        self.examples, self.length, self.pack, self.seed, self.shuffle = examples, length, pack, seed, shuffle
        self.sizes = np.diff(examples.offsets)
        assert self.sizes.max() <= length, (self.sizes.max(), length)
        self._plan = lru_cache(maxsize=1)(self._make_plan)  # rows are asked for in order: one epoch is enough
        self._count = len(self._plan(0))

    def __len__(self) -> int:
        """Rows in one epoch, the same in every epoch."""
        return self._count

    def _make_plan(self, epoch: int) -> list[list[int]]:
        """The example numbers in each row of an epoch, in order."""
        count = len(self.examples)
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        if not self.pack:
            return [[int(i)] for i in order]
        rows = pack(self.sizes, self.length, order)
        return [rows[i] for i in random.permutation(len(rows))] if self.shuffle else rows

    def row(self, number: int) -> list[int]:
        """The examples of row `number`, counted through all epochs."""
        epoch, index = divmod(number, len(self))
        return self._plan(epoch)[index]

    def batch(self, rows: list[list[int]]) -> Batch:
        """Tensors (len(rows), T) int64: tokens, positions, documents and labels.

        Packed rows have T = `length`; others are as long as the longest. The examples of a row are documents 1, 2, ...;
        padding is document 0 and has no labels. Rows without examples are all padding.
        """
        T = self.length if self.pack else max([1, *(int(self.sizes[row].sum()) for row in rows if row)])
        tokens, positions, documents = np.zeros((3, len(rows), T), dtype=np.int64)
        labels = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row, 1):
                size = self.sizes[i]
                source, target = slice(*self.examples.offsets[i : i + 2]), slice(at, at + size)
                tokens[r, target] = self.examples.inputs[source]
                labels[r, target] = self.examples.labels[source]
                positions[r, target] = np.arange(size)
                documents[r, target] = number
                at += size
            positions[r, at:] = np.arange(T - at)
        arrays = {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This rank's share of the rows `numbers` (see `row`), in micro-batches, as many on every rank.

        Where the rows do not suffice for all ranks, a micro-batch is one row of padding.
        """
        mine = numbers[rank::world]
        for i in range(-(-len(numbers) // (micro_batch * world))):
            yield self.batch([self.row(n) for n in mine[i * micro_batch : (i + 1) * micro_batch]] or [[]])

    def longest_batch(self, micro_batch: int) -> Batch:
        """A micro-batch of the longest examples, which needs most memory: the one to run first."""
        return self.batch([[int(i)] for i in np.argsort(-self.sizes, kind="stable")[:micro_batch]])


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Put examples into rows of `capacity` tokens: longest first, each into the fullest row that it fits (best fit).

    Examples of one length change places by `order`, so another order has other neighbours but as many rows.
    O(n log n + n log capacity).
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # tokens left -> rows
    rooms: list[int] = []  # the keys of by_room, sorted
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    for i in np.lexsort((rank, -lengths)):
        size = int(lengths[i])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):  # fits nowhere
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(int(i))
        if room - size not in by_room:
            bisect.insort(rooms, room - size)
        by_room.setdefault(room - size, []).append(row)
    return rows
