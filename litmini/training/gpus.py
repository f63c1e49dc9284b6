"""On which cards an estimate fits, what each of several devices holds, and how fast a card is: arithmetic only.

None of this was run on a GPU by us.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from litmini.training.flops import PUBLISHED, Throughput
from litmini.training.memory import Memory, nbytes

GIB = 2**30
CUDA_CONTEXT = GIB * 6 // 10  # and kernels; not measured by us
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
    """Tokens that a day of training sees on each card whose speed is published, in full rows with all tokens trained.

    Args:
        mfu: as `litmini.training.flops` defines it.
    """
    flops = token_flops(model, length)
    return {name: mfu * PUBLISHED[name] * devices * 86400 / flops for name, _ in GPUS if name in PUBLISHED}


def token_flops(model: nn.Module, length: int) -> float:
    """Operations that training on a token needs, on average over a full row in which all tokens are trained."""
    meter = Throughput(model, torch.device("cpu"), torch.bfloat16)
    return meter.per_token + meter.per_target + meter.per_key * (length + 1) / 2


def memory_per_device(memory: Memory, model: nn.Module, devices: int, strategy: str, num_nodes: int = 1) -> Memory:
    """The memory of each of several devices, `devices` on each node, by arithmetic.

    ddp: all of it, and a second copy of the gradients to exchange. fsdp: a share of weights, gradients and averages; gathered
    are embedding, head and two blocks (the one that computes and the next), and the gradients of a block. hsdp: the same, with
    shares of one node.
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
    shared = {part: -(-getattr(memory, part) // devices) for part in ("frozen", "trained", "optimizer", "gradients")}
    return replace(memory, temporary=memory.temporary + gathered, **shared)


def fitting(memory: Memory) -> str:
    """The smallest of the ordinary cards on which `memory` fits, with room for the CUDA context and the allocator."""
    need = (memory.total - memory.process - memory.allocator) * 1.1 + CUDA_CONTEXT
    fits = [f"{name} ({gib} GiB)" for name, gib in GPUS if need < gib * GIB]
    return f"{fits[0]} and larger" if fits else f"none of the ordinary cards: {need / GIB:,.0f} GiB"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends, to those of its node and of other nodes."""

    micro_batch: tuple[float, float]
    """With each micro-batch."""
    step: tuple[float, float]
    """Once more in each optimizer step."""


def communication_volume(model: nn.Module, strategy: str, devices: int, num_nodes: int) -> Traffic:
    """What `strategy` makes each of `devices` GPUs on each of `num_nodes` nodes send.

    ddp: gradients are summed up in each step. fsdp: in each micro-batch weights are gathered for the forward pass and again
    for the backward pass, and sums of gradients are scattered. hsdp: the same inside of a node; in each step shares of
    gradients are summed up between nodes.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    weights = sum(map(nbytes, parameters))
    gradients = sum(nbytes(p) for p in parameters if p.requires_grad)

    def ring(processes: int, size: float) -> float:
        return size * (processes - 1) / processes

    world = devices * num_nodes
    if strategy == "hsdp":
        shared = ring(devices, 2 * weights + gradients)
        return Traffic((shared, 0.0), (0.0, 2 * ring(num_nodes, gradients / devices)))
    sent = 2 * ring(world, gradients) if strategy == "ddp" else ring(world, 2 * weights + gradients)
    way = (sent, 0.0) if num_nodes == 1 else (0.0, sent)  # a ring is as fast as its slowest part
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
    """A few lines: what is sent in a step, how long that takes, and how long computing does, which hides it if it is longer.

    Args:
        flops: that a token needs.
        tokens: of a micro-batch.
        micro_batches: of one GPU in a step.
        speeds: bytes a second that a GPU sends inside of a node, and between nodes.
    """
    lines, waiting = [], 0.0
    for i, way in enumerate(("inside of a node", "between nodes")):
        size = micro_batches * sent.micro_batch[i] + sent.step[i]
        waiting += size / speeds[i]
        if size:
            lines.append(
                f"  each sends {size / 1e9:,.1f} GB {way}: {size / speeds[i]:.2g} s at {speeds[i] / 1e9:,.0f} GB/s"
            )
    there = micro_batches * tokens
    computing = there * flops / (mfu * PUBLISHED[gpu])
    hidden = "hides that" if computing > waiting else "does not hide that"
    lines.append(
        f"  each computes {computing:.2g} s ({gpu}), which {hidden}: a step has {there:,} tokens for each, "
        f"{there * waiting / computing:,.0f} would do"
    )
    return "\n".join(lines)
