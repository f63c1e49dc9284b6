"""The work of the benchmark's task `classifier`: texts of each optimizer step with their classes, the same for all tools."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from work import LORA, SEED, Work

from litmini.checkpoints.config import empty_model
from litmini.config.classify import LabelledDataConfig
from litmini.data.labelled import LabelledSequences, load_labelled
from litmini.methods.adapters import add_adapters
from litmini.methods.heads import use_scores
from litmini.tasks.classify import with_score
from litmini.tokenizer import Tokenizer
from litmini.training.flops import Throughput

RATE = 1e-4
CLASSES = {
    "boat": "a red boat",
    "clock": "the kitchen clock",
    "bridge": "the wooden bridge",
    "apples": "two green apples",
}


def write_texts(file: Path, count: int, max_tokens: int, seed: int = SEED) -> None:
    """Write a JSONL file of synthetic texts of 10 to about `max_tokens` tokens; the class is what they are about."""
    draw = random.Random(seed)
    who = ["The teacher", "A farmer", "My neighbour", "The old captain", "An engineer", "Our doctor", "The young cook"]
    does = ["bought", "repaired", "painted", "described", "carried", "sold", "forgot", "measured", "found", "borrowed"]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            label = draw.choice(list(CLASSES))
            size = 1 + round(draw.uniform(0, (max_tokens - 10) / 6.5))
            said = " ".join(f"{draw.choice(who)} {draw.choice(does)} {CLASSES[label]}." for _ in range(size))
            out.write(json.dumps({"text": f"Story {number}. {said}", "label": label}) + "\n")


def plan_texts(checkpoint_dir: str, data: Path, steps: int, rows: int, max_seq_len: int, dtype: torch.dtype) -> Work:
    """Return the first `steps` optimizer steps of litmini, with `rows` packed sequences of `max_seq_len` tokens in each."""
    config = LabelledDataConfig(str(data), max_seq_len=max_seq_len)
    examples, _ = load_labelled(config, Tokenizer(checkpoint_dir), SEED)
    packed = LabelledSequences(examples, max_seq_len, True, SEED)
    _, model = empty_model(Path(checkpoint_dir))
    use_scores(model, len(examples.names))
    add_adapters(model, with_score(LORA))
    throughput = Throughput(model, torch.device("cpu"), dtype)
    work = Work([], [], [], classes=[])
    for step in range(steps):
        members = [packed.sequence(number) for number in range(step * rows, (step + 1) * rows)]
        chosen = sorted(i for row in members for i in row)  # in the order of the file, so that lengths are mixed
        work.flops.append(throughput.flops([packed.batch(members)]))
        work.steps.append([examples[i][0].tolist() for i in chosen])
        work.classes.append([int(examples.targets[i]) for i in chosen])
    return work


def classifier_jobs(config: Any, place: Path, dtype: str, tools: list[str]) -> list[dict[str, Any]]:
    """Return one job for each tool: a classifier with LoRA, with as many tokens in a step as the other tasks have."""
    rows, length = config.micro_batch_size, config.max_seq_len
    data = place / f"texts-{config.steps * rows * length}.jsonl"
    write_texts(data, config.steps * rows * length // 90 + 50, min(200, length - 60))
    work = place / f"work-classifier-{dtype}.json"
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    plan_texts(config.checkpoint_dir, data, config.steps, rows, length, kind).save(work)
    words = ["--checkpoint_dir", config.checkpoint_dir, "--data.path", data, "--seed", SEED]
    words += ["--data.max_seq_len", length, "--train.global_batch_size", rows, "--train.micro_batch_size", 1]
    words += ["--train.max_steps", config.steps, "--optim.lr", RATE, "--optim.schedule", "constant"]
    words += ["--compile", "false", "--precision", "32-true" if dtype == "fp32" else "bf16-true"]
    words += ["--lora.rank", LORA.rank, "--lora.alpha", LORA.alpha]
    job = {
        "task": "classifier", "method": "classifier", "dtype": dtype, "packed": False, "lr": RATE,
        "micro_batch_size": config.micro_batch_size, "betas": (0.9, 0.95), "max_grad_norm": 1.0, "rank": LORA.rank,
        "alpha": LORA.alpha, "work": str(work), "words": list(map(str, words)), "variant": "", "labels": len(CLASSES),
    }  # fmt: skip
    return [{**job, "tool": tool} for tool in tools]
