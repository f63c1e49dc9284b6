"""Documents -> token shards: `train-00000.bin`, ... and `val-...`, plain arrays of token ids, and `index.json`.

All cores tokenise; one process reads and writes, in the order of the files, so shards are the same for any number of
cores. What was written is committed every few seconds: an interrupted preparation resumes from there and ends with the
same bytes.
"""

import dataclasses
import hashlib
import os
import re
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from litmini.data.pretrain.text import Piece, Source, read_pieces
from litmini.data.pretrain.tokenize import SPLITS, Encoder, TokenizerSpec, encode_all, tokenizer_hash
from litmini.errors import UserError, counted
from litmini.files import file_hash, read_json, write_json
from litmini.system import lock

FORMAT = "litmini tokens 1"
PAGE = 4096  # bytes that have a checksum
BATCH = 1 << 20  # characters that a process tokenises at once
COMMIT_SECONDS = 5.0


class Shards:
    """The shards of one split, written one after the other."""

    def __init__(self, directory: Path, split: str, item_bytes: int, shard_tokens: int) -> None:
        self.directory, self.split, self.item_bytes = directory, split, item_bytes
        self.capacity = shard_tokens * item_bytes
        self.done: list[dict[str, Any]] = []
        self.size = 0  # bytes in the current shard
        self.documents = 0
        self.file: Any = None

    def _path(self, number: int, partial: bool = False) -> Path:
        name = f"{self.split}-{number:05d}.bin"
        return self.directory / (f".{name}.partial" if partial else name)

    def write(self, tokens: bytes) -> None:
        view = memoryview(tokens)
        while len(view):
            if self.file is None:
                self.file = _append(self._path(len(self.done), partial=True))
            part = view[: self.capacity - self.size]
            self.file.write(part)
            self.size += len(part)
            view = view[len(part) :]
            if self.size == self.capacity:
                self.close()

    def close(self) -> None:
        """Finish the current shard: checksums, then its name."""
        if not self.size:
            return
        self.flush()
        self.file.close()
        partial, path = self._path(len(self.done), partial=True), self._path(len(self.done))
        with partial.open("rb") as written:
            pages = array("I", (zlib.crc32(page) for page in iter(lambda: written.read(PAGE), b"")))
        path.with_suffix(".crc").write_bytes(pages.tobytes())
        entry = {"file": path.name, "tokens": self.size // self.item_bytes, "sha256": file_hash(partial)}
        partial.rename(path)
        self.done.append(entry)
        self.file, self.size = None, 0

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def state(self) -> dict[str, Any]:
        return {"done": self.done, "size": self.size, "documents": self.documents}

    def restore(self, state: dict[str, Any]) -> None:
        """Return to a `state`, and delete what was written after it."""
        self.done, self.size, self.documents = list(state["done"]), state["size"], state["documents"]
        partial, path = self._path(len(self.done), partial=True), self._path(len(self.done))
        if not partial.exists() and path.exists():  # finished after that state
            path.rename(partial)
        if (partial.stat().st_size if partial.exists() else 0) < self.size:
            raise UserError(f"{partial} was shortened since the preparation stopped; delete {self.directory}.")
        ours = re.compile(rf"{self.split}-\d{{5,}}\.bin|\.{self.split}-\d{{5,}}\.bin\.partial")
        for leftover in filter(lambda path: ours.fullmatch(path.name), list(self.directory.iterdir())):
            if leftover != partial and leftover.name not in [entry["file"] for entry in self.done]:
                leftover.unlink()
        if partial.exists():
            self.file = _append(partial)
            self.file.truncate(self.size)


def _append(partial: Path) -> Any:
    """Open a shard to write at its end; raise UserError if it is a link, which may lead to anyone's file."""
    try:
        return open(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666), "ab"
        )
    except OSError as error:
        if partial.is_symlink():
            raise UserError(f"{partial} is a link, expected a shard that is being written; remove it.") from None
        raise error


@dataclass
class Counts:
    """How far a preparation is."""

    source: int = 0
    """Files that were read to the end."""
    piece: int = 0
    """Pieces of the next file that were read."""
    documents: int = 0
    empty: int = 0
    """Documents without text, which are not written."""
    first_empty: str = ""
    characters: int = 0
    is_validation: bool = False
    """Whether the current document is in the validation split."""


