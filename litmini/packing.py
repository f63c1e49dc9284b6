"""Tokenised examples -> rows -> batches. Which examples make which batch is a pure function of the seed and the step."""

import bisect
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from litmini.data import Examples
from litmini.loss import IGNORE

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of `length` tokens, each of one or more examples, shuffled anew each epoch."""

    examples: Examples
    length: int
    pack: bool
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plan", lru_cache(maxsize=2)(self._make_plan))

    def __len__(self) -> int:
        """Rows in one epoch, the same in every epoch."""
        return len(self._plan(0))  # type: ignore[attr-defined]

    def _make_plan(self, epoch: int) -> list[list[int]]:
        """The example numbers in each row of an epoch, in order."""
        count = len(self.examples)
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        if not self.pack:
            return [[int(i)] for i in order]
        rows = pack(np.diff(self.examples.offsets), self.length, order)
        return [rows[i] for i in random.permutation(len(rows))] if self.shuffle else rows

    def row(self, number: int) -> list[int]:
        """The examples of row `number`, counted through all epochs."""
        epoch, index = divmod(number, len(self))
        return self._plan(epoch)[index]  # type: ignore[attr-defined]

    def batch(self, rows: list[list[int]]) -> Batch:
        """Tensors (len(rows), T): tokens, positions, documents and labels.

        Packed rows have T = `length`; others are as long as the longest. Padding has no labels and, like an example,
        is a document of its own. Rows without examples are all padding.
        """
        longest = max((sum(self._size(i) for i in row) for row in rows), default=1)
        T = self.length if self.pack else max(1, longest)
        tokens, labels = np.zeros((len(rows), T), dtype=np.int64), np.full((len(rows), T), IGNORE, dtype=np.int64)
        positions, documents = np.zeros((len(rows), T), dtype=np.int64), np.zeros((len(rows), T), dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row, 1):
                size = self._size(i)
                source, target = slice(self.examples.offsets[i], self.examples.offsets[i + 1]), slice(at, at + size)
                tokens[r, target] = self.examples.inputs[source]
                labels[r, target] = self.examples.labels[source]
                positions[r, target] = np.arange(size)
                documents[r, target] = number
                at += size
            positions[r, at:] = np.arange(T - at)
        arrays = {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _size(self, i: int) -> int:
        return int(self.examples.offsets[i + 1] - self.examples.offsets[i])

    def step(
        self, step: int, global_batch: int, micro_batch: int, total: int, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, as many on every rank.

        Args:
            total: rows in the whole run; the last step may have fewer than `global_batch`.
        """
        numbers = range(step * global_batch, min((step + 1) * global_batch, total))
        count = -(-len(numbers) // (micro_batch * world))
        mine = [self.row(n) for n in numbers[rank::world]]
        parts = [mine[i * micro_batch : (i + 1) * micro_batch] for i in range(count)]
        return [self.batch(part or [[]]) for part in parts]

    def in_order(self, micro_batch: int, rank: int = 0, world: int = 1) -> list[list[list[int]]]:
        """All rows of one epoch in micro-batches for evaluation, as many on every rank; `batch` makes tensors of each."""
        count = -(-len(self) // (micro_batch * world))
        mine = [self.row(n) for n in range(rank, len(self), world)]
        return [mine[i * micro_batch : (i + 1) * micro_batch] or [[]] for i in range(count)]

    def longest_batch(self, micro_batch: int) -> Batch:
        """The micro-batch that needs most memory: the one to run first."""
        sizes = np.diff(self.examples.offsets)
        if not self.pack:
            return self.batch([[int(i)] for i in np.argsort(-sizes, kind="stable")[:micro_batch]])
        plan = self._plan(0)  # type: ignore[attr-defined]
        return self.batch(sorted(plan, key=lambda row: -max(sizes[i] for i in row))[:micro_batch])


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Put examples into rows of `capacity` tokens: longest first, each into the fullest row that it fits (best fit).

    Ties go by `order`, so each epoch has other neighbours but the same number of rows. O(n log capacity).
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
