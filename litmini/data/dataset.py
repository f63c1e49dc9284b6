"""Data files -> tokenised examples, for training and validation. `formats.py` reads examples, `encode.py` tokenises them,
`token_cache.py` keeps the tokens on disk; `packing.py` makes sequences and batches of them."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from litmini.config.finetune import DataConfig
from litmini.data.encode import NOTES
from litmini.data.formats import Example, find_locations, pick_examples
from litmini.data.token_cache import TokenFile, tokenize_file
from litmini.errors import UserError, counted
from litmini.files import content_hash, existing_file
from litmini.ops.cross_entropy import IGNORE
from litmini.system import has_colors
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class Examples:
    """Tokenised examples of one or more files, or some of them."""

    arrays: list[tuple[np.ndarray, np.ndarray]]
    """Inputs and labels of each file, (tokens,) int32, on disk; labels[i] is the token to predict after inputs[i]."""
    table: np.ndarray
    """(examples,) of encode.ENTRY: where each example is."""
    dropped: int = 0
    """Examples without a supervised token, which are not here."""
    truncated_dropped: int = 0
    """How many of these were truncated."""
    notes: Counter[str] = field(default_factory=Counter)
    """Numbers for `encode.NOTES`."""
    lengths_per_sequence = 1
    """Packed sequences are as many times as long as data.max_seq_len."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of each file by name."""
    paths: list[str] = field(default_factory=list)
    """Path of each file, in the order of `arrays`."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and labels of one example, (tokens,) int32."""
        entry = self.table[i]
        span = slice(entry["start"], entry["start"] + entry["size"])
        inputs, labels = self.arrays[entry["file"]]
        return inputs[span], labels[span]

    def documents(self, i: int) -> list[int]:
        """Return the tokens of each document of an example: it is one."""
        return [int(self.table["size"][i])]

    @property
    def sizes(self) -> np.ndarray:
        """The tokens of a sequence that each example needs, (examples,)."""
        return self.table["size"]

    def check_ids(self, vocab_size: int) -> None:
        """Raise a `UserError` that names the first example with a token id that a model of so many rows does not have."""
        for i in range(len(self)):
            if (largest := int(max(map(np.max, self[i])))) >= vocab_size:
                raise UserError(
                    f"{self.locations([i])[0]}: token id {largest}, but the model has rows for 0 to {vocab_size - 1} only: "
                    f"the tokenizer does not belong to this model."
                )

    def locations(self, numbers: Sequence[int]) -> list[str]:
        """Return file:line of examples, for which the file is read again; or their record, if the file has changed."""
        entries = self.table[list(numbers)]
        by_record: dict[tuple[int, int], str] = {}
        for file in np.unique(entries["file"]).tolist():
            path, wanted = self.paths[file], entries["number"][entries["file"] == file].tolist()
            try:
                if content_hash(existing_file(path, "data file")) not in self.files.values():
                    raise UserError(f"{path} was changed.")
                locations = find_locations(path, set(wanted))
            except UserError:
                locations = {n: f"{path}, which was changed: record {n + 1}" for n in wanted}
            by_record |= {(file, n): location for n, location in locations.items()}
        return [by_record[int(entry["file"]), int(entry["number"])] for entry in entries]

    @property
    def statistics(self) -> dict[str, Any]:
        table = self.table
        return {
            "examples": len(table),
            "tokens": int(table["size"].sum()),
            "trained_tokens": int(table["trained"].sum()),
            "truncated_examples": int(table["truncated"].sum()) + self.truncated_dropped,
            "dropped_examples": self.dropped,
            "longest": int(table["size"].max()),
            **self.notes,
        }

    def describe(self, name: str) -> str:
        """Return one line of statistics to print."""
        s = self.statistics
        truncated = s["truncated_examples"] / max(1, s["examples"] + s["dropped_examples"])
        notes = "".join(f"; {text.format(self.notes[key])}" for key, text in NOTES.items() if self.notes[key])
        return (
            f"{name}: {counted(s['examples'], 'example')}, {counted(s['tokens'], 'token')}, "
            f"{s['trained_tokens'] / s['tokens']:.0%} supervised, "
            f"longest {s['longest']:,}, truncated {s['truncated_examples']} ({truncated:.1%}), "
            f"dropped {s['dropped_examples']}{notes}"
        )

    def show_masks(self, tokenizer: Tokenizer, count: int) -> str:
        """Return the first examples token by token: supervised ones green, others dim; in brackets without colors."""
        supervised, rest = ("\033[32m{}\033[0m", "\033[2m{}\033[0m") if has_colors(sys.stdout) else ("[{}]", "{}")
        shown: list[str] = []
        for i in range(min(count, len(self))):
            inputs, labels = self[i]
            mask = labels != IGNORE
            text = f"--- example {len(shown) + 1}: {mask.sum()} of {counted(len(labels), 'token')} supervised\n"
            # The first token is never predicted; the last one is known only where it is a label
            tokens = [*zip(inputs, [False, *mask[:-1]], strict=True), *zip(labels[-1:], [True], strict=True)]
            for token, is_supervised in tokens if mask[-1] else tokens[:-1]:
                piece = tokenizer.decode([int(token)], skip_special=False)
                text += (supervised if is_supervised else rest).format(piece)
            shown.append(text)
        return "\n".join(shown)


