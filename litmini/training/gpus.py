"""Estimates for GPUs, by arithmetic alone: which ones have enough memory, memory per device, and throughput.

None of these estimates was checked on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from litmini.distributed.fsdp import blocks, gathered_bytes
from litmini.ops.cross_entropy import GPU_PART
from litmini.training.flops import PUBLISHED, Throughput
from litmini.training.memory import Memory, nbytes

GIB = 2**30
CUDA_CONTEXT = GIB * 6 // 10  # with its kernels; not measured
GPUS = ("RTX 4090", "L40S", "A100", "H100", "H200", "B200")
SIZES = {  # GB, as sold: GiB that CUDA reports, the fewest of those named
    16: (15.6, "RTX 4080, V100"),
    24: (23.5, "RTX 4090, L4, A10"),
    40: (39.4, "A100 40 GB"),
    48: (44.4, "L40S, A6000"),
    80: (79.1, "A100, H100"),
    141: (139.7, "H200"),
}
SMALLEST = int(SIZES[16][0] * GIB)


def tokens_per_day(model: nn.Module, length: int, mfu: float, devices: int) -> dict[str, float]:
    """Return the tokens per day of training on each GPU with a published peak; sequences are full, all tokens supervised.

    Args:
        mfu: as `litmini.training.flops` defines it.
    """
    flops = token_flops(model, length)
    return {name: mfu * PUBLISHED[name] * devices * 86400 / flops for name in GPUS}


def token_flops(model: nn.Module, length: int) -> float:
    """Return the mean training FLOPs of a token, in a full sequence with all tokens supervised."""
    throughput = Throughput(model, torch.device("cpu"), torch.bfloat16)
    return throughput.per_token + throughput.per_target + throughput.per_key * (length + 1) / 2


def memory_per_device(
    memory: Memory, model: nn.Module, devices: int, strategy: str, num_nodes: int = 1, mixed: bool = False
) -> Memory:
    """Return the memory of each of several devices, `devices` on each node.

    ddp: the whole memory, and a second copy of the gradients for their exchange. fsdp: a shard of weights, gradients and
    optimizer state; embedding, head, two blocks (the current one and the next) and the gradients of a block are gathered,
    and one of these gradients is in fp32 once more, to be summed. hsdp: the same, with shards over one node.

    Args:
        mixed: with `bf16-mixed`, fsdp gathers blocks in bf16.
    """
    devices = devices if strategy == "hsdp" else devices * num_nodes
    if devices == 1:
        return memory
    if strategy == "ddp":
        return replace(memory, temporary=memory.temporary + memory.trained)
    whole = max(sum(map(nbytes, block.parameters())) for block in blocks(model))
    block = max(gathered_bytes(block, mixed) for block in blocks(model))
    every = sum(nbytes(p) for p in {id(p): p for p in model.parameters()}.values())
    outside = every - sum(nbytes(p) for block in blocks(model) for p in block.parameters())
    gradients = (outside + block + max(outside, whole)) * memory.trained // every
    sharded = {part: -(-getattr(memory, part) // devices) for part in ("frozen", "trained", "optimizer", "gradients")}
    return replace(memory, temporary=memory.temporary + outside + 2 * block + gradients, **sharded)


def on_gpu(memory: Memory) -> Memory:
    """Add CUDA's own memory, and 10% of what comes and goes for PyTorch's allocator. Neither was measured."""
    moving = memory.activations + memory.loss + memory.temporary + memory.gradients
    return replace(memory, process=CUDA_CONTEXT, allocator=moving // 10)


def fits_on(memory: Memory) -> Iterator[str]:
    """Yield a line for each size of GPUs: whether `memory`, estimated for one of `SMALLEST` bytes, fits on it."""
    for size, (gib, names) in SIZES.items():
        more_logits = (gib * GIB - SMALLEST) / GPU_PART  # at once, at most: see `rows_at_once`
        left = gib - (memory.total + more_logits) / GIB
        answer = f"fits, {left:.1f} GiB are left" if left > 0 else f"does not fit, {-left:.1f} GiB are missing"
        yield f"  {size:>4} GB  {names:20}{answer}"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends: (to GPUs of its node, to other nodes)."""

    micro_batch: tuple[float, float]
    """In each micro-batch."""
    step: tuple[float, float]
    """In addition, once in each optimizer step."""


def communication_volume(model: nn.Module, strategy: str, devices: int, num_nodes: int, mixed: bool = False) -> Traffic:
    """Return the bytes that each of `devices` GPUs on each of `num_nodes` nodes sends with `strategy`.

    ddp: an all-reduce of gradients in each step. fsdp: in each micro-batch, an all-gather of weights in forward and again in
    backward, and a reduce-scatter of gradients. hsdp: the same within a node; in each step, an all-reduce of the shards of
    gradients between nodes.

    Args:
        mixed: with `bf16-mixed`, fsdp gathers blocks in bf16.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    inside = blocks(model) if mixed else []
    saved = sum(sum(map(nbytes, block.parameters())) - gathered_bytes(block, mixed) for block in inside)
    weights = sum(map(nbytes, parameters)) - saved
    gradients = sum(nbytes(p) for p in parameters if p.requires_grad)

    def ring(processes: int, size: float) -> float:
        return size * (processes - 1) / processes

    world = devices * num_nodes
    if strategy == "hsdp":
        within_node = ring(devices, 2 * weights + gradients)
        return Traffic((within_node, 0.0), (0.0, 2 * ring(num_nodes, gradients / devices)))
    sent = 2 * ring(world, gradients) if strategy == "ddp" else ring(world, 2 * weights + gradients)
    way = (sent, 0.0) if num_nodes == 1 else (0.0, sent)  # the slowest link limits a ring
    return Traffic((0.0, 0.0), way) if strategy == "ddp" else Traffic(way, (0.0, 0.0))


def compare(
    sent: Traffic,
    flops: float,
    tokens: int,
    micro_batches: int,
    mfu: float,
    speeds: tuple[float, float],
    gpu: str = "H100",
) -> str:
    """Return lines of text: bytes and seconds of communication in a step, seconds of compute, and which of them is longer.

    Args:
        flops: training FLOPs of a token.
        tokens: tokens of a micro-batch.
        micro_batches: micro-batches of one GPU in a step.
        speeds: bytes per second that a GPU sends: (within a node, between nodes).
    """
    lines, waiting = [], 0.0
    for i, way in enumerate(("within a node", "between nodes")):
        size = micro_batches * sent.micro_batch[i] + sent.step[i]
        waiting += size / speeds[i]
        if size:
            lines.append(
                f"  each GPU sends {size / 1e9:,.1f} GB {way}: {size / speeds[i]:.2g} s at {speeds[i] / 1e9:,.0f} GB/s"
            )
    per_gpu = micro_batches * tokens
    computing = per_gpu * flops / (mfu * PUBLISHED[gpu])
    hidden = "hides that" if computing > waiting else "does not hide that"
    lines.append(
        f"  each GPU computes {computing:.2g} s ({gpu}), which {hidden}: a step has {per_gpu:,} tokens per GPU, "
        f"{per_gpu * waiting / computing:,.0f} are enough"
    )
    return "\n".join(lines)
