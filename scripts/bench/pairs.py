"""The work of the benchmark's task `dpo`: the pairs of each optimizer step, the same for all tools."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from work import LORA, SEED, Work

from litmini.checkpoints.config import empty_model
from litmini.config.preference import PreferenceDataConfig
from litmini.data.preferences import PreferenceSequences, load_preferences
from litmini.methods.adapters import add_adapters
from litmini.ops.cross_entropy import IGNORE
from litmini.tokenizer import Tokenizer
from litmini.training.flops import Throughput

BETA, RATE = 0.1, 2e-5


def write_pairs(file: Path, count: int, max_tokens: int, seed: int = SEED) -> None:
    """Write a JSONL file of synthetic questions, each with two answers of 10 to about `max_tokens` tokens, uniformly."""
    draw = random.Random(seed)
    who = ["The teacher", "A farmer", "My neighbour", "The old captain", "An engineer", "Our doctor", "The young cook"]
    does = ["bought", "repaired", "painted", "described", "carried", "sold", "forgot", "measured", "found", "borrowed"]
    what = ["a red boat", "the kitchen clock", "seven letters", "an open book", "the wooden bridge", "two green apples"]

    def answer() -> str:
        size = 1 + round(draw.uniform(0, (max_tokens - 10) / 6.5))
        return " ".join(f"{draw.choice(who)} {draw.choice(does)} {draw.choice(what)}." for _ in range(size))

    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            pair = {"prompt": f"Tell me story number {number}.", "chosen": answer(), "rejected": answer()}
            out.write(json.dumps(pair) + "\n")


def plan_pairs(checkpoint_dir: str, data: Path, steps: int, rows: int, max_seq_len: int, dtype: torch.dtype) -> Work:
    """Return the first `steps` optimizer steps of litmini; a step's samples are chosen and rejected documents in turns."""
    examples, _, _ = load_preferences(
        PreferenceDataConfig(str(data), max_seq_len=max_seq_len), Tokenizer(checkpoint_dir), SEED
    )
    packed = PreferenceSequences(examples, max_seq_len, True, SEED)
    _, model = empty_model(Path(checkpoint_dir))
    add_adapters(model, LORA)
    throughput = Throughput(model, torch.device("cpu"), dtype)
    chosen, prompts, flops = [], [], []
    for step in range(steps):
        members = [packed.sequence(number) for number in range(step * rows, (step + 1) * rows)]
        flops.append(throughput.flops([packed.batch(members)]))
        documents: list[tuple[list[int], int]] = []
        for i in sorted(i for row in members for i in row):
            inputs, labels = examples[i]
            at = 0
            for size in examples.documents(i):
                own = labels[at : at + size]
                documents.append(([*inputs[at : at + size].tolist(), int(own[-1])], int((own == IGNORE).sum()) + 1))
                at += size
        chosen.append([ids for ids, _ in documents])
        prompts.append([size for _, size in documents])
    return Work(chosen, [], flops, prompts)


def preference_jobs(config: Any, place: Path, dtype: str, tools: list[str]) -> list[dict[str, Any]]:
    """Return one job for each tool: DPO with LoRA, with as many tokens in a step as the other tasks have."""
    rows, length = max(1, config.micro_batch_size // 2), config.max_seq_len  # a sequence has room for two documents
    data = place / f"pairs-{config.steps * rows * 2 * length}.jsonl"
    write_pairs(data, config.steps * rows * 2 * length // 250 + 50, min(200, length - 60))
    work = place / f"work-dpo-{dtype}.json"
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    plan_pairs(config.checkpoint_dir, data, config.steps, rows, length, kind).save(work)
    words = ["--checkpoint_dir", config.checkpoint_dir, "--data.path", data, "--seed", SEED, "--preference.beta", BETA]
    words += ["--data.max_seq_len", length, "--train.global_batch_size", rows]
    words += ["--train.micro_batch_size", 1, "--train.max_steps", config.steps, "--optim.lr", RATE]
    words += ["--optim.schedule", "constant", "--eval.samples", 0, "--compile", "false"]
    words += ["--precision", "32-true" if dtype == "fp32" else "bf16-true"]
    words += ["--lora.rank", LORA.rank, "--lora.alpha", LORA.alpha]
    job = {
        "task": "dpo", "method": "preference", "dtype": dtype, "packed": False, "lr": RATE, "beta": BETA,
        "micro_batch_size": config.micro_batch_size, "betas": (0.9, 0.95), "max_grad_norm": 1.0, "rank": LORA.rank,
        "alpha": LORA.alpha, "work": str(work), "words": list(map(str, words)), "variant": "",
    }  # fmt: skip
    return [{**job, "tool": tool} for tool in tools]
