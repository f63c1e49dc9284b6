"""Tokenised examples -> sequences -> batches. Which examples a batch has is a pure function of the seed and the step."""

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
EFFICIENT = 0.99  # packing efficiency from which shorter sequences would save too little
MULTIPLE = 8  # of which sequence lengths are: others are slow on some hardware


class PackedDataset:
    """Sequences of up to `length` tokens, each of one or more examples, in another order in each epoch.

    Args:
        examples: none is longer than `length`.
        pack: several examples in a sequence; else one. Sequences are shorter than `length` where as many suffice.
        shuffle: else each epoch has the examples in their order (or, packed, the sequences as `pack` makes them).
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
        self.sizes = examples.sizes.astype(np.int64)
        assert self.sizes.max() <= length, (self.sizes.max(), length)
        sets = examples.table["set"]
        weights = weights or [1.0] * (int(sets.max()) + 1)
        self._sets = [(np.flatnonzero(sets == i), weight) for i, weight in enumerate(weights)]
        self._plan = lru_cache(maxsize=1)(self._make_plan)  # sequences are read in order: one epoch is enough
        self._ends: list[int] = []  # sequences up to the end of each epoch
        self._epochs_are_equal = all(weight == int(weight) for _, weight in self._sets)  # in the sizes of sequences
        self._max_length = self.length = length
        if pack and self._epochs_are_equal:
            order, bounds = self._plan(0)
            longest = int(np.add.reduceat(self.sizes[order], bounds[:-1]).max())
            self.length = min(length, -(-longest // MULTIPLE) * MULTIPLE)
        self._end(0)

    def __len__(self) -> int:
        """Return the sequences in the first epoch; another has as many, unless a weight is a fraction."""
        return self._end(0)

    def tokens(self, epoch: int) -> int:
        """Return the tokens in an epoch."""
        return int(self.sizes[self._plan(epoch)[0]].sum())

    def count(self, epochs: float) -> int:
        """Return the sequences in so many epochs."""
        whole = int(epochs)
        before = self._end(whole - 1) if whole else 0
        return before + (int(np.ceil((epochs - whole) * (self._end(whole) - before))) if epochs > whole else 0)

    def _end(self, epoch: int) -> int:
        if self._epochs_are_equal and self._ends:
            return self._ends[0] * (epoch + 1)
        while len(self._ends) <= epoch:
            count = len(self._plan(len(self._ends))[1]) - 1
            self._ends.append((self._ends or [0])[-1] + count)
        return self._ends[epoch]

    def _choose(self, epoch: int) -> np.ndarray:
        """Return the example numbers of an epoch, shuffled."""
        order = []
        for number, (members, weight) in enumerate(self._sets):
            # A data set is a sequence of passes, each in another order; an epoch is the next part of that sequence
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
        """Return (examples, bounds) of an epoch: sequence i has the examples examples[bounds[i] : bounds[i + 1]]."""
        order = self._choose(epoch)
        if not self.pack:
            return order, np.arange(len(order) + 1)
        packed, bounds = pack(self.sizes[order], self._max_length, self._epochs_are_equal)
        if not self.shuffle:
            return order[packed], bounds
        shuffled = np.random.default_rng((self.seed, epoch, 1)).permutation(len(bounds) - 1)
        sizes = np.diff(bounds)[shuffled]
        ends = np.cumsum(sizes)
        within = np.arange(len(packed)) - np.repeat(ends - sizes, sizes)
        return order[packed[np.repeat(bounds[:-1][shuffled], sizes) + within]], np.concatenate([[0], ends])

    def sequence(self, number: int) -> list[int]:
        """Return the examples of sequence `number`, counted through all epochs."""
        epoch = number // self._ends[0] if self._epochs_are_equal else 0
        while self._end(epoch) <= number:
            epoch += 1
        index = number - (self._end(epoch - 1) if epoch else 0)
        examples, bounds = self._plan(epoch)
        return examples[bounds[index] : bounds[index + 1]].tolist()

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return file:line of each example of the sequences `numbers`."""
        sequences = [self.sequence(number) for number in numbers]
        locations = iter(self.examples.locations([i for sequence in sequences for i in sequence]))
        return [[next(locations) for _ in sequence] for sequence in sequences]

    def batch(self, sequences: list[list[int]]) -> Batch:
        """Return tensors (len(sequences), T) int64: tokens, positions, documents and labels.

        Packed sequences have T = `length`; others are as long as the longest. The examples of a sequence are documents
        1, 2, ..., or several each; padding is document 0 and has no labels. Sequences without examples are all padding.
        """
        T = self.length if self.pack else max([1, *(int(self.sizes[s].sum()) for s in sequences if s)])
        tokens, positions, documents = np.zeros((3, len(sequences), T), dtype=np.int64)
        labels = np.full((len(sequences), T), IGNORE, dtype=np.int64)
        for row, sequence in enumerate(sequences):
            at = number = 0
            for i in sequence:
                inputs, targets = self.examples[i]
                tokens[row, at : at + len(inputs)], labels[row, at : at + len(inputs)] = inputs, targets
                for size in self.examples.documents(i):
                    number += 1
                    positions[row, at : at + size] = np.arange(size)
                    documents[row, at : at + size] = number
                    at += size
            positions[row, at:] = np.arange(T - at)
        arrays = {"tokens": tokens, "positions": positions, "documents": documents, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def batches(self, numbers: range, micro_batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Yield this rank's sequences among `numbers` (see `sequence`), in micro-batches, as many on every rank.

        Where there are too few sequences for all ranks, a micro-batch is one sequence of padding.
        """
        mine = numbers[rank::world]
        for i in range(-(-len(numbers) // (micro_batch * world))):
            yield self.batch([self.sequence(n) for n in mine[i * micro_batch : (i + 1) * micro_batch]] or [[]])

    def lengths(self) -> np.ndarray:
        """Return the tokens of each example, (examples,)."""
        return self.sizes

    def longest_batch(self, micro_batch: int) -> Batch | None:
        """Return the micro-batch that needs most memory, of the longest examples; None where all are of one length."""
        if self.pack:
            return None
        return self.batch([[int(i)] for i in np.argsort(-self.sizes, kind="stable")[:micro_batch]])


def pack(lengths: np.ndarray, capacity: int, balance: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Put examples into sequences of up to `capacity` tokens: longest first, each into the fullest that it fits (best fit).

    Examples of one length are taken in the order in which they come, so another order has other neighbours but as many
    sequences, of the same sizes. O(n log n) in numpy and, in Python, a few steps for each length that occurs.

    Args:
        balance: where packing efficiency is low, distribute the examples evenly over as many sequences: all can be shorter
            then.

    Returns:
        Example numbers (n,) and bounds (sequences + 1,): sequence i has the examples numbers[bounds[i] : bounds[i + 1]].
    """
    by_length = np.argsort(-lengths, kind="stable")
    ordered = lengths[by_length]
    assigned = _best_fit(ordered, capacity)
    count = int(assigned.max()) + 1
    if balance and ordered.sum() < EFFICIENT * count * capacity:
        balanced = _balance(ordered, count)
        if np.bincount(balanced, ordered).max() <= capacity:
            assigned = balanced
    numbers = by_length[np.argsort(assigned, kind="stable")]
    return numbers, np.concatenate([[0], np.cumsum(np.bincount(assigned))])


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the sequence of each example, (n,). Sequences with equally many remaining tokens are treated as one.

    Args:
        lengths: sorted, the longest first.
    """
    assigned = np.empty(len(lengths), dtype=np.int64)
    sequences_by_rest: dict[int, list[np.ndarray]] = {}  # remaining tokens -> sequences
    rests: list[int] = []  # its keys, sorted

    def put_back(rest: int, sequences: np.ndarray) -> None:
        if rest not in sequences_by_rest:
            bisect.insort(rests, rest)
        sequences_by_rest.setdefault(rest, []).append(sequences)

    done = opened = 0
    for size, count in zip(*(a[::-1].tolist() for a in np.unique(lengths, return_counts=True)), strict=True):
        while count:
            at = bisect.bisect_left(rests, size)
            if at == len(rests):  # fits nowhere
                rest, sequences = capacity, np.arange(opened, opened - (-count // (capacity // size)))
                opened += len(sequences)
            else:
                rest = rests[at]
                sequences = sequences_by_rest[rest].pop()
                if not sequences_by_rest[rest]:
                    del sequences_by_rest[rest], rests[at]
            each = rest // size
            full, others = sequences[: count // each], sequences[count // each :]
            for taken, times in ((full, each), (others[:1], count - each * len(full) if len(others) else 0)):
                assigned[done : done + len(taken) * times] = np.repeat(taken, times)
                done, count = done + len(taken) * times, count - len(taken) * times
                if len(taken):
                    put_back(rest - times * size, taken)
            if len(others) > 1:
                put_back(rest, others[1:])
    return assigned


def _balance(lengths: np.ndarray, count: int) -> np.ndarray:
    """Return the sequence of each example, (n,): round by round one for each of `count`, the longest to the emptiest.

    Args:
        lengths: sorted, the longest first.
    """
    assigned = np.empty(len(lengths), dtype=np.int64)
    used = np.zeros(count, dtype=np.int64)  # tokens
    for start in range(0, len(lengths), count):
        part = lengths[start : start + count]
        emptiest = np.argsort(used, kind="stable")[: len(part)]
        assigned[start : start + count] = emptiest
        used[emptiest] += part
    return assigned
