"""Measure the cost of pretraining data: preparation and the bare tokenizer, reading of sequences, opening of a corpus.

    python scripts/bench/pretraining_data.py --text data/stdlib/text.jsonl --tokenizer checkpoints/org/name --megabytes 50

The text is repeated and shuffled up to `--megabytes`. Preparation and the bare batch encoder of `tokenizers` run over it in
turns, on all cores. The corpora of the last table are sparse files that take no disk space.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from litmini.cli import command


@dataclass
class MeasureConfig:
    """Settings of pretraining_data.py."""

    text: str
    """A .jsonl file with documents under "text"."""
    tokenizer: str
    """Directory with a tokenizer."""
    megabytes: int = 50
    """Text to tokenise."""
    turns: int = 3
    """Repetitions of each measurement."""


def preparation(config: MeasureConfig, place: Path) -> None:
    from litmini.data.pretrain.text import find_sources
    from litmini.data.pretrain.tokenize import TokenizerSpec
    from litmini.data.pretrain.write_shards import prepare

    texts = [json.loads(line)["text"] for line in Path(config.text).read_text().split("\n") if line]
    random = np.random.default_rng(0)
    many: list[str] = []
    while sum(map(len, many)) < config.megabytes * 10**6:
        many += [texts[i] for i in random.permutation(len(texts))]
    file = place / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    content = (Path(config.tokenizer) / "tokenizer.json").read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"bare": [], "prepare_data": []}
    for turn in range(config.turns):
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        fast = FastTokenizer.from_str(content)
        started, tokens = time.perf_counter(), 0
        for at in range(0, len(many), 1000):
            tokens += sum(map(len, fast.encode_batch_fast(many[at : at + 1000], add_special_tokens=False)))
        seconds["bare"].append(time.perf_counter() - started)
        started = time.perf_counter()
        spec = TokenizerSpec(content, [], 0, val_fraction=0.005)
        prepare(find_sources([str(file)]), spec, place / f"out-{turn}", cores, lambda path: None)
        seconds["prepare_data"].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:13} {tokens / min(times):,.0f} tokens/s (best of {len(times)}), on {cores} cores")
    print(
        f"prepare_data has {min(seconds['bare']) / min(seconds['prepare_data']):.0%} of the bare encoder's throughput\n"
    )


def reading(place: Path) -> None:
    """Measure reading sequences of several lengths at random from a corpus of 50 million tokens in the page cache."""
    from litmini.data.pretrain.windows import TokenWindows

    corpus = fake_corpus(place / "reading", 50_000_000, real=True)
    print("rows x tokens   microseconds a batch   tokens/s of reading")
    for rows, length in ((12, 64), (16, 1024), (8, 2048), (4, 8192)):
        windows = TokenWindows([corpus], "train", length, seed=0)
        batch = lambda step, w=windows, r=rows: list(w.batches(range(step * r, (step + 1) * r), r))  # noqa: E731
        for step in range(300):
            batch(step)
        started = time.process_time()  # excludes other processes
        for step in range(300, 800):
            batch(step)
        each = (time.process_time() - started) / 500
        print(f"{rows:4} x {length:5} {each * 1e6:20,.0f} {rows * length / each:21,.0f}")


def fake_corpus(directory: Path, tokens: int, real: bool = False):  # type: ignore[no-untyped-def]
    """Return a corpus whose tokens are all 0: a sparse file or, with `real`, a file with checksums that can be read."""
    import zlib

    from litmini.data.pretrain.read_shards import Corpus
    from litmini.data.pretrain.tokenize import tokenizer_hash
    from litmini.data.pretrain.write_shards import FORMAT, PAGE

    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    shards, shard_tokens = [], 1 << 28
    for number in range(-(-tokens // shard_tokens)):
        count = min(shard_tokens, tokens - number * shard_tokens)
        file = directory / f"train-{number:05d}.bin"
        file.touch()
        os.truncate(file, 2 * count)
        shards.append({"file": file.name, "tokens": count, "sha256": ""})
        if real:
            content = np.zeros(count, np.uint16)
            content.tofile(file)
            pages = [zlib.crc32(content[at : at + PAGE // 2].tobytes()) for at in range(0, count, PAGE // 2)]
            np.array(pages, np.uint32).tofile(file.with_suffix(".crc"))
    splits = {"train": {"documents": 1, "shards": shards}, "val": {"documents": 0, "shards": []}}
    index = {"format": FORMAT, "dtype": "uint16", "vocab_size": 2, "tokenizer_sha256": tokenizer_hash("{}"), "end": 1}
    (directory / "index.json").write_text(json.dumps({**index, "splits": splits}))
    return Corpus(directory)


def opening(place: Path) -> None:
    from litmini.data.pretrain.read_shards import Corpus
    from litmini.data.pretrain.windows import TokenWindows

    print("\ntokens           shards   milliseconds until the first row is known")
    for exponent in (7, 9, 11, 12):
        directory = place / f"sparse-{exponent}"
        corpus = fake_corpus(directory, 10**exponent)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            TokenWindows([Corpus(directory)], "train", 2048, seed=0).locate(0)
            times.append(time.perf_counter() - started)
        print(f"{10**exponent:16,} {len(corpus.splits['train']):6,} {min(times) * 1e3:12.2f}")


def main(config: MeasureConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        preparation(config, Path(name))
        reading(Path(name))
        opening(Path(name))


if __name__ == "__main__":
    command(main, MeasureConfig, __doc__)
