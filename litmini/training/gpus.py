"""Estimates for GPUs, by arithmetic alone: which ones have enough memory, memory per device, and throughput.

None of these estimates was checked on a GPU.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from litmini.training.flops import PUBLISHED, Throughput
from litmini.training.memory import Memory, nbytes

GIB = 2**30
CUDA_CONTEXT = GIB * 6 // 10  # with its kernels; not measured
GPUS = (  # name, GiB
    ("RTX 4060", 8),
    ("RTX 3060", 12),
    ("RTX 4080", 16),
    ("RTX 4090", 24),
    ("RTX 5090", 32),
    ("L40S", 48),
    ("A100", 80),
    ("H100", 80),
    ("H200", 141),
    ("B200", 180),
)


def tokens_per_day(model: nn.Module, length: int, mfu: float, devices: int) -> dict[str, float]:
    """Return the tokens per day of training on each GPU with a published peak; sequences are full, all tokens supervised.

    Args:
        mfu: as `litmini.training.flops` defines it.
    """
    flops = token_flops(model, length)
    return {name: mfu * PUBLISHED[name] * devices * 86400 / flops for name, _ in GPUS if name in PUBLISHED}


def token_flops(model: nn.Module, length: int) -> float:
    """Return the mean training FLOPs of a token, in a full sequence with all tokens supervised."""
    throughput = Throughput(model, torch.device("cpu"), torch.bfloat16)
    return throughput.per_token + throughput.per_target + throughput.per_key * (length + 1) / 2


def memory_per_device(memory: Memory, model: nn.Module, devices: int, strategy: str, num_nodes: int = 1) -> Memory:
    """Return the memory of each of several devices, `devices` on each node.

    ddp: the whole memory, and a second copy of the gradients for their exchange. fsdp: a shard of weights, gradients and
    optimizer state; embedding, head, two blocks (the current one and the next) and the gradients of a block are gathered.
    hsdp: the same, with shards over one node.
    """
    devices = devices if strategy == "hsdp" else devices * num_nodes
    if devices == 1:
        return memory
    if strategy == "ddp":
        return replace(memory, temporary=memory.temporary + memory.trained)
    blocks = [sum(map(nbytes, m.parameters())) for m in model.modules() if type(m).__name__ == "Block"]
    every = sum(nbytes(p) for p in {id(p): p for p in model.parameters()}.values())
    outside = every - sum(blocks)
    gathered = outside + 2 * max(blocks, default=0) + (outside + max(blocks, default=0)) * memory.trained // every
    sharded = {part: -(-getattr(memory, part) // devices) for part in ("frozen", "trained", "optimizer", "gradients")}
    return replace(memory, temporary=memory.temporary + gathered, **sharded)


def fitting(memory: Memory) -> str:
    """Name the smallest common GPU on which `memory` fits, with the CUDA context and 10% for the allocator."""
    need = (memory.total - memory.process - memory.allocator) * 1.1 + CUDA_CONTEXT
    fits = [f"{name} ({gib} GiB)" for name, gib in GPUS if need < gib * GIB]
    return f"{fits[0]} and larger" if fits else f"none of the common GPUs: {need / GIB:,.0f} GiB"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends: (to GPUs of its node, to other nodes)."""

    micro_batch: tuple[float, float]
    """In each micro-batch."""
    step: tuple[float, float]
    """In addition, once in each optimizer step."""


def communication_volume(model: nn.Module, strategy: str, devices: int, num_nodes: int) -> Traffic:
    """Return the bytes that each of `devices` GPUs on each of `num_nodes` nodes sends with `strategy`.

    ddp: an all-reduce of gradients in each step. fsdp: in each micro-batch, an all-gather of weights in forward and again in
    backward, and a reduce-scatter of gradients. hsdp: the same within a node; in each step, an all-reduce of the shards of
    gradients between nodes.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    weights = sum(map(nbytes, parameters))
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
