"""Files of texts with labels -> tokenised texts, each with a label at its last token and nowhere else.

So they are packed and batched as other examples are (`packing.py`), and the token with a label is where a model's scores are
computed. There the label is the number of the class; of several labels, or a value, it is 0, and batches have `targets`.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from litmini.config.classify import LabelledDataConfig, ProblemType
from litmini.data.dataset import Examples, split
from litmini.data.encode import ENTRY
from litmini.data.formats import bad_records
from litmini.data.labels import (
    MULTI,
    REGRESSION,
    SETTING,
    SINGLE,
    LabelledText,
    TextFile,
    find_problem_type,
    read_files,
    value_of,
)
from litmini.data.packing import Batch, PackedDataset
from litmini.data.readers import CHUNK
from litmini.errors import UserError, counted
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledExamples(Examples):
    """Tokenised texts; `labels` are IGNORE but for the last token of each."""

    names: list[str] = field(default_factory=list)
    """Name of each class, in the order of their numbers."""
    problem_type: str = SINGLE
    texts: list[list[LabelledText]] = field(default_factory=list)
    """The records of each file."""

    def records(self) -> list[LabelledText]:
        """Return the record of each example."""
        return [self.texts[entry["file"]][entry["number"]] for entry in self.table]

    @cached_property
    def targets(self) -> np.ndarray:
        """What is to be predicted: the number of the class, (examples,) int64; of several labels, 1 or 0 for each class,
        (examples, classes) fp32; of a regression, the values, (examples,) fp32."""
        records = self.records()
        if self.problem_type == REGRESSION:
            return np.array([value_of(text) for text in records], np.float32)
        numbers = {name: number for number, name in enumerate(self.names)}
        if self.problem_type == SINGLE:
            return np.array([numbers[text.names[0]] for text in records], np.int64)
        found = np.zeros((len(records), len(self.names)), np.float32)
        for row, text in zip(found, records, strict=True):
            row[[numbers[name] for name in text.names]] = 1
        return found

    def counts(self) -> np.ndarray:
        """Return the examples of each class, (classes,) int64."""
        if self.problem_type == SINGLE:
            return np.bincount(self.targets, minlength=len(self.names))
        return self.targets.sum(0, dtype=np.float64).astype(np.int64)

    @property
    def statistics(self) -> dict[str, Any]:
        sizes, targets = self.table["size"], self.targets
        common = {
            "examples": len(self),
            "tokens": int(sizes.sum()),
            "truncated_examples": int(self.table["truncated"].sum()),
            "longest": int(sizes.max()),
            "problem_type": self.problem_type,
        }
        if self.problem_type == REGRESSION:
            return {**common, "mean": float(targets.mean()), "std": float(targets.std())}
        return {**common, "classes": dict(zip(self.names, self.counts().tolist(), strict=True))}

    def describe(self, name: str) -> str:
        """Return one line of statistics to print."""
        s = self.statistics
        if self.problem_type == REGRESSION:
            about = (
                f"values {self.targets.min():.4g} to {self.targets.max():.4g}, mean {s['mean']:.4g}, std {s['std']:.3g}"
            )
        else:
            most = Counter(s["classes"]).most_common(10)
            classes = ", ".join(f"{label} {n:,}" for label, n in most) + ", ..." * (len(s["classes"]) > len(most))
            about = f"{len(s['classes'])} {'labels' if self.problem_type == MULTI else 'classes'}: {classes}"
        return (
            f"{name}: {counted(s['examples'], 'example')}, {counted(s['tokens'], 'token')}, longest {s['longest']:,}, "
            f"truncated {s['truncated_examples']} ({s['truncated_examples'] / s['examples']:.1%}); {about}"
        )

    def show_masks(self, tokenizer: Tokenizer, count: int) -> str:
        """Return the first examples: their tokens, the last one, where the scores are computed, in brackets, and the label."""
        shown, what = [], {SINGLE: "class", MULTI: "labels", REGRESSION: "value"}[self.problem_type]
        for i, text in enumerate(self.records()[:count]):
            ids = self[i][0].tolist()
            rest, last = (tokenizer.decode(part, skip_special=False) for part in (ids[:-1], ids[-1:]))
            shown.append(
                f"--- example {i + 1}: {counted(len(ids), 'token')}, {what} {', '.join(text.names)}\n{rest}[{last}]"
            )
        return "\n".join(shown)


class LabelledSequences(PackedDataset):
    """Packed sequences of texts with labels. A batch has for its n documents, row by row,

    - `numbers` (n,) int64: which example each is,
    - `targets` (n, classes) or (n,) fp32, of several labels or a regression.
    """

    examples: LabelledExamples

    def batch(self, sequences: list[list[int]]) -> Batch:
        batch = super().batch(sequences)
        numbers = np.array([i for sequence in sequences for i in sequence], np.int64)
        batch["numbers"] = torch.from_numpy(numbers)
        if self.examples.problem_type != SINGLE:
            batch["targets"] = torch.from_numpy(self.examples.targets[numbers])
        return batch


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a batch that a model takes."""
    return {name: batch[name] for name in ("tokens", "positions", "documents", "labels")}


