"""Turn text into token shards for pretraining.

    python scripts/prepare_data.py my_texts/ 'more/*.jsonl.zst' --tokenizer checkpoints/org/name --out_dir data/mine

Reads .txt, .jsonl and .parquet, plain, .gz or .zst: files, folders, globs, or URLs such as hf://datasets/org/name.
Repeat the command to resume an interrupted preparation. Memory: about 100 MiB per process.
"""

from dataclasses import dataclass

from litmini.cli import command
from litmini.errors import check, counted
from litmini.settings import Text


@dataclass
class PrepareConfig:
    """Settings of prepare_data.py."""

    inputs: list[str]
    """Files, folders, globs and URLs of text; positional arguments."""
    tokenizer: str
    """Directory with a tokenizer: a checkpoint, or the output of train_tokenizer.py."""
    out_dir: str
    """Directory for the shards, index.json and the tokenizer."""
    text_key: str = "text"
    """The field of JSONL records, or column of Parquet files, that holds the text."""
    separator: Text | None = None
    """Separator of documents in .txt files, such as <|endoftext|>; none: a file is one document."""
    val_fraction: float = 0.005
    """Fraction of documents for validation, chosen by a hash of their text."""
    shard_tokens: int = 1 << 28
    """Tokens of one shard, of 2 or 4 bytes each."""
    workers: int | None = None
    """Number of processes that tokenise; none: the number of cores."""
    max_empty: float = 0.01
    """Maximum fraction of empty documents, which are dropped; more is an error."""

    def __post_init__(self) -> None:
        check(
            "",
            self,
            inputs=bool(self.inputs),
            separator=self.separator != "",
            val_fraction=0 <= self.val_fraction < 1,
            shard_tokens=self.shard_tokens > 0,
            workers=self.workers is None or self.workers > 0,
            max_empty=0 <= self.max_empty <= 1,
        )


def main(config: PrepareConfig) -> None:
    import time
    from pathlib import Path

    from litmini.data.pretrain.text import find_sources
    from litmini.data.pretrain.tokenize import TokenizerSpec
    from litmini.data.pretrain.write_shards import prepare
    from litmini.system import cpu_count
    from litmini.tokenizer import Tokenizer

    tokenizer, target = Tokenizer(config.tokenizer), Path(config.out_dir)
    spec = TokenizerSpec(
        tokenizer=(tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8"),
        begin=tokenizer.encode(""),
        end=tokenizer.stop_ids[0],
        text_key=config.text_key,
        separator=config.separator,
        val_fraction=config.val_fraction,
        shard_tokens=config.shard_tokens,
    )
    sources = find_sources(config.inputs)
    started = time.perf_counter()
    index = prepare(sources, spec, target, config.workers or cpu_count(), tokenizer.save, config.max_empty)
    for split, content in index["splits"].items():
        tokens = sum(shard["tokens"] for shard in content["shards"])
        print(
            f"{split}: {counted(content['documents'], 'document')}, {counted(tokens, 'token')} in "
            f"{counted(len(content['shards']), 'shard')}"
        )
    s = index["statistics"]
    print(
        f"{s['characters']:,} characters, {counted(s['empty'], 'empty document')} dropped, "
        f"{time.perf_counter() - started:.1f} s"
    )
    print(
        f"\nNow train on it:\n  python scripts/pretrain.py --model llama/tiny --data.path {target} --out_dir out/NAME"
    )


if __name__ == "__main__":
    command(main, PrepareConfig, __doc__, positional=("inputs...",))
