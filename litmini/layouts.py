"""What a GPU sends to the others under each strategy, and whether that takes longer than what it computes meanwhile.

Arithmetic, with rings: to gather a tensor from N processes, or to scatter its sum over them, each sends (N - 1) / N of its
bytes; to have the sum everywhere, twice that. Weights are gathered, and gradients summed, as they are stored.

None of this was measured on a GPU by us.
"""

from dataclasses import dataclass

from torch import nn

from litmini.estimate import nbytes
from litmini.meter import PUBLISHED


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends, to those of its node and of other nodes."""

    micro_batch: tuple[float, float]
    """With each micro-batch."""
    step: tuple[float, float]
    """Once more in each optimizer step."""


def traffic(model: nn.Module, strategy: str, devices: int, num_nodes: int) -> Traffic:
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
    card: str = "H100",
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
    computing = there * flops / (mfu * PUBLISHED[card])
    hidden = "hides that" if computing > waiting else "does not hide that"
    lines.append(
        f"  each computes {computing:.2g} s ({card}), which {hidden}: a step has {there:,} tokens for each, "
        f"{there * waiting / computing:,.0f} would do"
    )
    return "\n".join(lines)