def load_labelled(
    config: LabelledDataConfig, tokenizer: Tokenizer, seed: int, asked: ProblemType = "auto"
) -> tuple[LabelledExamples, LabelledExamples | None]:
    """Return tokenised training and validation texts. Their classes are the labels of the training files.

    Args:
        seed: for choosing `config.val_fraction`.
        asked: the problem type; auto: by the types of the labels.

    Raises:
        UserError: a file cannot be read, labels are of several types, there are fewer than two classes, or validation has one
            that training has not.
    """
    files = read_files(config.paths, config.columns)
    texts = [text for file in files for text in file.texts]
    problem_type = find_problem_type(texts, asked)
    if len({text.label for text in texts}) < 2:
        label = list(texts[0].label) if isinstance(texts[0].label, tuple) else texts[0].label
        raise UserError(f"every label in {', '.join(config.paths)} is {label!r}; expected two different ones or more.")
    names = ["value"] if problem_type == REGRESSION else class_names({name for text in texts for name in text.names})
    train, val = tokenize(files, names, problem_type, tokenizer, config.most_tokens), None
    if config.val_path:
        val_files = read_files([config.val_path], config.columns)
        check_labels(val_files, names, problem_type)
        val = tokenize(val_files, names, problem_type, tokenizer, config.most_tokens)
    elif config.val_fraction:
        train, val = split(train, config.val_fraction, seed)
        missing = (
            [name for name, n in zip(names, train.counts(), strict=True) if not n] if problem_type != REGRESSION else []
        )
        if missing:
            raise UserError(
                f"--data.val_fraction {config.val_fraction} leaves no training example of {listed(missing)}: give a lower "
                f"one, another --seed, or --data.val_path."
            )
    return train, val


def check_labels(files: list[TextFile], names: list[str], problem_type: str) -> None:
    """Raise UserError if records have labels that training had not, or of another type."""
    texts = [text for file in files for text in file.texts]
    find_problem_type(texts, problem_type, f"the training data were {problem_type}")  # type: ignore[arg-type]
    known = set(names)
    unknown = [text for text in texts if not known.issuperset(text.names)] if problem_type != REGRESSION else []
    if unknown:
        listing = "\n  ".join(f"{text.where}: {', '.join(map(repr, text.names))}" for text in unknown[:10])
        raise UserError(
            f"{counted(len(unknown), 'example')} with a label that no training example has; there are {listed(names)}:\n  "
            f"{listing}"
        )


def class_names(labels: set[str]) -> list[str]:
    """Return the names of all classes: sorted, by their value if all are whole numbers."""
    by_value = all(label.removeprefix("-").isdecimal() for label in labels)
    names = sorted(labels, key=lambda label: (int(label), label)) if by_value else sorted(labels)
    if len(names) < 2:
        raise UserError(f"the only label is {listed(names)!r}; expected two or more: {SETTING} has other choices.")
    return names


def listed(names: list[str]) -> str:
    """Return the first names as text."""
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def tokenize(
    files: list[TextFile], names: list[str], problem_type: str, tokenizer: Tokenizer, max_seq_len: int
) -> LabelledExamples:
    """Return the tokens of all files: those that `tokenizer(text)` of transformers gives, BOS where the tokenizer adds it; of
    a conversation, those of `apply_chat_template`.

    Of more than `max_seq_len`, the first ones are kept.

    Raises:
        UserError: conversations that the chat template refuses, named by file:line.
    """
    numbers = {name: number for number, name in enumerate(names)}
    bos = tokenizer.encode("")
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    entries: list[tuple[int, int, int, int, int, int, bool]] = []
    for file in files:
        kept: list[np.ndarray] = []
        start = 0
        for first in range(0, len(file.texts), CHUNK):
            part = file.texts[first : first + CHUNK]
            for number, (text, encoding) in enumerate(zip(part, _encode(part, tokenizer), strict=True), first):
                ids = np.array([*(bos if text.messages is None else []), *encoding.ids], dtype=np.int32)
                if not len(ids):
                    raise bad_records([f"{text.where}: the tokenizer makes no token of this text"])
                size = min(len(ids), max_seq_len)
                entries.append((file.data_set, len(arrays), start, size, 1, number, len(ids) > size))
                kept.append(ids[:size])
                start += size
        inputs = np.concatenate(kept)
        labels = np.full(len(inputs), IGNORE, dtype=np.int32)
        classes = [numbers[text.names[0]] if problem_type == SINGLE else 0 for text in file.texts]
        labels[np.cumsum([len(ids) for ids in kept]) - 1] = classes
        arrays.append((inputs, labels))
    hashes, paths = {file.name: file.sha256 for file in files}, [file.path for file in files]
    return LabelledExamples(
        arrays, np.array(entries, ENTRY), files=hashes, paths=paths, names=names, problem_type=problem_type,
        texts=[file.texts for file in files],
    )  # fmt: skip


def _encode(texts: list[LabelledText], tokenizer: Tokenizer) -> list[Any]:
    """Return the encodings of texts, and of conversations as the chat template renders them."""
    turns = [tokenizer.template.in_form(tokenizer.mark(text.messages)) for text in texts if text.messages is not None]
    rendered = iter(
        tokenizer.template.render([(each, None, [(len(each), False, None)]) for each in turns]) if turns else ()
    )
    pieces = [text.text if text.messages is None else next(rendered) for text in texts]
    if refused := [
        f"{text.where}: {piece}" for text, piece in zip(texts, pieces, strict=True) if not isinstance(piece, str)
    ]:
        raise bad_records(refused)
    return tokenizer.encode_batch(pieces)  # type: ignore[arg-type]