def prepare(
    sources: list[Source],
    spec: TokenizerSpec,
    directory: Path,
    workers: int,
    save_tokenizer: Callable[[Path], None],
    max_empty: float = 0.01,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the token shards of `sources` into `directory`, or resume that, and return the index.

    Args:
        workers: processes that tokenise; 1: this one only.
        save_tokenizer: writes the tokenizer into `directory`, beside its tokens.
        max_empty: the largest fraction of documents without text that is no error.

    Raises:
        UserError: the text is damaged or empty, or `directory` holds something else.
    """
    made_from = {"recipe": spec.described(), "sources": [dataclasses.asdict(s) for s in sources]}
    if (directory / "index.json").exists():
        index = read_json(directory / "index.json")
        if index.get("made_from") == made_from:
            say(f"{directory} exists already, made from the same text in the same way.")
            return index
        raise UserError(f"{directory} holds another corpus. Choose another --out_dir, or delete it.")
    directory.mkdir(parents=True, exist_ok=True)
    lock(directory)
    item_bytes = array(Encoder(spec).code).itemsize
    splits = [Shards(directory, split, item_bytes, spec.shard_tokens) for split in SPLITS]
    counts = _resume(directory, made_from, splits, say)

    def commit(counts: Counts) -> None:
        for shards in splits:
            shards.flush()
        state = {"made_from": made_from, "counts": vars(counts), "splits": [s.state() for s in splits]}
        write_json(directory / "progress.json", state)

    commit(counts)
    committed = time.monotonic()
    batches = _batches(sources, spec, dataclasses.replace(counts))
    with tqdm(desc="preparing", unit="tok", unit_scale=True, disable=None) as bar:
        for (documents, done), encoded in encode_all(batches, spec, workers):
            for shards, tokens, count in zip(splits, encoded, documents, strict=True):
                shards.write(tokens)
                shards.documents += count
                bar.update(len(tokens) // item_bytes)
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit(done)
                committed = time.monotonic()
            counts = done
    commit(counts)
    _check(counts, splits, max_empty, directory)
    for shards in splits:
        shards.close()
    index = {
        "format": FORMAT,
        "dtype": {2: "uint16", 4: "uint32"}[item_bytes],
        "vocab_size": spec.vocab_size,
        "tokenizer_sha256": tokenizer_hash(spec.tokenizer),
        "begin": spec.begin,
        "end": spec.end,
        "statistics": {k: v for k, v in vars(counts).items() if k in ("documents", "empty", "characters")},
        "splits": {s.split: {"documents": s.documents, "shards": s.done} for s in splits},
        "made_from": made_from,
    }
    save_tokenizer(directory)
    write_json(directory / "index.json", index)
    (directory / "progress.json").unlink()
    return index


def _resume(directory: Path, made_from: dict[str, Any], splits: list[Shards], say: Callable[[str], None]) -> Counts:
    """Return `directory` to its last commit, and the counts of then."""
    file = directory / "progress.json"
    if not file.exists():
        if names := [p.name for p in directory.glob("*.bin")]:
            raise UserError(f"{directory} holds {names[0]} but no index.json. Choose another --out_dir, or delete it.")
        return Counts()
    state = read_json(file)
    try:
        # Versions up to 0.1.0 wrote `held_out`
        counts = Counts(**{{"held_out": "is_validation"}.get(k, k): v for k, v in state["counts"].items()})
        before, begun = state["made_from"], counts.source + 1
        same = before["recipe"] == made_from["recipe"] and before["sources"][:begun] == made_from["sources"][:begun]
        saved_splits = [{key: saved[key] for key in ("done", "size", "documents")} for saved in state["splits"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): delete {directory} and start again.") from None
    if not same:
        raise UserError(
            f"{directory} was begun with other settings, another tokenizer or other text. Start again: delete it, or "
            f"choose another --out_dir."
        )
    for shards, saved in zip(splits, saved_splits, strict=True):
        shards.restore(saved)
    say(f"resuming in {directory} after {counted(counts.documents, 'document')}")
    return counts


def _check(counts: Counts, splits: list[Shards], max_empty: float, directory: Path) -> None:
    if counts.empty > max_empty * counts.documents:
        raise UserError(
            f"{counts.empty:,} of {counts.documents:,} documents are empty (the first: {counts.first_empty}). Fix the "
            f"text, or allow it with --max_empty {counts.empty / counts.documents:.3f} (tokens done so far are kept)."
        )
    if not splits[0].documents:
        raise UserError(f"no document is left to train on in {directory}: the text has {counts.documents:,}.")


Batch = tuple[list[tuple[Piece, bool]], tuple[list[int], Counts]]


def _batches(sources: list[Source], spec: TokenizerSpec, counts: Counts) -> Iterator[Batch]:
    """Yield what follows after `counts`, about `BATCH` characters at a time: pieces, documents of each split, new counts."""
    pieces: list[tuple[Piece, bool]] = []
    documents, size = [0, 0], 0
    skip = counts.piece
    for source in sources[counts.source :]:
        for number, piece in enumerate(read_pieces(source, spec.text_key, spec.separator), 1):
            if number <= skip:
                continue
            counts.piece = number
            counts.documents += piece.first
            if piece.first and piece.last and not piece.text.strip():
                counts.empty += 1
                counts.first_empty = counts.first_empty or f"document {counts.documents}, in {source.name}"
                continue
            if piece.first:
                counts.is_validation = _is_validation(piece.text, spec.val_fraction)
                documents[counts.is_validation] += 1
            pieces.append((piece, counts.is_validation))
            counts.characters += len(piece.text)
            size += len(piece.text)
            if size >= BATCH or len(pieces) >= 8192:
                yield pieces, (documents, dataclasses.replace(counts))
                pieces, documents, size = [], [0, 0], 0
        counts.source, counts.piece, skip = counts.source + 1, 0, 0
    yield pieces, (documents, dataclasses.replace(counts))


def _is_validation(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
