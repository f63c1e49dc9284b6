"""On which cards an estimate fits, what each of several devices holds, and how fast a card is: arithmetic only.

None of this was run on a GPU by us.
"""

from dataclasses import replace

import torch
from torch import nn

from litmini.estimate import Memory, nbytes
from litmini.meter import PUBLISHED, Meter

GIB = 2**30
CUDA_CONTEXT = GIB * 6 // 10  # and kernels; not measured by us
CARDS = (  # name, GiB
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
        mfu: as `litmini.meter` defines it.
    """
    flops = token_flops(model, length)
    return {name: mfu * PUBLISHED[name] * devices * 86400 / flops for name, _ in CARDS if name in PUBLISHED}


def token_flops(model: nn.Module, length: int) -> float:
    """Operations that training on a token needs, on average over a full row in which all tokens are trained."""
    meter = Meter(model, torch.device("cpu"), torch.bfloat16)
    return meter.per_token + meter.per_target + meter.per_key * (length + 1) / 2


def share(memory: Memory, model: nn.Module, devices: int, strategy: str, num_nodes: int = 1) -> Memory:
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
    fits = [f"{name} ({gib} GiB)" for name, gib in CARDS if need < gib * GIB]
    return f"{fits[0]} and larger" if fits else f"none of the ordinary cards: {need / GIB:,.0f} GiB"
