"""Growth of litmini's cost with the number of samples, with accumulation, and with the tokens of a micro-batch."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from run_litmini import SCRIPTS, read_rows
from work import LORA, SEED, hardware, versions, write_samples

SAMPLES = (1_000, 10_000, 100_000, 1_000_000)
ACCUMULATED = (1, 8, 64)  # micro-batches in a step
DOCUMENTS, LENGTH = (4, 8, 16), 256  # of a micro-batch whose activations are counted
NOTHING = ("real_tokens_per_second", "peak_memory_mib", "mfu", "seconds_to_first_step", "loss_start", "loss_end")


def measure_growth(config: Any, place: Path) -> list[dict[str, Any]]:
    """Return a row for each size: `what` was measured, `value` and `unit`."""
    fixed = {"task": "growth", "tool": "litmini", "dtype": config.dtype, **dict.fromkeys(NOTHING)}
    fixed |= {"versions": versions(), "hardware": hardware()}
    found = [*data_path(config, place), *accumulation(config, place), *activations(config.dtype)]
    return [{**fixed, "what": what, "value": value, "unit": unit} for what, value, unit in found]


def data_path(config: Any, place: Path) -> list[tuple[str, float, str]]:
    """Measure the data path from file to batches, without cache: tokenising, packing, and every batch of an epoch."""
    from litmini.config.finetune import DataConfig
    from litmini.data.dataset import load_data
    from litmini.data.packing import PackedDataset
    from litmini.tokenizer import Tokenizer

    found = []
    for count in SAMPLES:
        file = place / f"growth-{count}.jsonl"
        write_samples(file, count, max_tokens=40)
        os.environ["LITMINI_CACHE"] = str(place / f"cache-{time.time_ns()}")
        started = time.perf_counter()
        settings = DataConfig(path=str(file), train_on="all", max_seq_len=config.max_seq_len)
        examples, _, _ = load_data(settings, Tokenizer(config.checkpoint_dir), SEED)
        rows = PackedDataset(examples, config.max_seq_len, True, SEED)
        tokens = sum(int((batch["documents"] > 0).sum()) for batch in rows.batches(range(len(rows)), 4))
        seconds = time.perf_counter() - started
        found.append((f"data path, {count:,} samples", 1e6 * seconds / tokens, "us a token"))
        file.unlink()
    return found


def accumulation(config: Any, place: Path) -> list[tuple[str, float, str]]:
    """Measure LoRA with one sequence per micro-batch: time of the second half of the sequences, and peak memory."""
    found = []
    rows = 2 * max(ACCUMULATED)
    data = place / "growth-accumulation.jsonl"
    write_samples(data, rows * config.max_seq_len // 150 + 50, max_tokens=min(400, config.max_seq_len))
    for count in ACCUMULATED:
        out = place / f"growth-{count}-{time.time_ns()}"
        words = ["--checkpoint_dir", config.checkpoint_dir, "--data.path", data, "--data.train_on", "all"]
        words += ["--data.max_seq_len", config.max_seq_len, "--train.micro_batch_size", 1, "--out_dir", out]
        words += ["--train.global_batch_size", count, "--train.max_steps", rows // count, "--eval.samples", 0]
        words += ["--lora.rank", LORA.rank, "--precision", "bf16-true" if config.dtype == "bf16" else "32-true"]
        script = str(SCRIPTS / "finetune_lora.py")
        subprocess.run([sys.executable, script, *map(str, words)], check=True, capture_output=True)
        steps, results = read_rows(out / "metrics.csv"), json.loads((out / "manifest.json").read_text())["results"]
        seconds = sum(spent for spent, _ in steps[len(steps) // 2 :])
        named = f"{count} micro-batches in a step"
        found.append((f"time, {named}", 1e6 * seconds / (results["tokens"] / 2), "us a token"))
        found.append((f"peak memory, {named}", results["peak_memory_mib"], "MiB"))
    return found


def activations(dtype: str) -> list[tuple[str, float, str]]:
    """Count the activations per token of a block, in the smallest preset of each family, without running it.

    Differences between numbers of blocks and of documents exclude constant parts; measured at two sizes.
    """
    import torch

    from litmini.config.training import OptimConfig
    from litmini.errors import UserError
    from litmini.methods.adapters import add_adapters
    from litmini.models import FAMILIES, family
    from litmini.training.memory import estimate

    kind, precision = (torch.bfloat16, "bf16-true") if dtype == "bf16" else (torch.float32, "32-true")

    def kept(module: Any, config: Any, documents: int) -> int:
        positions = torch.arange(LENGTH).repeat(documents)[None]
        ids = torch.arange(documents).repeat_interleave(LENGTH)[None] + 1
        tokens = torch.ones_like(positions)
        batch = {"tokens": tokens, "positions": positions, "documents": ids, "labels": tokens}
        sizes = []
        for layers in (1, 2):
            with torch.device("meta"):
                model = module.Model(replace(config, n_layers=layers)).to(kind)
                add_adapters(model, LORA)
            sizes.append(estimate(model, batch, OptimConfig(), precision).activations)
        return sizes[1] - sizes[0]

    found = []
    for module in dict.fromkeys(family(name) for name in sorted(FAMILIES)):
        preset = min((p for p in module.PRESETS if p != "tiny"), key=lambda p: module.PRESETS[p].dim)
        what = f"kept for backward by a block of {preset}, LoRA, documents of {LENGTH}"
        try:
            sizes = [kept(module, module.PRESETS[preset], documents) for documents in DOCUMENTS]
        except UserError as error:
            print(f"note: {preset}: {error}", file=sys.stderr)
            continue
        for few, more, a, b in zip(sizes, sizes[1:], DOCUMENTS, DOCUMENTS[1:], strict=False):
            found.append((f"{what}, {a} to {b}", (more - few) / (b - a) / LENGTH / 1024, "KiB a token"))
    return found
