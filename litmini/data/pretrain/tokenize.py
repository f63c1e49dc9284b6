"""Text -> token ids, on all cores. Imports nothing heavy, for the sake of the processes that do it."""

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
    """Everything but the text that the tokens depend on."""

    tokenizer: str
    """The contents of tokenizer.json."""
    begin: list[int]
    """Ids before every document (BOS, where the tokenizer puts one)."""
    end: int
    """The id after every document."""
    text_key: str = "text"
    separator: str | None = None
    val_fraction: float = 0.0
    """Share of documents that are held out, by a hash of their text: equal documents fall on the same side."""
    shard_tokens: int = 1 << 28
    """Tokens in a shard; the last one of a split has fewer."""

    @property
    def vocab_size(self) -> int:
        return max(FastTokenizer.from_str(self.tokenizer).get_vocab().values()) + 1

    def described(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tokenizer": tokenizer_hash(self.tokenizer)}


def tokenizer_hash(text: str) -> str:
    """sha256 of what a tokenizer.json means: the order of keys, truncation and padding do not count."""
    content = {k: v for k, v in json.loads(text).items() if k not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Tokenises pieces, in one thread. Text that spells a special token is text: only documents' ends are ends."""

    def __init__(self, spec: TokenizerSpec) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process of its own
        self.fast = FastTokenizer.from_str(spec.tokenizer)
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True
        self.begin, self.end = spec.begin, spec.end
        self.code = "H" if spec.vocab_size <= 1 << 16 else "I"  # 2 or 4 bytes

    def __call__(self, pieces: list[tuple[Piece, bool]]) -> list[bytes]:
        """The tokens of (piece, held out?), for each split, as bytes of uint16 or uint32."""
        tokens = [array(self.code) for _ in SPLITS]
        encodings = self.fast.encode_batch_fast([piece.text for piece, _ in pieces], add_special_tokens=False)
        for (piece, held_out), encoding in zip(pieces, encodings, strict=True):
            out = tokens[held_out]
            if piece.first:
                out.extend(self.begin)
            out.extend(encoding.ids)
            if piece.last:
                out.append(self.end)
        return [out.tobytes() for out in tokens]


def encode_all(
    batches: Iterable[tuple[list[tuple[Piece, bool]], T]], spec: TokenizerSpec, workers: int
) -> Iterator[tuple[T, list[bytes]]]:
    """Tokenise batches, in order; a few for each process are under way at a time.

    Args:
        batches: (piece, held out?) of each piece of a batch, and what comes back with its tokens.
        workers: processes; 1 does it in this one.

    Returns:
        That, and the tokens of each split.
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
