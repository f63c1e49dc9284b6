"""Sequences of distillation: examples with what a teacher expects at each of their supervised tokens, or prompts alone."""

import hashlib

import numpy as np
import torch

from litmini.data.dataset import Examples
from litmini.data.packing import Batch, PackedDataset
from litmini.data.prompts import completion_batch
from litmini.ops.cross_entropy import IGNORE

INT16 = 1 << 16  # rows of a vocabulary whose ids take two bytes


def row_type(k: int, vocab: int) -> np.dtype:
    """Return the type of what is kept of one supervised token: k ids, and log-probabilities of these and of all others."""
    return np.dtype([("ids", np.uint16 if vocab <= INT16 else np.int32, (k,)), ("log_probs", np.float16, (k + 1,))])


def row_starts(examples: Examples) -> np.ndarray:
    """Return the number of the first supervised token of each example, and of all at the end; (examples + 1,)."""
    return np.concatenate([[0], np.cumsum(examples.table["trained"], dtype=np.int64)])


def tokens_hash(examples: Examples) -> str:
    """Return a hash of the tokens of examples and of their order."""
    digest = hashlib.sha256()
    for inputs, labels in examples.arrays:
        for array in (inputs, labels):
            for start in range(0, len(array), 1 << 22):
                digest.update(array[start : start + (1 << 22)].tobytes())
    for name in ("file", "start", "size"):
        digest.update(np.ascontiguousarray(examples.table[name]).tobytes())
    return digest.hexdigest()


class TaughtSequences(PackedDataset):
    """Sequences whose batches have, for their n supervised tokens row by row,

    - `teacher_ids` (n, k) int64: the teacher's most probable tokens,
    - `teacher_log_probs` (n, k + 1) fp32: their log-probabilities, and that of all others together.

    Before `use`, as for validation, they have neither.
    """

    rows: np.ndarray | None = None
    top_k = 0

    def use(self, rows: np.ndarray | None, top_k: int) -> None:
        """Take what a teacher expects from now on: (supervised tokens,) of `row_type`, on disk.

        Args:
            rows: None: all tokens are equally probable, to see how large batches will be.
        """
        self.rows, self.top_k = rows, top_k
        self._starts = row_starts(self.examples)

    def batch(self, sequences: list[list[int]]) -> Batch:
        batch = super().batch(sequences)
        if not self.top_k:
            return batch
        if self.rows is None:
            n = int((batch["labels"] != IGNORE).sum())
            ids = torch.arange(self.top_k).expand(n, -1).contiguous()
            return batch | {"teacher_ids": ids, "teacher_log_probs": torch.zeros(n, self.top_k + 1)}
        parts = [self.rows[self._starts[i] : self._starts[i + 1]] for sequence in sequences for i in sequence]
        found = np.concatenate([self.rows[:0], *parts])
        ids = torch.from_numpy(found["ids"].astype(np.int64))
        return batch | {
            "teacher_ids": ids,
            "teacher_log_probs": torch.from_numpy(found["log_probs"].astype(np.float32)),
        }


class PromptSequences(PackedDataset):
    """Sequences of one example each, which is taken as the prompt of its last completion, too."""

    longest_completion = 1

    def prompt(self, i: int) -> list[int]:
        """Return the token ids of an example before its last completion."""
        inputs, labels = self.examples[i]
        return [int(token) for token in inputs[: prompt_size(labels)]]

    def longest_batch(self, micro_batch: int) -> Batch:
        """Return completions of full length to the longest prompts, or the longest examples if they are longer."""
        ids = max((self.prompt(i) for i in range(len(self.examples))), key=len)
        ids = [*ids, *ids[:1] * self.longest_completion]
        data = super().longest_batch(micro_batch)
        if data is not None and data["tokens"].shape[1] >= len(ids):
            return data
        return plain(completion_batch([(ids, len(ids) - self.longest_completion)] * micro_batch))


def prompt_size(labels: np.ndarray) -> int:
    """Return the tokens before the last completion of an example, one at least."""
    supervised = np.flatnonzero(labels != IGNORE)
    last = np.flatnonzero(np.diff(supervised) > 1)
    return int(supervised[last[-1] + 1 if len(last) else 0]) + 1


def plain(batch: Batch) -> Batch:
    """Return what a model takes of a batch of completions."""
    return {name: batch[name] for name in ("tokens", "positions", "documents", "labels")}
