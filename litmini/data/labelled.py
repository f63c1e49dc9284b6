"""Files of texts with labels -> tokenised texts, each with the number of its class at its last token and nowhere else.

So they are packed and batched as other examples are (`packing.py`), and the token with a label is where a model's scores are
computed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, find_files, split
from litmini.data.encode import ENTRY
from litmini.data.formats import bad_records
from litmini.data.readers import CHUNK, check_text, read_chunks
from litmini.errors import UserError, counted
from litmini.files import content_hash, existing_file
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledText:
    """One record."""

    where: str
    """file:line, for errors."""
    text: str
    label: str
    """Name of its class."""


@dataclass(frozen=True)
class TextFile:
    """The records of one file."""

    data_set: int
    """Number of its data set."""
    name: str
    """In the manifest."""
    path: str
    sha256: str
    texts: list[LabelledText]


@dataclass(frozen=True)
class LabelledExamples(Examples):
    """Tokenised texts; `labels` are IGNORE, at the last token of each the number of its class."""

    names: list[str] = field(default_factory=list)
    """Name of each class, in the order of their numbers."""

    def classes(self) -> np.ndarray:
        """Return the number of each example's class, (examples,) int64."""
        last = self.table["start"] + self.table["size"] - 1
        found = np.zeros(len(self), np.int64)
        for number, (_, labels) in enumerate(self.arrays):
            inside = self.table["file"] == number
            found[inside] = labels[last[inside]]
        return found

    @property
    def statistics(self) -> dict[str, Any]:
        sizes, counts = self.table["size"], np.bincount(self.classes(), minlength=len(self.names))
        return {
            "examples": len(self),
            "tokens": int(sizes.sum()),
            "truncated_examples": int(self.table["truncated"].sum()),
            "longest": int(sizes.max()),
            "classes": dict(zip(self.names, counts.tolist(), strict=True)),
        }

    def describe(self, name: str) -> str:
        """Return one line of statistics to print."""
        s = self.statistics
        most = Counter(s["classes"]).most_common(10)
        classes = ", ".join(f"{label} {count:,}" for label, count in most) + ", ..." * (len(s["classes"]) > len(most))
        return (
            f"{name}: {counted(s['examples'], 'example')}, {counted(s['tokens'], 'token')}, longest {s['longest']:,}, "
            f"truncated {s['truncated_examples']} ({s['truncated_examples'] / s['examples']:.1%}); "
            f"{len(s['classes'])} classes: {classes}"
        )

    def show_masks(self, tokenizer: Tokenizer, count: int) -> str:
        """Return the first examples: their tokens, the last one, where the scores are computed, in brackets, and the class."""
        shown, classes = [], self.classes()
        for i in range(min(count, len(self))):
            ids = self[i][0].tolist()
            rest, last = (tokenizer.decode(part, skip_special=False) for part in (ids[:-1], ids[-1:]))
            shown.append(
                f"--- example {i + 1}: {counted(len(ids), 'token')}, class {self.names[classes[i]]}\n{rest}[{last}]"
            )
        return "\n".join(shown)


def load_labelled(
    config: DataConfig, tokenizer: Tokenizer, seed: int
) -> tuple[LabelledExamples, LabelledExamples | None]:
    """Return tokenised training and validation texts. Their classes are the labels of the training files.

    Args:
        seed: for choosing `config.val_fraction`.

    Raises:
        UserError: a file cannot be read, there are fewer than two classes, or validation has one that training has not.
    """
    files = _read_files(config.paths, config.columns)
    names = _class_names({text.label for file in files for text in file.texts})
    if len(names) < 2:
        raise UserError(f"every label in {', '.join(config.paths)} is {names[0]!r}; expected two classes or more.")
    train, val = _tokenize(files, names, tokenizer, config.most_tokens), None
    if config.val_path:
        val_files = _read_files([config.val_path], config.columns)
        if unknown := [text for file in val_files for text in file.texts if text.label not in names]:
            listing = "\n  ".join(f"{text.where}: {text.label!r}" for text in unknown[:10])
            raise UserError(
                f"{counted(len(unknown), 'validation example')} with a label that no training example has; there are "
                f"{_listed(names)}:\n  {listing}"
            )
        val = _tokenize(val_files, names, tokenizer, config.most_tokens)
    elif config.val_fraction:
        train, val = split(train, config.val_fraction, seed)
        if missing := [name for name, count in train.statistics["classes"].items() if not count]:
            raise UserError(
                f"--data.val_fraction {config.val_fraction} leaves no training example of {_listed(missing)}: give a lower "
                f"one, another --seed, or --data.val_path."
            )
    return train, val


