"""On which cards an estimate fits, what each of several devices holds, and how fast a card is: arithmetic only.

None of this was run on a GPU by us.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from litmini.estimate import Memory, nbytes

GIB = 2**30
CUDA_CONTEXT = GIB * 6 // 10  # and kernels; not measured by us
CARDS = (  # name, GiB, dense bf16 TFLOP/s as published
    ("RTX 4060", 8, 60),
    ("RTX 3060", 12, 51),
    ("RTX 4080", 16, 97),
    ("RTX 4090", 24, 165),
    ("RTX 5090", 32, 209),
    ("L40S", 48, 362),
    ("A100", 80, 312),
    ("H100", 80, 989),
    ("H200", 141, 989),
    ("B200", 180, 2250),
)


def flops_per_token(model: nn.Module, length: int, recompute: bool = False) -> float:
    """Floating point operations of training on a token in a row of `length`: forward and backward.

    2 for each weight that multiplies a token, 2 more for the gradient of its input, 2 more for its own if it is trained;
    attention to half of the row on average. With `recompute`, activation checkpointing: the forward pass once more.
    Every expert of a mixture is counted.
    """
    config: Any = model.config
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and not config.tied}
    products = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in looked_up and not name.endswith("absmax"):
            weights = parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)  # two in each byte of NF4
            products += weights * (4 + 2 * parameter.requires_grad + 2 * recompute)
    return products + 6 * length * config.n_heads * config.head_dim * config.n_layers


def share(memory: Memory, model: nn.Module, devices: int, strategy: str) -> Memory:
    """The memory of each of several devices, by arithmetic.

    ddp: all of it, and a second copy of the gradients to exchange. fsdp: a share of weights, gradients and averages; gathered
    are embedding, head and two blocks (the one that computes and the next), and the gradients of a block.
    """
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
    need = (memory.total - memory.process) * 1.1 + CUDA_CONTEXT
    fits = [f"{name} ({gib} GiB)" for name, gib, _ in CARDS if need < gib * GIB]
    return f"{fits[0]} and larger" if fits else f"none of the ordinary cards: {need / GIB:,.0f} GiB"
