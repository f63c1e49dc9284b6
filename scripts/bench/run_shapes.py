"""Rows of the benchmark on random weights of a model's shape: python run_shapes.py JOBS.json (`shapes.py` writes it).

One process runs all rows of a tool, as most of a short row on a GPU would be its start. A row that fails is a result; the rows
after it go on. Only what a tool needs is imported: neither litmini's command line nor a checkpoint.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generation import read_bandwidth
from shape_models import LORA, Job, packed, preset, random_model, transformers_model
from torch import Tensor, nn

from litmini.distributed.fabric import fabric_class, mixed_precision

Steps = list[tuple[float, float]]  # seconds and loss of each
PROMPT, NEW, BATCH = 128, 65, 8  # tokens, and prompts in a batch, of decoding
RESTART = 3  # the exit status that asks for a new process: CUDA answers with errors only


def litmini_training(job: Job, device: torch.device, batches: list[dict[str, Tensor]]) -> Steps:
    """Train in litmini's own loop."""
    from litmini.config.training import OptimConfig, TrainConfig
    from litmini.evaluation.verify import BatchList
    from litmini.methods.adapters import add_adapters
    from litmini.methods.nf4 import quantize_linears
    from litmini.ops.rounding import dither
    from litmini.training.compile import compile_training
    from litmini.training.loop import fit
    from litmini.training.objective import LanguageModeling
    from litmini.training.optimizer import make_optimizer
    from litmini.training.setup import Progress, Recorder, Setup

    model, full = random_model(job, device), job["task"] == "full"
    if job["task"] == "qlora":
        quantize_linears(model)
    if not full:
        add_adapters(model, LORA)
    dither(model.parameters(), torch.bfloat16, 0)
    steps: Steps = []

    class Rows(Recorder):
        def log(self, metrics: dict[str, float]) -> None:
            steps.append((batches[0]["tokens"].numel() / metrics["tokens_per_second"], metrics["loss"]))

    fabric = fabric_class()(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=None if full else "32-true",
        plugins=mixed_precision("bf16-mixed", device.type) if full else None,
    )
    optim = OptimConfig(lr=1e-5, schedule="constant")
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, optim))
    if job["variant"] == "compiled":
        compile_training(model, torch.bfloat16)
    data = BatchList([[batch] for batch in batches])
    fit(
        Setup(fabric, wrapped, optimizer, data, TrainConfig(), optim, 0, Progress(), Rows()),
        LanguageModeling(),
    )
    return steps


def transformers_training(job: Job, device: torch.device, batches: list[dict[str, Tensor]]) -> Steps:
    """Train in a plain loop, without the overhead of a trainer."""
    model, full = transformers_model(job, device).train(), job["task"] == "full"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    flat = job["attention"] != "sdpa"  # FlashAttention takes packed documents as one sequence
    steps = []
    for batch in batches:
        started = time.perf_counter()
        tokens, positions = (x.view(1, -1) if flat else x for x in (batch["tokens"], batch["positions"]))
        labels = tokens.masked_fill(positions == 0, -100)  # shifted by the model
        targets = int((labels >= 0).sum())
        inputs = {"input_ids": tokens, "position_ids": positions, "labels": labels}
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=full):
            loss = model(**inputs, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())  # CPU-GPU sync point
        steps.append((time.perf_counter() - started, value))
    return steps


def train(job: Job, device: torch.device) -> dict[str, Any]:
    """Return tokens per second, MFU and the median step of a training row."""
    from litmini.methods.adapters import add_adapters
    from litmini.training.flops import Throughput

    module, config = preset(job["shape"])
    batches = [packed(config.vocab_size, job["length"], job["rows"], seed) for seed in range(job["steps"])]
    run = litmini_training if job["tool"] == "litmini" else transformers_training
    steps = run(job, device, batches)
    step = median(seconds for seconds, _ in steps[job["warmup"] :])
    with torch.device("meta"):
        model = module.Model(config)
    if job["task"] != "full":
        add_adapters(model, LORA)
    throughput = Throughput(model, device, torch.bfloat16)
    flops = median(throughput.flops([batch]) for batch in batches[job["warmup"] :])
    return {
        "tokens_per_second": batches[0]["tokens"].numel() / step,
        "seconds_per_step": step,
        "mfu": flops / step / throughput.peak,
        "peak_flops": throughput.source,
        "loss": steps[0][1],
    }


def decode(job: Job, device: torch.device) -> dict[str, Any]:
    """Return tokens per second of greedy decoding, for one prompt and for a batch, and its part of memory bandwidth."""
    _, config = preset(job["shape"])
    prompt = min(PROMPT, config.max_positions - NEW - 1)
    prompts = torch.randint(0, config.vocab_size, (BATCH, prompt), generator=torch.Generator().manual_seed(0))
    if job["tool"] == "litmini":
        model = random_model(job, device).eval()
        if job["variant"] == "compiled":
            from litmini.generation.compile import compile_decoding

            compile_decoding(model)
        run: Callable[[int, int], None] = partial(_litmini_tokens, model, prompts.tolist())
    else:
        model = transformers_model(job, device).eval()
        run = partial(_transformers_tokens, model, prompts.to(device))
    found: dict[str, Any] = {}
    for name, rows in (("tokens_per_second", 1), (f"batch_{BATCH}_tokens_per_second", BATCH)):
        run(NEW, rows)  # warm-up
        seconds = {count: min(_timed(partial(run, count, rows), device) for _ in range(2)) for count in (1, NEW)}
        found[name] = rows * (NEW - 1) / max(seconds[NEW] - seconds[1], 1e-9)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tied:  # decoding reads one row of an untied embedding
        weights -= config.vocab_size * config.dim * 2
    found["of_bandwidth"] = found["tokens_per_second"] * weights / read_bandwidth(device)
    return found


def _litmini_tokens(model: nn.Module, prompts: list[list[int]], count: int, rows: int) -> None:
    from litmini.config.generate import SamplingConfig
    from litmini.generation.generate import finish_all
    from litmini.generation.request import Request

    sampling = SamplingConfig(max_new_tokens=count, ignore_eos=True)
    finish_all(model, [Request(prompt, sampling, []) for prompt in prompts[:rows]])


def _transformers_tokens(model: Any, prompts: Tensor, count: int, rows: int) -> None:
    fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(prompts[:rows], attention_mask=torch.ones_like(prompts[:rows]), **fixed)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_row(job: Job, device: torch.device) -> dict[str, Any]:
    """Return the results of a row, or `failed` with the reason; peak memory is that of the row on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        found = (decode if job["task"] == "decode" else train)(job, device)
    except ImportError as error:
        return {"failed": f"skipped: {error.name or error} is not installed"}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    if device.type == "cuda":
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def use(device: torch.device) -> None:
    """Let what is measured of "the" GPU be of this one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def main(file: Path) -> None:
    plan = json.loads(file.read_text())
    device = torch.device(plan["device"])
    use(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with open(plan["results"], "a") as results:
        for job in plan["jobs"]:
            if time.time() > plan["deadline"]:
                return
            started = time.time()
            print("begins:", job, flush=True)
            found = run_row(job, device)
            results.write(json.dumps({**job, **found, "seconds": time.time() - started, "device": name}) + "\n")
            results.flush()
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    os._exit(RESTART)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
