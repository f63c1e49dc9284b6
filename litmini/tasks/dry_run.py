"""`--dry_run`: estimates memory with fake tensors, and time with one timed micro-step."""

import math
import time

import torch
from torch import nn

from litmini.config.training import RunConfig
from litmini.data.packing import PackedDataset
from litmini.errors import UserError, counted
from litmini.methods.adapters import experts_left_out
from litmini.ops.cross_entropy import gpu_memory
from litmini.system import mapped_files, physical_bytes, resident_bytes
from litmini.tasks.setup import Data, count_parameters
from litmini.training import gpus
from litmini.training.low_memory import checkpoint_activations
from litmini.training.memory import LANGUAGE_MODELING, Batch, Memory, describe, estimate, nbytes
from litmini.training.objective import Objective
from litmini.training.setup import on_device


def preview(data: Data, config: RunConfig, model: nn.Module, objective: Objective = LANGUAGE_MODELING) -> None:
    """Print parameters, memory and time for `--dry_run`; with `--show_masks`, print examples with their loss masks."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if config.show_masks and isinstance(data.train, PackedDataset):
        print(data.train.examples.show_masks(data.tokenizer, config.show_masks))
    trained, total = count_parameters(model)
    print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f}%).")
    if left_out := experts_left_out(model):
        print(f"{left_out}.")
    if config.dry_run:
        if config.train.checkpoint_activations:
            checkpoint_activations(model)
        print(dry_run(model, config, data, objective))
    print("Nothing was trained or written.")


def dry_run(model: nn.Module, config: RunConfig, data: Data, objective: Objective = LANGUAGE_MODELING) -> str:
    """Return a text with peak memory by part, whether it fits on this device, and the duration of the run.

    No parameter is changed.

    Args:
        model: with its method, weights on the CPU.
    """
    world, micro = config.devices * config.num_nodes, data.micro_batch_size
    accumulate = data.global_batch_size > micro * world
    batch = data.train.longest_batch(micro) or next(data.train.batches(range(micro), micro))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = max(0, resident_bytes() - resident_weights(model)) if device.type == "cpu" else 0
    mixed = config.precision == "bf16-mixed"

    def peak(gpu: int) -> Memory:
        found = estimate(
            model, batch, config.optim, config.precision, accumulate, 0 if gpu else process, objective, gpu
        )
        found = gpus.memory_per_device(found, model, config.devices, config.strategy, config.num_nodes, mixed)
        return gpus.on_gpu(found) if gpu else found

    try:
        memory, on_gpu = peak(gpu_memory(device)), peak(gpus.SMALLEST)
    except UserError as error:
        return str(error)
    available = _memory_of(device)
    batch_text = f"{counted(micro, 'sequence')} of {batch['tokens'].shape[1]:,} tokens"
    lines = [f"peak memory of {'the process' if world == 1 else 'each process'}, {batch_text}:", describe(memory)]
    lines.append(f"  {'this device has':30}{available / 2**20:12,.0f} MiB")
    lines += ["a GPU that it fits on (estimated, not run on one):", *gpus.fits_on(on_gpu)]
    if memory.total > available:
        return "\n".join([*lines, f"warning: it does not fit on this device. {_suggest_less(config, memory)}"])
    seconds = time_micro_step(model.to(device), batch, config.precision, objective)
    per_step = math.ceil(data.global_batch_size / (micro * world))
    steps = data.total_steps
    evaluations = 2 + (steps - 1) // (config.train.eval_every or steps) if data.val else 0
    forwards = evaluations * math.ceil(len(data.val or ()) / (micro * world))
    whole = seconds * (steps * per_step + forwards / 3)  # a forward pass is a third of a micro-step
    lines.append(
        f"time: {_span(seconds)} per micro-step on this device, {_span(whole)} for {counted(steps, 'step')}, "
        f"without completions"
    )
    return "\n".join(lines)


def resident_weights(model: nn.Module) -> int:
    """Return the bytes of the model's weights in memory. Those that are mapped from a file come into it as they are read."""
    files = mapped_files(".safetensors")
    copied = [p for p in model.parameters() if not any(first <= p.data_ptr() < end for first, end, _ in files)]
    return sum(map(nbytes, copied)) + sum(size for _, _, size in files)


def time_micro_step(model: nn.Module, batch: Batch, precision: str, objective: Objective = LANGUAGE_MODELING) -> float:
    """Return the seconds of one forward and backward pass, after a warm-up."""
    device = next(model.parameters()).device
    ready = on_device(batch, device)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    model.train()
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            loss = objective.loss(model, ready)
        loss.backward()
        float(loss.detach())  # CPU-GPU sync point
        model.zero_grad()
    return time.perf_counter() - started


def _memory_of(device: torch.device) -> int:
    return gpu_memory(device) or physical_bytes()


def _suggest_less(config: RunConfig, memory: Memory) -> str:
    """Suggest settings that reduce the largest part of the memory."""
    if memory.activations + memory.loss + memory.temporary > memory.total / 2:
        smaller = [f"--train.micro_batch_size {max(1, config.train.micro_batch_size // 2)}"]
        smaller += [] if config.train.checkpoint_activations else ["--train.checkpoint_activations true"]
        return f"Try {' or '.join(smaller)}."
    return "Weights and optimizer state are the largest part: try LoRA, QLoRA or --optim.name adamw8bit."


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
