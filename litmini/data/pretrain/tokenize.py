"""Text -> token ids, on all cores. Imports nothing heavy: each spawned process does, too."""

import dataclasses
import hashlib
import json
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from litmini.data.pretrain.text import Piece
from litmini.data.workers import map_in_order

SPLITS = ("train", "val")
T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that the tokens depend on, but the text."""

    tokenizer: str
    """The contents of tokenizer.json."""
    begin: list[int]
    """Ids before every document (BOS, where the tokenizer puts one)."""
    end: int
    """The id after every document."""
    text_key: str = "text"
    separator: str | None = None
    val_fraction: float = 0.0
    """Fraction of documents for validation, chosen by a hash of their text: equal documents are in the same split."""
    shard_tokens: int = 1 << 28
    """Tokens in a shard; the last one of a split may have fewer."""

    @property
    def vocab_size(self) -> int:
        return max(FastTokenizer.from_str(self.tokenizer).get_vocab().values()) + 1

    def described(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tokenizer": tokenizer_hash(self.tokenizer)}


def tokenizer_hash(text: str) -> str:
    """Return the sha256 of what a tokenizer.json means: without the order of keys, truncation and padding."""
    content = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Tokenises pieces, in one thread. Text that spells a special token stays text: only documents' ends are ends."""

    def __init__(self, spec: TokenizerSpec) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores
        self.fast = FastTokenizer.from_str(spec.tokenizer)
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True
        self.begin, self.end = spec.begin, spec.end
        self.code = "H" if spec.vocab_size <= 1 << 16 else "I"  # 2 or 4 bytes

    def __call__(self, pieces: list[tuple[Piece, bool]]) -> list[bytes]:
        """Return the tokens of (piece, is_validation) of each split, as bytes of uint16 or uint32."""
        tokens = [array(self.code) for _ in SPLITS]
        encodings = self.fast.encode_batch_fast([piece.text for piece, _ in pieces], add_special_tokens=False)
        for (piece, is_validation), encoding in zip(pieces, encodings, strict=True):
            out = tokens[is_validation]
            if piece.first:
                out.extend(self.begin)
            out.extend(encoding.ids)
            if piece.last:
                out.append(self.end)
        return [out.tobytes() for out in tokens]


def encode_all(
    batches: Iterable[tuple[list[tuple[Piece, bool]], T]], spec: TokenizerSpec, workers: int
) -> Iterator[tuple[T, list[bytes]]]:
    """Tokenise batches, in order, a few for each process at a time; yield the mark and the tokens of each split.

    Args:
        batches: (piece, is_validation) of each piece of a batch, and a mark.
        workers: processes; 1: this one only.
    """
    marks: deque[T] = deque()

    def pieces() -> Iterator[list[tuple[Piece, bool]]]:
        for batch, mark in batches:
            marks.append(mark)
            yield batch

    make_encoder = partial(Encoder, spec)
    one_process = workers == 1
    # Spawned, since threads of a remote file system may hold locks
    encoded = map(make_encoder(), pieces()) if one_process else map_in_order(make_encoder, pieces(), workers, "spawn")
    for tokens in encoded:
        yield marks.popleft(), tokens
