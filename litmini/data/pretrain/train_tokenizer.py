"""Text -> a tokenizer in Hugging Face's form, trained with `tokenizers`."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litmini.data.pretrain.text import Source, read_pieces
from litmini.errors import UserError
from litmini.files import write_atomically, write_json

END = "<|endoftext|>"
UNKNOWN = "<|unknown|>"


def texts(sources: list[Source], text_key: str, separator: str | None, max_characters: int) -> Iterator[str]:
    """Yield the text of files, up to `max_characters`."""
    left = max_characters
    for source in sources:
        for piece in read_pieces(source, text_key, separator):
            yield piece.text[:left]
            left -= len(piece.text)
            if left <= 0:
                return


def train_tokenizer(stream: Iterable[str], kind: str, vocab_size: int, special: list[str]) -> Tokenizer:
    """Train a tokenizer on what `stream` yields; `END`, the end of a document, is token 0.

    Args:
        kind: "bpe" for byte-level BPE, or "characters".
        vocab_size: the largest vocabulary. Of characters the most frequent ones are kept, and others become `UNKNOWN`.
        special: further special tokens.

    Raises:
        UserError: the text is empty, or the vocabulary too small for its bytes.
    """
    if kind == "characters":
        counts = Counter[str]()
        for text in stream:
            counts.update(text)
        names = [END, UNKNOWN, *special]
        if vocab_size <= len(names):
            raise UserError(f"--vocab_size {vocab_size}: special tokens alone are {len(names)}.")
        kept = sorted(letter for letter, _ in counts.most_common(vocab_size - len(names)))
        if not kept:
            raise UserError("no text to make a tokenizer of.")
        vocabulary = {token: i for i, token in enumerate([*names, *kept])}
        fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))  # without merges: characters
        fast.decoder = decoders.Fuse()
        fast.add_special_tokens(names)
        return fast
    names = [END, *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    needed = len(alphabet) + len(names)
    if vocab_size < needed:
        raise UserError(f"--vocab_size {vocab_size}: the bytes and special tokens alone are {needed}.")
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=sys.stdout.isatty(),  # elsewhere it prints empty lines
    )
    fast.train_from_iterator(stream, trainer)
    return fast


def write_tokenizer(fast: Tokenizer, out_dir: str | Path) -> Path:
    """Write a tokenizer directory that litmini and transformers read.

    Raises:
        UserError: `out_dir` exists.
    """
    target = Path(out_dir)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out_dir or remove it.")
    with write_atomically(target, new=True) as partial:
        fast.save(str(partial / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
        }
        if fast.token_to_id(UNKNOWN) is not None:
            settings["unk_token"] = UNKNOWN
        write_json(partial / "tokenizer_config.json", settings)
    return target
