"""Tokenised preferences, and their sequences. A pair is one example of two documents, the chosen and the rejected completion
after the prompt, so both are in one sequence; a single completion is an example of one document."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from litmini.config.finetune import DataConfig
from litmini.data.dataset import Examples, find_files, split
from litmini.data.encode import ENTRY
from litmini.data.formats import Example
from litmini.data.packing import Batch, PackedDataset
from litmini.data.preference_records import read_preferences
from litmini.data.preference_tokens import DROPPED, encode_preferences
from litmini.errors import UserError
from litmini.files import content_hash, existing_file
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreferenceExamples(Examples):
    """Tokenised pairs, or single completions; `table` is of preference_tokens.ENTRY."""

    kind: str = "pairs"
    """pairs; single: completions with a label; scored: pairs whose last tokens alone are labelled, for a score."""
    why_dropped: Counter[str] = field(default_factory=Counter)
    """Numbers for `DROPPED`."""

    @property
    def single(self) -> bool:
        """Whether they are single completions."""
        return self.kind == "single"

    @property
    def lengths_per_sequence(self) -> int:  # type: ignore[override]
        return 1 if self.single else 2

    def documents(self, i: int) -> list[int]:
        """Return the tokens of the documents of an example: of a pair the chosen one and the rejected one."""
        size, first = (int(self.table[name][i]) for name in ("size", "first"))
        return [size] if self.single else [first, size - first]

    @property
    def sizes(self) -> np.ndarray:
        """The tokens that each example needs; of single completions those of the longer of it and its mismatched one."""
        return np.maximum(self.table["size"], self.table["other_size"])

    def mismatched(self) -> "PreferenceExamples":
        """Return the mismatched completion for each prompt of a single completion: that of another."""
        table = self.table.copy()
        table["start"], table["size"] = self.table["other"], self.table["other_size"]
        table["other"], table["other_size"] = self.table["start"], self.table["size"]
        return dataclasses.replace(self, table=table)

    @property
    def statistics(self) -> dict[str, Any]:
        table, n = self.table, len(self.table)
        first = table["targets"].astype(np.int64)
        found: dict[str, Any] = {"completions" if self.single else "pairs": n, "tokens": int(table["size"].sum())}
        if self.single:
            found |= {"desirable": int(table["desirable"].sum()), "completion_tokens": float(first.mean())}
        else:
            rejected = table["trained"] - first
            found |= {"chosen_tokens": float(first.mean()), "rejected_tokens": float(rejected.mean())}
            if self.kind == "scored":  # of the whole conversations
                sizes = table["first"], table["size"] - table["first"]
                found |= {"chosen_tokens": float(sizes[0].mean()), "rejected_tokens": float(sizes[1].mean())}
        return {
            **found,
            "truncated_examples": int((table["n_truncated"] > 0).sum()),
            "truncated_in_one_only": 0 if self.single else int((table["n_truncated"] == 1).sum()),
            "dropped_examples": self.dropped,
            **{f"dropped_{key}": count for key, count in self.why_dropped.items()},
            "longest": int(self.sizes.max()),
        }

    def describe(self, name: str) -> str:
        """Return one line of statistics to print."""
        s, what = self.statistics, "completions" if self.single else "pairs"
        if self.single:
            about = f"{s['desirable']:,} desirable, {s['completion_tokens']:.0f} tokens on average"
        else:
            about = f"chosen {s['chosen_tokens']:.0f} and rejected {s['rejected_tokens']:.0f} tokens on average"
        one = f", {s['truncated_in_one_only']} of them in one completion only" if s["truncated_in_one_only"] else ""
        truncated = f"truncated at their end {s['truncated_examples']} ({s['truncated_examples'] / s[what]:.1%}){one}"
        reasons = "".join(f"; {count}: {DROPPED[key]}" for key, count in self.why_dropped.items())
        return (
            f"{name}: {s[what]:,} {what}, {s['tokens']:,} tokens, {about}, longest {s['longest']:,}, {truncated}, "
            f"dropped {self.dropped}{reasons}"
        )

    def show_masks(self, tokenizer: Tokenizer, count: int) -> str:
        """Return the first examples, each completion token by token as of supervised finetuning, under what it is.

        Of completions to be scored the last token, where the score is computed, is in brackets.
        """
        shown = []
        for i in range(min(count, len(self))):
            entry, at = self.table[i], int(self.table["start"][i])
            names = ["desirable" if entry["desirable"] else "undesirable"] if self.single else ["chosen", "rejected"]
            for name, size in zip(names, self.documents(i), strict=True):
                title = f"example {i + 1}, {name}"
                if self.kind == "scored":
                    ids = self.arrays[entry["file"]][0][at : at + size].tolist()
                    rest, last = (tokenizer.decode(part, skip_special=False) for part in (ids[:-1], ids[-1:]))
                    shown.append(f"--- {title}: {size} tokens\n{rest}[{last}]")
                else:
                    one = np.array([(0, entry["file"], at, size, 0, 0, False)], ENTRY)
                    shown.append(Examples(self.arrays, one).show_masks(tokenizer, 1).replace("example 1", title, 1))
                at += size
        return "\n".join(shown)


def load_preferences(
    config: DataConfig, tokenizer: Tokenizer, seed: int, kind: str = "pairs"
) -> tuple[PreferenceExamples, PreferenceExamples | None, list[Example]]:
    """Return tokenised training and validation examples, and the latter's chosen or desirable completions as they were read.

    Args:
        seed: for choosing `config.val_fraction`.
        kind: pairs; single: completions with a label; scored: pairs whose last tokens alone are labelled, for a score.

    Raises:
        UserError: a file cannot be read or tokenised, or too many records have nothing to learn from.
    """
    train, read = _load(config.paths, config, tokenizer, kind, "training")
    val = None
    if config.val_path:
        val, read = _load([config.val_path], config, tokenizer, kind, "validation")
    elif config.val_fraction:
        train, val = split(train, config.val_fraction, seed)
        val = dataclasses.replace(val, why_dropped=Counter())
    if kind == "single" and len(kinds := set(train.table["desirable"].tolist())) == 1:
        raise UserError(
            f"every training completion is {'desirable' if True in kinds else 'undesirable'}, and preference.loss kto learns "
            f"from both kinds. Completions that are all desirable are for scripts/finetune_lora.py."
        )
    chosen = [entry for entry in val.table if entry["desirable"]] if val else []
    return train, val, [read[int(entry["file"])][int(entry["record"])] for entry in chosen]


def _load(
    data_sets: list[str], config: DataConfig, tokenizer: Tokenizer, kind: str, what: str
) -> tuple[PreferenceExamples, list[list[Example]]]:
    """Return the tokens of several data sets, and of each of their files the first completion of each record as it is read."""
    arrays: list[tuple[np.ndarray, np.ndarray]] = []
    tables, paths, read = [], [], []
    hashes: dict[str, str] = {}
    why: Counter[str] = Counter()
    total, first_dropped = 0, ""
    for number, data_set in enumerate(data_sets):
        for name, path in find_files(data_set).items():
            hashes[name] = content_hash(existing_file(path, "data file"))  # of what is read, or older
            has_template = tokenizer.chat_template is not None
            records = read_preferences(path, has_template, kind != "single", config.columns)
            encoded, table, dropped = encode_preferences(records, tokenizer, config.most_tokens, kind)
            table["set"], table["file"] = number, len(arrays)
            arrays.append(encoded)
            tables.append(table)
            paths.append(path)
            read.append([record.example(record.completions[0]) for record in records])
            why += Counter(reason for reason, _ in dropped)
            total += len(records)
            first_dropped = first_dropped or next((where for _, where in dropped), "")
    if (count := sum(why.values())) > config.max_dropped * total or count == total:
        reasons = "; ".join(f"{count}: {DROPPED[key]}" for key, count in why.items())
        raise UserError(
            f"{count} of {total} {what} records have nothing to learn from (the first: {first_dropped}): {reasons}. Correct "
            f"them, raise --data.max_seq_len if they are too long, or allow it with --data.max_dropped."
        )
    table = np.concatenate(tables)
    return PreferenceExamples(arrays, table, count, 0, Counter(), hashes, paths, kind=kind, why_dropped=why), read


class PreferenceSequences(PackedDataset):
    """Packed sequences of preferences. A batch tells the documents of all of its sequences apart, and which belong together.

    Args:
        length: tokens that one document may have; a sequence has room for both of a pair.

    Attributes:
        mismatched: the same sequences with mismatched completions; None: these are pairs, or mismatched themselves.
        reference: for each file of `examples`, the log-probability of each label under the reference, (tokens,) fp32; None:
            it is computed as it is needed.
    """

    examples: PreferenceExamples
    reference: list[np.ndarray] | None = None

    def __init__(self, examples: PreferenceExamples, length: int, *settings: Any, **options: Any) -> None:
        super().__init__(examples, examples.lengths_per_sequence * length, *settings, **options)
        self.mismatched = None
        if examples.single and type(self) is not MismatchedSequences:
            self.mismatched = MismatchedSequences(examples.mismatched(), length, *settings, **options)

    def batch(self, sequences: list[list[int]]) -> Batch:
        """Return the batch of `PackedDataset`, and for its n documents, of pairs chosen and rejected in turns,

        - `slots` (B, T) int64: the number of each token's document, from 0; n is padding,
        - `lengths` (n,) int64: the supervised tokens of each document,
        - `desirable` (n,) bool, of single completions; `margins` (n / 2,) fp32, of pairs,
        - `reference` (B, T) fp32, 0 where there is no label, if it is known.
        """
        batch = super().batch(sequences)
        documents, entries = batch["documents"], self.examples.table[[i for sequence in sequences for i in sequence]]
        per_row = documents.amax(1)
        n = int(per_row.sum())
        slots = documents - 1 + (per_row.cumsum(0) - per_row)[:, None]
        slots = batch["slots"] = slots.masked_fill(documents == 0, n)
        targets = (batch["labels"] != IGNORE).flatten().long()
        batch["lengths"] = torch.zeros(n + 1, dtype=torch.int64).index_add(0, slots.flatten(), targets)[:n]
        if self.examples.single:
            batch["desirable"] = torch.from_numpy(entries["desirable"].copy())
        else:
            batch["margins"] = torch.from_numpy(entries["margin"].copy())
        if self.reference is not None:
            batch["reference"] = torch.zeros(documents.shape)
            for row, sequence in enumerate(sequences):
                parts = [self.reference[e["file"]][span(e)] for e in self.examples.table[sequence]]
                known = torch.from_numpy(np.concatenate(parts or [np.zeros(0, np.float32)]))
                batch["reference"][row, : len(known)] = known
        return batch

    def use_reference(self, values: list[np.ndarray]) -> None:
        """Put the log-probabilities of a reference into all batches from now on; `values` as the attribute `reference`."""
        for one in (self, self.mismatched):
            if one is not None:
                one.reference = values

    def locations(self, numbers: Sequence[int]) -> list[list[str]]:
        """Return file:line of each document of the sequences `numbers`."""
        times = 1 if self.examples.single else 2
        return [[one for one in row for _ in range(times)] for row in super().locations(numbers)]


class MismatchedSequences(PreferenceSequences):
    """Mismatched completions, in the sequences that the single ones are in; their batches have the key `mismatched`."""

    def batch(self, sequences: list[list[int]]) -> Batch:
        batch = super().batch(sequences)
        return {**batch, "mismatched": batch.pop("desirable")}


def span(entry: Any) -> slice:
    """Return where the tokens of an example are in the arrays of its file."""
    return slice(int(entry["start"]), int(entry["start"] + entry["size"]))
