"""Train a tokenizer on text.

    python scripts/train_tokenizer.py my_texts/ --out_dir data/tokenizer --vocab_size 32000

Byte-level BPE, as in GPT-2, encodes any text. `--kind characters` makes one token per character. Memory grows with the
number of different words: a few GiB for 1 GB of text (--max_characters).
"""

from dataclasses import dataclass
from typing import Literal

from litmini.cli import command
from litmini.errors import check
from litmini.settings import Text


@dataclass
class TrainTokenizerConfig:
    """Settings of train_tokenizer.py."""

    inputs: list[str]
    """Files, folders, globs and URLs of text; positional arguments."""
    out_dir: str
    """Directory for tokenizer.json and tokenizer_config.json; must not exist."""
    kind: Literal["bpe", "characters"] = "bpe"
    """bpe: byte-level; characters: one token for each character that occurs."""
    vocab_size: int = 32_000
    """Tokens of a bpe tokenizer, the 256 bytes and special tokens included; characters: the maximum."""
    special_tokens: list[str] | None = None
    """Further tokens, such as <|im_start|>, that plain text never produces."""
    text_key: str = "text"
    """The field of JSONL records, or column of Parquet files, that holds the text."""
    separator: Text | None = None
    """Separator of documents in .txt files; none: a file is one document."""
    max_characters: int = 10**9
    """Characters to train on, from the first file on."""

    def __post_init__(self) -> None:
        check(
            "", self, inputs=bool(self.inputs), vocab_size=self.vocab_size > 1, max_characters=self.max_characters > 0
        )


def main(config: TrainTokenizerConfig) -> None:
    from litmini.data.pretrain.text import find_sources
    from litmini.data.pretrain.train_tokenizer import texts, train_tokenizer, write_tokenizer

    stream = texts(find_sources(config.inputs), config.text_key, config.separator, config.max_characters)
    fast = train_tokenizer(stream, config.kind, config.vocab_size, config.special_tokens or [])
    target = write_tokenizer(fast, config.out_dir)
    print(f"{target}: {fast.get_vocab_size():,} tokens")
    words = " ".join(config.inputs)
    print(f"\nTokens of the text:\n  python scripts/prepare_data.py {words} --tokenizer {target} --out_dir data/NAME")


if __name__ == "__main__":
    command(main, TrainTokenizerConfig, __doc__, positional=("inputs...",))
