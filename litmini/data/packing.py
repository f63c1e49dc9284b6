"""Tokenised examples -> rows -> batches. Which examples make which batch is a pure function of the seed and the step."""

import bisect
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from litmini.data.dataset import Examples
from litmini.errors import UserError
from litmini.ops.cross_entropy import IGNORE

Batch = dict[str, Tensor]
FULL = 0.99  # rows filled so far are not worth shortening
STEP = 8  # row lengths are multiples of it: odd ones are slow on some hardware


class PackedDataset:
    """Rows of up to `length` tokens, each of one or more examples, shuffled anew each epoch.

    Args:
        examples: none is longer than `length`.
        pack: several examples in a row; else one. Rows are made shorter than `length` where as many of them suffice.
        shuffle: else each epoch has the examples in their order (or, packed, the rows as `pack` makes them).
        weights: how often each example of each data set comes in an epoch; a fraction, over several epochs.
    """

    def __init__(
        self,
        examples: Examples,
        length: int,
        pack: bool,
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.examples, self.pack, self.seed, self.shuffle = examples, pack, seed, shuffle
        self.sizes = examples.table["size"].astype(np.int64)
        assert self.sizes.max() <= length, (self.sizes.max(), length)
        sets = examples.table["set"]
        weights = weights or [1.0] * (int(sets.max()) + 1)
        self._sets = [(np.flatnonzero(sets == i), weight) for i, weight in enumerate(weights)]
        self._plan = lru_cache(maxsize=1)(self._make_plan)  # rows are asked for in order: one epoch is enough
        self._ends: list[int] = []  # rows up to the end of each epoch
        self._even = all(weight == int(weight) for _, weight in self._sets)  # every epoch has rows of the same sizes
        self._most = self.length = length
        if pack and self._even:
            found, bounds = self._plan(0)
            longest = int(np.add.reduceat(self.sizes[found], bounds[:-1]).max())
            self.length = min(length, -(-longest // STEP) * STEP)
        self._end(0)

    def __len__(self) -> int:
        """Rows in the first epoch; in each other one as many, but where a weight is no whole number."""
        return self._end(0)

    def tokens(self, epoch: int) -> int:
        """Tokens in an epoch."""
        return int(self.sizes[self._plan(epoch)[0]].sum())

    def count(self, epochs: float) -> int:
        """Rows in so many epochs."""
        whole = int(epochs)
        before = self._end(whole - 1) if whole else 0
        return before + (int(np.ceil((epochs - whole) * (self._end(whole) - before))) if epochs > whole else 0)

    def _end(self, epoch: int) -> int:
        if self._even and self._ends:
            return self._ends[0] * (epoch + 1)
        while len(self._ends) <= epoch:
            rows = len(self._plan(len(self._ends))[1]) - 1
            self._ends.append((self._ends or [0])[-1] + rows)
        return self._ends[epoch]

    def _chosen(self, epoch: int) -> np.ndarray:
        """The example numbers of an epoch, shuffled."""
        order = []
        for number, (members, weight) in enumerate(self._sets):
            # A data set is a sequence of passes, each in another order; an epoch is the next piece of that sequence
            start, stop = (int(len(members) * weight * e + 1e-6) for e in (epoch, epoch + 1))
            for turn in range(start // max(1, len(members)), -(-stop // max(1, len(members)))):
                random = np.random.default_rng((self.seed, number, turn))
                passed = random.permutation(members) if self.shuffle else members
                first = turn * len(members)
                order.append(passed[max(0, start - first) : stop - first])
        chosen = np.concatenate(order or [np.zeros(0, np.int64)])
        if not len(chosen):
            raise UserError(f"data.weights leave no example for epoch {epoch + 1}, expected larger ones.")
        return np.random.default_rng((self.seed, epoch)).permutation(chosen) if self.shuffle else chosen

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(examples, bounds) of an epoch: the examples of row i are examples[bounds[i] : bounds[i + 1]]."""
        order = self._chosen(epoch)
        if not self.pack:
            return order, np.arange(len(order) + 1)
        found, bounds = pack(self.sizes[order], self._most, self._even)
        if not self.shuffle:
            return order[found], bounds
        rows = np.random.default_rng((self.seed, epoch, 1)).permutation(len(bounds) - 1)
        sizes = np.diff(bounds)[rows]
        ends = np.cumsum(sizes)
        within = np.arange(len(found)) - np.repeat(ends - sizes, sizes)
        return order[found[np.repeat(bounds[:-1][rows], sizes) + within]], np.concatenate([[0], ends])

    def row(self, number: int) -> list[int]:
        """The examples of row `number`, counted through all epochs."""
        epoch = number // self._ends[0] if self._even else 0
        while self._end(epoch) <= number:
            epoch += 1
        index = number - (self._end(epoch - 1) if epoch else 0)
        examples, bounds = self._plan(epoch)
        return examples[bounds[index] : bounds[index + 1]].tolist()

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """file:line of each example of the rows `numbers`."""
        rows = [self.row(number) for number in numbers]
        locations = iter(self.examples.locations([i for row in rows for i in row]))
        return [[next(locations) for _ in row] for row in rows]

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
                target = slice(at, at + size)
                tokens[r, target], labels[r, target] = self.examples[i]
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

    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each."""
        return self.sizes

    def longest_batch(self, micro_batch: int) -> Batch | None:
        """A micro-batch of the longest examples, which needs most memory; None where packing makes all sequences equal."""
        if self.pack:
            return None
        return self.batch([[int(i)] for i in np.argsort(-self.sizes, kind="stable")[:micro_batch]])


def pack(lengths: np.ndarray, capacity: int, even: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Put examples into rows of up to `capacity` tokens: longest first, each into the fullest row that it fits (best fit).

    Examples of one length are taken in the order in which they come, so another order has other neighbours but as many
    rows, of the same sizes. O(n log n) in numpy and, in Python, a few steps for each length that occurs.

    Args:
        even: where rows stay unfilled, share the examples out evenly over as many rows: all can be shorter then.

    Returns:
        Example numbers (n,) and bounds (rows + 1,): the examples of row i are numbers[bounds[i] : bounds[i + 1]].
    """
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    row_of = _best_fit(ordered, capacity)
    rows = int(row_of.max()) + 1
    if even and ordered.sum() < FULL * rows * capacity:
        shared = _share_out(ordered, rows)
        if np.bincount(shared, ordered).max() <= capacity:
            row_of = shared
    found = by_length[np.argsort(row_of, kind="stable")]
    return found, np.concatenate([[0], np.cumsum(np.bincount(row_of))])


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example; `lengths` are sorted, the longest first. Rows with equal room are treated as one."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    by_room: dict[int, list[np.ndarray]] = {}  # tokens left -> rows
    rooms: list[int] = []  # the keys of by_room, sorted

    def put_back(room: int, rows: np.ndarray) -> None:
        if room not in by_room:
            bisect.insort(rooms, room)
        by_room.setdefault(room, []).append(rows)

    done = opened = 0
    for size, count in zip(*(a[::-1].tolist() for a in np.unique(lengths, return_counts=True)), strict=True):
        while count:
            at = bisect.bisect_left(rooms, size)
            if at == len(rooms):  # fits nowhere
                room, rows = capacity, np.arange(opened, opened - (-count // (capacity // size)))
                opened += len(rows)
            else:
                room = rooms[at]
                rows = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[at]
            each = room // size
            full, rest = rows[: count // each], rows[count // each :]
            for taken, times in ((full, each), (rest[:1], count - each * len(full) if len(rest) else 0)):
                row_of[done : done + len(taken) * times] = np.repeat(taken, times)
                done, count = done + len(taken) * times, count - len(taken) * times
                if len(taken):
                    put_back(room - times * size, taken)
            if len(rest) > 1:
                put_back(room, rest[1:])
    return row_of


def _share_out(lengths: np.ndarray, rows: int) -> np.ndarray:
    """The row of each example: round by round one for every row, the longest to the emptiest. `lengths` are sorted."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    filled = np.zeros(rows, dtype=np.int64)
    for start in range(0, len(lengths), rows):
        part = lengths[start : start + rows]
        emptiest = np.argsort(filled, kind="stable")[: len(part)]
        row_of[start : start + rows] = emptiest
        filled[emptiest] += part
    return row_of