def _read_files(data_sets: list[str], columns: dict[str, str]) -> list[TextFile]:
    """Return the files of several data sets with their records."""
    paths = [(number, name, path) for number, each in enumerate(data_sets) for name, path in find_files(each).items()]
    hashes = [content_hash(existing_file(path, "data file")) for _, _, path in paths]  # of what is read, or older
    return [TextFile(*at, sha256, read_texts(at[-1], columns)) for at, sha256 in zip(paths, hashes, strict=True)]


def read_texts(path: str, columns: dict[str, str] | None = None) -> list[LabelledText]:
    """Return the records of a file.

    Raises:
        UserError: the file is missing or empty, or has records without a text or a label; all named by file:line.
    """
    texts: list[LabelledText] = []
    problems: list[str] = []
    total = 0
    for chunk in read_chunks(path, columns):
        total += len(chunk.locations)
        for where, record in chunk.records():
            try:
                texts.append(_labelled(where, record))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    if problems:
        raise bad_records(problems, total)
    return texts


def _labelled(where: str, record: Any) -> LabelledText:
    """Return a record as a `LabelledText`; a ValueError says what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict) or not record.keys() >= {"text", "label"}:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {keys}; expected text and label")
    text, label = check_text(record["text"], "text"), record["label"]
    if not text.strip():
        raise ValueError("text is empty")
    if isinstance(label, bool):
        label = str(label).lower()
    elif isinstance(label, int):
        label = str(label)
    elif not isinstance(label, str):
        raise ValueError(f"label is {type(label).__name__}, expected the name or number of one class")
    if not check_text(label, "label").strip():
        raise ValueError("label is empty")
    return LabelledText(where, text, label)


def _class_names(labels: set[str]) -> list[str]:
    """Return the names of all classes: sorted, by their value if all are whole numbers."""
    by_value = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if by_value else sorted(labels)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def _tokenize(files: list[TextFile], names: list[str], tokenizer: Tokenizer, max_seq_len: int) -> LabelledExamples:
    """Return the tokens of all files: those that `tokenizer(text)` of transformers gives, BOS where the tokenizer adds it.

    Of more than `max_seq_len`, the first ones are kept.
    """
    numbers = {name: number for number, name in enumerate(names)}
    bos = tokenizer.encode("")
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    entries: list[tuple[int, int, int, int, int, int, bool]] = []
    for file in files:
        kept: list[np.ndarray] = []
        start = 0
        for first in range(0, len(file.texts), CHUNK):
            encodings = tokenizer.encode_batch([text.text for text in file.texts[first : first + CHUNK]])
            for number, encoding in enumerate(encodings, first):
                ids = np.array([*bos, *encoding.ids], dtype=np.int32)
                size = min(len(ids), max_seq_len)
                entries.append((file.data_set, len(arrays), start, size, 1, number, len(ids) > size))
                kept.append(ids[:size])
                start += size
        inputs = np.concatenate(kept)
        labels = np.full(len(inputs), IGNORE, dtype=np.int32)
        labels[np.cumsum([len(ids) for ids in kept]) - 1] = [numbers[text.label] for text in file.texts]
        arrays.append((inputs, labels))
    hashes, paths = {file.name: file.sha256 for file in files}, [file.path for file in files]
    return LabelledExamples(arrays, np.array(entries, ENTRY), files=hashes, paths=paths, names=names)
