"""The work that `scripts/benchmark.py` gives to every tool: the samples of each optimizer step, and their FLOPs.

A step has the samples that litmini packs into its sequences; other tools get the same samples in the same step, in their own
micro-batches. In all tools, the loss of a step is the mean over its target tokens.
"""

import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from litmini.checkpoints.config import empty_model
from litmini.config.finetune import DataConfig, LoraConfig
from litmini.data.dataset import load_data
from litmini.data.packing import PackedDataset
from litmini.methods.adapters import add_adapters
from litmini.methods.dora import DoRALinear
from litmini.tokenizer import Tokenizer
from litmini.training.flops import Throughput

SEED = 1337
VALIDATION_SAMPLES = 16  # samples that every result is evaluated on, in fp32
MEAN_TOKENS = 210  # of a synthetic sample
LORA = LoraConfig(rank=8, alpha=16)
Method = Literal["lora", "qlora", "dora", "full"]


@dataclass(frozen=True)
class Work:
    """The samples and FLOPs of a benchmark."""

    steps: list[list[list[int]]]
    """Optimizer step -> samples -> token ids. A sample of n tokens has n - 1 inputs and n - 1 targets."""
    validation: list[list[int]]
    """Samples that are in no step, if there are enough."""
    flops: list[float]
    """FLOPs of each step, by `litmini.training.flops`; padding and recomputation do not count."""
    prompts: list[list[int]] = field(default_factory=list)
    """Of pairs, whose samples are chosen and rejected documents in turns: the tokens of each one's prompt."""

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


def write_samples(file: Path, count: int, seed: int = SEED, max_tokens: int = 400) -> None:
    """Write a JSONL file of synthetic instructions with completions, of 20 to about `max_tokens` tokens, uniformly."""
    draw = random.Random(seed)
    who = ["The teacher", "A farmer", "My neighbour", "The old captain", "An engineer", "Our doctor", "The young cook"]
    does = ["bought", "repaired", "painted", "described", "carried", "sold", "forgot", "measured", "found", "borrowed"]
    what = ["a red boat", "the kitchen clock", "seven letters", "an open book", "the wooden bridge", "two green apples"]
    when = ["in the morning", "near the station", "before the storm", "last winter", "at the market", "without a word"]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            sentences = [
                f"{draw.choice(who)} {draw.choice(does)} {draw.choice(what)} {draw.choice(when)}."
                for _ in range(round(draw.uniform(0, (max_tokens - 20) / 9.4)))
            ]
            about, rest = sentences[:1] or ["Nothing."], sentences[1:]
            text = f"### Instruction:\nGo on, number {number}. {about[0]}\n\n### Response:\n{' '.join(rest)}"
            out.write(json.dumps({"text": text}) + "\n")


def plan_work(
    checkpoint_dir: str, data: Path, method: Method, steps: int, rows: int, max_seq_len: int, dtype: torch.dtype
) -> Work:
    """Return the first `steps` optimizer steps of litmini, with `rows` packed sequences of `max_seq_len` tokens in each."""
    config = DataConfig(path=str(data), train_on="all", max_seq_len=max_seq_len)
    examples, _, _ = load_data(config, Tokenizer(checkpoint_dir), SEED)
    packed = PackedDataset(examples, max_seq_len, True, SEED)
    _, model = empty_model(Path(checkpoint_dir))
    if method != "full":
        add_adapters(model, LORA, DoRALinear if method == "dora" else None)
    throughput = Throughput(model, torch.device("cpu"), dtype)
    chosen, flops = [], []
    for step in range(steps):
        members = [packed.sequence(number) for number in range(step * rows, (step + 1) * rows)]
        flops.append(throughput.flops([packed.batch(members)]))
        chosen.append(sorted(i for row in members for i in row))  # in the order of the file, so that lengths are mixed
    used = {i for step in chosen for i in step}
    left = [i for i in range(len(examples)) if i not in used] or list(range(len(examples)))

    def tokens(i: int) -> list[int]:
        inputs, labels = examples[i]
        return [*inputs.tolist(), int(labels[-1])]

    return Work([[tokens(i) for i in step] for step in chosen], [tokens(i) for i in left[:VALIDATION_SAMPLES]], flops)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return the FLOPs per second of a large matmul: the best in about `seconds`."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # CPU-GPU sync point
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def versions() -> dict[str, str]:
    """Return the versions of torch and litmini in this process."""
    import litmini

    return {"torch": torch.__version__, "litmini": litmini.__version__}


def hardware() -> dict[str, Any]:
    """Return the hardware of the measurements."""
    import platform

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": gpu or "cpu", "cpu": name, "threads": torch.get_num_threads()}
