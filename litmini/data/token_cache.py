"""Tokens of data files, kept on disk: made once, on all cores, then mapped into memory by every run and every process.

The name of an entry is a hash of everything that decides its content: the data file, the tokenizer and its template, the
settings, and `FORMAT`. So it is never out of date, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from litmini.config.finetune import DataConfig
from litmini.data.encode import ENTRY, Part, encode_examples
from litmini.data.formats import Example, bad_records, parse_chunk
from litmini.data.readers import Chunk, read_chunks
from litmini.errors import UserError
from litmini.files import content_hash, existing_file, read_json, write_json
from litmini.system import cpu_count, locked
from litmini.tokenizer import Tokenizer

FORMAT = 4  # raise it with each change of the tokens of a record, or of how they are stored
LARGE = 4 << 20  # bytes of a data file from which several processes are faster than one
ABANDONED = 86_400  # seconds after which what a killed process left is removed


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one data file; the arrays are mapped from disk."""

    inputs: np.ndarray
    """(tokens,) int32."""
    labels: np.ndarray
    """(tokens,) int32."""
    table: np.ndarray
    """(examples,) of `encode.ENTRY`."""
    sha256: str
    """Of the data file."""
    records: int
    examples: int
    notes: dict[str, int]
    """Numbers for `encode.NOTES`."""
    dropped: int
    truncated_dropped: int
    first_dropped: str
    """Where in the file the first example without a supervised token is."""


def cache_directory() -> Path:
    """Return $LITMINI_CACHE, or ~/.cache/litmini."""
    return Path(os.environ.get("LITMINI_CACHE") or "~/.cache/litmini").expanduser()


def tokenize_file(
    path: str, tokenizer: Tokenizer, config: DataConfig, what: str, workers: int | None = None
) -> TokenFile:
    """Return the tokens of a data file, from the cache or made now.

    Args:
        what: name in the progress bar.
        workers: processes; None: one for each core, or only this one where the file is small.

    Raises:
        UserError: the file cannot be read, or has records that cannot be tokenised; nothing is kept then.
    """
    sha256 = content_hash(existing_file(path, "data file"))
    directory = cache_directory() / _key(sha256, Path(path).suffix.lower(), tokenizer, config)
    tokens = _open(directory, sha256)
    if tokens is None:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory.parent)
            partial_directory = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        except OSError as error:
            raise UserError(
                f"the token cache {directory.parent} cannot be written: {error.strerror}. Name another directory with the "
                f"environment variable LITMINI_CACHE."
            ) from None
        try:
            _write(partial_directory, path, tokenizer, config, what, workers)
            with locked(directory.parent):
                tokens = _open(directory, sha256)  # another process may have been faster: its entry is the same
                if tokens is None:
                    shutil.rmtree(directory, ignore_errors=True)  # a damaged one
                    partial_directory.rename(directory)
                    tokens = _open(directory, sha256)
        finally:
            shutil.rmtree(partial_directory, ignore_errors=True)
        assert tokens is not None, f"{directory} exists, but cannot be read"
    return tokens


def _key(sha256: str, suffix: str, tokenizer: Tokenizer, config: DataConfig) -> str:
    parts = {
        "data": sha256 + suffix,
        "tokenizer": content_hash(tokenizer.directory / "tokenizer.json"),
        "settings": [tokenizer.settings, tokenizer.stop_ids],
        "new_tokens": tokenizer.new_tokens.entries if tokenizer.new_tokens else [],
        "template": [tokenizer.chat_template, tokenizer.template_kwargs, *tokenizer.template.dates()],
        "special_tokens_in_text": tokenizer.special_tokens_in_text,
        "config": [config.train_on, config.most_tokens, config.columns],
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _open(directory: Path, sha256: str) -> TokenFile | None:
    """Return an entry; None if it does not exist, or a crash of the machine has damaged it."""
    try:
        counts = read_json(directory / "counts.json")
        table = np.load(directory / "table.npy")
        tokens = int(table["size"].sum())
        arrays: list[np.ndarray] = []
        for name in ("inputs", "labels"):
            file = directory / f"{name}.i32"
            if file.stat().st_size != 4 * tokens:
                return None
            arrays.append(np.memmap(file, np.int32, "r") if tokens else np.zeros(0, np.int32))
        fits = table.dtype == ENTRY and len(table) + counts["dropped"] == counts["examples"]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return TokenFile(arrays[0], arrays[1], table, sha256, **counts) if fits else None


def _write(
    directory: Path, path: str, tokenizer: Tokenizer, config: DataConfig, what: str, workers: int | None
) -> None:
    """Tokenise a file into `directory`. In memory, only its table grows with the file: 33 bytes an example."""
    tables: list[np.ndarray] = []
    dropped: list[str] = []
    problems: list[str] = []
    total = tokens = truncated_dropped = 0
    notes: Counter[str] = Counter()
    if workers is None:
        workers = cpu_count() if Path(path).stat().st_size > LARGE else 1
    with (
        (directory / "inputs.i32").open("wb") as inputs,
        (directory / "labels.i32").open("wb") as labels,
        (directory / "table.npy").open("wb") as table,
        tqdm(desc=f"tokenising {what}", unit="ex", unit_scale=True, disable=None) as bar,
    ):
        for part in _parts(path, tokenizer, config, workers):
            part.table["start"] += tokens
            part.table["number"] += total
            tables.append(part.table)
            inputs.write(part.inputs.tobytes())
            labels.write(part.labels.tobytes())
            dropped += part.dropped
            truncated_dropped += part.truncated_dropped
            notes += part.notes
            problems += part.problems
            total, tokens = total + part.records, tokens + len(part.inputs)
            bar.update(part.records)
        if problems:
            raise bad_records(problems, total)
        np.save(table, whole := np.concatenate(tables))
        for file in (inputs, labels, table):
            file.flush()
            os.fsync(file.fileno())
    first = dropped[0].removeprefix(f"{path}:") if dropped else ""
    counts = {"records": total, "examples": len(whole) + len(dropped), "notes": notes, "dropped": len(dropped)}
    write_json(directory / "counts.json", {**counts, "truncated_dropped": truncated_dropped, "first_dropped": first})


def _parts(path: str, tokenizer: Tokenizer, config: DataConfig, workers: int) -> Iterator[Part]:
    """Yield the file's records as tokens, in order."""
    chunks = read_chunks(path, config.columns)
    first = next(chunks)
    form = parse_chunk(first, None, tokenizer.chat_template is not None, [], [])
    tokenize_chunk = partial(_tokenize_chunk, form=form, tokenizer=tokenizer, config=config)
    yield tokenize_chunk(first)
    if workers == 1:
        yield from map(tokenize_chunk, chunks)
    else:
        from litmini.data.workers import map_in_order

        # No thread that a fork would lose has run so far; spawned processes would import torch
        yield from map_in_order(lambda: tokenize_chunk, chunks, workers, "fork")


def _tokenize_chunk(chunk: Chunk, form: str | None, tokenizer: Tokenizer, config: DataConfig) -> Part:
    examples: list[Example] = []
    problems: list[str] = []
    parse_chunk(chunk, form, tokenizer.chat_template is not None, examples, problems)
    part = encode_examples(examples, tokenizer, config)
    part.problems = problems + part.problems
    return part


def _remove_abandoned(cache: Path) -> None:
    for directory in cache.glob(".*"):
        if time.time() - directory.stat().st_mtime > ABANDONED:
            shutil.rmtree(directory, ignore_errors=True)
