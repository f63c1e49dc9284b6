"""What preparing data costs as it grows: time, tokens a second beside the tokenizer alone, memory, start from the cache.

    python tests/data_at_size.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --sizes 10000 100000 1000000

The examples have Alpaca's form and lengths, and are cut out of Python's own documentation. Each figure is of a process of
its own, so that memory is its own, too. Tokens by seconds of CPU say most on a machine that does other things beside.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BASELINE = 20_000  # texts that the tokenizer alone is timed on


def write_examples(file: Path, count: int) -> None:
    """Alpaca-like records: some 10 words of instruction, 40% with 15 of input, and 60 of output, with long tails."""
    random = np.random.default_rng(0)
    words = "\n".join(topics.values()).split()
    with file.open("w") as out:
        for _ in range(count):
            lengths = 1 + random.lognormal(np.log([9, 13, 38]), [0.4, 0.6, 0.9]).astype(int).clip(max=600)
            lengths[1] *= random.random() < 0.4
            starts = random.integers(len(words) - 600, size=3)
            parts = [" ".join(words[at : at + size]) for at, size in zip(starts, lengths, strict=True)]
            out.write(json.dumps(dict(zip(("instruction", "input", "output"), parts, strict=True))) + "\n")


def prepare(file: str, checkpoint_dir: str) -> dict[str, float]:
    """What a run does before its first step: tokens, rows of 2,048, and the first batch."""
    from litmini.config.finetune import DataConfig
    from litmini.data.dataset import load_data
    from litmini.data.packing import PackedDataset
    from litmini.tokenizer import Tokenizer

    started, before, used = time.perf_counter(), memory("RssAnon"), cpu_seconds()
    train, _, _ = load_data(DataConfig(file), Tokenizer(checkpoint_dir), 0)
    loaded, used = time.perf_counter(), cpu_seconds() - used
    rows = PackedDataset(train, 2048, True, 0)
    next(rows.batches(range(4), 4))
    return {
        "tokens": rows.tokens(0),
        "filled": rows.tokens(0) / (len(rows) * rows.length),
        "seconds": loaded - started,
        "cpu_seconds": used,
        "rows_seconds": time.perf_counter() - loaded,
        "own_mib": (memory("RssAnon") - before) / 2**20,
        "worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
    }


def cpu_seconds() -> float:
    """Of this process and those that it has started."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(kind: str) -> int:
    """Bytes of this process; RssAnon leaves out what is mapped from files, which the system may drop."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def baseline(file: str, checkpoint_dir: str) -> list[float]:
    """Tokens a second, and a second of CPU, of the tokenizer's own batch call, on text that is rendered already."""
    from litmini.data.formats import read_examples
    from litmini.tokenizer import Tokenizer

    tokenizer = Tokenizer(checkpoint_dir)
    examples = read_examples(file, True)
    texts = [tokenizer.apply_template(example.messages or []) for example in examples[:BASELINE]]
    started, used = time.perf_counter(), time.process_time()
    encodings = tokenizer.encode_batch(texts)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    tokens = sum(len(encoding.ids) for encoding in encodings)
    return [tokens / seconds, tokens / used]


def measure(what: str, *words: str) -> Any:
    code = f"import json, data_at_size as d; print(json.dumps(d.{what}(*{words!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    settings = parser.parse_args()
    settings.checkpoint_dir = str(Path(settings.checkpoint_dir).resolve())
    titles = (
        "examples | tokens | tokenising | tokens/s, by CPU second | tokenizer alone | rows, a batch | filled | memory"
    )
    print(f"| {titles} | from the cache |\n|{'---|' * 9}", flush=True)
    for size in settings.sizes:
        with tempfile.TemporaryDirectory() as directory:
            os.environ["LITMINI_CACHE"] = f"{directory}/cache"
            file = f"{directory}/data.jsonl"
            write_examples(Path(file), size)
            first: dict[str, float] = measure("prepare", file, settings.checkpoint_dir)
            again: dict[str, float] = measure("prepare", file, settings.checkpoint_dir)
            alone: list[float] = measure("baseline", file, settings.checkpoint_dir)
        print(
            f"| {size:,} | {first['tokens']:,} | {first['seconds']:.1f} s ({first['cpu_seconds']:.0f} s of CPU) | "
            f"{first['tokens'] / first['seconds']:,.0f}, {first['tokens'] / first['cpu_seconds']:,.0f} | "
            f"{alone[0]:,.0f}, {alone[1]:,.0f} | {first['rows_seconds']:.1f} s | {first['filled']:.1%} | "
            f"{first['own_mib']:,.0f} MiB, each worker {first['worker_mib']:,.0f} | "
            f"{again['seconds'] + again['rows_seconds']:.1f} s, {again['own_mib']:,.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