E = TypeVar("E", bound=Examples)


def _check_dropped(dropped: int, total: int, first: str, config: DataConfig, what: str) -> None:
    if dropped > config.max_dropped * total or dropped == total:
        raise UserError(
            f"{dropped} of {total} {what} examples have no supervised token within max_seq_len "
            f"{config.most_tokens} (the first: {first}). Their completions are missing or truncated: raise "
            f"--data.max_seq_len, or allow it with --data.max_dropped."
        )


def find_files(path: str) -> dict[str, str]:
    """Return the files of a data set: its name in the manifest -> its path on this machine."""
    if not path.startswith("hub:"):
        return {path: path}
    from litmini.data.hub_datasets import find_files

    return find_files(path)


def load_data(
    config: DataConfig, tokenizer: Tokenizer, seed: int, max_examples: int | None = None
) -> tuple[Examples, Examples | None, list[Example]]:
    """Return tokenised training examples, tokenised validation examples, and validation examples as they were read.

    Args:
        seed: for choosing `config.val_fraction`.
        max_examples: of the last; None: all.

    Raises:
        UserError: a file cannot be read or tokenised, or the settings contradict each other.
    """
    train_files = [find_files(path) for path in config.paths]
    train, val, val_files = _join(train_files, tokenizer, config, "training"), None, train_files
    if config.val_path:
        val_files = [find_files(config.val_path)]
        val = _join(val_files, tokenizer, config, "validation")
    elif config.val_fraction:
        train, val = split(train, config.val_fraction, seed)
    val_examples: list[Example] = []
    if val:
        entries = val.table[:max_examples]
        for number, path in enumerate(file for files in val_files for file in files.values()):
            wanted = np.unique(entries["number"][entries["file"] == number]).tolist()
            if wanted:
                val_examples += pick_examples(path, tokenizer.chat_template is not None, wanted, config.columns)
    return train, val, val_examples


def split(examples: E, fraction: float, seed: int) -> tuple[E, E]:
    """Return (training, validation) examples; the latter are those of a random `fraction` of all records, at least one."""
    table = examples.table
    is_next = (table["file"][1:] != table["file"][:-1]) | (table["number"][1:] != table["number"][:-1])
    records = np.concatenate([[0], np.cumsum(is_next)])  # examples of one conversation stay together
    total = int(records[-1]) + 1
    order = np.random.default_rng(seed).permutation(total)
    count = max(1, round(fraction * total))
    if count >= total:
        raise UserError(f"--data.val_fraction {fraction} leaves none of {counted(total, 'example')} to train on")
    chosen = np.isin(records, order[:count])
    val = dataclasses.replace(examples, table=table[chosen], dropped=0, truncated_dropped=0, notes=Counter())
    return dataclasses.replace(examples, table=table[~chosen]), val


def _join(sets: list[dict[str, str]], tokenizer: Tokenizer, config: DataConfig, what: str) -> Examples:
    """Join the tokens of several data sets, each of one or more files (name -> path)."""
    files: list[tuple[int, str, TokenFile]] = []
    for number, names in enumerate(sets):
        files += [(number, name, tokenize_file(path, tokenizer, config, what)) for name, path in names.items()]
    paths = [path for names in sets for path in names.values()]
    tables = []
    for i, (number, _, file) in enumerate(files):
        tables.append(file.table.copy())
        tables[-1]["set"], tables[-1]["file"] = number, i
    dropped, total = sum(f.dropped for _, _, f in files), sum(f.examples for _, _, f in files)
    first = next((f"{name}:{f.first_dropped}" for _, name, f in files if f.dropped), "")
    _check_dropped(dropped, total, first, config, what)
    hashes = {name: f.sha256 for _, name, f in files}
    arrays, truncated = [(f.inputs, f.labels) for _, _, f in files], sum(f.truncated_dropped for _, _, f in files)
    notes = sum((Counter(f.notes) for _, _, f in files), Counter())
    return Examples(arrays, np.concatenate(tables), dropped, truncated, notes, hashes, paths)
